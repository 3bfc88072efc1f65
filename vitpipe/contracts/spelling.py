"""What a misspelt name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


def did_you_mean(word: object, known: Iterable[str], places: Mapping[str, str] | None = None) -> str:
    """` (did you mean 'pretrain'?)`, or nothing where no known word is close.

    Args:
        places: known word -> what is shown of it, where that is not the word itself.
    """
    # difflib's default cutoff of 0.6: lower values suggest unrelated keys for short words.
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean '{(places or {}).get(close[0], close[0])}'?)" if close else ""
