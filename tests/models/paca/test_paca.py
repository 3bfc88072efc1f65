"""What holds for PaCa networks besides the recorded numbers: sharing, clusters, sizes, transfer, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vitpipe.benchmarks.model_cost import measure_cost
from vitpipe.config.model import model_config
from vitpipe.contracts.errors import CheckpointError, InputError
from vitpipe.models.build import build_classifier, build_dense, build_encoder
from vitpipe.models.convert import convert_state
from vitpipe.models.paca.paca import PaCa
from vitpipe.models.paca.paca_shapes import SHAPES
from vitpipe.models.transfer import transfer_weights
from vitpipe.models.weights import save_weights


def nano(**options):
    return model_config({"name": "paca_nano", "image_size": 64, **options})


def count_clusterings(network):
    return sum(name.endswith(".clustering") for name, module in network.named_modules() if module is not None)


@settings(max_examples=15, deadline=None)
@given(st.integers(32, 90), st.integers(32, 90), st.sampled_from(["conv", "mlp", "linear"]))
def test_every_size_works_and_shares_of_a_cluster_sum_to_one(height, width, kind):
    torch.manual_seed(0)
    network = build_encoder(nano(clustering=kind, clusters=[5, 4, 3, 2])).eval()
    with torch.no_grad():
        found = network.backbone(torch.randn(2, 3, height, width))
    for stage, (output, number) in enumerate(zip(found.stages, (5, 4, 3, 2), strict=True)):
        rows, columns = (-(-side // (4 << stage)) for side in (height, width))
        assert output.grid == (rows, columns)
        assert output.shares.shape == (2, number, rows * columns)
        torch.testing.assert_close(output.shares.sum(-1), torch.ones(2, number))
        assert output.tokens.isfinite().all()


def test_an_assignment_is_made_once_per_stage_or_in_every_block():
    by_stage, by_block = (build_encoder(nano(assignment=kind)) for kind in ("stage", "block"))
    assert (count_clusterings(by_stage), count_clusterings(by_block)) == (3, 4)
    images = torch.randn(1, 3, 64, 64)
    blocks = by_stage.backbone.stages[2]
    seen = []
    for block in blocks:
        block.attn.register_forward_hook(lambda *call: seen.append(call[2][1]))
    by_stage.features(images)
    assert seen[0] is seen[1]


def test_the_teacher_assigns_for_all_blocks_and_learns():
    torch.manual_seed(0)
    network = PaCa(SHAPES["paca_teacher_tiny"], clusters=(6, 5, 4, 3))
    assert count_clusterings(network) == 0
    found = network(torch.randn(2, 3, 64, 64))
    assert [output.shares.shape[1] for output in found.stages] == [6, 5, 4, 3]
    found.stages[-1].tokens.square().sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if name.startswith("teacher.")}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())


def test_features_have_the_grids_of_their_stages_and_attention_to_clusters():
    network = build_encoder(nano()).eval()
    found = network.features(torch.randn(2, 3, 64, 96), range(network.num_blocks), attention=True)
    assert found.grids == ((16, 24), (8, 12), (4, 6), (4, 6), (2, 3))
    # 16, 16 and 8 clusters, and all patches in the last stage.
    assert [tuple(a.shape[1:]) for a in found.attention] == [
        (2, 384, 16), (2, 96, 16), (4, 24, 8), (4, 24, 8), (4, 6, 6)
    ]  # fmt: skip
    for part in found.attention:
        torch.testing.assert_close(part.sum(-1), torch.ones(part.shape[:-1]))
    torch.testing.assert_close(network.final_norm(found.tokens[-1]).mean(1), found.pooled)
    look = network.image_attention(torch.randn(2, 3, 64, 96))
    assert look.shape == (2, 2, 3)
    torch.testing.assert_close(look.sum((1, 2)), torch.ones(2))
    clustered = build_encoder(nano(clusters=[8, 8, 4, 4])).eval()
    torch.testing.assert_close(clustered.image_attention(torch.randn(1, 3, 64, 64)).sum(), torch.tensor(1.0))


@pytest.mark.parametrize("name", ["paca_tiny", "paca_teacher_tiny"])
def test_multiply_adds_per_patch_do_not_grow_with_the_image(name):
    clusters = [100, 100, 100, 100]

    def per_patch(side):
        model = model_config({"name": name, "image_size": side, "clusters": clusters})
        return measure_cost(lambda: build_classifier(model, num_classes=10), side).macs / (side / 4) ** 2

    small, large = per_patch(224), per_patch(896)
    # They fall a little: keys and values of the clusters are computed once, whatever the size.
    assert 0.9 * small < large <= small


def test_another_number_of_clusters_keeps_the_last_map_s_initial_values(tmp_path):
    torch.manual_seed(1)
    save_weights(build_classifier(nano(), num_classes=3), tmp_path / "w.safetensors")
    network = build_dense(nano(dense_clusters=[20, 20, 20, 0]), "segment", image_size=64)
    before = {name: t.clone() for name, t in network.state_dict().items()}
    rows = {row["target"]: row for row in transfer_weights(network, tmp_path / "w.safetensors").table()}
    fresh = {name for name, row in rows.items() if row["outcome"] == "fresh"}
    assert fresh == {f"backbone.stages.{s}.0.attn.clustering.to_clusters.weight" for s in range(3)}
    assert all(torch.equal(network.state_dict()[name], before[name]) for name in fresh)
    moved = network.state_dict()["backbone.stages.0.0.attn.q.weight"]
    assert not torch.equal(moved, before["backbone.stages.0.0.attn.q.weight"])
    # The same network takes everything; another number of classes keeps the head's initial values.
    assert not [
        r
        for r in transfer_weights(build_classifier(nano(), num_classes=3), tmp_path / "w.safetensors").table()
        if r["outcome"] not in ("matched",)
    ]


@pytest.mark.dense
def test_weights_survive_the_framework_s_initialisation(tmp_path):
    """mmengine's `init_weights` goes through all modules; the released backbone loses its weights there."""
    from vitpipe.config.read import load_recipe
    from vitpipe.dense.detector import build_detector, detector_config
    from vitpipe.dense.mm_import import open_detection

    open_detection()
    head = "detect.head={name: mask_rcnn, neck: fpn, width: 16, fc_width: 16}"
    recipe = load_recipe("selfpatch/dino", "demo", ["model={name: paca_nano, image_size: 64, patch_size: null, pooling: null}",
                         "stages=[prepare, detect, report]", head])  # fmt: skip
    detector = build_detector(
        detector_config(recipe.detect, recipe.model, num_classes=3, norm="BN"), recipe.detect
    )
    detector.init_weights()
    torch.manual_seed(5)
    save_weights(build_encoder(recipe.model), tmp_path / "w.safetensors")
    transfer_weights(detector.backbone.net, tmp_path / "w.safetensors")
    loaded = {name: t.clone() for name, t in detector.backbone.state_dict().items()}
    detector.init_weights()
    assert all(torch.equal(t, loaded[name]) for name, t in detector.backbone.state_dict().items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 31}, "below 32 pixels"),
        ({"clusters": [1, 2, 3]}, "clusters"),
        ({"clusters": [-1, 2, 3, 0]}, "clusters"),
        ({"dense_clusters": [200, 200, 200, 200]}, "must be 0 where clusters"),
        ({"name": "paca_teacher_tiny", "clusters": [9, 9, 9, 0]}, "at least one cluster"),
        ({"name": "paca_teacher_tiny", "clustering": "mlp"}, "do not apply to it"),
        ({"name": "paca_teacher_tiny", "assignment": "block"}, "do not apply to it"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValidationError, match=words):
        nano(**options)


