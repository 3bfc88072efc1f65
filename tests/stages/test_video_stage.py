"""Stage `video` on embedded clips: figures, tables, files, ranks, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import video_runs
from embedded_sets import prepare_sets
from PIL import Image
from tiny_runs import free_port, run_processes

from vitpipe.config.data import DataConfig
from vitpipe.config.read import load_recipe
from vitpipe.contracts.errors import DatasetError, InputError, RecipeError
from vitpipe.contracts.graph import all_stages, graph_of
from vitpipe.contracts.logger import MemoryLogger
from vitpipe.data.image_grid import note_of
from vitpipe.datasets.davis_palette import davis_palette
from vitpipe.datasets.embedded.write import write_davis
from vitpipe.evaluate.video_metrics import mean_scores, score_video
from vitpipe.models.network import Encoder
from vitpipe.stages.video import figure, stage

NAMES = {
    "JF_mean",
    *(f"{m}_{name}" for m in "JF" for name in ("mean", "recall", "decay")),
    *(f"random_{name}" for name in ("JF_mean", "J_mean", "F_mean")),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Prepared clips and the weights of a small vit; tests read it, and write into folders of their own."""
    root = tmp_path_factory.mktemp("video")
    video_runs.make_inputs(root)
    return root


@pytest.fixture(scope="module")
def finished(root) -> tuple[dict[str, float], MemoryLogger, Path]:
    """A run of the vit: metrics, logger, folder."""
    logger = MemoryLogger()
    metrics = stage.run(video_runs.context(root, "vit", logger=logger))
    return metrics, logger, root / "vit"


def labels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_metrics_are_those_of_the_written_masks(finished, root):
    metrics, logger, folder = finished
    assert set(metrics) == NAMES
    (unpacked,) = (root / "state/data").glob("davis-*")
    objects = []
    for row in logger.tables["video_sequences"]:
        annotated = sorted((unpacked / "Annotations/480p" / row["video"]).glob("*.png"))
        found = sorted((folder / "results" / row["video"]).glob("*.png"))
        assert [path.name for path in found] == [path.name for path in annotated]
        scores = score_video(row["video"], [*map(labels_of, annotated)], [*map(labels_of, found)])
        own = mean_scores(scores.statistics())
        assert row["JF_mean"] == own["JF_mean"]
        assert (row["frames"], row["scored"], row["objects"]) == (6, 4, len(scores.region))
        objects += scores.statistics()
    trained = {name: value for name, value in metrics.items() if not name.startswith("random_")}
    assert trained == mean_scores(objects)
    # Random features, too, but not the same ones.
    assert 0.05 < metrics["random_JF_mean"] != metrics["JF_mean"]
    rows = logger.tables["video_objects"]
    assert [{name: row[name] for name in objects[0]} for row in rows] == objects
    # Features of random weights follow objects a little: not all frames are background.
    assert metrics["JF_mean"] > 0.05


def test_masks_are_indexed_and_the_first_one_is_the_annotation(finished, root):
    _, _, folder = finished
    (unpacked,) = (root / "state/data").glob("davis-*")
    first = folder / "results/digits-val-00/00000.png"
    picture = Image.open(first)
    assert picture.mode == "P"
    assert picture.getpalette()[: 3 * 4] == davis_palette()[: 3 * 4]
    given = labels_of(unpacked / "Annotations/480p/digits-val-00/00000.png")
    assert (labels_of(first) == given).all()


def test_the_protocol_says_how_it_was_measured(finished):
    _, logger, _ = finished
    rows = [row for row in logger.tables["protocol"] if row["metric"] == "JF_mean"]
    found = {row["setting"]: row["value"] for row in rows}
    assert found["frame size"] == "short side 64, long side down to a multiple of 8"
    assert found["context"] == "first frame and the last 7"
    assert found["neighbourhood"] == "12 rows and columns"
    assert (found["top-k"], found["temperature"]) == ("5", "0.1")
    assert found["frames scored"].startswith("all but the first and the last")
    assert found["objects"] == str(len(logger.tables["video_objects"]))
    assert {row["metric"] for row in logger.tables["protocol"]} == {n for n in NAMES if n[:7] != "random_"}


def test_the_animation_shows_the_first_videos(finished):
    _, logger, folder = finished
    path = logger.figures["videos"]
    assert path == folder / "videos.gif"
    with Image.open(path) as picture:
        assert (picture.n_frames, picture.format) == (6, "GIF")
    assert note_of(path).startswith("The first 2 validation videos")


def test_an_object_without_a_patch_is_named(finished):
    _, logger, _ = finished
    lost = [row for row in logger.tables["video_objects"] if row["first_patches"] == 0]
    assert lost
    (line,) = [line for line in logger.lines if "cannot be followed" in line]
    assert f"{lost[0]['object']} of {lost[0]['video']}" in line
    assert all(row["J_mean"] == 0 for row in lost)


