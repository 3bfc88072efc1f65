"""mmdet and mmseg, opened with only the parts that our networks need.

Their packages import everything they have: 27 backbones, trackers, augmentation libraries, all of which take
about 7 s of CPU time before the first line of ours runs. Nearly all of it hangs on `__init__` files that
only re-export names, so those are opened thinly: a name is imported when it is first asked for. The parts
that our configurations name are imported one by one, which registers them.
"""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from vitpipe.contracts.errors import RunError
from vitpipe.dense import operators

_DETECTION = (
    "mmdet.models.data_preprocessors.data_preprocessor",
    "mmdet.models.detectors.mask_rcnn",
    "mmdet.models.detectors.cascade_rcnn",
    "mmdet.models.dense_heads.rpn_head",
    "mmdet.models.roi_heads.standard_roi_head",
    "mmdet.models.roi_heads.cascade_roi_head",
    "mmdet.models.roi_heads.bbox_heads.convfc_bbox_head",
    "mmdet.models.roi_heads.mask_heads.fcn_mask_head",
    "mmdet.models.roi_heads.roi_extractors.single_level_roi_extractor",
    "mmdet.models.task_modules.assigners.iou2d_calculator",
    "mmdet.models.task_modules.assigners.max_iou_assigner",
    "mmdet.models.task_modules.coders.delta_xywh_bbox_coder",
    "mmdet.models.task_modules.prior_generators.anchor_generator",
    "mmdet.models.task_modules.samplers.random_sampler",
    "mmdet.models.layers.normed_predictor",
    "mmdet.models.losses.accuracy",
    "mmdet.models.losses.cross_entropy_loss",
    "mmdet.models.losses.iou_loss",
    "mmdet.models.losses.smooth_l1_loss",
    "mmdet.datasets.coco",
    "mmdet.datasets.transforms.formatting",
    "mmdet.datasets.transforms.loading",
    "mmdet.datasets.transforms.transforms",
)
_SEGMENTATION = (
    "mmseg.models.data_preprocessor",
    "mmseg.models.segmentors.encoder_decoder",
    "mmseg.models.decode_heads.uper_head",
    "mmseg.models.decode_heads.fcn_head",
    "mmseg.models.losses.cross_entropy_loss",
    "mmseg.datasets.basesegdataset",
    "mmseg.datasets.transforms.formatting",
    "mmseg.datasets.transforms.loading",
    "mmseg.datasets.transforms.transforms",
    "mmseg.evaluation.metrics.iou_metric",
)
_MASK2FORMER = (
    "mmseg.models.decode_heads.mask2former_head",
    "mmdet.models.layers.msdeformattn_pixel_decoder",
    "mmdet.models.losses.cross_entropy_loss",
    "mmdet.models.losses.dice_loss",
    "mmdet.models.task_modules.assigners.hungarian_assigner",
    "mmdet.models.task_modules.assigners.match_cost",
    "mmdet.models.task_modules.samplers.mask_pseudo_sampler",
)
# Rooms whose package files only re-export. `structures` is not among them: importing it registers box types.
_THIN_ROOMS = ("datasets", "evaluation", "models", "utils")
# Imported by transforms inside try/except for augmentations that we do not have; costs 1 s.
_NOT_NEEDED = ("imagecorruptions",)
_SCOPES = itertools.count()


def open_detection(device: str = "cpu") -> None:
    """Import and register what Mask R-CNN and its cascade need, and make mmdet the scope of short names.

    Args:
        device: where it will run; torchvision must have RoIAlign and NMS for it.

    Raises:
        RunError: when the dense libraries are not installed, or torchvision does not fit torch or device.
    """
    _open("mmdet", ("mmcv.transforms", *_DETECTION))
    operators.check_device(device)


def open_segmentation(head: str = "upernet") -> None:
    """Import and register what a head on ADE20K needs, and make mmseg the scope of short names.

    Args:
        head: `upernet`, or `mask2former`, whose parts are mmdet's.

    Raises:
        RunError: as `open_detection`.
    """
    parts = ("mmdet", *_MASK2FORMER) if head == "mask2former" else ()
    _open("mmseg", ("mmcv.transforms", *_SEGMENTATION, *parts))


def _open(scope: str, modules: Sequence[str]) -> None:
    operators.register()  # mmcv looks its operators up when it is imported
    try:
        with _thin_packages(scope), _left_out(_NOT_NEEDED):
            for name in modules:
                importlib.import_module(name)
        from mmengine.logging import MMLogger
        from mmengine.registry import DefaultScope
    except ImportError as error:
        raise RunError(
            f"The dense stages need mmcv, mmdet and mmseg, which cannot be imported ({error})",
            where="detect, segment",
            fix="install the extra 'dense' (`make setup` does)",
        ) from error
    # Until a runner brings its own logger, this one would tell every start value on the terminal.
    MMLogger.get_instance("mmengine").setLevel("WARNING")
    # The scope made last is the one that counts, and a name can be used once only.
    DefaultScope.get_instance(f"vitpipe-{next(_SCOPES)}", scope_name=scope)


@contextmanager
def _left_out(names: Sequence[str]) -> Iterator[None]:
    """Importing one of `names` fails inside the context, as if it were not installed."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextmanager
def _thin_packages(scope: str) -> Iterator[None]:
    """Packages first imported inside the context, below mmdet and mmseg, are opened thinly."""
    finder = _ThinFinder()
    sys.meta_path.insert(0, finder)
    try:
        importlib.import_module(scope)
        yield
    finally:
        sys.meta_path.remove(finder)


class _ThinFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        top, _, rest = fullname.partition(".")
        if top not in ("mmdet", "mmseg") or rest.split(".")[0] not in _THIN_ROOMS:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.submodule_search_locations is not None and spec.origin:
            spec.loader = _ThinLoader(Path(spec.origin))
        return spec


class _ThinLoader(Loader):
    """Runs a package file that does nothing but re-export by noting where each name comes from."""

    def __init__(self, source: Path) -> None:
        self.source = source

    def exec_module(self, module: ModuleType) -> None:
        homes = dict(_exports(ast.parse(self.source.read_text(encoding="utf-8"))))

        def find(name: str) -> Any:
            if name not in homes:
                raise AttributeError(f"module '{module.__name__}' has no attribute '{name}'")
            home, original = homes[name]
            value = getattr(importlib.import_module(f"{module.__name__}.{home}"), original)
            setattr(module, name, value)
            return value

        module.__getattr__ = find  # type: ignore[method-assign]


def _exports(tree: ast.Module) -> Iterator[tuple[str, tuple[str, str]]]:
    """(name, (submodule, name there)) of every `from .submodule import name`, also inside `try`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, (node.module, alias.name)
