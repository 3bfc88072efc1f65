"""Saved states are kept by what decides the weights; the rest is said; nothing is removed that is not secured."""

from __future__ import annotations

import json
import shutil

import pytest

from vitpipe.config.digest import digest_of
from vitpipe.config.read import load_recipe
from vitpipe.contracts.artifact import Card, open_artifact, write_card, write_metrics, writing
from vitpipe.contracts.errors import ArtifactError
from vitpipe.contracts.graph import all_stages
from vitpipe.stages import resume
from vitpipe.stages.resume import claim_state, mark_finished, release_states
from vitpipe.stages.weights_identity import weights_identity
from vitpipe.track.outbox import Outbox

CARD = Card(
    stage="pretrain", recipe="r", profile="demo", recipe_digest="a", data_digest="b", code_digest="c", image="train",
    identity="d", parents={}, seed=0, libraries={},
)  # fmt: skip
DECIDES = {"stage": "pretrain", "recipe": "r1", "data": "d1", "weights": ""}
CODE = {"code_digest": "1" * 64, "libraries": {"torch": "2.15", "mlflow": "3.17.0"}}


@pytest.fixture
def state(tmp_path):
    """A state folder with a saved state, as a killed run leaves it."""
    folder = tmp_path / ".pretrain.state"
    claim_state(folder, DECIDES, CODE, tmp_path / "pretrain")
    (folder / "state-0123456789ab-000000004.pt").write_bytes(b"four")
    (folder / "state-0123456789ab-000000008.pt").write_bytes(b"eight")
    (folder / "track").mkdir()
    (folder / "track" / "box.json").write_text("{}")
    return folder


def make_output(state, card=CARD):
    out = state.parent / "pretrain"
    with writing(out) as folder:
        write_metrics(folder, {"x": 1.0})
        write_card(folder, card)
    mark_finished(state, open_artifact(out).card)
    return out


@pytest.mark.parametrize("moment", ["is_delivered", "own_entries", "remove"])
def test_stages_that_begin_together_release_the_same_state(state, monkeypatch, moment):
    """Another process removes the folder between any two steps of ours."""
    out = make_output(state)
    place, name = (Outbox, moment) if moment == "is_delivered" else (resume, moment)
    usual = getattr(place, name)

    def behind_another(*arguments):
        shutil.rmtree(state, ignore_errors=True)
        return usual(*arguments)

    monkeypatch.setattr(place, name, behind_another)
    release_states({"weights": open_artifact(out)}, state.parent / ".detect.state")
    assert not state.exists()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_same_work_goes_on_without_a_word(state):
    before = names(state)
    assert claim_state(state, DECIDES, CODE, state.parent / "pretrain").messages == ()
    assert names(state) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"code_digest": "2" * 64}, "code (111111111111, now 222222222222)"),
        ({"libraries": {"torch": "2.15", "mlflow": "3.17.1"}}, "mlflow (3.17.0, now 3.17.1)"),
        ({"libraries": {"torch": "2.15"}}, "mlflow (3.17.0, now absent)"),
    ],
)
def test_other_code_and_libraries_are_said_noted_and_no_reason_to_stop(state, change, named):
    before = names(state)
    claim = claim_state(state, DECIDES, CODE | change, state.parent / "pretrain")
    assert named in claim.messages[0]
    assert named in claim.notes[0]
    assert names(state) == before
    # A third start with the same code has nothing to say, but the card still has to tell it.
    again = claim_state(state, DECIDES, CODE | change, state.parent / "pretrain")
    assert (again.messages, again.notes) == ((), claim.notes)