@pytest.mark.parametrize("settings", [video_runs.HIVIT, video_runs.REVCOL], ids=["hivit", "revcol"])
def test_other_families(settings, root, tmp_path):
    (tmp_path / "data").symlink_to(root / "data")
    video_runs.make_inputs(tmp_path, settings)
    metrics = stage.run(video_runs.context(tmp_path, "out", settings))
    assert set(metrics) == NAMES
    assert 0 < metrics["JF_mean"] < 1


def test_swin_takes_frames_of_its_own_size(tmp_path):
    settings = (
        *video_runs.NOT_HIVIT,
        "model.name=swin_nano",
        "model.image_size=128",
        "video.short_side=128",
        "video.size_multiple=64",
    )
    write_davis(tmp_path / "raw/davis", video_runs.CLIPS)
    for path in sorted((tmp_path / "raw/davis").rglob("*.[jp][pn]g")):
        with Image.open(path) as picture:
            square = picture.resize((96, 96), Image.Resampling.NEAREST)
        square.save(path)
    data = DataConfig(root=tmp_path / "raw", sets=("davis",))
    prepare_sets(tmp_path / "prepare", data).rename(tmp_path / "data")
    video_runs.make_inputs(tmp_path, settings)
    assert set(stage.run(video_runs.context(tmp_path, "out", settings))) == NAMES


def test_frames_of_another_size_than_the_network_s_own_are_refused(root, tmp_path):
    (tmp_path / "data").symlink_to(root / "data")
    settings = ("model.image_size=64", "video.size_multiple=16")  # with relative positions
    video_runs.make_inputs(tmp_path, settings)
    with pytest.raises(InputError, match=r"become 64 x 112 pixels.*takes images of 64 x 64 pixels only"):
        stage.run(video_runs.context(tmp_path, "out", settings))


def test_the_batch_changes_nothing(finished, root):
    metrics = stage.run(video_runs.context(root, "single", (*video_runs.VIT, "video.batch=1")))
    assert metrics == pytest.approx(finished[0], abs=2e-3)


def test_every_setting_of_the_propagation_acts(finished, root):
    for change in ("num_context_frames=0", "neighbourhood=1", "top_k=1", "temperature=2.0"):
        settings = (*video_runs.VIT, f"video.{change}", "video.sample_videos=0")
        assert stage.run(video_runs.context(root, "changed", settings)) != finished[0], change
    assert not (root / "changed/videos.gif").exists()


def test_two_ranks_give_the_same_figures_and_files(finished, root, tmp_path):
    shutil.copytree(root / "data", tmp_path / "data")
    shutil.copytree(root / "weights", tmp_path / "weights")
    port = free_port()
    codes = run_processes(video_runs.rank_child, *((tmp_path, rank, 2, port) for rank in range(2)))
    assert codes == [0, 0]
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == finished[0]
    files = sorted(path.relative_to(finished[2]) for path in finished[2].rglob("*.png"))
    for name in files:
        assert (tmp_path / "of0" / name).read_bytes() == (finished[2] / name).read_bytes()
    assert not list((tmp_path / "of1").rglob("*.png"))


def folder_of_clips(tmp_path: Path) -> Path:
    """A user's DAVIS folder, the first two validation videos of which are cut to one and two frames."""
    place = tmp_path / "raw/davis"
    write_davis(place, video_runs.CLIPS)
    for number in range(2):
        for folder in (place / kind / f"480p/digits-val-0{number}" for kind in ("JPEGImages", "Annotations")):
            for path in sorted(folder.iterdir())[1 + number :]:
                path.unlink()
    return place


def prepared_folder(tmp_path: Path) -> None:
    data = DataConfig(root=tmp_path / "raw", sets=("davis",))
    prepare_sets(tmp_path / "prepare", data).rename(tmp_path / "data")
    video_runs.make_inputs(tmp_path)


def test_videos_without_a_frame_to_score_count_in_no_mean(tmp_path):
    folder_of_clips(tmp_path)
    prepared_folder(tmp_path)
    logger = MemoryLogger()
    metrics = stage.run(video_runs.context(tmp_path, "out", logger=logger))
    whole = logger.tables["video_sequences"][2]
    assert metrics["JF_mean"] == whole["JF_mean"]
    assert [row["scored"] for row in logger.tables["video_sequences"]] == [0, 0, 4]
    assert [row["JF_mean"] for row in logger.tables["video_sequences"]][:2] == ["", ""]
    assert logger.tables["video_objects"][0]["J_mean"] == ""
    assert any("2 videos have fewer than three frames" in line for line in logger.lines)
    assert len(list((tmp_path / "out/results/digits-val-00").iterdir())) == 1
    with Image.open(tmp_path / "out/videos.gif") as picture:
        assert picture.n_frames == 2


