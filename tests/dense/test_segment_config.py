"""UPerNet's configuration: the values of iTPN's released configurations, one by one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vitpipe.contracts.errors import DatasetError
from vitpipe.dense.method import DenseMethod
from vitpipe.dense.mm_import import open_segmentation
from vitpipe.dense.segmentor import (
    ade_dataset,
    ade_places,
    build_segmentor,
    eval_pipeline,
    segmentor_config,
    train_pipeline,
)

pytestmark = pytest.mark.dense


@pytest.fixture(scope="module")
def config(full_recipe):
    return segmentor_config(full_recipe.segment, full_recipe.model, num_classes=150, norm="SyncBN")


@pytest.fixture(scope="module")
def segmentor(config, full_recipe):
    """The full network without memory."""
    open_segmentation()
    with torch.device("meta"):
        return build_segmentor(config, full_recipe.segment)


def test_heads(config):
    head, auxiliary = config["decode_head"], config["auxiliary_head"]
    assert head["in_channels"] == [384, 512, 768, 768]
    assert (head["channels"], head["pool_scales"], head["dropout_ratio"]) == (768, (1, 2, 3, 6), 0.1)
    assert head["loss_decode"]["loss_weight"] == 1.0
    assert (auxiliary["in_channels"], auxiliary["in_index"], auxiliary["channels"]) == (768, 2, 256)
    assert (auxiliary["num_convs"], auxiliary["loss_decode"]["loss_weight"]) == (1, 0.4)
    for part in (head, auxiliary):
        assert (part["num_classes"], part["norm_cfg"]["type"]) == (150, "SyncBN")


def test_large_widths(full_recipe):
    model = full_recipe.model.model_copy(update={"name": "hivit_large"})
    config = segmentor_config(full_recipe.segment, model, num_classes=150, norm="BN")
    assert config["decode_head"]["in_channels"] == [448, 640, 1024, 1024]


def test_sliding_window_and_padding(config):
    assert config["test_cfg"] == {"mode": "slide", "crop_size": (512, 512), "stride": (341, 341)}
    assert config["data_preprocessor"]["size"] == (512, 512)
    assert config["data_preprocessor"]["test_cfg"] == {"size": (512, 512)}
    assert config["data_preprocessor"]["seg_pad_val"] == 255
    assert (config["backbone"]["image_size"], config["backbone"]["drop_path"]) == (512, 0.1)


def test_pipelines(full_recipe):
    steps = {step["type"]: step for step in train_pipeline(full_recipe.segment)}
    assert (steps["RandomResize"]["scale"], steps["RandomResize"]["ratio_range"]) == ((2048, 512), (0.5, 2.0))
    assert (steps["RandomCrop"]["crop_size"], steps["RandomCrop"]["cat_max_ratio"]) == ((512, 512), 0.75)
    assert steps["RandomFlip"]["prob"] == 0.5
    assert "PhotoMetricDistortion" in steps
    tested = {step["type"]: step for step in eval_pipeline(full_recipe.segment)}
    assert tested["Resize"] == {"type": "Resize", "scale": (2048, 512), "keep_ratio": True}
    assert "RandomFlip" not in tested


def test_layer_decay(segmentor, full_recipe):
    groups = DenseMethod(segmentor).groups(full_recipe.segment.optim)
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    factor, net = 0.9 ** (13 / 32), "backbone.net.backbone"
    expected = {
        f"{net}.stem.proj.weight": factor**31,
        f"{net}.absolute_position": factor**31,
        f"{net}.stage16.23.attn.qkv.weight": 1.0437,
        f"{net}.stage16.22.attn.qkv.weight": 1.0,
        "decode_head.conv_seg.weight": 1.0,
    }
    assert {name: scale[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert decay[f"{net}.absolute_position"] == decay[f"{net}.stage16.0.attn.relative_table"] == 0.05
    assert decay[f"{net}.stem.proj.bias"] == 0.0
    assert segmentor.backbone.net.backbone.stage16[0].attn.relative_table.shape == (63 * 63, 8)


def test_small_images_are_padded_for_the_relative_bias(tiny_recipe):
    """The prediction of an image whose short side is below the crop has the original size."""
    from mmseg.structures import SegDataSample

    open_segmentation()
    section = tiny_recipe.segment
    torch.manual_seed(0)
    config = segmentor_config(section, tiny_recipe.model, num_classes=3, norm="BN")
    network = build_segmentor(config, section).eval()
    meta = {"img_shape": (40, 200), "ori_shape": (20, 100), "pad_shape": (40, 200), "flip": False}
    sample = SegDataSample(metainfo=meta)
    with torch.no_grad():
        image = torch.zeros(3, 40, 200, dtype=torch.uint8)
        (found,) = network.test_step({"inputs": [image], "data_samples": [sample]})
    assert found.pred_sem_seg.data.shape == (1, 20, 100)


def test_labels_lose_their_zero(prepared, tiny_recipe, tmp_path):
    """Class 1 of the files is index 0, label 0 is ignored; mmseg has read what the PNG says."""
    import numpy as np
    from PIL import Image

    from vitpipe.datasets.dense_folder import open_dense

    open_segmentation()
    folder = open_dense(prepared, "ade20k", tmp_path)
    val = ade_dataset(folder, "val", eval_pipeline(tiny_recipe.segment))
    for index in range(len(val)):
        labels = np.asarray(Image.open(val.get_data_info(index)["seg_map_path"])).astype(int)
        read = val[index]["data_samples"].gt_sem_seg.data[0].numpy()
        assert np.array_equal(read, np.where(labels == 0, 255, labels - 1))
    assert val.metainfo["classes"] == folder.classes


def test_missing_label_maps_are_named(tmp_path):
    empty = SimpleNamespace(root=tmp_path, classes=("one",))
    with pytest.raises(DatasetError, match=r"no \.jpg files"):
        ade_dataset(empty, "train", [])
    for folder, names in (("images", ("a.jpg", "b.jpg")), ("annotations", ("a.png",))):
        place = tmp_path / folder / "training"
        place.mkdir(parents=True)
        for name in names:
            (place / name).touch()
    with pytest.raises(DatasetError, match=r"1 image without a label map \(b\)"):
        ade_places(tmp_path, "train")
