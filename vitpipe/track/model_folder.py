"""What a registered model consists of, beside MLflow's own files, and how it predicts.

weights.safetensors    as the stage wrote them
recipe.json            the run's recipe: network, crop, normalisation
labels.json            stage, kind of its dataset, and the classes: `class` as in the data, `name` for people
example.jpg            a picture of the validation set
README.md              the model card

No pickled object: the code is that of the installed vitpipe.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from vitpipe.config.recipe import Recipe
from vitpipe.contracts.errors import ArtifactError, InputError
from vitpipe.contracts.graph import CLASSES, all_stages

WEIGHTS_FILE, RECIPE_FILE, LABELS_FILE = "weights.safetensors", "recipe.json", "labels.json"
EXAMPLE_FILE, CARD_FILE = "example.jpg", "README.md"
FILES = (WEIGHTS_FILE, RECIPE_FILE, LABELS_FILE, EXAMPLE_FILE, CARD_FILE)
T = TypeVar("T", bound=BaseModel)
_TOP = 5  # classes that are listed for an image
_MIN_SCORE = 0.05  # mmdet's own threshold of a box; lower ones are not listed by the papers' networks either


class Label(BaseModel):
    """A class: as its folder or annotation names it, and in words."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    key: str
    name: str


class Labels(BaseModel):
    """The content of `labels.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    classes: tuple[Label, ...]

    @property
    def kind(self) -> str:
        """Kind of the stage's dataset: `classes`, or a layout such as `coco`."""
        return all_stages()[self.stage].reads


class Predictor(Protocol):
    """Encoded images -> one row of plain values for each."""

    def __call__(self, images: Sequence[bytes]) -> list[dict[str, Any]]:
        """Predict. Raises InputError for bytes that are no image."""


def open_predictor(folder: Path, device: str = "cpu") -> Predictor:
    """The model in a folder.

    Raises:
        ArtifactError: a file is missing or damaged.
        CheckpointError: the weights do not fit.
    """
    recipe, labels = _read(Recipe, folder / RECIPE_FILE), _read(Labels, folder / LABELS_FILE)
    return _KINDS[labels.kind](folder / WEIGHTS_FILE, recipe, labels, device)


def _read(kind: type[T], file: Path) -> T:
    try:
        return kind.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
        raise ArtifactError(
            f"The file is none of a model that this version reads ({reason})",
            where=file,
            fix="use the version of vitpipe that the model's card names, or run the stage again",
        ) from error


def can_predict(stage: str) -> bool:
    """Whether models of this stage can be served."""
    known = all_stages()[stage]
    # Probe and evaluation read a set with classes, too, and have no model of their own.
    return known.kind == "Model" and known.reads in _KINDS


class _Classes:
    """Classes with their probabilities, the most likely one first."""

    columns: ClassVar = {"class": "string", "name": "string", "probability": "double"}
    lists: ClassVar = {"top_classes": "string", "top_names": "string", "top_probabilities": "double"}

    def __init__(self, weights: Path, recipe: Recipe, labels: Labels, device: str) -> None:
        from vitpipe.evaluate.image_classifier import ImageClassifier

        self.classify, self.labels = ImageClassifier(weights, recipe, labels.stage, device), labels.classes

    def __call__(self, images: Sequence[bytes]) -> list[dict[str, Any]]:
        top = self.classify([_decoded(image) for image in images]).topk(min(_TOP, len(self.labels)))
        rows = []
        for shares, places in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            found = [self.labels[place] for place in places]
            rows.append(
                {
                    "class": found[0].key,
                    "name": found[0].name,
                    "probability": shares[0],
                    "top_classes": [label.key for label in found],
                    "top_names": [label.name for label in found],
                    "top_probabilities": shares,
                }
            )
        return rows


