"""Properties of every network that can be built, whatever its size, those of plugins included.

VITPIPE_PLUGINS=my_methods pytest THIS_FILE
"""

from __future__ import annotations

import functools
import hashlib

import pytest
import torch

from vitpipe.benchmarks.model_cost import measure_cost
from vitpipe.config.model import FAMILIES, entries, model_config
from vitpipe.contracts.discovery import PACKAGE, source_of
from vitpipe.contracts.errors import InputError, RecipeError
from vitpipe.models.build import build_classifier, build_dense, build_pretrainer, create_backbone
from vitpipe.models.network import Encoder

SMALL_DECODER = {"pyramid": {"width": 64}, "decoder": {"width": 64, "depth": 2, "heads": 4}}
SMALL_SIZE = 64
MODELS = entries()


def _config(entry):
    """Small networks run on the CPU, at their own settings; of the others only shapes, on the meta device."""
    config = model_config({"name": entry.name, "image_size": entry.image_size})
    change = SMALL_DECODER if entry.name in ("hivit_nano", "itpn_vit_nano") else {}
    if entry.image_size > SMALL_SIZE and hasattr(config, "columns"):
        change = {"columns": {"memory_mode": "plain"}}
    if hasattr(config, "head_init_std"):
        change = {"head_init_std": 0.02, **change}  # large enough for gradients that are not zero
    return model_config({**config.model_dump(exclude_unset=True), **change})


CONFIGS = {name: _config(entry) for name, entry in MODELS.items()}
# Several sizes of a network have one code: gradients and features of the smallest one are looked at.
# Of each network that is published in several sizes, for example `hivit_base`, the one with fewest parameters.
KINDS = {name.rpartition("_")[0] or name for name in MODELS if "nano" not in name}
SMALLEST = {
    min((n for n in MODELS if (n.rpartition("_")[0] or n) == kind and "nano" not in n),
        key=lambda name: MODELS[name].classifier_params)
    for kind in KINDS
}  # fmt: skip


def _crop_size(model):
    return 512 if model.image_size == 224 else 128


def _detector(model):
    if hasattr(model, "pyramid"):
        pyramid = model.pyramid.model_copy(update={"dense_depth": 1})
        model = model.model_copy(update={"pyramid": pyramid})
    return build_dense(model, "detect", image_size=model.image_size)


def _segmentor(model):
    if hasattr(model, "segment_maps"):  # otherwise all maps have one stride (tests/models/vit)
        model = model.model_copy(update={"segment_maps": "pyramid"})
    return build_dense(model, "segment", image_size=_crop_size(model))


