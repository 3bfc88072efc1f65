"""Write the loss curves in curves.json again: `python tests/golden/make_curves.py` after a named change.

`before` are the curves of the same runs when draws still belonged to micro-batches; kept for comparison.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "support"))

from short_runs import packed_digits, run, section_of  # noqa: E402  (after the path is set)

CURVES = HERE / "curves.json"


def main() -> None:
    """Train both kinds for 20 steps and replace their curves."""
    # One thread, as in the tests: sums in another order differ in the last digits.
    torch.set_num_threads(1)
    known = json.loads(CURVES.read_text())
    folder = Path(tempfile.mkdtemp())
    shards = packed_digits(folder)
    for kind in known["curves"]:
        section = section_of(kind, known["steps"], micro_batch=known["micro_batch"])
        _, losses, _ = run(shards, section, folder / kind)
        known["curves"][kind] = [round(loss, 7) for loss in losses]
    CURVES.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
