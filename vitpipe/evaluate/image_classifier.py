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
from vitpipe.contracts.errors import CheckpointError
from vitpipe.data.augment import eval_transform
from vitpipe.models.build import as_stored, build_classifier
from vitpipe.models.transfer import describe, load_same
from vitpipe.models.weights import load_state


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
        state = load_state(weights)
        info = describe(state, weights)
        if info.kind != "classifier":
            raise CheckpointError(
                f"The weights are those of {info}, which cannot classify",
                where=weights,
                fix="give the weights of a finetune stage",
            )
        # Options from the file, not from the recipe: it is what was trained.
        model = build_classifier(as_stored(recipe.model, info), num_classes=info.num_classes)
        load_same(model, state, weights)
        self.device, self.num_classes = torch.device(device), info.num_classes
        self.model = model.eval().to(self.device)
        section: ClassifyConfig = getattr(recipe, stage)
        self.transform = eval_transform(recipe.model.image_size, section.eval_crop_ratio, section.augment)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images of any size -> probabilities (B, K), float32 on the CPU."""
        crops = [self.transform(image) for image in images]
        batch_B3HW = torch.stack([crop for crop in crops if isinstance(crop, Tensor)])
        logits: Tensor = self.model(batch_B3HW.to(self.device))
        return logits.float().softmax(dim=1).cpu()