BUILDERS = {
    "classifier": lambda model: build_classifier(model, num_classes=1000),
    "pretrainer": build_pretrainer,
    "detector": _detector,
    "segmentor": _segmentor,
}
# name/network: parameters, multiply-adds, SHA-256 of the sorted "name shape" lines of the state (first 12)
PINNED = {
    "hivit_nano/classifier": (286_280, 4_585_984, "6781bcd1aac4"),
    "hivit_nano/pretrainer": (644_900, 12_148_736, "034e4931515c"),
    "hivit_nano/detector": (422_544, 27_721_728, "b97e72de89d8"),
    "hivit_nano/segmentor": (492_576, 154_402_816, "d9d7e6af1026"),
    "hivit_base/classifier": (78_557_992, 17_816_604_672, "2c39bd014674"),
    "hivit_base/pretrainer": (108_392_992, 11_324_121_088, "2784066b9c97"),
    "hivit_base/detector": (81_552_000, 22_517_383_168, "fdec2001ca71"),
    "hivit_base/segmentor": (83_366_208, 149_216_559_104, "c474ff9e6424"),
    "hivit_large/classifier": (288_493_576, 61_117_544_448, "7a1582e8a323"),
    "hivit_large/pretrainer": (318_239_456, 21_926_309_888, "d053d66e90d1"),
    "hivit_large/detector": (291_398_464, 65_959_362_560, "92c6350ec4a7"),
    "hivit_large/segmentor": (294_355_744, 407_434_690_560, "2f1118624634"),
    "itpn_vit_nano/classifier": (316_088, 4_127_232, "420590e92077"),
    "itpn_vit_nano/pretrainer": (693_460, 12_574_720, "de22a7f0b266"),
    "itpn_vit_nano/detector": (471_104, 27_656_192, "4ab5dd436a61"),
    "itpn_vit_nano/segmentor": (541_136, 154_140_672, "16627532f2dd"),
    "itpn_vit_base/classifier": (86_671_096, 17_471_649_792, "4f4c270a8539"),
    "itpn_vit_base/pretrainer": (118_320_288, 11_473_143_808, "746f5667e9cc"),
    "itpn_vit_base/detector": (91_479_296, 22_647_439_360, "2e9c67a03fe1"),
    "itpn_vit_base/segmentor": (93_102_992, 144_686_710_784, "18695171106e"),
    "paca_nano/classifier": (254_008, 4_796_672, "0e16b0e9525c"),
    "paca_nano/detector": (189_008, 4_732_672, "f975de2b109f"),
    "paca_nano/segmentor": (189_008, 18_611_200, "f975de2b109f"),
    "paca_tiny/classifier": (12_200_680, 3_219_262_208, "e72df59d6804"),
    "paca_tiny/detector": (11_815_680, 3_218_878_208, "0cd6c1549afc"),
    "paca_tiny/segmentor": (11_815_680, 16_474_456_064, "0cd6c1549afc"),
    "paca_small/classifier": (22_037_704, 5_501_010_944, "679b7a4d66a8"),
    "paca_small/detector": (21_652_704, 5_500_626_944, "a44257c6bc1e"),
    "paca_small/segmentor": (21_652_704, 27_878_088_704, "a44257c6bc1e"),
    "paca_base/classifier": (46_911_304, 9_536_566_784, "497056c3f4f6"),
    "paca_base/detector": (46_398_304, 9_536_054_784, "23f1cbc6c248"),
    "paca_base/segmentor": (46_398_304, 47_624_478_720, "23f1cbc6c248"),
    "paca_teacher_tiny/classifier": (12_483_672, 3_424_064_768, "b51d93b8ffab"),
    "paca_teacher_tiny/detector": (12_098_672, 3_423_680_768, "cc25a2d77a54"),
    "paca_teacher_tiny/segmentor": (12_098_672, 17_386_913_792, "cc25a2d77a54"),
    "paca_teacher_small/classifier": (21_075_064, 5_482_396_928, "4a25d2df5899"),
    "paca_teacher_small/detector": (20_690_064, 5_482_012_928, "207621374d0c"),
    "paca_teacher_small/segmentor": (20_690_064, 27_544_543_232, "207621374d0c"),
    "paca_teacher_base/classifier": (47_659_192, 9_770_973_184, "68de66d4b1ad"),
    "paca_teacher_base/detector": (47_146_192, 9_770_461_184, "36efec08726b"),
    "paca_teacher_base/segmentor": (47_146_192, 48_271_056_896, "36efec08726b"),
    "revcol_micro/classifier": (920_968, 9_800_192, "ec750c06e792"),
    "revcol_nano/classifier": (1_052_616, 10_857_472, "579c537a9a18"),
    "revcol_tiny/classifier": (30_456_168, 4_517_355_520, "e1eba5720e1b"),
    "revcol_small/classifier": (60_568_424, 9_043_832_832, "c07be4c68420"),
    "revcol_base/classifier": (138_616_408, 16_585_449_984, "1060822e089d"),
    "revcol_large/classifier": (273_095_400, 39_306_092_544, "4edd02a3d1eb"),
    "revcol_xlarge/classifier": (833_807_400, 120_206_026_752, "9a2556f09c24"),
    "revcol_huge/classifier": (2_157_600_160, 310_617_031_680, "320c21c5e4bc"),
    "vit_nano/classifier": (315_432, 4_340_736, "bae1871f3cb7"),
    "vit_nano/detector": (299_776, 5_849_600, "1d8f1f3f96c0"),
    "vit_nano/segmentor": (302_848, 24_379_904, "b64105f254b3"),
    "vit_tiny/classifier": (5_717_416, 1_253_683_200, "6bb6b986a1ad"),
    "vit_tiny/detector": (5_967_360, 1_426_899_456, "d62b9c13e41c"),
    "vit_tiny/segmentor": (6_126_336, 11_339_371_008, "3e57cff40b69"),
    "vit_small/classifier": (22_050_664, 4_598_882_304, "1fe6051a483b"),
    "vit_small/detector": (23_436_288, 5_292_131_328, "178f67e127d9"),
    "vit_small/segmentor": (23_754_240, 35_372_934_144, "5e995e55faf7"),
    "vit_base/classifier": (86_567_656, 17_563_828_224, "327551d321bb"),
    "vit_base/detector": (92_878_848, 20_337_592_320, "4640934b87a5"),
    "vit_base/segmentor": (93_514_752, 121_522_636_800, "18cc09587d12"),
    "vit_large/classifier": (304_326_632, 61_554_712_576, "7e81ab140cd5"),
    "vit_large/detector": (315_887_616, 66_486_190_080, "9e4dcbcfe7de"),
    "vit_large/segmentor": (316_735_488, 387_755_065_344, "368de460f040"),
    "revcolv2_nano/classifier": (566_164, 6_400_896, "f2e92dbf178f"),
    "revcolv2_nano/pretrainer": (554_988, 6_484_992, "495b47a9607d"),
    "revcolv2_nano/detector": (684_856, 22_093_824, "22e32ca5ea79"),
    "revcolv2_nano/segmentor": (549_948, 44_187_648, "6ace604c5588"),
    "revcolv2_base/classifier": (89_131_240, 12_852_464_640, "0ed227f6e50c"),
    "revcolv2_base/pretrainer": (89_043_456, 11_684_284_416, "195705e9ec11"),
    "revcolv2_base/detector": (92_046_688, 21_497_806_848, "f8836dfd74aa"),
    "revcolv2_base/segmentor": (91_155_840, 132_724_555_776, "bfd4b089cb20"),
    "revcolv2_large/classifier": (325_140_200, 45_692_912_640, "f4fff549d4e8"),
    "revcolv2_large/pretrainer": (324_994_048, 41_543_720_960, "8241b11c4785"),
    "revcolv2_large/detector": (329_161_632, 69_756_682_240, "60457b835b5c"),
    "revcolv2_large/segmentor": (330_481_280, 427_399_577_600, "eedda5b3a4e7"),
    "swin_nano/classifier": (504_942, 6_685_696, "f2a0ad70491b"),
    "swin_nano/detector": (376_486, 7_405_568, "a49fd57c665a"),
    "swin_nano/segmentor": (376_486, 26_279_936, "a49fd57c665a"),
    "swin_tiny/classifier": (28_288_354, 4_490_566_656, "7528ed603d4e"),
    "swin_tiny/detector": (27_520_698, 4_489_798_656, "62fe453ef569"),
    "swin_tiny/segmentor": (27_520_698, 25_502_541_696, "62fe453ef569"),
    "swin_small/classifier": (49_606_258, 8_740_875_264, "3ee197fa807c"),
    "swin_small/detector": (48_838_602, 8_740_107_264, "e2d680a167d3"),
    "swin_small/segmentor": (48_838_602, 49_221_659_520, "e2d680a167d3"),
    "swin_base/classifier": (87_768_224, 15_430_946_816, "163c87f9366f"),
    "swin_base/detector": (86_745_016, 15_429_922_816, "12b467bb0201"),
    "swin_base/segmentor": (86_745_016, 86_843_439_616, "12b467bb0201"),
    "cvt_nano/classifier": (210_024, 4_706_816, "20bea14f4a91"),
    "cvt_13/classifier": (19_936_296, 4_543_682_816, "86ec7b929e60"),
    "resnet_nano/classifier": (411_528, 13_350_912, "aed39653458b"),
    "resnet50/classifier": (25_557_032, 4_089_184_256, "9df9509710af"),
    "t2t_nano/classifier": (299_118, 10_317_824, "d39cac392748"),
    "t2t_vit_14/classifier": (21_465_806, 4_783_468_544, "a60d481e2502"),
    "vit_base_drloc/classifier": (86_540_008, 17_563_828_224, "e68b8041508a"),
    "vit_base_drloc/detector": (92_851_200, 20_337_592_320, "71b586a3e61c"),
    "vit_base_drloc/segmentor": (93_487_104, 121_522_636_800, "4ad8624d38c4"),
}


