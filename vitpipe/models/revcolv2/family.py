"""The RevColV2 family: its networks from a recipe, and which weights one takes from another.

RevColV2: Exploring Disentangled Representations in Masked Image Modeling; Qi Han, Yuxuan Cai, Xiangyu Zhang;
arXiv 2309.01005: the whole autoencoder is kept for transfer, except mask tokens and pixel head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from vitpipe.models.families import Family, WeightsInfo, WeightsKind
from vitpipe.models.masking import UNIT_PIXELS
from vitpipe.models.network import Network, Task
from vitpipe.models.revcolv2.columns import SHAPES
from vitpipe.models.revcolv2.config import RevColV2Config
from vitpipe.models.revcolv2.dense_maps import RevColV2Dense
from vitpipe.models.revcolv2.revcolv2 import RevColV2, RevColV2Pretrainer, resize_positions
from vitpipe.models.revcolv2.revcolv2_classifier import RevColV2Classifier, RevColV2Encoder
from vitpipe.models.weights import Rule

# In detection attention works in windows of the size of the pre-training's grid, 224 / 16, as in ViTDet
# (arXiv 2203.16527): the products of global attention over the 64 x 64 units of 1024 pixels cost 21 times as
# much.
_DETECTION_WINDOW = 14

_RESIZE = Rule("resized", r"^backbone\.(top_down_)?pos_embed$", "bicubic to the network's grid")
_NEW_HEAD = Rule("missing", r"^head\.", "a new head")
_OTHER_CLASSES = Rule("fresh", r"^head\.fc\.", "another number of classes")
# The load report quotes these texts; `transfer_rules` says which apply.
_NEW_NECK = Rule("missing", r"^(norms|rescale|refine)\.", "pre-training and classification have no neck")
_ONLY_PRETRAINING = Rule(
    "unused", r"^(mask_token$|pixel_norm\.|pixel_head\.)", "only pre-training reconstructs pixels"
)
_ONLY_CLASSIFIER = Rule("unused", r"^head\.", "only a classifier has a classification head")


class RevColV2Family(Family[RevColV2Config]):
    """Builds RevColV2's networks, and reads and transfers their weights."""

    name = "revcolv2"

    def backbone(self, name: str, *, image_size: int, **options: Any) -> RevColV2:
        """The backbone; `options` are those of `RevColV2`."""
        return RevColV2(SHAPES[name], image_size=image_size, **options)

    def pretrainer(self, model: RevColV2Config, *, mask_ratio: float) -> RevColV2Pretrainer:
        """The masked pre-training network, without drop path (supplement, section 1.1), positions fixed."""
        # Fixed sine-cosine tables in pre-training and linear probing, trainable in fine-tuning: MAE's rule.
        return RevColV2Pretrainer(_backbone(model, model.image_size), mask_ratio)

    def encoder(self, model: RevColV2Config, *, drop_path: float) -> RevColV2Encoder:
        """The bottom-up columns, with trainable positions."""
        return RevColV2Encoder(
            _backbone(model, model.image_size, drop_path=drop_path, trainable_positions=True)
        )

    def classifier(self, model: RevColV2Config, *, num_classes: int, drop_path: float) -> RevColV2Classifier:
        """The classifier, with trainable positions."""
        backbone = _backbone(model, model.image_size, drop_path=drop_path, trainable_positions=True)
        return RevColV2Classifier(backbone, num_classes, model.head_init_std)

    def dense(self, model: RevColV2Config, task: Task, *, image_size: int, drop_path: float) -> RevColV2Dense:
        """Dense features; position tables are made for `image_size` and resized for images of other sizes."""
        # Segmentation crops (512, 640) are small enough for global attention everywhere.
        window = _DETECTION_WINDOW if task == "detect" else None
        return RevColV2Dense(
            _backbone(model, image_size, drop_path=drop_path, trainable_positions=True, window=window), task
        )

    def describe(self, state: Mapping[str, Tensor]) -> WeightsInfo | None:
        """What a state is, recognised by the names of the first column."""
        mixed, position = (
            state.get(f"backbone.{name}")
            for name in ("bottom_up.0.levels.0.blocks.0.attn.qkv.weight", "pos_embed")
        )
        if mixed is None or position is None:
            return None
        prefix = "backbone.bottom_up.0.levels.0.blocks."
        depth = len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})
        # Without the number of columns, which recipes may change: the name is still that of the size.
        sizes = (mixed.shape[1], depth)
        head = state.get("head.fc.weight")
        parts: dict[WeightsKind, bool] = {
            "pretrain": "mask_token" in state,
            "classifier": head is not None,
            # The shared name for dense features; these have one norm per level.
            "pyramid": "norms.0.weight" in state,
            "encoder": True,
        }
        return WeightsInfo(
            family=self.name,
            kind=next(kind for kind, has_it in parts.items() if has_it),
            model=next((s.name for s in SHAPES.values() if (s.width, s.depth) == sizes), ""),
            image_size=math.isqrt(position.shape[1]) * UNIT_PIXELS,
            num_classes=0 if head is None else head.shape[0],
        )

    def transfer_rules(self, network: Network, info: WeightsInfo) -> Sequence[Rule]:
        """What may differ between file and network.

        pretrain or encoder > classifier: new head. classifier > classifier: the head keeps its initial
        values when the number of classes differs. pretrain or classifier > encoder: their heads are not used.
        All but dense > dense: new neck. pretrain > pretrain: nothing.
        """
        # No rule for columns: another number of them would leave columns untrained, or drop trained ones.
        if isinstance(network, RevColV2Classifier):
            head = _OTHER_CLASSES if info.kind == "classifier" else _NEW_HEAD
            return (_RESIZE, head, _ONLY_PRETRAINING)
        if isinstance(network, RevColV2Encoder):
            return (_RESIZE, _ONLY_PRETRAINING, _ONLY_CLASSIFIER)
        if isinstance(network, RevColV2Dense):
            return (_RESIZE, _NEW_NECK, _ONLY_PRETRAINING, _ONLY_CLASSIFIER)
        return ()

    def resized(self, network: Network, name: str, given: Tensor, wanted: Tensor) -> Tensor:
        """Position tables (1, N, C), bicubic."""
        side = math.isqrt(wanted.shape[1])
        return resize_positions(given, (side, side))


def _backbone(model: RevColV2Config, image_size: int, **options: Any) -> RevColV2:
    """The backbone of a size, with the recipe's numbers of columns."""
    columns = model.columns
    return RevColV2(
        replace(SHAPES[model.name], num_bottom_up=columns.bottom_up, num_top_down=columns.top_down),
        image_size=image_size,
        memory_mode=columns.memory_mode,
        allow_reversible_amp=columns.reversible_autocast,
        **options,
    )


FAMILY = RevColV2Family()
