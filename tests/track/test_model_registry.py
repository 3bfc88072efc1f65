"""The model registry: one version per run, aliases by the stated rule, and a server that answers with classes."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from model_files import CLASSES, NAME, NAMES, offered, picture, write_model
from PIL import Image

from vitpipe.contracts.errors import ArtifactError, CheckpointError
from vitpipe.models.build import build_classifier
from vitpipe.track.delivery import Delivery
from vitpipe.track.journal import Journal
from vitpipe.track.model_folder import open_predictor
from vitpipe.track.model_registry import Registry, best_alias, registered_name
from vitpipe.track.server import connect


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of a model."""
    return write_model(tmp_path_factory.mktemp("files") / "model")


@pytest.fixture
def registry(client):
    return Registry(client, "sqlite", lines.append)


@pytest.fixture(autouse=True)
def _no_lines():
    lines.clear()


lines: list[str] = []


def new_run(client) -> str:
    return client.create_run("0").info.run_id


def test_the_best_of_each_dataset_and_the_newest_have_an_alias(client, registry, folder):
    values = ((0.5, "a 1"), (0.7, "a 1"), (0.9, "b 2"), (0.6, "a 1"), (0.7, "a 1"))
    for value, dataset in values:
        registry.add(new_run(client), offered(value, dataset), folder)
    # The tie at 0.7 leaves the alias with the earlier version.
    assert client.get_registered_model(NAME).aliases == {"candidate": 5, "best-a-1": 2, "best-b-2": 3}
    assert not lines


def test_sent_twice_it_is_one_version(client, registry, folder):
    run = new_run(client)
    for _ in range(2):
        registry.add(run, offered(), folder)
    found = client.search_model_versions(f"name = '{NAME}'")
    assert [version.run_id for version in found] == [run]
    assert found[0].description == "# The card\n"
    assert found[0].tags["vitpipe.value"] == "0.5"
    assert len(client.search_logged_models(["0"])) == 1


def test_a_model_that_was_half_uploaded_is_uploaded_again(client, registry, folder, monkeypatch):
    run = new_run(client)

    def killed(*args, **kwargs):
        raise ConnectionError("gone")

    with monkeypatch.context() as patched:
        patched.setattr(client, "finalize_logged_model", killed)
        with pytest.raises(ConnectionError):
            registry.add(run, offered(), folder)
    assert not client.search_model_versions(f"name = '{NAME}'")
    registry.add(run, offered(), folder)
    (logged,) = client.search_logged_models(["0"])
    assert str(logged.status) == "READY"
    (version,) = client.search_model_versions(f"name = '{NAME}'")
    assert version.source == f"models:/{logged.model_id}"


def test_the_card_is_replaced_when_the_verdict_is_known(client, registry, folder):
    run = new_run(client)
    registry.add(run, offered(), folder)
    registry.replace_card(run, "# With a verdict\n" + "a long line\n" * 1000)
    (version,) = client.search_model_versions(f"name = '{NAME}'")
    assert version.description.startswith("# With a verdict\n")
    assert len(version.description) <= 5000
    assert "Cut; the whole card is the model's file README.md." in version.description
    place = Path(
        client.get_logged_model(version.source.removeprefix("models:/")).artifact_location.removeprefix(
            "file://"
        )
    )
    assert (place / "artifacts" / "model" / "README.md").read_text().count("a long line") == 1000


def test_a_server_that_refuses_models_costs_the_model_only(client, folder, tmp_path, store, new_outbox):
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

    class Refusing:
        def __getattr__(self, name):
            if name == "search_registered_models":
                raise MlflowException("may not register models", error_code=PERMISSION_DENIED)
            return getattr(client, name)

    Registry(Refusing(), "there", lines.append).add(new_run(client), offered(), folder)
    assert lines == [f"The model {NAME} is not in the registry of there: may not register models"]


def test_it_travels_by_the_outbox_and_a_journal_of_before_still_reads(client, store, new_outbox, folder):
    outbox = new_outbox(store, "finetune")
    journal = Journal(outbox.journal)
    journal.status("RUNNING")
    place = outbox.files / "model"
    place.mkdir(parents=True)
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    journal.model(offered())
    journal.model(offered())  # a finished stage that writes its output again
    journal.status("FINISHED")
    assert not outbox.is_delivered()
    Delivery(outbox).sync()
    assert outbox.is_delivered()
    (version,) = client.search_model_versions(f"name = '{NAME}'")
    assert version.run_id == outbox.run_id
    assert client.get_run(outbox.run_id).outputs.model_outputs[0].model_id in version.source
    # `num_models` did not exist in earlier versions.
    sent = json.loads((outbox.folder / "sent.json").read_text())
    assert sent["num_models"] == 1


