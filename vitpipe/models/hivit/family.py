"""The HiViT family: iTPN's networks from a recipe, and which weights one takes from another.

Sizes and settings are those of iTPN (arXiv 2211.12735, supplement, tables 7 and 8).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vitpipe.contracts.errors import RecipeError
from vitpipe.models.families import Family, WeightsInfo, WeightsKind
from vitpipe.models.hivit.config import HiViTConfig
from vitpipe.models.hivit.feature_pretrainer import FeatureHeads, FeaturePretrainer
from vitpipe.models.hivit.hivit import SHAPES, HiViT
from vitpipe.models.hivit.hivit_classifier import HiViTClassifier, HiViTEncoder
from vitpipe.models.hivit.itpn import MaskedPretrainer, PixelDecoder
from vitpipe.models.hivit.pyramid import Pyramid, PyramidBackbone
from vitpipe.models.masking import UNIT_PIXELS, units_per_side
from vitpipe.models.network import Network, Task
from vitpipe.models.positions import resample_positions, resize_relative_table
from vitpipe.models.weights import Rule

# Of the released detection and segmentation backbones: torch's default, while pre-training and classification
# set 1e-6.
_DENSE_NORM_EPS = 1e-5

# Why a key may be missing, unused or of another shape. `transfer_rules` chooses from these by the networks;
# the texts stand in the load report.
_RELATIVE = r"\.relative_table$"
# All but the first block after a fusion: the depth is 2 in pixel pre-training, 1 in released detectors.
_LATER_FUSE = r"^pyramid\.fuse[48]\.[1-9]"
_RESIZE = (
    Rule("resized", r"^backbone\.absolute_position$", "bicubic to the network's grid"),
    Rule("resized", _RELATIVE, "bicubic to the network's grid"),
)
# Pre-training runs without relative positions (table 7), fine-tuning with them (table 8). Zero is what the
# tables start from, and adds nothing to the scores.
_NO_RELATIVE_YET = Rule(
    "missing", _RELATIVE, "the file has no relative position bias; it starts at zero, which has no effect"
)
_NEW_AXES = Rule(
    "missing",
    r"\.(row|column)_table$",
    "only detection has positions per axis; they keep their initial values",
)
_NEW_HEAD = Rule("missing", r"^head_norm\.|^head\.", "a new head")
_OTHER_CLASSES = Rule("fresh", r"^head\.", "another number of classes")
_NEW_PYRAMID = Rule("missing", r"^pyramid\.", "the file has none; the pyramid keeps its initial values")
_DEEPER_PYRAMID = Rule(
    "missing", _LATER_FUSE, "the file's pyramid has fewer blocks; this one keeps its initial values"
)
_SHALLOWER_PYRAMID = Rule("unused", _LATER_FUSE, "this network's pyramid has fewer blocks")
_ONLY_PRETRAINING = Rule(
    "unused", r"^(decoder|predictor)\.", "only pre-training has a decoder, or heads for a teacher's features"
)
_ONLY_DENSE = Rule("unused", r"^pyramid\.", "only pre-training and dense features have a pyramid")
_ONLY_CLASSIFIER = Rule("unused", r"^head_norm\.|^head\.", "only a classifier has a classification head")
_WITHOUT_RELATIVE = Rule("unused", _RELATIVE, "this task runs without relative positions")


class HiViTFamily(Family[HiViTConfig]):
    """Builds iTPN's networks, and reads and transfers their weights."""

    name = "hivit"

    def backbone(self, name: str, *, image_size: int, **options: Any) -> HiViT:
        """The backbone; `options` are those of `HiViT`."""
        return HiViT(SHAPES[name], image_size=image_size, **options)

    def pretrainer(self, model: HiViTConfig, *, mask_ratio: float) -> MaskedPretrainer:
        """The masked pre-training network, without drop path and relative positions (table 7).

        Raises:
            RecipeError: when the decoder's width is no multiple of 16 and of its heads.
            InputError: when `image_size` is not a multiple of 16, or the mask ratio hides all units or none.
        """
        neck, decode = model.pyramid, model.decoder
        # 16: at stride 4 a unit has 16 sub-tokens, which share the decoder's width.
        if decode.width % 16 or decode.width % decode.heads:
            raise RecipeError(
                f"The decoder's width of {decode.width} cannot be divided by 16 (sub-tokens of a unit) "
                f"and by {decode.heads} (heads)",
                where="model.decoder.width, model.decoder.heads",
                fix="use a width that is a multiple of 16 and of the number of heads",
            )
        backbone = HiViT(SHAPES[model.name], image_size=model.image_size)
        gain = backbone.shape.init_gain
        pyramid = Pyramid(backbone.widths, neck.width, neck.depth, init_gain=gain)
        decoder = PixelDecoder(
            pyramid_width=neck.width,
            width=decode.width,
            depth=decode.depth,
            num_heads=decode.heads,
            grid_side=backbone.grid_side,
            init_gain=gain,
        )
        return MaskedPretrainer(backbone, pyramid, decoder, mask_ratio=mask_ratio)

    def feature_predictor(
        self, model: HiViTConfig, *, target_width: int, drop_path: float, aligned: bool
    ) -> FeaturePretrainer:
        """The network that predicts a teacher's features, with relative positions (table 9).

        Raises:
            InputError: when `image_size` is not a multiple of 16.
        """
        backbone, neck = _backbone(model, drop_path), model.pyramid
        pyramid = Pyramid(backbone.widths, neck.width, neck.depth, init_gain=backbone.shape.init_gain)
        heads = FeatureHeads(
            backbone, pyramid_width=neck.width, target_width=target_width, layer_scale=model.layer_scale
        )
        return FeaturePretrainer(backbone, pyramid, heads, aligned=aligned)

    def encoder(self, model: HiViTConfig, *, drop_path: float) -> HiViTEncoder:
        """The backbone, with relative positions unless the section refuses them (table 8)."""
        return HiViTEncoder(_backbone(model, drop_path))

    def classifier(self, model: HiViTConfig, *, num_classes: int, drop_path: float) -> HiViTClassifier:
        """The classifier, with relative positions unless the section refuses them (table 8)."""
        return HiViTClassifier(_backbone(model, drop_path), num_classes, model.head_init_std)

    def dense(self, model: HiViTConfig, task: Task, *, image_size: int, drop_path: float) -> PyramidBackbone:
        """Dense features: segmentation with relative positions for `image_size`, detection as it is said.

        The absolute table keeps the size of `model.image_size` and is resampled in the forward pass.
        """
        neck = model.pyramid
        backbone = HiViT(
            SHAPES[model.name],
            image_size=image_size,
            drop_path=drop_path,
            relative_position=task == "segment" and model.relative_position,
            layer_scale=model.layer_scale,
            norm_eps=_DENSE_NORM_EPS,
            # The released dense code keeps the 14 x 14 table too. Relative tables are resized at loading.
            position_image_size=model.image_size,
        )
        if task == "detect" and model.detect_position == "per_axis":
            backbone.use_axis_positions(units_per_side(model.image_size))
        depth, gain = neck.dense_depth or neck.depth, backbone.shape.init_gain
        pyramid = Pyramid(backbone.widths, neck.width, depth, _DENSE_NORM_EPS, init_gain=gain)
        return PyramidBackbone(backbone, pyramid, task)

    def as_stored(self, model: HiViTConfig, info: WeightsInfo) -> HiViTConfig:
        """With relative positions and layer scale if, and only if, the file has them."""
        # A network pre-trained on pixels has none; new tables start at zero and would only cost time.
        found = bool(info.options.get("relative_position", model.relative_position))
        scaled = bool(info.options.get("layer_scale", model.layer_scale is not None))
        # Any initial value will do: the file's take its place.
        scale = (model.layer_scale or 1.0) if scaled else None
        return model.model_copy(update={"relative_position": found, "layer_scale": scale})

    def describe(self, state: Mapping[str, Tensor]) -> WeightsInfo | None:
        """What a state is, recognised by the stem's name; `None` without it."""
        stem = state.get("backbone.stem.proj.weight")
        if stem is None:
            return None
        depths = tuple(_num_blocks(state, f"backbone.stage{stride}.") for stride in (4, 8, 16))
        sizes = (depths, stem.shape[0])
        # Empty for a size of the user's own: such weights can still be loaded into the same network.
        model = next((s.name for s in SHAPES.values() if (s.depths, s.widths[0]) == sizes), "")
        position, head = state.get("backbone.absolute_position"), state.get("head.weight")
        lateral = state.get("pyramid.lateral8.weight")
        parts: dict[WeightsKind, bool] = {
            "pretrain": "decoder.mask_token" in state or "predictor.mask_token" in state,
            "pyramid": lateral is not None,
            "classifier": head is not None,
            "encoder": True,
        }
        return WeightsInfo(
            family=self.name,
            kind=next(kind for kind, has_it in parts.items() if has_it),
            model=model,
            image_size=0 if position is None else math.isqrt(position.shape[1]) * UNIT_PIXELS,
            num_classes=0 if head is None else head.shape[0],
            options={
                "relative_position": "backbone.stage16.0.attn.relative_table" in state,
                "layer_scale": "backbone.stage16.0.gamma_2" in state,
                "pyramid_width": 0 if lateral is None else lateral.shape[0],
                "pyramid_depth": _num_blocks(state, "pyramid.fuse8."),
            },
        )

    def transfer_rules(self, network: Network, info: WeightsInfo) -> Sequence[Rule]:
        """What may differ between file and network.

        pretrain > encoder: relative tables start at zero; pyramid and decoder are not used.
        pretrain > classifier: also a new head.
        classifier > encoder: the head is not used.
        classifier > classifier: the head keeps its initial values when the number of classes differs.
        pretrain or pyramid > PyramidBackbone: the decoder is not used; of a pyramid of another depth the
        common blocks are loaded. classifier > PyramidBackbone: the pyramid keeps its initial values.
        pretrain > MaskedPretrainer: nothing may differ.
        """
        if isinstance(network, HiViTClassifier):
            # Between classifiers a missing head would be damage; only another number of classes is allowed.
            head = _OTHER_CLASSES if info.kind == "classifier" else _NEW_HEAD
            return (*_RESIZE, head, _NO_RELATIVE_YET, _ONLY_PRETRAINING, _ONLY_DENSE)
        if isinstance(network, HiViTEncoder):
            return (*_RESIZE, _NO_RELATIVE_YET, _ONLY_PRETRAINING, _ONLY_DENSE, _ONLY_CLASSIFIER)
        if isinstance(network, PyramidBackbone):
            pyramid = _NEW_PYRAMID if info.kind in ("classifier", "encoder") else _DEEPER_PYRAMID
            unused = (_SHALLOWER_PYRAMID, _ONLY_PRETRAINING, _ONLY_CLASSIFIER, _WITHOUT_RELATIVE)
            return (*_RESIZE, pyramid, _NO_RELATIVE_YET, _NEW_AXES, *unused)
        # Never resized into pre-training: its table starts as sine and cosine for the grid it is trained on.
        return ()

    def resized(self, network: Network, name: str, given: Tensor, wanted: Tensor) -> Tensor:
        """Absolute tables (1, N, C) by `resample_positions`, relative ones by `resize_relative_table`."""
        if name.endswith("relative_table"):
            return resize_relative_table(given, wanted.shape[0])
        side = math.isqrt(wanted.shape[1])
        return resample_positions(given, (side, side))


def _backbone(model: HiViTConfig, drop_path: float) -> HiViT:
    return HiViT(
        SHAPES[model.name],
        image_size=model.image_size,
        drop_path=drop_path,
        relative_position=model.relative_position,
        layer_scale=model.layer_scale,
    )


def _num_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


FAMILY = HiViTFamily()
