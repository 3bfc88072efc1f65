"""Whether a run may be compared with a published row follows from its facts, never from a text in a recipe."""

from __future__ import annotations

import csv
import dataclasses

import pytest
from prepared_tables import catalogue_rows

from vitpipe.config.read import load_recipe, recipe_files, recipe_names
from vitpipe.config.recipe import Expectation
from vitpipe.contracts.artifact import open_artifact, write_card, write_metrics, write_table
from vitpipe.contracts.graph import graph_of
from vitpipe.contracts.protocol import COCO_AP, PIXEL_IOU, PROTOCOL, centre_crop, protocol_rows
from vitpipe.datasets.catalogue import FACTS
from vitpipe.papers.published import find_row, rows
from vitpipe.report.comparability import _has_published_size
from vitpipe.report.compare import verdicts_of
from vitpipe.report.recipe_differences import acting_values, differences
from vitpipe.report.results import RunResults

PIXEL = "itpn/pixel_base"


@pytest.fixture
def ran(tmp_path, make_run):
    """A run of `itpn/pixel_base` at profile full on whole sets, with overrides."""

    def run(*overrides: str, recipe: str = PIXEL) -> RunResults:
        return make_run(
            tmp_path / f"run{len(list(tmp_path.iterdir()))}", load_recipe(recipe, "full", overrides)
        )

    return run


def prepared(run: RunResults, rows, *, classes=None, sources=None, **metrics: float) -> RunResults:
    """The same run with other tables of `prepare`."""
    finished = run.artifacts["prepare"]
    folder = finished.path
    for name, table in (("splits", rows), ("classes", classes), ("sources", sources)):
        if table is not None:
            write_table(folder, name, table)
    write_metrics(folder, {**finished.metrics, **metrics})
    write_card(folder, finished.card, finished.run)
    return RunResults(run.recipe, {**run.artifacts, "prepare": open_artifact(folder, "prepare")})


def found(run: RunResults, metric: str = "top1"):
    return next(v for v in verdicts_of(run) if v.metric == metric)


def whole(**changed) -> list[dict]:
    """Rows of `splits` of whole sets; `imagenet_val={"num_images": 3}` changes one of them."""
    rows = [row for name in ("imagenet", "coco", "ade20k") for row in catalogue_rows(name)]
    return [{**row, **changed.get(f"{row['dataset']}_{row['split']}", {})} for row in rows]


def test_the_published_recipe_on_the_published_data_is_judged(ran):
    verdicts = verdicts_of(ran())
    assert {v.judgement for v in verdicts} <= {"above", "below", "within noise", "reproduced"}
    assert all(v.kinds == () for v in verdicts)


def test_own_pictures_called_imagenet_are_other_data(ran):
    three = {"num_images": 3, "num_classes": 3}
    run = prepared(ran("model.name=hivit_nano"), whole(imagenet_train=three, imagenet_val=three))
    verdict = found(run)
    assert verdict.judgement == "not comparable"
    assert verdict.kinds == ("other data", "other network")
    assert "imagenet has 3 training and 3 validation images of 3 classes, not 1,281,167" in verdict.reason
    assert 'model.name is "hivit_nano", not "hivit_base"' in verdict.reason
    # The number of parameters depends on the network and the number of classes, not on images.
    assert "imagenet has 3 classes, not 1,000" in found(run, "params").reason


def test_other_epochs_of_an_earlier_stage_are_other_settings(ran):
    run = ran("pretrain.epochs=400")
    for metric in ("top1", "box_AP", "mask_AP", "mIoU"):
        verdict = found(run, metric)
        assert (verdict.judgement, verdict.kinds) == ("not comparable", ("other settings",))
        assert verdict.reason == "pretrain.epochs is 400, not 1600"
    assert found(run, "params").judgement != "not comparable"


@pytest.mark.parametrize(
    ("override", "metric", "reason"),
    [
        ("finetune.optim.base_lr=1e-4", "top1", "finetune.optim.base_lr is 0.0001, not 0.0005"),
        ("model.image_size=384", "box_AP", "model.image_size is 384, not 224"),
        ("evaluate.eval_crop_ratio=1.0", "top1", "evaluate.eval_crop_ratio is 1, not 0.875"),
        ("start_from={finetune: pretrain, detect: finetune}", "box_AP", "the stages are prepare, pretrain, "),
        (
            "stages=[prepare, finetune, evaluate, report]",
            "top1",
            "the stages are prepare, finetune, evaluate",
        ),
    ],
)
def test_a_value_that_the_result_depends_on_is_a_reason(ran, override, metric, reason):
    assert reason in found(ran(override), metric).reason


