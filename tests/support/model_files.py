"""The files of a model as a stage offers them to the registry: the demo's network with seeded random weights."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vitpipe.config.read import load_recipe
from vitpipe.models.build import build_classifier
from vitpipe.models.weights import save_weights
from vitpipe.track.journal import OfferedModel
from vitpipe.track.model_folder import labels_text

CLASSES = [f"n{number:08}" for number in range(10)]
NAMES = [f"name {number}" for number in range(10)]
NAME = "vitpipe-itpn-pixel_base-finetune"


def picture(seed: int, form: str = "JPEG") -> bytes:
    """An image file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=form)
    return file.getvalue()


def write_model(place: Path) -> Path:
    """Write the files of a classifier into a new folder."""
    place.mkdir()
    recipe = load_recipe("itpn/pixel_base", "demo")
    torch.manual_seed(0)
    model = build_classifier(recipe.model, num_classes=10)
    # The head starts near zero: without this every class would be as likely as the next.
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    save_weights(model, place / "weights.safetensors")
    (place / "recipe.json").write_text(recipe.model_dump_json())
    (place / "labels.json").write_text(labels_text("finetune", CLASSES, NAMES))
    (place / "example.jpg").write_bytes(picture(0))
    (place / "README.md").write_text("# The card\n")
    return place


def offered(value: float = 0.5, dataset: str = "imagenet 12345678", name: str = NAME) -> OfferedModel:
    """What the journal says of the model."""
    return OfferedModel(name, "classes", "top1", value, dataset, {"recipe": "itpn/pixel_base", "seed": "0"})
