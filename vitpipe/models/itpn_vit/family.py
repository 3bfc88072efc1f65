"""The family of plain vision transformers for masked pixels: networks, and whose weights they take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vitpipe.contracts.errors import RecipeError
from vitpipe.models.families import Family, WeightsInfo, WeightsKind
from vitpipe.models.hivit.itpn import PixelDecoder
from vitpipe.models.hivit.pyramid import Pyramid
from vitpipe.models.itpn_vit.config import ITPNViTConfig
from vitpipe.models.itpn_vit.unit_classifier import UnitClassifier, UnitEncoder
from vitpipe.models.itpn_vit.unit_maps import UnitMaps
from vitpipe.models.itpn_vit.unit_pretrainer import LastLevelDecoder, UnitPretrainer
from vitpipe.models.itpn_vit.unit_vit import SHAPES, UnitViT
from vitpipe.models.masking import UNIT_PIXELS
from vitpipe.models.network import Network, Task
from vitpipe.models.positions import resample_positions, resize_relative_table
from vitpipe.models.weights import Rule

_DENSE_NORM_EPS = 1e-5  # as HiViT's

# Why a key may be missing, unused or of another shape; the texts stand in the load report.
_RELATIVE, _LEVELS = r"\.relative_table$", r"^(pyramid|backbone\.lift[48])\."
_LATER_FUSE = r"^pyramid\.fuse[48]\.[1-9]"
_RESIZE = (
    Rule("resized", r"^backbone\.position$", "bicubic to the network's grid"),
    Rule("resized", _RELATIVE, "bicubic to the network's grid"),
)
_NO_RELATIVE_YET = Rule(
    "missing", _RELATIVE, "the file has no relative position bias; it starts at zero, which has no effect"
)
_WITHOUT_RELATIVE = Rule("unused", _RELATIVE, "this network runs without relative positions")
_NEW_HEAD = Rule("missing", r"^head_norm\.|^head\.", "a new head")
_OTHER_CLASSES = Rule("fresh", r"^head\.", "another number of classes")
_ONLY_CLASSIFIER = Rule("unused", r"^head_norm\.|^head\.", "only a classifier has a classification head")
_ONLY_PRETRAINING = Rule("unused", r"^decoder\.", "only pre-training has a decoder")
_ONLY_DENSE = Rule("unused", _LEVELS, "only pre-training and dense features have a pyramid")
_NEW_LEVELS = Rule("missing", _LEVELS, "the file has none; the pyramid keeps its initial values")
_DEEPER_PYRAMID = Rule(
    "missing", _LATER_FUSE, "the file's pyramid has fewer blocks; this one keeps its initial values"
)
_SHALLOWER_PYRAMID = Rule("unused", _LATER_FUSE, "this network's pyramid has fewer blocks")
_NEW_RESCALING = Rule("missing", r"^rescale\.", "new: what brings the maps to their strides")
_NO_RESCALING = Rule("unused", r"^rescale\.", "only dense features without a pyramid rescale their maps")


class ITPNViTFamily(Family[ITPNViTConfig]):
    """Builds plain vision transformers with iTPN's pyramid or MAE's decoder, and transfers their weights."""

    name = "itpn_vit"

    def backbone(self, name: str, *, image_size: int, **options: Any) -> UnitViT:
        """The trunk; `options` are those of `UnitViT`."""
        return UnitViT(SHAPES[name], image_size=image_size, **options)

    def pretrainer(self, model: ITPNViTConfig, *, mask_ratio: float) -> UnitPretrainer:
        """The masked pre-training network, without drop path and relative positions (iTPN, table 7).

        Raises:
            RecipeError: when the decoder's width is no multiple of 16 and of its heads.
            InputError: when the mask ratio hides all units or none.
        """
        size, has_pyramid = model.decoder, model.levels == "pyramid"
        # 16: at stride 4 a unit has 16 sub-tokens, which share the decoder's width.
        if size.width % 16 or size.width % size.heads:
            raise RecipeError(
                f"The decoder's width of {size.width} cannot be divided by 16 (sub-tokens of a unit) "
                f"and by {size.heads} (heads)",
                where="model.decoder.width, model.decoder.heads",
                fix="use a width that is a multiple of 16 and of the number of heads",
            )
        backbone = UnitViT(SHAPES[model.name], image_size=model.image_size, lifts=has_pyramid)
        gain = backbone.shape.init_gain
        if not has_pyramid:
            last = LastLevelDecoder(backbone.widths[-1], size, grid_side=backbone.grid_side, init_gain=gain)
            return UnitPretrainer(backbone, None, last, mask_ratio=mask_ratio)
        neck = model.pyramid
        pyramid = Pyramid(backbone.widths, neck.width, neck.depth, init_gain=gain)
        decoder = PixelDecoder(
            pyramid_width=neck.width,
            width=size.width,
            depth=size.depth,
            num_heads=size.heads,
            grid_side=backbone.grid_side,
            init_gain=gain,
        )
        return UnitPretrainer(backbone, pyramid, decoder, mask_ratio=mask_ratio)

    def encoder(self, model: ITPNViTConfig, *, drop_path: float) -> UnitEncoder:
        """The trunk, with relative positions unless the section refuses them."""
        return UnitEncoder(_trunk(model, drop_path))

    def classifier(self, model: ITPNViTConfig, *, num_classes: int, drop_path: float) -> UnitClassifier:
        """The classifier, with relative positions unless the section refuses them."""
        return UnitClassifier(_trunk(model, drop_path), num_classes, model.head_init_std)

    def dense(self, model: ITPNViTConfig, task: Task, *, image_size: int, drop_path: float) -> UnitMaps:
        """Dense features: segmentation with relative positions for `image_size`, detection without.

        The absolute table keeps the size of `model.image_size` and is resampled in the forward pass.
        """
        has_pyramid = model.levels == "pyramid"
        backbone = UnitViT(
            SHAPES[model.name],
            image_size=image_size,
            drop_path=drop_path,
            relative_position=task == "segment" and model.relative_position,
            lifts=has_pyramid,
            norm_eps=_DENSE_NORM_EPS,
            position_image_size=model.image_size,
        )
        if not has_pyramid:
            return UnitMaps(backbone, None, task)
        neck, gain = model.pyramid, backbone.shape.init_gain
        depth = neck.dense_depth or neck.depth
        pyramid = Pyramid(backbone.widths, neck.width, depth, _DENSE_NORM_EPS, init_gain=gain)
        return UnitMaps(backbone, pyramid, task)

    def as_stored(self, model: ITPNViTConfig, info: WeightsInfo) -> ITPNViTConfig:
        """With relative positions if, and only if, the file has them."""
        found = bool(info.options.get("relative_position", model.relative_position))
        return model.model_copy(update={"relative_position": found})

    def describe(self, state: Mapping[str, Tensor]) -> WeightsInfo | None:
        """What a state is, recognised by the patch embedding's name; `None` without it."""
        stem, position = state.get("backbone.patch_embed.0.weight"), state.get("backbone.position")
        if stem is None or position is None or "backbone.blocks.0.attn.qkv.weight" not in state:
            return None
        depth = len({name.split(".")[2] for name in state if name.startswith("backbone.blocks.")})
        sizes = (stem.shape[0], depth)
        head = state.get("head.weight")
        is_dense = "backbone.lift8.norm.weight" in state or any(name.startswith("rescale.") for name in state)
        parts: dict[WeightsKind, bool] = {
            "pretrain": "decoder.mask_token" in state,
            "pyramid": is_dense,
            "classifier": head is not None,
            "encoder": True,
        }
        return WeightsInfo(
            family=self.name,
            kind=next(kind for kind, has_it in parts.items() if has_it),
            model=next((name for name, s in SHAPES.items() if (s.trunk.width, s.trunk.depth) == sizes), ""),
            image_size=math.isqrt(position.shape[1]) * UNIT_PIXELS,
            num_classes=0 if head is None else head.shape[0],
            options={
                "relative_position": "backbone.blocks.0.attn.relative_table" in state,
                "levels": "pyramid.lateral8.weight" in state,
            },
        )

    def transfer_rules(self, network: Network, info: WeightsInfo) -> Sequence[Rule]:
        """What may differ between file and network; into pre-training nothing.

        pretrain > encoder, classifier: relative tables start at zero; pyramid and decoder are not used.
        pretrain > UnitMaps: the decoder is not used; of a pyramid of another depth the common blocks are
        loaded. Any other > UnitMaps: pyramid or rescaling keep their initial values.
        """
        if isinstance(network, UnitMaps):
            has_levels = bool(info.options["levels"])
            # A file with a pyramid whose parts are missing would be damaged.
            new = _DEEPER_PYRAMID if has_levels else _NEW_LEVELS
            kept = _SHALLOWER_PYRAMID if network.pyramid is not None else _ONLY_DENSE
            # Between detector and segmentor without a pyramid the maps are the same.
            maps = () if info.kind == "pyramid" and not has_levels else (_NEW_RESCALING,)
            unused = (kept, *maps, _NO_RESCALING, _ONLY_PRETRAINING, _ONLY_CLASSIFIER, _WITHOUT_RELATIVE)
            return (*_RESIZE, new, _NO_RELATIVE_YET, *unused)
        if not isinstance(network, UnitEncoder):
            return ()
        common = (
            *_RESIZE,
            _NO_RELATIVE_YET,
            _WITHOUT_RELATIVE,
            _ONLY_PRETRAINING,
            _ONLY_DENSE,
            _NO_RESCALING,
        )
        if not isinstance(network, UnitClassifier):
            return (*common, _ONLY_CLASSIFIER)
        # Between classifiers a missing head would be damage; only another number of classes is allowed.
        return (*common, _OTHER_CLASSES if info.kind == "classifier" else _NEW_HEAD)

    def resized(self, network: Network, name: str, given: Tensor, wanted: Tensor) -> Tensor:
        """Absolute tables (1, N, C) by `resample_positions`, relative ones by `resize_relative_table`."""
        if name.endswith("relative_table"):
            return resize_relative_table(given, wanted.shape[0])
        side = math.isqrt(wanted.shape[1])
        return resample_positions(given, (side, side))


def _trunk(model: ITPNViTConfig, drop_path: float) -> UnitViT:
    return UnitViT(
        SHAPES[model.name],
        image_size=model.image_size,
        drop_path=drop_path,
        relative_position=model.relative_position,
    )


FAMILY = ITPNViTFamily()