@pytest.mark.parametrize(
    ("override", "metric"),
    [
        ("seed=7", "top1"),
        ("data.workers=3", "top1"),
        ("finetune.micro_batch=16", "top1"),
        ("pretrain.micro_batch=16", "box_AP"),
        ("detect.epochs=1", "top1"),
        ("finetune.epochs=3", "box_AP"),
        ("evaluate.eval_crop_ratio=1.0", "mIoU"),
        ("pretrain.epochs=400", "params"),
    ],
)
def test_a_value_that_it_does_not_depend_on_is_none(ran, override, metric):
    assert found(ran(override), metric).judgement != "not comparable"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"imagenet_val": {"num_images": 49_999}}, "1,281,167 training and 49,999 validation images"),
        ({"imagenet_train": {"num_images": 1_281_160}}, "imagenet has 1,281,160 training"),
        ({"imagenet_train": {"num_images": 1_281_168}}, "imagenet has 1,281,168 training"),
        ({"imagenet_val": {"num_classes": 999}}, "of 999 classes"),
    ],
)
def test_sets_of_another_size_are_other_data(ran, changed, reason):
    verdict = found(prepared(ran(), whole(**changed)))
    assert verdict.kinds == ("other data",)
    assert reason in verdict.reason


def test_unreadable_training_images_that_were_left_out_are_allowed(ran):
    missing = whole(imagenet_train={"num_images": 1_281_160})
    assert found(prepared(ran(), missing, num_corrupt=7.0)).judgement != "not comparable"
    assert found(prepared(ran(), missing, num_corrupt=6.0)).judgement == "not comparable"


def test_other_classes_and_smaller_images_are_other_data(ran):
    run = ran()
    with (run.artifacts["prepare"].path / "tables/classes.csv").open(newline="") as file:
        classes = list(csv.DictReader(file))
    swapped = [classes[1], classes[0], *classes[2:]]
    verdict = found(prepared(run, whole(), classes=swapped))
    assert (
        "has other classes than ImageNet-1K (ILSVRC 2012): class 0 is 'n01443537', not 'n01440764'"
        in verdict.reason
    )
    packed = [{"dataset": "imagenet", "encoding": "short side at most 256 (bicubic), jpeg 95"}]
    verdict = found(prepared(run, whole(), classes=classes, sources=packed))
    assert (
        verdict.reason == "imagenet was packed with smaller images: short side at most 256 (bicubic), jpeg 95"
    )


def test_a_set_that_was_not_prepared_and_data_that_are_not_here(ran):
    run = ran()
    only_coco = [row for row in whole() if row["dataset"] == "coco"]
    assert "imagenet is not among the prepared sets" in found(prepared(run, only_coco)).reason
    without = RunResults(run.recipe, {k: a for k, a in run.artifacts.items() if k != "prepare"})
    assert found(without).reason == "the data are unknown: the output of prepare is not here"


def test_outputs_that_do_not_fit(ran):
    run = ran()
    mixed = RunResults(run.recipe, run.artifacts, {"pretrain": "the output of pretrain was made elsewhere"})
    assert found(mixed).reason == "the output of pretrain was made elsewhere"
    assert found(mixed).kinds == ("unknown",)


def test_a_demo_with_own_pictures_is_not_said_to_be_embedded(tmp_path, make_run):
    recipe = load_recipe(PIXEL, "demo", ["data.source=folders", f"data.root={tmp_path}"])
    verdict = found(make_run(tmp_path / "run", recipe))
    assert "embedded" not in verdict.reason
    assert "imagenet has 2,000 training and 400 validation images of 10 classes" in verdict.reason


