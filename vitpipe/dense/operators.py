"""mmcv's compiled operators, replaced by those of torchvision's prebuilt library.

mmcv ships its operators as C++ and CUDA source (`mmcv._ext`), which must be compiled against the very torch
that runs them: five to ten minutes and a compiler on every machine. Our networks need three of its 80.
torchvision's wheel has two of them prebuilt for CPU and CUDA, with the same arithmetic (outputs and gradients
equal bit for bit on a CPU); mmcv itself contains the third, written in PyTorch. `register` installs a module
with these as `mmcv._ext`, before `mmcv.ops` is imported and looks up all 80 names.
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
    """Install our module as `mmcv._ext`, unless there is one already (a compiled one, or ours).

    Raises:
        RunError: when torchvision, or its library for this torch, is missing.
    """
    # torchvision first: if it fails, no module is left behind that would fail at the first call.
    if _NAME not in sys.modules:
        _load_torchvision()
        sys.modules[_NAME] = _Operators(_NAME, __doc__)


def check_device(device: str) -> None:
    """Run NMS on one box on `device`.

    Raises:
        RunError: when torchvision was built without kernels for it.
    """
    try:
        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device)
        torch.ops.torchvision.nms(boxes, boxes[:, 0], 0.5)
    except (RuntimeError, AssertionError) as error:  # torch raises AssertionError if built without it
        raise RunError(
            f"torchvision's NMS and RoIAlign cannot run on {device} ({str(error).splitlines()[0]})",
            where="detect",
            fix="install the torchvision that was built for this torch and this device; `make setup` does",
        ) from error


def _load_torchvision() -> None:
    """Load torchvision's operators without its Python package, which takes 2 s to import (torch._dynamo)."""
    # `find_spec` locates the package without importing it.
    spec = find_spec("torchvision")
    folders = (spec.submodule_search_locations if spec else None) or ()
    library = next((file for folder in folders for file in sorted(Path(folder).glob("_C*.so"))), None)
    try:
        if library is None:
            raise OSError("torchvision is not installed, or has no _C*.so")
        torch.ops.load_library(library)
        # A library built for another torch may load and still not define the names.
        _ = torch.ops.torchvision.nms, torch.ops.torchvision.roi_align
    except (OSError, AttributeError) as error:
        raise RunError(
            f"torchvision's operators cannot be loaded ({str(error).splitlines()[0]})",
            where="detect, segment",
            fix="install the torchvision that was built for this torch; `make setup` does",
        ) from error


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Non-maximum suppression: indices of the boxes that are kept, (K,) int64, by descending score.

    Of equal scores the earlier box ranks first.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2 in pixels.
        scores: (N,).
        iou_threshold: a box whose IoU with a better one is above it is removed.
        offset: 0. With 1 a box includes its last pixel, as in the first version of Detectron.

    Raises:
        RunError: for another offset, which torchvision does not have.
    """
    if offset != 0:
        raise _unavailable(f"nms with offset {offset}")
    # mmcv's own CPU operator sorts without a rule for ties: which of two equal boxes is kept, and with it the
    # trained weights, depended on the width of the processor's vector instructions. torchvision sorts stably.
    # The threshold is rounded to float32, as in mmcv and in CUDA kernels: torchvision's CPU kernel compares
    # in double, and a box whose IoU is exactly 0.3 in float32 would be removed on a CPU and kept on a GPU (10
    # of 90 random sets of boxes differed).
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
    """Compute RoIAlign (He et al., arXiv 1703.06870, section 3) into `output`.

    Args:
        features: (B, C, H, W).
        rois: (R, 5) as image, x1, y1, x2, y2 in pixels of the input image.
        output: (R, C, aligned_height, aligned_width), overwritten.
        argmax_y: for maximum pooling only; unused.
        argmax_x: likewise.
        aligned_height: number of bins per region, vertically.
        aligned_width: horizontally.
        spatial_scale: pixels of `features` per pixel of the input image.
        sampling_ratio: samples per bin and axis; 0 takes one per pixel of the region.
        pool_mode: 1, the mean of a bin's samples.
        aligned: whether coordinates are shifted by half a pixel, as in Detectron2.

    Raises:
        RunError: for maximum pooling, which torchvision does not have.
    """
    _only_average(pool_mode)
    size = (aligned_height, aligned_width)
    # mmcv's compiled operator reads channels-last features in the wrong order, as RevColV2 returns them: box
    # AP50 of the demo was 0.003 with it and is 0.069 with torchvision's, which accepts every memory layout.
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
    """Compute the gradient of RoIAlign by its features, (B, C, H, W), into `grad_input`.

    The other arguments are those of `roi_align_forward`.

    Raises:
        RunError: for maximum pooling.
    """
    _only_average(pool_mode)
    size = (aligned_height, aligned_width)
    grad_input.copy_(
        # A private operator: mmcv has an autograd function of its own and needs the backward pass alone.
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

    mmcv calls this on a GPU; on a CPU it takes its PyTorch implementation by itself.

    Args:
        value: (B, tokens of all levels, heads, D).
        shapes: (levels, 2) heights and widths.
        level_start: (levels,) first token of each level; redundant, it follows from `shapes`.
        locations: (B, Q, heads, levels, points, 2) as x, y between 0 and 1.
        weights: (B, Q, heads, levels, points).
        im2col_step: images per CUDA launch; unused here.
    """
    # Imported here: `mmcv.ops` imports this module as `mmcv._ext`.
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
    """Compute the gradients of `ms_deform_attn_forward` into the three `grad_*`, shaped as their inputs."""
    # The forward pass is computed again: mmcv's autograd function saves its inputs only.
    leaves = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
    with torch.enable_grad():
        output = ms_deform_attn_forward(
            leaves[0], shapes, level_start, leaves[1], leaves[2], im2col_step=im2col_step
        )
    gradients = torch.autograd.grad(output, leaves, grad_output)
    for target, gradient in zip((grad_value, grad_locations, grad_weights), gradients, strict=True):
        target.copy_(gradient)


def get_compiler_version() -> str:
    """Compiler version for mmcv's environment report."""
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
    """The operators above; any other name is a function that raises `RunError` when it is called.

    mmcv looks up all 80 names at import, so a missing one may fail only when it is used.
    """

    def __getattr__(self, name: str) -> Callable[..., Any]:
        # The import system looks up `__path__`, `__file__` and others, which must raise AttributeError.
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
        f"the operator to vitpipe/dense/operators.py, which has {', '.join(sorted(_OURS))}",
    )
