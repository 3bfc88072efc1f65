"""Builds the toy's encoder and classifier; it has neither pre-training nor dense features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from vitpipe.models.toy.config import ToyConfig

from vitpipe.models.families import Family, WeightsInfo
from vitpipe.models.network import Classifier, Encoder, Features, Network
from vitpipe.models.weights import Rule


class ToyEncoder(Encoder):
    """One block: patches, embedded and normed."""

    family = "toy"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, kernel_size=16, stride=16)
        self.norm = nn.LayerNorm(width)

    @property
    def num_layers(self) -> int:
        """Patches and head."""
        return 2

    def layer_of(self, name: str) -> int:
        """0 for the patches, 1 for the head."""
        return int(name.startswith("head."))

    @property
    def num_blocks(self) -> int:
        """1."""
        return 1

    @property
    def feature_width(self) -> int:
        """C."""
        return self.embed.out_channels

    def features(
        self, images_BCHW: Tensor, blocks: Sequence[int] = (-1,), *, attention: bool = False
    ) -> Features:
        """Patches as tokens, and their mean."""
        self.refuse_attention(attention)
        x_BCHW = self.embed(images_BCHW)
        tokens = self.norm(x_BCHW.flatten(2).transpose(1, 2))
        num_asked = len(self.chosen_blocks(blocks))
        grid = (x_BCHW.shape[2], x_BCHW.shape[3])
        return Features((tokens,) * num_asked, (grid,) * num_asked, tokens.mean(dim=1))


class ToyClassifier(ToyEncoder, Classifier):
    """The encoder and a linear layer."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__(width)
        self.head = nn.Linear(width, num_classes)

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.head.out_features

    def logits(self, features: Features) -> Tensor:
        """(B, num_classes)."""
        return self.head(features.pooled)


class ToyFamily(Family[ToyConfig]):
    """What stages ask for."""

    name = "toy"

    def backbone(self, name: str, *, image_size: int) -> ToyEncoder:
        """The encoder of the default width."""
        return ToyEncoder(ToyConfig(name=name).width)

    def encoder(self, model: ToyConfig, *, drop_path: float) -> ToyEncoder:
        """Without a head."""
        return ToyEncoder(model.width)

    def classifier(self, model: ToyConfig, *, num_classes: int, drop_path: float) -> ToyClassifier:
        """With one."""
        return ToyClassifier(model.width, num_classes)

    def describe(self, state: Mapping[str, Tensor]) -> WeightsInfo | None:
        """Recognised by the patches' name and shape."""
        patches, head = state.get("embed.weight"), state.get("head.weight")
        if patches is None or patches.shape[1:] != (3, 16, 16):
            return None
        return WeightsInfo(
            family=self.name,
            kind="encoder" if head is None else "classifier",
            model="toy_tiny",
            image_size=0,
            num_classes=0 if head is None else head.shape[0],
        )

    def transfer_rules(self, network: Network, info: WeightsInfo) -> Sequence[Rule]:
        """The head alone may differ."""
        return (Rule("unused", r"^head\.", "no head here"), Rule("missing", r"^head\.", "a new head"))


FAMILY = ToyFamily()
