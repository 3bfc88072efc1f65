"""Save and load weights, with a report on every key.

A stage writes `weights.safetensors`; the next one loads from it what its own network has. Nothing is dropped,
resized or left at its initial value silently: `LoadReport` has a row for every key of the file and of the
network, and what no rule allows raises a `CheckpointError` that names the keys.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vitpipe.contracts.errors import CheckpointError
from vitpipe.contracts.files import written_aside

Outcome = Literal["matched", "renamed", "resized", "missing", "fresh", "unused", "dropped"]
Resize = Callable[[str, Tensor, Tensor], Tensor]
# Keys named in one message: a wrong file can have hundreds of wrong keys, and the first few show the pattern.
MAX_NAMED = 6


@dataclass(frozen=True)
class KeyRow:
    """What happened to one key.

    Attributes:
        source: key in the file; empty when the file does not have it.
        target: key in the network; empty when the network does not have it.
        shape: of the tensor in the network, or in the file if it is not in the network.
        outcome: `missing`, `fresh`: the network keeps its initial value. `unused`, `dropped`: not loaded.
        why: the reason; empty for plain matches.
    """

    source: str
    target: str
    shape: tuple[int, ...]
    outcome: Outcome
    why: str = ""


@dataclass(frozen=True)
class LoadReport:
    """What happened at loading: one row per key of the file and of the network.

    Attributes:
        where: the file.
        note: what was chosen from the file, where there was a choice.
    """

    where: str
    rows: tuple[KeyRow, ...]
    note: str = ""

    def count(self, outcome: Outcome) -> int:
        """Number of rows with this outcome."""
        return sum(row.outcome == outcome for row in self.rows)

    def summary(self) -> str:
        """One line: how many of each outcome, and each reason once."""
        counts = Counter(row.outcome for row in self.rows)
        reasons = Counter((row.outcome, row.why) for row in self.rows if row.why)
        parts = [f"{count} {outcome}" for outcome, count in counts.items()]
        notes = [f"{count} {outcome}: {why}" for (outcome, why), count in reasons.items()]
        return ", ".join(parts) + (f" ({'; '.join(notes)})" if notes else "")

    def table(self) -> list[dict[str, str]]:
        """Rows as text, for a CSV file or a terminal."""
        return [
            {
                **{name: str(value) for name, value in asdict(row).items()},
                "shape": "x".join(map(str, row.shape)) or "scalar",
            }
            for row in self.rows
        ]


@dataclass(frozen=True)
class Rule:
    """A difference that is allowed for keys that match `pattern` (a regular expression, searched), and why.

    `missing`: the file may lack the key; the network keeps its initial value.
    `fresh`: the file may have another shape; the network keeps its initial value.
    `unused`: the file may have a key that the network does not have.
    `resized`: a position table may be resampled to the network's grid.
    """

    outcome: Literal["missing", "fresh", "unused", "resized"]
    pattern: str
    why: str


def save_weights(
    model_or_state: nn.Module | Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write weights as safetensors; the file appears complete or not at all.

    The same tensors and metadata give the same bytes, and the file has the mode that the umask gives.

    Args:
        model_or_state: a network, or name -> tensor.
        path: the file; replaced if it exists.
        metadata: text entries beside the tensors.

    Raises:
        StorageError: when the file cannot be written.
    """
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    # safetensors refuses tensors that are not contiguous.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with written_aside(path) as partial:
        save_file(tensors, partial, metadata=dict(metadata or {}))
        # Before the rename: DVC and output cards compare files by checksum, so other bytes must not be
        # visible.
        _sort_header(partial)


