"""MoBY: two views, each predicts the other's key among a queue of keys.

Self-Supervised Learning with Swin Transformers; Zhenda Xie et al.; arXiv 2105.04553.
"""

from __future__ import annotations

from vitpipe.methods.contrast import Contrast
from vitpipe.methods.moby.config import MobyConfig


class Moby(Contrast):
    """MoBY as published; SelfPatch on it is the method moby_selfpatch."""

    CONFIG = MobyConfig


METHOD = Moby
