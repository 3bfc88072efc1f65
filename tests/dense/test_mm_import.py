"""Importing mmdet and mmseg: quiet, complete, and one line of error where it fails."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vitpipe.contracts.errors import RunError
from vitpipe.dense.mm_import import open_detection

_PROBE = """
import sys
from vitpipe.dense.mm_import import open_detection, open_segmentation
from mmengine.registry import MODELS, DefaultScope
open_segmentation(("mmdet.models",))
assert DefaultScope.get_current_instance().scope_name == "mmseg"
assert MODELS.get("mmdet.MSDeformAttnPixelDecoder") and MODELS.get("mmseg.UPerHead")
open_detection()
assert DefaultScope.get_current_instance().scope_name == "mmdet"
assert MODELS.get("mmdet.MaskRCNN")
"""


@pytest.mark.dense
def test_types_are_registered_and_nothing_is_printed():
    """Standard output carries results; mmdet and mmseg print to it, and warn on stderr, when imported plainly."""
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "SyntaxWarning" not in done.stderr


def test_a_missing_library_is_one_line(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "mmdet"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mmdet", None)
    with pytest.raises(RunError, match="make setup") as caught:
        open_detection()
    assert "\n" not in str(caught.value)