def test_how_a_number_was_measured_is_read_from_the_run(ran):
    run = ran()
    finished = run.artifacts["evaluate"]
    recorded = protocol_rows(
        ["top1"], {"crop": "224 of a 224 short side", "EMA": "off", "images": 50_000, "ours": 1}
    )
    write_table(finished.path, PROTOCOL, recorded)
    write_card(finished.path, finished.card, finished.run)
    again = RunResults(run.recipe, {**run.artifacts, "evaluate": open_artifact(finished.path, "evaluate")})
    verdict = found(again)
    assert verdict.kinds == ("other protocol",)
    assert verdict.reason == "crop is 224 of a 224 short side, not 224 of a 256 short side"
    rows = {row.setting: (row.ours, row.published, row.differs) for row in verdict.ledger}
    assert rows["crop"] == ("224 of a 224 short side", "224 of a 256 short side", True)
    assert rows["images"] == ("50000", "50000", False)
    # What only one of the two says is shown and is no difference.
    assert rows["interpolation"] == ("", "bicubic", False)
    assert rows["ours"] == ("1", "", False)
    # Rows are those of one metric: nothing was recorded for the parameters.
    assert {row.ours for row in found(again, "params").ledger} == {""}


def test_recipes_state_published_settings_in_the_words_of_the_stages():
    words = {"crop", "interpolation", "EMA", "images", "classes", "classifier", "counted", "image"}
    words |= {"test size", "flips", "AP", "inference", "IoU"}
    for name in recipe_names():
        recipe = load_recipe(name, "full")
        for item in recipe.expect:
            assert set(item.protocol) <= words, name
            assert item.protocol.get("AP", COCO_AP) == COCO_AP
            assert item.protocol.get("IoU", PIXEL_IOU) == PIXEL_IOU
            if "crop" in item.protocol:
                # The published crop is the one that the stage itself makes at the published size.
                ratio = getattr(recipe, item.stage).eval_crop_ratio
                own = centre_crop(recipe.model.image_size, ratio, "")["crop"]
                assert item.protocol["crop"] == own, name


def test_the_training_images_of_a_set_without_validation_images_may_be_held_out():
    known = FACTS["imagenet22k"]
    whole_set, num_classes = known.num_train_images, known.num_classes
    assert known.num_val_images == 0
    assert _has_published_size(known, whole_set - 5000, 5000, num_classes, 0)
    assert not _has_published_size(known, whole_set - 5001, 5000, num_classes, 0)


def test_reasons_are_told_in_the_same_order_by_every_process():
    recipes = [load_recipe(PIXEL, profile) for profile in ("demo", "full")]
    values = [acting_values(r, graph_of(r.stages)) for r in recipes]
    shuffled = dict(sorted(values[0].items(), key=lambda item: hash(item[0])))
    assert (
        list(differences(*values)) == list(differences(shuffled, values[1])) == sorted(differences(*values))
    )


def own_file(folder, *changes: tuple[str, str]):
    """A copy of our recipe as a file of the user's, with other values in it."""
    text = recipe_files()["itpn/pixel_base"].read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_copy_of_our_recipe_is_judged_as_ours(ran, tmp_path):
    run = ran()
    own = dataclasses.replace(run, recipe=load_recipe(str(own_file(tmp_path)), "full", ["data.root=/d"]))
    assert [(v.judgement, v.reason) for v in verdicts_of(own)] == [
        (v.judgement, v.reason) for v in verdicts_of(run)
    ]


def test_other_values_in_an_own_file_are_other_settings(ran, tmp_path):
    """The file claims our rows, too, and must not be what it is compared with."""
    path = own_file(tmp_path, ("epochs: 1600", "epochs: 16"))
    run = dataclasses.replace(
        ran("pretrain.epochs=16"), recipe=load_recipe(str(path), "full", ["data.root=/d"])
    )
    assert found(run).judgement == "not comparable"
    assert found(run).reason == "pretrain.epochs is 16, not 1600"


def test_a_row_that_only_an_own_file_claims_has_no_known_settings(ran, tmp_path):
    row = next(
        row for row in rows("itpn")
        if row["metric"] == "top-1 accuracy" and not claimed_by_ours(row)
    )  # fmt: skip
    where = {
        key: value for key, value in row.items() if isinstance(value, str | int | float) and key != "value"
    }
    recipe = load_recipe(str(own_file(tmp_path)), "full", ["data.root=/d"])
    expectation = Expectation(stage="evaluate", metric="top1", where=where, tolerance=0.3)
    run = dataclasses.replace(ran(), recipe=recipe.model_copy(update={"expect": (expectation,)}))
    (verdict,) = verdicts_of(run)
    assert verdict.judgement == "not comparable"
    assert "no recipe of vitpipe or of a plugin claims this row" in verdict.reason


def claimed_by_ours(row) -> bool:
    recipes = [load_recipe(name, "full") for name in recipe_names()]
    return any(
        find_row("itpn", item.where) == row for r in recipes if r.source.paper == "itpn" for item in r.expect
    )