def test_files_that_are_gone_cost_the_model_only(client, store, new_outbox):
    outbox = new_outbox(store, "finetune")
    journal = Journal(outbox.journal)
    journal.status("RUNNING")
    journal.model(offered())
    journal.status("FINISHED")
    Delivery(outbox, warn=lines.append).sync()
    assert outbox.is_delivered()
    assert "no longer exists; vitpipe-itpn-pixel_base-finetune is not registered" in lines[0]
    assert not client.search_registered_models()


@pytest.mark.slow
def test_a_server_takes_it_over_http(server_port, folder, tmp_path, monkeypatch):
    from mlflow.artifacts import download_artifacts

    address = f"http://127.0.0.1:{server_port}"
    client = connect(address)
    name = f"vitpipe-{tmp_path.name}-finetune"
    Registry(client, address, lines.append).add(new_run(client), offered(name=name), folder)
    assert not lines
    (version,) = client.search_model_versions(f"name = '{name}'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    place = download_artifacts(artifact_uri=version.source, dst_path=str(tmp_path))
    weights = Path(place) / "artifacts" / "model" / "weights.safetensors"
    assert weights.read_bytes() == (folder / "weights.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("itpn/pixel_base", "vitpipe-itpn-pixel_base-finetune"),
        ("my recipes/own: 2%.yaml", "vitpipe-my-recipes-own-2-finetune"),
        ("/x/é/y.yaml", "vitpipe-x-é-y-finetune"),
    ],
)
def test_names_and_aliases_are_those_that_mlflow_accepts(recipe, name):
    from mlflow.utils.validation import _validate_model_alias_name, _validate_model_name

    assert registered_name(recipe, "finetune") == name
    _validate_model_name(name)
    _validate_model_alias_name(best_alias("my set 12345678"))


def test_predictions_are_those_of_the_network(folder):
    from vitpipe.config.recipe import Recipe
    from vitpipe.data.augment import eval_transform
    from vitpipe.models.weights import load_state

    recipe = Recipe.model_validate_json((folder / "recipe.json").read_bytes())
    images = [picture(1), picture(2, "PNG")]
    rows = open_predictor(folder)(images)
    model = build_classifier(recipe.model, num_classes=10).eval()
    model.load_state_dict(load_state(folder / "weights.safetensors"))
    crop = eval_transform(recipe.model.image_size, recipe.finetune.eval_crop_ratio, recipe.finetune.augment)
    batch = torch.stack([crop(Image.open(io.BytesIO(image)).convert("RGB")) for image in images])
    with torch.no_grad():
        expected = model(batch).softmax(dim=1)
    for row, shares in zip(rows, expected, strict=True):
        best = int(shares.argmax())
        assert (row["class"], row["name"]) == (CLASSES[best], NAMES[best])
        assert row["probability"] == pytest.approx(float(shares[best]), rel=1e-5)
        assert len(row["top_names"]) == 5
        assert row["top_probabilities"] == sorted(row["top_probabilities"], reverse=True)


def test_what_cannot_be_predicted_with_is_an_error_in_words(folder, tmp_path):
    with pytest.raises(ArtifactError, match="none of a model that this version reads"):
        open_predictor(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "labels.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"Where: .*labels\.json"):
        open_predictor(other)
    (other / "labels.json").write_bytes((folder / "labels.json").read_bytes())
    (other / "weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError):
        open_predictor(other)


def post(port: int, values: dict) -> tuple[int, dict]:
    request = Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps(values).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.slow
def test_mlflow_serves_it(client, registry, folder, store, tmp_path):
    registry.add(new_run(client), offered(), folder)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
    }
    command = ["mlflow", "models", "serve", "--env-manager", "local", "--host", "127.0.0.1"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [Path(sys.executable).parent / "mlflow", *command[1:], "--port", str(port), "-m", f"models:/{NAME}@candidate"],
            cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        for _ in range(300):
            try:
                urlopen(f"http://127.0.0.1:{port}/ping", timeout=2).close()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.5)
        images = [picture(3), picture(4)]
        records = [{"image": base64.b64encode(image).decode()} for image in images]
        status, answer = post(port, {"dataframe_records": records})
        assert status == 200, answer
        expected = open_predictor(folder)(images)
        for row, own in zip(answer["predictions"], expected, strict=True):
            assert row["name"] == own["name"]
            assert row["top_classes"] == own["top_classes"]
            assert row["top_probabilities"] == pytest.approx(own["top_probabilities"], rel=1e-5)
        url = {"image": f"data:image/jpeg;base64,{records[0]['image']}"}
        status, named = post(port, {"dataframe_records": [url]})
        assert named["predictions"][0]["top_classes"] == expected[0]["top_classes"]
        status, answer = post(port, {"dataframe_records": [records[0], {"image": None}]})
        assert status == 400
        assert "Row 2: an image file in base64 is expected, found null" in answer["message"]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)
