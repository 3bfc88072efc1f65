"""The frozen teacher: its tower from the recipe's file, the images it sees, and what it is called.

Shapes: B images, N patches, D channels of a target.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitpipe.config.digest import file_digest
from vitpipe.config.train_sections import AugmentConfig
from vitpipe.contracts.units import counted
from vitpipe.data.augment import Normalise
from vitpipe.methods.masked_features.config import TeacherConfig
from vitpipe.models.clip.conversion import read_tower
from vitpipe.models.clip.tower import CLIP_MEAN, CLIP_STD, TOWERS, ClipTower


class Teacher(nn.Module):
    """A tower that never learns, and its own size and normalisation of images.

    Args:
        config: which one.
        grid_side: patches per side that it shall have, those of the network's units.
        augment: the network's mean and std, for targets of images that are normalised for it.
    """

    back_to_unit: tuple[Tensor, Tensor]

    def __init__(self, config: TeacherConfig, *, grid_side: int, augment: AugmentConfig) -> None:
        super().__init__()
        self.config, shape = config, TOWERS[config.name]
        self.image_size, self.width = grid_side * shape.patch, shape.out_width
        # Of a random teacher these are its weights; a file's take the place of the whole tower.
        tower = ClipTower(shape, grid_side=grid_side, activation=config.activation)
        self.tower = tower.eval().requires_grad_(False)
        mean, std = CLIP_MEAN, CLIP_STD
        if config.pixels == "released":
            # ((v + 1) / 2 - mean) / std, the released mapping, as one subtraction and one division.
            mean = (2 * mean[0] - 1, 2 * mean[1] - 1, 2 * mean[2] - 1)
            std = (2 * std[0], 2 * std[1], 2 * std[2])
        self.normalise = Normalise(mean, std)
        for name, values in (("own", (mean, std)), ("given", (augment.mean, augment.std))):
            self.register_buffer(f"{name}_mean", torch.tensor(values[0]).view(3, 1, 1), persistent=False)
            self.register_buffer(f"{name}_std", torch.tensor(values[1]).view(3, 1, 1), persistent=False)

    def load(self) -> None:
        """Read the file, where there is one.

        Raises:
            CheckpointError: as `read_tower`.
        """
        if self.config.file is None:
            return
        device = self.tower.class_token.device
        tower = read_tower(self.config.file, self.config.name, activation=self.config.activation)
        self.tower = tower.to(device)

    def targets(self, images_BCHW: Tensor) -> Tensor:
        """Images of `image_size`, normalised for the teacher -> (B, N, D) float32, without gradients."""
        return self.tower.targets(images_BCHW)

    @torch.no_grad()
    def seen(self, images_BCHW: Tensor) -> Tensor:
        """Images that are normalised for the network -> the same for the teacher, resized where they differ.

        For measuring: training crops are rendered for it from the original pixels.
        """
        values = images_BCHW * self.get_buffer("given_std") + self.get_buffer("given_mean")
        if values.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            values = F.interpolate(values, size=size, mode="bicubic", antialias=True).clamp(0.0, 1.0)
        return (values - self.get_buffer("own_mean")) / self.get_buffer("own_std")

    def about(self) -> list[dict[str, Any]]:
        """Rows for the report: what gave the targets."""
        config, patches = self.config, (self.image_size // self.tower.shape.patch) ** 2
        rows = {
            "teacher": "random weights, no CLIP" if config.file is None else config.name,
            "tower": str(TOWERS[config.name]),
            "image": f"{self.image_size} pixels, {counted(patches, 'patch', 'patches')}",
            "pixels": "values 0 to 1" if config.pixels == "unit" else "values 0.5 to 1, as released",
        }
        if config.file is not None:
            rows |= {"file": config.file.name, "sha256": file_digest(config.file)}
        return [{"what": what, "value": value} for what, value in rows.items()]
