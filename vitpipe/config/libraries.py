"""Versions of installed libraries: those that can change a stage's numbers, and what a run record names."""

from __future__ import annotations

import functools
import platform
import re
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, requires, version

# Import name -> distribution of the libraries that can change a number. Not those that move, show or check
# numbers: MLflow, DVC, matplotlib, pydantic.
DECIDING = {
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "numpy": "numpy",
    "numba": "numba",
    "PIL": "pillow",
    "scipy": "scipy",
    "pyarrow": "pyarrow",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "cv2": "opencv-python-headless",
    "safetensors": "safetensors",
    "faster_coco_eval": "faster-coco-eval",
    "pycocotools": "pycocotools",
    "mmcv": "onedl-mmcv",
    "mmengine": "onedl-mmengine",
    "mmdet": "onedl-mmdetection",
    "mmseg": "onedl-mmsegmentation",
}
# Named in a run's record besides: they explain a failure, and change no number.
_RECORDED = ("mlflow", "dvc")


def deciding_libraries(words: Collection[str]) -> dict[str, str]:
    """Versions of the libraries that code with these imports computes with, and Python's minor version.

    Args:
        words: top-level names of what the code imports, and `name:` of what it only reads a file of; others
            than libraries are ignored.
    """
    # Reading a list of class names in timm's folder needs no torch.
    read = {DECIDING[word[:-1]] for word in words if word.endswith(":") and word[:-1] in DECIDING}
    used: set[str] = set()
    waiting = [DECIDING[word] for word in words if word in DECIDING]
    while waiting:
        name = waiting.pop()
        if name not in used:
            used.add(name)
            # timm computes with torch, whether we import torch ourselves or not.
            waiting += _needs(name)
    # A patch release of Python changes no number; 3.13.1 beside 3.13.0 would repeat days of training.
    minor = ".".join(platform.python_version_tuple()[:2])
    return {"python": minor, **{name: installed(name) for name in sorted(used | read)}}


def recorded_libraries() -> dict[str, str]:
    """Versions of all libraries above that are installed, MLflow, DVC, and Python to the patch release."""
    found = {name: installed(name) for name in (*DECIDING.values(), *_RECORDED)}
    return {"python": platform.python_version(), **{k: v for k, v in found.items() if v != "absent"}}


@functools.cache
def installed(name: str) -> str:
    """The installed version of a distribution, or `absent`."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


@functools.cache
def _needs(name: str) -> tuple[str, ...]:
    """Which of the deciding libraries a distribution requires."""
    try:
        texts = requires(name) or ()
    except PackageNotFoundError:
        return ()
    # `numpy<3,>=1.23; extra == "test"` is needed by nobody who only computes.
    names = (re.split(r"[^A-Za-z0-9._-]", text)[0] for text in texts if "extra ==" not in text)
    plain = {re.sub(r"[-_.]+", "-", given).lower() for given in names}
    return tuple(sorted(plain & set(DECIDING.values())))
