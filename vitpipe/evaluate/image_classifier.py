"""A trained classifier for single images, from its weights file and its recipe.

image > the centre crop that the stage was measured with > network > classes with probabilities
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from vitpipe.config.recipe import Recipe
from vitpipe.config.train_sections import ClassifyConfig
from vitpipe.data.augment import eval_transform
from vitpipe.models.build import stored_classifier
from vitpipe.models.transfer import load_same


class ImageClassifier:
    """Predicts in float32, as the `evaluate` stage measures.

    Args:
        weights: safetensors file of a stage that trains a classifier.
        recipe: of the run.
        stage: the stage of the recipe that wrote the file; says crop and normalisation.
        device: where the network runs.

    Raises:
        CheckpointError: the file cannot be read or is no classifier of the recipe's network.
    """

    def __init__(self, weights: Path, recipe: Recipe, stage: str, device: str = "cpu") -> None:
        build, state = stored_classifier(recipe.model, weights)
        self.model, self.device = build(), torch.device(device)
        load_same(self.model, state, weights)
        self.model.eval().to(self.device)
        section: ClassifyConfig = getattr(recipe, stage)
        self.transform = eval_transform(recipe.model.image_size, section.eval_crop_ratio, section.augment)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images of any size -> probabilities (B, K), float32 on the CPU."""
        crops = [self.transform(image) for image in images]
        batch_B3HW = torch.stack([crop for crop in crops if isinstance(crop, Tensor)])
        logits: Tensor = self.model(batch_B3HW.to(self.device))
        return logits.float().softmax(dim=1).cpu()
