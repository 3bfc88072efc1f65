"""CvT in a recipe: the sizes that there are; imports no torch.

CvT: Introducing Convolutions to Vision Transformers; Haiping Wu, Bin Xiao, Noel Codella, Mengchen Liu, Xiyang
Dai, Lu Yuan, Lei Zhang; ICCV 2021, arXiv 2103.15808. In the form that drloc trains (Liu et al., NeurIPS
2021).
"""

from __future__ import annotations

from typing import ClassVar

from vitpipe.config.model import ModelConfig, ModelEntry
from vitpipe.contracts.graph import NetworkKind

_CVT = "CvT (Wu et al., ICCV 2021, arXiv 2103.15808), as drloc has it"


class CvtConfig(ModelConfig):
    """A CvT of the public re-implementation that drloc took; weights of the authors' CvT do not fit."""

    builds: ClassVar[tuple[NetworkKind, ...]] = ("encoder", "classifier")
    stride: ClassVar[int] = 16


CONFIG = CvtConfig

# tests/models/test_every_model.py measures parameters and multiply-adds of every entry again, and compares
# with `published_params` within 2 %.
ENTRIES = (
    ModelEntry(
        name="cvt_nano",
        summary="blocks 1-1-2, channels 16 to 64: our own, for a laptop and the demo",
        paper="ours, after " + _CVT,
        published_params=None,
        classifier_params=210_024,
        classifier_macs=4_706_816,
        image_size=64,
        num_layers=6,  # input, 4 blocks, head
    ),
    ModelEntry(
        name="cvt_13",
        summary="blocks 1-2-10, channels 64 to 384",
        paper=_CVT,
        published_params=20.0,  # drloc
        classifier_params=19_936_296,
        classifier_macs=4_543_682_816,
        image_size=224,
        num_layers=15,
    ),
)
