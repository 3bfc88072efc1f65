"""Which datasets of a list are some classes of another one. Nothing heavy: `plan` asks before any work."""

from __future__ import annotations

from collections.abc import Iterable

from vitpipe.config.set_names import base_of


def views_among(names: Iterable[str]) -> dict[str, str]:
    """View -> whole set, of those names that are some classes of another one of them.

    Without its whole set in the list, such a set is packed by itself.
    """
    listed = tuple(names)
    return {name: base for name in listed if (base := base_of(name)) in listed and base is not None}
