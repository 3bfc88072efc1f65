"""All networks by name: data for `vitpipe models` and recipes, readable without torch."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from vitpipe.contracts.errors import RecipeError

_ITPN = "Integrally Pre-Trained Transformer Pyramid Networks (Tian et al., arXiv 2211.12735)"
_REVCOL = "Reversible Column Networks (Cai et al., arXiv 2212.11696)"
_REVCOLV2 = (
    "RevColV2: Exploring Disentangled Representations in Masked Image Modeling (Han et al., arXiv 2309.01005)"
)


@dataclass(frozen=True)
class ModelEntry:
    """One network by name.

    Attributes:
        name: as recipes give it in `model.name`.
        family: the folder in `vitpipe.models` that builds it; see families.py.
        summary: what it is, in a few words.
        paper: title, authors, arXiv number.
        published_params: parameters in millions as the paper states them; `None` where it does not.
        classifier_params: parameters of the classifier with 1000 classes.
        classifier_macs: multiply-adds of that classifier for one image of `image_size`.
        image_size: default input, pixels per side.
        num_layers: layer ids of the classifier, for layer-wise learning rates.
        decay_stated_for: see `config.resolve.layer_scales`.
    """

    name: str
    family: str
    summary: str
    paper: str
    published_params: float | None
    classifier_params: int
    classifier_macs: int
    image_size: int
    # The next two are also properties of the networks (`Network.num_layers`, `decay_stated_for`), which count
    # the layers they really have: a recipe may change the number of columns, and library users may give
    # shapes of their own. They are stated here because `vitpipe recipe` and `plan` show layer-wise learning
    # rates without torch, which every family module imports. tests/models/test_registry.py compares the two
    # for every entry.
    num_layers: int
    decay_stated_for: int | None = None


# Parameters and multiply-adds are measured (tests/models/test_every_model.py measures them again for every
# entry, and compares with `published_params` within 2 %). One multiply-add counts once, attention products
# included.
MODELS: dict[str, ModelEntry] = {
    entry.name: entry
    for entry in (
        ModelEntry(
            name="hivit_nano",
            family="hivit",
            summary="blocks 1-1-4, channels 16/32/64: our own, for a laptop and the demo",
            paper="ours, after " + _ITPN,
            published_params=None,
            classifier_params=286_280,
            classifier_macs=4_585_984,
            image_size=64,
            num_layers=8,  # stem, 6 blocks, head
            decay_stated_for=13,
        ),
        ModelEntry(
            name="hivit_base",
            family="hivit",
            summary="blocks 3-3-24, channels 128/256/512",
            paper=_ITPN,
            published_params=79.0,  # ImageNet-1K table of the main text: HiViT-B 79, HiViT-L 288
            classifier_params=78_557_992,
            classifier_macs=17_816_604_672,
            image_size=224,
            num_layers=32,  # stem, 30 blocks, head
            decay_stated_for=13,
        ),
        ModelEntry(
            name="hivit_large",
            family="hivit",
            summary="blocks 2-2-40, channels 192/384/768",
            paper=_ITPN,
            published_params=288.0,
            classifier_params=288_493_576,
            classifier_macs=61_117_544_448,
            image_size=224,
            num_layers=46,  # stem, 44 blocks, head
            decay_stated_for=13,
        ),
        ModelEntry(
            name="revcol_micro",
            family="revcol",
            summary="3 columns of 1-1-2-1 blocks, channels 16 to 128: our own, for a laptop and tests",
            paper="ours, after " + _REVCOL,
            published_params=None,
            classifier_params=920_968,
            classifier_macs=9_800_192,
            image_size=64,
            num_layers=9,  # RevCol: stem, blocks of one column + columns - 1, head; here 5 + 3 + 1
        ),
        ModelEntry(
            name="revcol_tiny",
            family="revcol",
            summary="4 columns of 2-2-4-2 blocks, channels 64 to 512",
            paper=_REVCOL,
            published_params=30.0,
            classifier_params=30_456_168,
            classifier_macs=4_517_355_520,
            image_size=224,
            num_layers=15,
        ),
        ModelEntry(
            name="revcol_small",
            family="revcol",
            summary="8 columns of 2-2-4-2 blocks, channels 64 to 512",
            paper=_REVCOL,
            published_params=60.0,
            classifier_params=60_568_424,
            classifier_macs=9_043_832_832,
            image_size=224,
            num_layers=19,
        ),
        ModelEntry(
            name="revcol_base",
            family="revcol",
            summary="16 columns of 1-1-3-2 blocks, channels 72 to 576",
            paper=_REVCOL,
            published_params=138.0,
            classifier_params=138_616_408,
            classifier_macs=16_585_449_984,
            image_size=224,
            num_layers=24,
        ),
        ModelEntry(
            name="revcol_large",
            family="revcol",
            summary="8 columns of 1-2-6-2 blocks, channels 128 to 1024",
            paper=_REVCOL,
            published_params=273.0,
            classifier_params=273_095_400,
            classifier_macs=39_306_092_544,
            image_size=224,
            num_layers=20,
        ),
        ModelEntry(
            name="revcol_xlarge",
            family="revcol",
            summary="8 columns of 1-2-6-2 blocks, channels 224 to 1792",
            paper=_REVCOL,
            published_params=834.0,
            classifier_params=833_807_400,
            classifier_macs=120_206_026_752,
            image_size=224,
            num_layers=20,
        ),
        ModelEntry(
            name="revcol_huge",
            family="revcol",
            summary="8 columns of 1-2-6-2 blocks, channels 360 to 2880",
            paper=_REVCOL,
            published_params=2158.0,
            classifier_params=2_157_600_160,
            classifier_macs=310_617_031_680,
            image_size=224,
            num_layers=20,
        ),
        ModelEntry(
            name="revcolv2_nano",
            family="revcolv2",
            summary="2 + 2 columns, 4 x 1 blocks each, 48 channels: our own, for a laptop and the demo",
            paper="ours, after " + _REVCOLV2,
            published_params=None,
            classifier_params=566_164,
            classifier_macs=6_400_896,
            image_size=64,
            num_layers=9,
        ),
        ModelEntry(
            name="revcolv2_base",
            family="revcolv2",
            summary="2 + 2 columns, 4 x 3 blocks each, 384 channels (our reading of the paper)",
            paper=_REVCOLV2,
            published_params=88.0,  # supplement, table 5: 88 M and 19 G, 327 M and 67 G
            classifier_params=89_131_240,
            # 12.9 G and not the published 19 G (ours: 18.7 G): only the levels that reach the top are run.
            classifier_macs=12_852_464_640,
            image_size=224,
            num_layers=17,  # RevColV2: input, 4 x 3 blocks of one column + 4 columns - 1, head
        ),
        ModelEntry(
            name="revcolv2_large",
            family="revcolv2",
            summary="2 + 2 columns, 4 x 4 blocks each, 640 channels (our reading of the paper)",
            paper=_REVCOLV2,
            published_params=327.0,
            classifier_params=325_140_200,
            classifier_macs=45_692_912_640,
            image_size=224,
            num_layers=21,
        ),
    )
}


def find_model(name: str) -> ModelEntry:
    """The entry with this name.

    Raises:
        RecipeError: when there is none; suggests the most similar name.
    """
    entry = MODELS.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise RecipeError(
            f"There is no model '{name}'",
            where="model.name",
            fix=f"{hint}give one of {', '.join(MODELS)} (`vitpipe models` describes them)",
        )
    return entry