def _build(name, kind, device):
    with torch.device(device):
        return BUILDERS[kind](CONFIGS[name])


@functools.cache
def _cost(name, kind):
    return measure_cost(lambda: BUILDERS[kind](CONFIGS[name]), _size(name, kind))


def _is_built(family, kind):
    """Whether the family builds this kind, asked for its first network."""
    name = next(name for name, entry in MODELS.items() if entry.family == family)
    try:
        _build(name, kind, "meta")
    except RecipeError:
        return False
    return True


PAPERS = {entry.family for entry in MODELS.values()}
KINDS = {family: [kind for kind in BUILDERS if _is_built(family, kind)] for family in PAPERS}
EVERY = [(name, kind) for name, entry in MODELS.items() for kind in KINDS[entry.family]]

# A plugin's networks may still change; its counts are compared with its entries.
OURS = [
    pair for pair in EVERY if source_of(f"{FAMILIES}.{MODELS[pair[0]].family}.family").is_relative_to(PACKAGE)
]


def test_every_network_is_pinned():
    assert {f"{name}/{kind}" for name, kind in OURS} == set(PINNED)


def _forward(model, kind, size, device):
    with torch.device(device):
        images = torch.randn(2, 3, size, size)
        if kind == "pretrainer":
            return model(images, torch.rand(2, model.num_units))
        return model(images)


def _size(name, kind):
    return _crop_size(CONFIGS[name]) if kind == "segmentor" else CONFIGS[name].image_size


