"""The operators that mmcv would compile, from torchvision's prebuilt library.

mmcv ships its operators as C++ and CUDA source (`mmcv._ext`), which must be compiled against the very torch
that runs them: five to ten minutes and a compiler on every machine. Our networks need three of its 80.
torchvision's wheel holds two of them prebuilt for CPU and CUDA, with the same arithmetic (outputs and
gradients equal bit for bit on a CPU); the third stands in mmcv itself, written in PyTorch. `register` puts a
module with these in the place of `mmcv._ext`, before `mmcv.ops` is imported and looks all 80 names up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitpipe.contracts.errors import RunError

_NAME = "mmcv._ext"
_AVERAGE = 1  # mmcv's pool_mode: 0 takes the maximum of a bin's samples, 1 their mean


def register() -> None:
    """Make `mmcv._ext` our module, unless mmcv's operators have been imported already. Once is enough.

    Raises:
        RunError: when torchvision, or its library for this torch, is missing.
    """
    if _NAME not in sys.modules:
        _load_torchvision()
        sys.modules[_NAME] = _Operators(_NAME, __doc__)


def check_device(device: str) -> None:
    """Run the smallest NMS there is on `device`.

    Raises:
        RunError: when torchvision was built without kernels for it.
    """
    try:
        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device)
        torch.ops.torchvision.nms(boxes, boxes[:, 0], 0.5)
    except (RuntimeError, AssertionError) as error:  # torch asserts when it was built without the device
        raise RunError(
            f"torchvision's NMS and RoIAlign cannot run on {device} ({str(error).splitlines()[0]})",
            where="detect",
            fix="install the torchvision that was built for this torch and this device; `make setup` does",
        ) from error


def _load_torchvision() -> None:
    """Load torchvision's operators without its Python package, which takes 2 s to import (torch._dynamo)."""
    spec = find_spec("torchvision")
    folders = (spec.submodule_search_locations if spec else None) or ()
    library = next((file for folder in folders for file in sorted(Path(folder).glob("_C*.so"))), None)
    try:
        if library is None:
            raise OSError("torchvision is not installed, or has no _C*.so")
        torch.ops.load_library(library)
        # A library for another torch may load and still leave the names undefined.
        _ = torch.ops.torchvision.nms, torch.ops.torchvision.roi_align
    except (OSError, AttributeError) as error:
        raise RunError(
            f"torchvision's operators cannot be loaded ({str(error).splitlines()[0]})",
            where="detect, segment",
            fix="install the torchvision that was built for this torch; `make setup` does",
        ) from error


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes that stay, best first, (K,) int64; of equal scores the earlier one is the better.

    mmcv's own sorts without that rule: which of two equal boxes stays depends on the processor's vectors.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2 in pixels.
        scores: (N,).
        iou_threshold: a box that overlaps a better one by more goes.
        offset: 0. 1 counts a box's last pixel as inside, as Detectron's first versions did.

    Raises:
        RunError: for another offset, which torchvision does not have.
    """
    if offset != 0:
        raise _unavailable(f"nms with offset {offset}")
    # In float32, as mmcv and the CUDA kernel hold it: torchvision's CPU kernel compares with the double, and
    # a box whose overlap is exactly 0.3 in float32 would go here and stay there.
    return torch.ops.torchvision.nms(boxes, scores, float(np.float32(iou_threshold)))


def roi_align_forward(
    features: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign (He et al., arXiv 1703.06870, section 3) into `output`.

    Args:
        features: (B, C, H, W).
        rois: (R, 5) as image, x1, y1, x2, y2 in pixels of the input image.
        output: (R, C, aligned_height, aligned_width), overwritten.
        argmax_y: of maximum pooling only; unused.
        argmax_x: likewise.
        aligned_height: bins per region.
        aligned_width: likewise.
        spatial_scale: pixels of `features` per pixel of the input image.
        sampling_ratio: samples per bin and axis; 0 takes as many as the region has pixels.
        pool_mode: 1, the mean of a bin's samples.
        aligned: whether coordinates are moved by half a pixel, as Detectron2 does.

    Raises:
        RunError: for maximum pooling, which torchvision does not have.
    """
    _only_average(pool_mode)
    size = (aligned_height, aligned_width)
    output.copy_(
        torch.ops.torchvision.roi_align(features, rois, spatial_scale, *size, sampling_ratio, aligned)
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of RoIAlign over its features, (B, C, H, W), into `grad_input`; the rest as in the forward.

    Raises:
        RunError: for maximum pooling.
    """
    _only_average(pool_mode)
    size = (aligned_height, aligned_width)
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad_output, rois, spatial_scale, *size, *grad_input.shape, sampling_ratio, aligned
        )
    )


def ms_deform_attn_forward(
    value: Tensor,
    shapes: Tensor,
    level_start: Tensor,
    locations: Tensor,
    weights: Tensor,
    *,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention (Zhu et al., arXiv 2010.04159, equation 3), (B, Q, heads * D).

    mmcv takes its PyTorch path by itself on a CPU and asks for this on a GPU.

    Args:
        value: (B, tokens of all levels, heads, D).
        shapes: (levels, 2) heights and widths.
        level_start: (levels,) first token of each level; follows from `shapes`.
        locations: (B, Q, heads, levels, points, 2) as x, y between 0 and 1.
        weights: (B, Q, heads, levels, points).
        im2col_step: images per CUDA launch; means nothing here.
    """
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)


def ms_deform_attn_backward(
    value: Tensor,
    shapes: Tensor,
    level_start: Tensor,
    locations: Tensor,
    weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_locations: Tensor,
    grad_weights: Tensor,
    *,
    im2col_step: int,
) -> None:
    """Gradients of `ms_deform_attn_forward` into the three `grad_*`, shaped as what they belong to.

    The forward is computed again: mmcv keeps its inputs only.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
    with torch.enable_grad():
        output = ms_deform_attn_forward(
            leaves[0], shapes, level_start, leaves[1], leaves[2], im2col_step=im2col_step
        )
    gradients = torch.autograd.grad(output, leaves, grad_output)
    for target, gradient in zip((grad_value, grad_locations, grad_weights), gradients, strict=True):
        target.copy_(gradient)


def get_compiler_version() -> str:
    """What mmcv's own environment report asks for."""
    return "none, the operators are torchvision's"


def get_compiling_cuda_version() -> str:
    """CUDA version of torchvision's operators (`13000`), or `not available`."""
    version = torch.ops.torchvision._cuda_version()
    return "not available" if version < 0 else str(version)


_OURS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        nms,
        roi_align_forward,
        roi_align_backward,
        ms_deform_attn_forward,
        ms_deform_attn_backward,
        get_compiler_version,
        get_compiling_cuda_version,
    )
}


class _Operators(ModuleType):
    """Holds the operators above; any other name is a function that says that it is not there."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        # The import system asks for `__path__`, `__file__` and the like; those must be missing.
        if name.startswith("__"):
            raise AttributeError(f"module '{_NAME}' has no attribute '{name}'")

        def refuse(*values: Any, **options: Any) -> None:
            raise _unavailable(name)

        return _OURS.get(name, refuse)


def _only_average(pool_mode: int) -> None:
    if pool_mode != _AVERAGE:
        raise _unavailable("roi_align with pool_mode 'max'")


def _unavailable(name: str) -> RunError:
    return RunError(
        f"mmcv's operator {name} is not available: mmcv is installed without compiled operators",
        where="mmcv.ops",
        fix="use a head that needs only nms, roi_align (mean) and multi-scale deformable attention, or add "
        f"the operator to vitpipe/dense/operators.py; it has {', '.join(sorted(_OURS))}",
    )