class _Boxes:
    """Objects with class, score, box (x, y, width, height) and mask (COCO's run-length code)."""

    columns: ClassVar = {"height": "long", "width": "long"}
    lists: ClassVar = {"names": "string", "scores": "double", "boxes": "[double]", "masks": "string"}

    def __init__(self, weights: Path, recipe: Recipe, labels: Labels, device: str) -> None:
        from vitpipe.dense.image_predictors import ImageDetector

        self.labels = labels.classes
        self.detect = ImageDetector(weights, recipe, labels.stage, len(self.labels), device)

    def __call__(self, images: Sequence[bytes]) -> list[dict[str, Any]]:
        from vitpipe.dense.coco_ap import encoded_masks

        decoded = [_decoded(image) for image in images]
        rows = []
        for image, found in zip(decoded, self.detect(decoded), strict=True):
            kept = found[found.scores >= _MIN_SCORE]
            corners = kept.bboxes.tolist()
            rows.append(
                {
                    "height": image.height,
                    "width": image.width,
                    "names": [self.labels[label].name for label in kept.labels.tolist()],
                    "scores": kept.scores.tolist(),
                    "boxes": [[x, y, right - x, lower - y] for x, y, right, lower in corners],
                    "masks": encoded_masks(kept.masks),
                }
            )
        return rows


class _LabelMaps:
    """A label map as base64 of a PNG, and the share of pixels of every class that occurs."""

    columns: ClassVar = {"label_map_png": "string"}
    lists: ClassVar = {"names": "string", "numbers": "long", "shares": "double"}

    def __init__(self, weights: Path, recipe: Recipe, labels: Labels, device: str) -> None:
        from vitpipe.dense.image_predictors import ImageSegmentor

        self.labels = labels.classes
        self.segment = ImageSegmentor(weights, recipe, labels.stage, len(self.labels), device)

    def __call__(self, images: Sequence[bytes]) -> list[dict[str, Any]]:
        import numpy as np
        from PIL import Image

        rows, smallest = [], np.uint8 if len(self.labels) <= 256 else np.uint16
        for numbers in self.segment([_decoded(image) for image in images]):
            file = io.BytesIO()
            Image.fromarray(numbers.astype(smallest)).save(file, format="PNG")
            counts = np.bincount(numbers.ravel(), minlength=len(self.labels))
            present = sorted(counts.nonzero()[0].tolist(), key=lambda place: -counts[place])
            rows.append(
                {
                    "label_map_png": base64.b64encode(file.getvalue()).decode(),
                    "names": [self.labels[place].name for place in present],
                    "numbers": present,
                    "shares": [float(counts[place] / numbers.size) for place in present],
                }
            )
        return rows


# Kind of a stage's dataset -> how its networks predict.
_KINDS: dict[str, Any] = {CLASSES: _Classes, "coco": _Boxes, "ade20k": _LabelMaps}


def output_columns(kind: str) -> Iterator[tuple[str, str, bool]]:
    """Name, type and whether it is a list, of every column that a predictor of a kind gives."""
    predictor = _KINDS[kind]
    yield from ((name, type_, False) for name, type_ in predictor.columns.items())
    yield from ((name, type_, True) for name, type_ in predictor.lists.items())


def _decoded(image_bytes: bytes) -> Any:
    """Encoded bytes -> RGB, as training reads images: EXIF rotation and transparency are ignored."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(image_bytes)) as image:
            image.load()
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
        raise InputError(
            f"The bytes are no image that can be read ({error})",
            where="column 'image'",
            fix="post a JPEG, PNG or WebP file in base64",
        ) from error


def labels_text(stage: str, classes: Sequence[str], names: Sequence[str] = ()) -> str:
    """The text of `labels.json`.

    Args:
        classes: in the order of the class numbers.
        names: for people; those of `classes` if empty.
    """
    labels = [Label(key=key, name=name) for key, name in zip(classes, names or classes, strict=True)]
    return json.dumps(Labels(stage=stage, classes=tuple(labels)).model_dump(), indent=1) + "\n"
