"""Write dense_curves.json again: `python tests/golden/make_dense_curves.py` after a named change.

The first curves were those of mmengine's runner; the loop of `vitpipe.train` gave the same in all eight digits,
and these are its curves since the optimiser is fused on a CPU, too.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "support"), str(HERE.parent / "dense")]

from conftest import pack_tiny, write_tiny  # noqa: E402  (after the path is set)
from dense_curves import HEADS, losses_of  # noqa: E402

CURVES = HERE / "dense_curves.json"


def main() -> None:
    """Train every head for 50 steps and replace its curve."""
    # One thread, as in the tests: sums in another order differ in the last digits.
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    prepared = pack_tiny(write_tiny(folder / "raw"), folder / "prepared")
    curves = {head: [float(f"{x:.8g}") for x in losses_of(head, prepared, folder / head)] for head in HEADS}
    CURVES.write_text(json.dumps(curves, indent=1) + "\n")


if __name__ == "__main__":
    main()