def _check_features(model, images):
    """Every block has a grid of tokens; the vectors are those of the classifier and of the bare encoder."""
    found = model.features(images, blocks=range(model.num_blocks))
    assert found.pooled.shape == model.frozen_features(images).shape == (2, model.feature_width)
    for tokens, (rows, columns), map_BCHW in zip(found.tokens, found.grids, found.maps(), strict=True):
        assert tokens.shape[:2] == (2, rows * columns)
        assert map_BCHW.shape == (2, tokens.shape[2], rows, columns)
    _check_last_blocks(model, images, has_class_tokens=bool(found.class_tokens))
    read = model.forward_features(images)
    assert model.logits(read).shape == (2, model.num_classes)
    assert read.tokens[0].shape == found.tokens[-1].shape
    assert model.final_norm(read.tokens[0]).shape == read.tokens[0].shape


def _check_last_blocks(model, images, *, has_class_tokens):
    """Features of two blocks end with those of the last one, or are refused."""
    if model.num_blocks < 2:
        return
    if not has_class_tokens and type(model).frozen_features is Encoder.frozen_features:
        with pytest.raises(InputError, match="no class tokens"):
            model.frozen_features(images, 2)
        return
    found = model.frozen_features(images, 2)
    assert found.shape == (2, 2 * model.feature_width)
    if not found.is_meta:
        torch.testing.assert_close(found[:, -model.feature_width :], model.frozen_features(images))


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_shapes_strides_and_gradients(name, kind):
    device = "cpu" if CONFIGS[name].image_size == SMALL_SIZE else "meta"
    torch.manual_seed(0)
    model, size = _build(name, kind, device), _size(name, kind)
    if kind == "detector":
        size += -size % 64  # for maps down to stride 64
    out = _forward(model, kind, size, device)
    if kind == "classifier":
        assert out.shape == (2, 1000)
        if device == "cpu" or name in SMALLEST:
            with torch.no_grad():
                _check_features(model, torch.zeros(2, 3, size, size, device=device))
        total = out.square().sum()
    elif kind == "pretrainer":
        assert out.pred_BND.shape == (2, (size // 16) ** 2, 768)
        assert out.mask_BN.shape == out.pred_BND.shape[:2]
        total = out.pred_BND.square().sum()
    else:
        strides = (4, 8, 16, 32, 64)[: len(out)]
        for x_BCHW, num_channels, stride in zip(out, model.widths, strides, strict=True):
            assert x_BCHW.shape == (2, num_channels, size // stride, size // stride)
        total = sum(x.square().sum() for x in out)
    if device == "meta" and name not in SMALLEST:
        return
    total.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert not [n for n, p in trained.items() if p.grad is None or p.grad.shape != p.shape]
    if device == "cpu":
        assert not [n for n, p in trained.items() if not p.grad.isfinite().all() or not p.grad.any()]


@pytest.mark.parametrize(("name", "kind"), OURS)
def test_names_parameters_and_macs_stay(name, kind):
    state = _build(name, kind, "meta").state_dict()
    lines = "\n".join(f"{key} {tuple(tensor.shape)}" for key, tensor in sorted(state.items()))
    digest = hashlib.sha256(lines.encode()).hexdigest()[:12]
    params, macs, expected = PINNED[f"{name}/{kind}"]
    assert digest == expected  # of the names and shapes, and so of the number of parameters
    # Counting takes seconds on a large one. Classifiers of all sizes are counted by the test below.
    if name in SMALLEST or "nano" in name:
        cost = _cost(name, kind)
        assert (cost.params, cost.macs) == (params, macs)


@pytest.mark.parametrize("name", MODELS)
def test_registry_entries_hold_the_measured_counts(name):
    entry = MODELS[name]
    cost = _cost(name, "classifier")
    assert (cost.params, cost.macs) == (entry.classifier_params, entry.classifier_macs)
    if entry.published_params is not None:
        assert cost.params / 1e6 == pytest.approx(entry.published_params, rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_a_library_user_gets_a_backbone(name):
    with torch.device("meta"):
        backbone = create_backbone(name)
    classifier = _build(name, "classifier", "meta").state_dict()
    assert backbone.state_dict()
    assert set(backbone.state_dict()) <= {key.removeprefix("backbone.") for key in classifier}


@pytest.mark.parametrize("name", [name for name, entry in MODELS.items() if entry.family == "hivit"])
def test_a_library_user_gets_hivit_with_relative_positions(name):
    with torch.device("meta"):
        backbone = create_backbone(name, relative_position=True)
        features = backbone.forward_stages(torch.empty(1, 3, backbone.image_size, backbone.image_size))
    assert backbone.num_blocks == sum(backbone.shape.depths)
    assert features.level16_BNC.shape == (1, backbone.grid_side**2, backbone.widths[-1])


@pytest.mark.parametrize(
    ("name", "kind"), [pair for pair in EVERY if CONFIGS[pair[0]].image_size == SMALL_SIZE]
)
def test_the_same_seed_gives_the_same_network(name, kind):
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(_build(name, kind, "cpu").state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