@pytest.mark.parametrize(
    ("key", "reason"),
    [("recipe", "other-recipe-values"), ("data", "other-data"), ("weights", "other-starting-weights"), ("stage", "other-stage")],
)  # fmt: skip
def test_what_does_not_fit_is_moved_aside_with_the_reason(state, key, reason):
    claim = claim_state(state, DECIDES | {key: "changed"}, CODE, state.parent / "pretrain")
    aside = next(state.parent.glob(f".pretrain.state.aside-*-{reason}"))
    assert str(aside) in claim.messages[0]
    assert (aside / "state-0123456789ab-000000008.pt").read_bytes() == b"eight"
    assert (aside / "track" / "box.json").is_file()
    assert names(state) == ["identity.json"]
    claim_state(state, DECIDES, CODE, state.parent / "pretrain")  # there and back in one second
    assert len(list(state.parent.glob("*.aside-*"))) == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('"0123456789abcdef"', "another-version"),
        ('{"version": 99}', "another-version"),
        ("", "damaged-identity"),
        ('{"version": 2}', "damaged-identity"),
        ('{"version": 2, "decides": 3, "recorded": {}}', "damaged-identity"),
        (None, "damaged-identity"),
    ],
)
def test_states_of_another_version_and_damaged_marks_are_kept(state, content, reason):
    mark = state / "identity.json"
    mark.unlink() if content is None else mark.write_text(content)
    claim_state(state, DECIDES, CODE, state.parent / "pretrain")
    aside = next(state.parent.glob(f"*.aside-*-{reason}"))
    assert (aside / "state-0123456789ab-000000008.pt").read_bytes() == b"eight"


def test_a_flipped_bit_in_a_mark_is_no_other_work(state):
    mark = state / "identity.json"
    mark.write_text(mark.read_text().replace('"d1"', '"d0"'))
    claim_state(state, DECIDES, CODE, state.parent / "pretrain")
    assert len(list(state.parent.glob("*.aside-*-damaged-identity"))) == 1


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years")
    with pytest.raises(ArtifactError, match=r"thesis\.txt"):
        claim_state(folder, DECIDES, CODE, tmp_path / "out")
    assert names(folder) == ["thesis.txt"]


def test_packed_shards_survive_another_recipe(tmp_path):
    folder, decides = tmp_path / ".prepare.state", {"stage": "prepare", "recipe": "a", "inputs": ""}
    claim_state(folder, decides, CODE, tmp_path / "prepare")
    for name in ("pack", "track"):
        (folder / name).mkdir()
    claim_state(folder, decides | {"recipe": "b"}, CODE, tmp_path / "prepare")
    assert "pack" in names(folder)
    assert [name.rpartition("-other")[0][:11] for name in names(folder) if "aside" in name] == ["track.aside"]


def test_the_last_state_stays_until_a_later_stage_has_read_the_output(state):
    out = make_output(state)
    assert names(state) == ["finished.json", "identity.json", "state-0123456789ab-000000008.pt", "track"]
    other = open_artifact(out)
    other.card = CARD.model_copy(update={"seed": 9})
    release_states({"weights": other}, state.parent / ".finetune.state")
    assert state.is_dir()
    (out / "metrics.json").write_text("{}\n")
    with pytest.raises(ArtifactError, match="damaged"):
        release_states({"weights": Broken(out)}, state.parent / ".finetune.state")
    assert state.is_dir()
    make_output(state)
    release_states({"weights": open_artifact(out)}, state.parent / ".finetune.state")
    assert not state.exists()


@pytest.mark.parametrize("left", ["mmengine/20261128_152456", "20261128_152456", "diverged-step000000003.pt"])
def test_nothing_of_ours_outlives_a_released_state(state, left):
    """Logs of the dense stages and batches of a diverged step would make the next run refuse the folder."""
    place = state / left
    if left.endswith(".pt"):
        place.write_bytes(b"batch")
    else:
        place.mkdir(parents=True)
        (place / "mmengine.log").write_text("epoch")
    out = make_output(state)
    release_states({"weights": open_artifact(out)}, state.parent / ".finetune.state")
    assert not state.exists()


def test_logs_that_earlier_versions_have_left_are_no_foreign_files(tmp_path):
    folder = tmp_path / ".detect.state"
    (folder / "20261128_152456").mkdir(parents=True)
    (folder / "20261128_152456" / "mmengine.log").write_text("epoch")
    claim_state(folder, DECIDES, CODE, tmp_path / "detect")
    assert names(folder) == ["identity.json"]


