"""Opening mmdet and mmseg: only what is needed, silently, and with a paragraph where it fails."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vitpipe.contracts.errors import RunError
from vitpipe.dense.mm_import import open_detection

# Kept out: trackers, other backbones, and the augmentation and statistics libraries that they pull in.
_PROBE = """
import sys
from vitpipe.dense.mm_import import open_detection, open_segmentation
open_detection()
open_segmentation()
heavy = {"sklearn", "imgaug", "imagecorruptions", "timm", "torchvision", "pandas", "mmdet.models.mot",
         "mmdet.models.backbones.csp_darknet", "mmseg.models.backbones.beit", "mmdet.apis"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
import mmdet.models
from mmdet.models import losses
from mmdet.models.layers import multiclass_nms
assert multiclass_nms.__module__ == "mmdet.models.layers.bbox_nms"
assert "imagecorruptions" not in sys.modules
try:
    mmdet.models.layers.no_such_thing
except AttributeError as error:
    assert "no_such_thing" in str(error)
else:
    raise SystemExit("an unknown name was found")
"""


@pytest.mark.dense
def test_only_what_is_needed_and_nothing_said():
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_missing_library_is_a_paragraph(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "mmdet"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mmdet", None)
    with pytest.raises(RunError, match="make setup") as caught:
        open_detection()
    assert "\n" not in str(caught.value)
