"""Numbers with units as people read them: bytes, durations, counts."""

from __future__ import annotations

_DECIMAL = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6))
_BINARY = (("TiB", 2.0**40), ("GiB", 2.0**30), ("MiB", 2.0**20))


def format_bytes(size_bytes: float, *, binary: bool = False) -> str:
    """`12 kB`, `967.0 MB`, `154.6 GB`, `1.31 TB`; with `binary` `2.0 MiB`, `23.4 GiB`.

    Args:
        binary: powers of 1024, which memory is counted in. Disks and transfers are sold in powers of 1000.
    """
    for unit, size in _BINARY if binary else _DECIMAL:
        if size_bytes >= size:
            digits = 2 if unit.startswith("T") else 1  # 0.1 TB is too coarse to plan a disk with
            return f"{size_bytes / size:,.{digits}f} {unit}"
    return f"{size_bytes / 1024:,.0f} KiB" if binary else f"{size_bytes / 1000:,.0f} kB"


def format_duration(seconds: float) -> str:
    """`0.4 s`, `42 s`, `3 min 05 s`, `2 h 10 min`, `5 d 3 h`; whole seconds below 10 without a decimal."""
    # 9.95 s and more would be shown as "10.0 s": from there on whole seconds are exact enough.
    if seconds < 9.95 and seconds != int(seconds):
        return f"{seconds:.1f} s"
    minutes, seconds_left = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    days, hours_left = divmod(hours, 24)
    if days:
        return f"{days} d {hours_left} h"
    if hours:
        return f"{hours} h {minutes_left:02d} min"
    return f"{minutes} min {seconds_left:02d} s" if minutes else f"{seconds_left} s"


def format_count(number: float) -> str:
    """A whole number with thousands marks: `14,197,122`."""
    return f"{number:,.0f}"


def format_millions(number: float) -> str:
    """Parameters as papers count them: `0.29 M`, `86.4 M`, `2,158 M`; very small ones with 3 digits."""
    return f"{_few_digits(number / 1e6)} M"


def format_billions(number: float) -> str:
    """Multiply-adds and FLOPs as papers count them: `17.82 G`, `0.00459 G`."""
    return f"{_few_digits(number / 1e9)} G"


def counted(number: int, noun: str, plural: str = "") -> str:
    """A count and its noun: `1 file`, `2 files`, `1,024 leftover folders`.

    Args:
        plural: of a noun that does not take an s.
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def _few_digits(value: float) -> str:
    if value >= 1000:
        return format_count(value)
    # Small networks are told apart by their digits: two decimals would make most of them 0.
    return f"{value:.3g}" if value < 0.1 else f"{value:.2f}".rstrip("0").rstrip(".")
