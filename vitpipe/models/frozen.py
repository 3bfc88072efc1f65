"""A linear classifier on a frozen network.

Masked Autoencoders Are Scalable Vision Learners; Kaiming He et al.; arXiv 2111.06377, appendix A.1: a batch
norm without affine parameters takes the place of tuning the features' scale.
"""

from __future__ import annotations

from torch import Tensor, nn

from vitpipe.models.network import Classifier


class FrozenProbe(nn.Module):
    """Frozen features > batch norm without affine > Linear; only the linear layer learns.

    Args:
        network: whose `frozen_features` are read; it stays in evaluation mode and its gradients are off.
        num_classes: K.
    """

    def __init__(self, network: Classifier, num_classes: int) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.norm = nn.BatchNorm1d(network.feature_width, affine=False, eps=1e-6)
        self.fc = nn.Linear(network.feature_width, num_classes)
        nn.init.trunc_normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def train(self, mode: bool = True) -> FrozenProbe:
        """Training mode for the new layers only."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, K)."""
        return self.fc(self.norm(self.network.frozen_features(images_BCHW)))

    def head(self) -> dict[str, Tensor]:
        """What has been learnt: the state without the frozen network."""
        return {name: t for name, t in self.state_dict().items() if not name.startswith("network.")}