@pytest.mark.parametrize("mine", ["20261128_152456/thesis.txt", "data/thesis.txt", "mmengine/thesis.txt"])
def test_a_folder_of_the_users_is_not_taken_for_what_we_leave(tmp_path, mine):
    folder = tmp_path / "state"
    (folder / mine).parent.mkdir(parents=True)
    (folder / mine).write_text("years")
    with pytest.raises(ArtifactError, match="has not written"):
        claim_state(folder, DECIDES, CODE, tmp_path / "out")
    assert (folder / mine).read_text() == "years"


class Broken:
    """An artifact opened before its file was damaged."""

    def __init__(self, path):
        from vitpipe.contracts.artifact import Artifact, read_card

        self.path, self.card = path, read_card(path)
        self.verify = Artifact(path, self.card, {}).verify


def test_a_state_elsewhere_is_found_beside_the_later_stage_s(tmp_path, state):
    moved = tmp_path / "volume" / "pretrain"
    moved.parent.mkdir()
    state.rename(moved)
    out = tmp_path / "pretrain"
    with writing(out) as folder:
        write_metrics(folder, {})
        write_card(folder, CARD)
    mark_finished(moved, open_artifact(out).card)
    release_states({"weights": open_artifact(out)}, tmp_path / "volume" / "finetune")
    assert not moved.exists()


def test_a_finished_stage_with_the_same_code_is_not_trained_again(state):
    make_output(state)
    assert claim_state(state, DECIDES, CODE, state.parent / "pretrain").messages == ()
    assert names(state) == ["identity.json", "state-0123456789ab-000000008.pt", "track"]


def test_a_finished_stage_is_trained_again_by_other_code(state):
    """Its weights are not what the present code makes; they are secured in the output, or kept aside."""
    out = make_output(state)
    claim_state(state, DECIDES, CODE | {"code_digest": "2" * 64}, out)
    assert names(state) == ["identity.json"]
    assert not list(state.parent.glob("*.aside-*"))


def test_a_finished_stage_without_its_output_is_kept_aside(state):
    out = make_output(state)
    out.rename(out.with_name("gone"))
    claim_state(state, DECIDES, CODE | {"code_digest": "2" * 64}, out)
    aside = next(state.parent.glob("*.aside-*-finished-by-other-code"))
    assert (aside / "state-0123456789ab-000000008.pt").is_file()


def test_a_stage_without_states_keeps_nothing(tmp_path):
    folder = tmp_path / ".report.state"
    claim_state(folder, {"stage": "report", "recipe": "", "inputs": ""}, CODE, tmp_path / "report")
    (folder / "pack").mkdir()
    mark_finished(folder, CARD)
    assert names(tmp_path) == []


def decided(*overrides):
    recipe = load_recipe("itpn/pixel_base", "demo", overrides)
    return digest_of(weights_identity(all_stages()["finetune"], recipe, {}))


@pytest.mark.parametrize(
    "override",
    ["finetune.log_every_steps=7", "finetune.checkpoint_minutes=1", "data.workers=0", "finetune.eval_batch=3",
     "finetune.eval_crop_ratio=1.0", "report.sample_images=3", "pretrain.epochs=9", "evaluate.batch=3"],
)  # fmt: skip
def test_values_that_do_not_act_on_the_weights(override):
    assert decided(override) == decided()


@pytest.mark.parametrize(
    "override",
    ["finetune.epochs=9", "finetune.optim.base_lr=0.1", "seed=7", "model.image_size=128", "finetune.ema_decay=0.5",
     "finetune.augment.flip_probability=0.25", "finetune.global_batch=16"],
)  # fmt: skip
def test_values_that_act_on_the_weights(override):
    assert decided(override) != decided()


def test_a_mark_is_replaced_in_one_move(state, monkeypatch):
    mark = (state / "identity.json").read_text()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(Exception, match="No space left"):
        claim_state(state, DECIDES, CODE | {"code_digest": "2" * 64}, state.parent / "pretrain")
    assert (state / "identity.json").read_text() == mark
    assert json.loads(mark)["decides"] == DECIDES