def test_images_below_a_patch_and_stages_without_clusters_are_refused():
    network = build_encoder(nano())
    with pytest.raises(InputError, match="cannot take an image of 31 x 64"):
        network.features(torch.zeros(1, 3, 31, 64))
    with pytest.raises(InputError, match=r"no clusters.*choose one of \[1, 2, 3\]"):
        network.backbone.assignment(torch.zeros(1, 3, 64, 64), 4)
    with pytest.raises(InputError, match="at least one cluster"):
        PaCa(SHAPES["paca_teacher_tiny"], clusters=(1, 1, 1, 0))


def test_unknown_tensors_and_sizes_are_refused():
    from paca_golden import official

    state = official("pacavit_tiny_p2cconv_100_0")
    with pytest.raises(CheckpointError, match=r"stage1\.0\.attn\.extra is not known"):
        convert_state({**state, "stage1.0.attn.extra": torch.zeros(1)})
    short = {name: tensor for name, tensor in state.items() if not name.startswith("stage4.1.")}
    with pytest.raises(CheckpointError, match="no known size"):
        convert_state(short)
    teacher = official("pacavit_convmixer_tiny_100")
    part = {n: t for n, t in teacher.items() if not n.startswith("paca_teacher.to_clusters2")}
    with pytest.raises(
        CheckpointError, match=r"teacher of paca_teacher_tiny lacks paca_teacher\.to_clusters2"
    ):
        convert_state(part)
    blur = "paca_teacher.transition1.0.blur_filter"
    convert_state({n: t for n, t in teacher.items() if n != blur})
    with pytest.raises(CheckpointError, match=r"blur, a constant, has other values"):
        convert_state({**teacher, blur: teacher[blur] * 1.1})