def _sort_header(path: Path) -> None:
    """Sort the metadata of a safetensors file by key, and give it the mode of any other new file."""
    # safetensors keeps metadata in a hash map with a random seed and writes them in another order every time,
    # and creates files with mode 0600: another user was told that such a file was truncated.
    with path.open("r+b") as handle:
        # The format: 8 bytes with the header's length (little-endian), the header as JSON, padded with spaces
        # to a multiple of 8 bytes, then the tensors. The header must keep its length, or all of them would
        # move.
        num_bytes = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(num_bytes))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= num_bytes:  # without padding it is as long as before; longer would overwrite tensors
            handle.seek(8)
            handle.write(text.ljust(num_bytes))
    umask = os.umask(0)  # can only be read by setting it
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def load_state(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file to the CPU.

    Raises:
        CheckpointError: when it is missing, truncated or no safetensors file.
    """
    # To the CPU, whatever device they were saved from: the network may be on another one.
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)


def is_safetensors(path: Path) -> bool:
    """Whether a file can be opened as safetensors."""
    try:
        _opened(path)
    except CheckpointError:
        return False
    return True


def load_metadata(path: Path) -> dict[str, str]:
    """The text entries that were saved beside the tensors.

    Raises:
        CheckpointError: as `load_state`.
    """
    with _opened(path) as file:
        return dict(file.metadata() or {})


def _opened(path: Path) -> safe_open:
    if path.is_file() and not os.access(path, os.R_OK):
        # safetensors' own error is the same as for a damaged file.
        raise CheckpointError(
            "The weights file cannot be read (permission denied)",
            where=path,
            fix=f"give this user permission to read it (chmod a+r {shlex.quote(str(path))})",
        )
    if not path.is_file():
        raise CheckpointError(
            "The weights file does not exist",
            where=path,
            fix="correct the path, or run the stage that writes it",
        )
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ").splitlines()[0]
        raise CheckpointError(
            f"The weights file is truncated or is no safetensors file ({reason})",
            where=path,
            fix="copy it or run its stage again; turn an official .pth checkpoint into safetensors with "
            "`vitpipe convert`",
        ) from error


def load_into(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    rules: Sequence[Rule] = (),
    resized: Resize | None = None,
    where: str | Path = "",
    about: str = "",
) -> LoadReport:
    """Copy weights into a network, which is changed only if `rules` allow all differences.

    Args:
        rules: differences that are allowed.
        resized: (name, tensor of the file, tensor of the network) -> the file's for the network's grid; for
            names that a `resized` rule allows.
        where: the file, for messages and the report.
        about: what the file holds, for the message when it does not fit.

    Raises:
        CheckpointError: when a key is missing, unused or of another shape and no rule allows it.
    """
    rows: list[KeyRow] = []
    problems: list[str] = []
    new: list[tuple[Tensor, Tensor]] = []
    target = model.state_dict()
    for name, tensor in target.items():
        shape = tuple(tensor.shape)
        given = state.get(name)
        if given is None:
            if (why := _allowed(rules, "missing", name)) is not None:
                rows.append(KeyRow("", name, shape, "missing", why))
            else:
                problems.append(f"{name} is not in the file")
        elif given.shape == tensor.shape:
            new.append((tensor, given))
            rows.append(KeyRow(name, name, shape, "matched"))
        # Before `fresh`: a resized table is worth more than initial values. Interpolated in float32, in
        # whatever precision the file is.
        elif resized and (why := _allowed(rules, "resized", name)) and _is_other_grid(given, tensor):
            new.append((tensor, resized(name, given.float(), tensor)))
            rows.append(KeyRow(name, name, shape, "resized", f"{why}, from {tuple(given.shape)}"))
        elif (why := _allowed(rules, "fresh", name)) is not None:
            rows.append(KeyRow(name, name, shape, "fresh", f"{why}, {tuple(given.shape)} in the file"))
        else:
            problems.append(f"{name} has shape {tuple(given.shape)} in the file, {shape} in the network")
    # Sorted: the order of a set of strings differs from process to process.
    for name in sorted(set(state) - set(target)):
        unused = _allowed(rules, "unused", name)
        if unused is None:
            problems.append(f"{name} of the file is not in the network")
        else:
            rows.append(KeyRow(name, "", tuple(state[name].shape), "unused", unused))
    # Only now is the network changed: a refused file must not leave it half loaded.
    if problems:
        raise _does_not_fit(problems, where, about)
    with torch.no_grad():
        for tensor, given in new:
            tensor.copy_(given)
    return LoadReport(str(where), tuple(rows))


def _allowed(rules: Sequence[Rule], outcome: str, name: str) -> str | None:
    return next((r.why for r in rules if r.outcome == outcome and re.search(r.pattern, name)), None)


def _is_other_grid(given: Tensor, tensor: Tensor) -> bool:
    """Same channels or heads, for another square of units; anything else is another model."""
    # Position tables have rows for units or offsets, N or (2S-1)^2, always a square number, and channels or
    # heads last: (1, N, C) or ((2S-1)^2, H).
    same_columns = given.ndim == tensor.ndim and given.shape[-1] == tensor.shape[-1]
    return same_columns and math.isqrt(given.shape[-2]) ** 2 == given.shape[-2]


def _does_not_fit(problems: Sequence[str], where: str | Path, about: str) -> CheckpointError:
    more = f"; and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
    return CheckpointError(
        f"The weights do not fit the network: {'; '.join(problems[:MAX_NAMED])}{more}",
        where=where,
        fix="use weights of the same model and stage, or change the recipe's model section to fit them"
        + (f"; the file holds {about}" if about else ""),
    )
