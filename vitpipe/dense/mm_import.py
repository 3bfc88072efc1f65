"""Import mmdet and mmseg, so that their registries know the types that our configurations name."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import warnings

from vitpipe.contracts.errors import RunError
from vitpipe.dense import operators
from vitpipe.dense.unused_modules import without_unused_modules

# Importing these packages registers everything in them. `mmseg.models` imports mmdet's models, too, for
# Mask2Former; mmcv's transforms (`LoadImageFromFile`, `RandomChoiceResize`, ...) are named by both.
_DETECTION = ("mmcv.transforms", "mmdet.models", "mmdet.datasets")
_SEGMENTATION = ("mmcv.transforms", "mmseg.models", "mmseg.datasets")
_SCOPES = itertools.count()


def open_detection(device: str = "cpu") -> None:
    """Import and register mmdet, and make it the scope in which short type names are looked up.

    Args:
        device: the stage's; torchvision must have RoIAlign and NMS for it.

    Raises:
        RunError: when the dense libraries are not installed, or torchvision does not fit torch or device.
    """
    _open("mmdet", _DETECTION)
    operators.check_device(device)


def open_segmentation(packages: tuple[str, ...] = ()) -> None:
    """Import and register mmseg, and make it the scope in which short type names are looked up.

    Args:
        packages: modules that the head needs besides; Mask2Former needs those of mmdet.

    Raises:
        RunError: as `open_detection`.
    """
    # mmseg 1.4.2 carries on without mmdet (`try: from mmdet.models.dense_heads import ...`), and Mask2Former
    # would fail only when it is built.
    _open("mmseg", (*_SEGMENTATION, *packages))


def _open(scope: str, packages: tuple[str, ...]) -> None:
    # mmdet imports mmcv.ops, which fails without this: "ModuleNotFoundError: No module named 'mmcv._ext'".
    operators.register()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            without_unused_modules(),
        ):
            # mmdet 3.5.1 and mmseg 1.4.2 print "Could not import OneDL" (the client of a dataset service) on
            # stdout: mmengine's `print_log` without a logger prints messages of level DEBUG as well.
            # Python 3.12 and later warn of escapes such as '\i' in mmdet's docstrings.
            warnings.simplefilter("ignore", SyntaxWarning)
            for name in packages:
                importlib.import_module(name)
        from mmengine.logging import MMLogger
        from mmengine.registry import DefaultScope
    except ImportError as error:
        raise RunError(
            f"The dense stages need mmcv, mmdet and mmseg, which cannot be imported ({error})",
            where="detect, segment",
            fix="install the extra 'dense' (`make setup` does)",
        ) from error
    # mmengine writes how every parameter was initialised to the terminal.
    MMLogger.get_instance("mmengine").setLevel("WARNING")
    # The scope that was created last is the current one. For a known name mmengine returns the existing one,
    # which need not be the last: every call takes a new name.
    DefaultScope.get_instance(f"vitpipe-{next(_SCOPES)}", scope_name=scope)
