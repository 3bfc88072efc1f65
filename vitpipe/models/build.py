"""Networks from a recipe's `model:` section."""

from __future__ import annotations

from vitpipe.config.recipe import ModelConfig
from vitpipe.errors import RecipeError
from vitpipe.models.hivit import HiViT, HiViTClassifier
from vitpipe.models.itpn import MaskedPretrainer, PixelDecoder
from vitpipe.models.pyramid import Pyramid, PyramidBackbone
from vitpipe.models.registry import find_model


def build_pretrainer(model: ModelConfig, *, mask_ratio: float = 0.75) -> MaskedPretrainer:
    """The masked pre-training network (iTPN, supplement, table 7): no drop path, no relative positions.

    Raises:
        RecipeError: when the name is unknown or the decoder's width does not divide as it must.
        InputError: when `image_size` is not a multiple of 16 or the mask ratio leaves nothing to do.
    """
    width, num_heads = model.decoder_width, model.decoder_heads
    if width % 16 or width % num_heads:
        raise RecipeError(
            f"A decoder of width {width} cannot be cut into 16 sub-tokens and {num_heads} heads",
            where="model.decoder_width, model.decoder_heads",
            mend="use a width that is a multiple of 16 and of the number of heads",
        )
    backbone = HiViT(find_model(model.name).shape(), image_size=model.image_size)
    gain = backbone.shape.init_gain
    pyramid = Pyramid(backbone.widths, model.pyramid_width, model.pyramid_depth, init_gain=gain)
    decoder = PixelDecoder(
        pyramid_width=model.pyramid_width,
        width=width,
        depth=model.decoder_depth,
        num_heads=num_heads,
        grid_side=backbone.grid_side,
        init_gain=gain,
    )
    return MaskedPretrainer(backbone, pyramid, decoder, mask_ratio=mask_ratio)


def build_classifier(
    model: ModelConfig,
    *,
    num_classes: int,
    drop_path: float = 0.0,
    relative_position: bool = True,
    head_init_std: float = 2e-5,
) -> HiViTClassifier:
    """The classifier (iTPN, supplement, table 8).

    Raises:
        RecipeError: when the name is unknown.
        InputError: when `image_size` is not a multiple of 16.
    """
    backbone = HiViT(
        find_model(model.name).shape(),
        image_size=model.image_size,
        drop_path=drop_path,
        relative_position=relative_position,
    )
    return HiViTClassifier(backbone, num_classes, head_init_std)


def build_pyramid_backbone(
    model: ModelConfig,
    *,
    image_size: int,
    drop_path: float = 0.0,
    pyramid_depth: int = 2,
    relative_position: bool = False,
    norm_eps: float = 1e-5,
) -> PyramidBackbone:
    """Dense features for detection (no relative positions, any size) and segmentation (with them).

    Args:
        image_size: pixels per side that a relative bias is made for; without a bias any multiple of 16 can
            be fed. The absolute table keeps the size of `model.image_size` and is resampled on the way.

    Raises:
        RecipeError: when the name is unknown.
        InputError: when an image size is not a multiple of 16.
    """
    backbone = HiViT(
        find_model(model.name).shape(),
        image_size=image_size,
        drop_path=drop_path,
        relative_position=relative_position,
        norm_eps=norm_eps,
        position_image_size=model.image_size,
    )
    pyramid = Pyramid(
        backbone.widths, model.pyramid_width, pyramid_depth, norm_eps, init_gain=backbone.shape.init_gain
    )
    return PyramidBackbone(backbone, pyramid)