def test_only_such_videos_are_refused(tmp_path):
    place = folder_of_clips(tmp_path)
    (place / "ImageSets/2017/val.txt").write_text("digits-val-00\ndigits-val-01\n")
    prepared_folder(tmp_path)
    with pytest.raises(DatasetError, match="No video has a frame to score: of digits-val-00, digits-val-01"):
        stage.run(video_runs.context(tmp_path, "out"))


def test_numbers_without_an_object_are_named(tmp_path):
    """The official rules number objects from 1 to the largest label: one that is nowhere counts as perfect."""
    place = tmp_path / "raw/davis"
    write_davis(place, video_runs.CLIPS)
    for path in sorted((place / "Annotations/480p/digits-val-00").iterdir()):
        with Image.open(path) as picture:
            labels, palette = np.asarray(picture).copy(), picture.getpalette()
        labels[labels == labels.max()] = 5
        changed = Image.fromarray(labels)
        changed.putpalette(palette)
        changed.save(path)
    prepared_folder(tmp_path)
    logger = MemoryLogger()
    stage.run(video_runs.context(tmp_path, "out", logger=logger))
    (line,) = [line for line in logger.lines if "in no annotation" in line]
    assert "4 of digits-val-00" in line
    assert "Number the objects without gaps" in line
    lost = [line for line in logger.lines if "cannot be followed" in line]
    assert not any("4 of digits-val-00" in line for line in lost)


def test_later_objects_and_label_255_are_background(tmp_path):
    place = tmp_path / "raw/davis"
    write_davis(place, video_runs.CLIPS)

    def figures(name: str) -> dict[str, float]:
        shutil.rmtree(tmp_path / "prepare", ignore_errors=True)
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        prepared_folder(tmp_path)
        return stage.run(video_runs.context(tmp_path, name))

    before = figures("before")
    for path in sorted((place / "Annotations/480p/digits-val-00").iterdir()):
        with Image.open(path) as picture:
            labels, palette = np.asarray(picture).copy(), picture.getpalette()
        corner = labels[:6, :6]
        # In the first frame 255, in later ones an object that was not there.
        corner[corner == 0] = 255 if path.stem == "00000" else 9
        changed = Image.fromarray(labels)
        changed.putpalette(palette)
        changed.save(path)
    assert figures("after") == before


def test_a_failed_figure_does_not_fail_the_stage(root, finished, monkeypatch):
    def broken(*_args, **_options):
        raise ValueError("no palette")

    monkeypatch.setattr(figure, "write_animation", broken)
    logger = MemoryLogger()
    assert stage.run(video_runs.context(root, "no-figure", logger=logger)) == finished[0]
    assert any("figure videos was not drawn (ValueError: no palette)" in line for line in logger.lines)
    assert not logger.figures


def test_tokens_are_those_behind_the_final_norm(root, finished, monkeypatch):
    monkeypatch.setattr(Encoder, "final_norm", lambda self, tokens: tokens)
    for kind in Encoder.__subclasses__():
        if "final_norm" in vars(kind):
            monkeypatch.delattr(kind, "final_norm")
    assert stage.run(video_runs.context(root, "no-norm")) != finished[0]


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (["video.short_side=100"], r"video\.short_side is 100, 'vit_nano' needs a multiple of 8"),
        (["video.size_multiple=12"], r"video\.size_multiple is 12, 'vit_nano' needs a multiple of 8"),
        (["video.size_multiple=128"], "size_multiple 128 is above short_side 64"),
        (["video.dataset=coco"], "'video' reads a set in the layout of davis, but 'coco'"),
    ],
)
def test_mistakes_in_the_recipe_are_named(settings, what):
    from vitpipe.stages.resolved import training_steps

    with pytest.raises(RecipeError, match=what):
        training_steps(video_runs.recipe_of([*video_runs.VIT, *settings]), 1)


def test_a_network_of_one_size_is_refused_when_the_recipe_is_read():
    settings = ["stages=[prepare, pretrain, video]", "data.sets=auto"]
    with pytest.raises(
        RecipeError, match=r"short_side is 480.*64 x 64 pixels only.*relative_position: false"
    ):
        load_recipe("itpn/pixel_base", "demo", settings)


def test_its_place_in_the_graph():
    names = list(all_stages())
    assert names.index("segment") < names.index("video") < names.index("evaluate")
    feeders = {
        stages: next(node for node in graph_of(stages) if node.name == "video").inputs["weights"]
        for stages in (("prepare", "pretrain", "video"), ("prepare", "finetune", "video"))
    }
    assert [*feeders.values()] == ["pretrain", "finetune"]
    recipe = video_runs.recipe_of()
    assert "davis" in recipe.data.sets
