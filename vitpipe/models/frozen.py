"""A linear classifier on a frozen network.

Masked Autoencoders Are Scalable Vision Learners; Kaiming He et al.; arXiv 2111.06377, appendix A.1: an extra
batch norm without affine parameters in front of the classifier.
"""

from __future__ import annotations

from torch import Tensor, nn

from vitpipe.models.network import Encoder


class FrozenProbe(nn.Module):
    """Frozen features > batch norm without affine > Linear; only the linear layer learns.

    Args:
        network: whose `frozen_features` are used; it stays in evaluation mode and is not trained.
        num_classes: K.
        last_blocks: blocks that the features are read from, see `Encoder.frozen_features`.
        standardise: with the batch norm; DINO, MoBY and MoCo-v3 have none.
    """

    def __init__(
        self, network: Encoder, num_classes: int, *, last_blocks: int = 1, standardise: bool = True
    ) -> None:
        super().__init__()
        self.network, self.last_blocks = network.requires_grad_(False), last_blocks
        width = network.feature_width * last_blocks
        # It calibrates the features' magnitude, so that networks can be compared with one learning rate and
        # no search for each. eps as in MAE's released code; torch's default is 1e-5.
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6) if standardise else nn.Identity()
        self.fc = nn.Linear(width, num_classes)
        # As in MAE's released linear probe; cut at +-2, so the plain normal of DINO and MoCo-v3.
        nn.init.trunc_normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def train(self, mode: bool = True) -> FrozenProbe:
        """Training mode for the new layers only."""
        # In training mode the frozen network would drop paths, and its features would not be frozen.
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, K)."""
        return self.fc(self.norm(self.network.frozen_features(images_BCHW, self.last_blocks)))

    def head(self) -> dict[str, Tensor]:
        """The trained part: the state without the frozen network."""
        return {name: t for name, t in self.state_dict().items() if name.startswith(("norm.", "fc."))}
