"""What the dense libraries import at their head and nothing uses is not imported; all others get it."""

from __future__ import annotations

import builtins
import subprocess
import sys

import pytest

from vitpipe.contracts.errors import RunError
from vitpipe.dense.unused_modules import without_unused_modules

pytestmark = pytest.mark.dense

IN_A_PROCESS = (
    "import sys\n"
    "from vitpipe.dense.mm_import import open_detection, open_segmentation\n"
    "open_detection()\n"
    "open_segmentation(('mmdet.models',))\n"
    "print(sorted({'imgaug', 'matplotlib', 'sklearn', 'timm', 'torch.distributed.fsdp'} & set(sys.modules)))\n"
    "import matplotlib.pyplot, sklearn.gaussian_process, timm, torch.distributed.fsdp as fsdp\n"
    "print(fsdp.FullyShardedDataParallel.__module__, matplotlib.__version__ > '3')\n"
    "from mmdet.registry import MODELS\n"
    "from mmseg.registry import MODELS as SEGMENTORS\n"
    "print(MODELS.get('MaskRCNN').__name__, SEGMENTORS.get('mmseg.UPerHead').__name__)\n"
)


def import_as(importer: str, text: str) -> dict:
    """The names that a module of this name has after these imports."""
    names = {"__name__": importer, "__builtins__": builtins}
    with without_unused_modules():
        exec(text, names)
    return names


def test_both_libraries_are_complete_without_them():
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "[]",
        "torch.distributed.fsdp.fully_sharded_data_parallel True",
        "MaskRCNN UPerHead",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "from sklearn.gaussian_process import GaussianProcessRegressor as used",
        "import imgaug.augmenters as library; used = library.Sequential",
        "import matplotlib.pyplot as library; used = library.figure",
        "import torch.distributed.fsdp; used = torch.FullyShardedDataParallel",
    ],
)
def test_a_use_says_what_was_left_out(text):
    used = import_as("mmdet.models.some", text)["used"]
    with pytest.raises(RunError, match="left out when the dense libraries were imported"):
        used()


def test_others_get_the_modules_themselves():
    text = "import matplotlib; from sklearn import __version__ as version; import json"
    found = import_as("vitpipe.report.some", text)
    assert found["matplotlib"].__file__
    assert found["version"]
    # What a dense library uses.
    assert import_as("mmdet.models.some", "import numpy.linalg as used")["used"].norm


def test_imports_are_pythons_own_afterwards_whatever_happens():
    real = builtins.__import__
    with pytest.raises(ModuleNotFoundError), without_unused_modules():
        import no_such_module  # noqa: F401
    assert builtins.__import__ is real
