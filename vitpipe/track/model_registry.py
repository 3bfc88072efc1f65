"""MLflow's model registry: one version of `vitpipe-RECIPE-STAGE` per run of the stage, with two aliases.

candidate       the newest version
best-DATASET    the version with the highest main metric on one validation set; a tie leaves it where it is

A version is found again by its run, so sending a model twice adds nothing. A server without a registry, or
one that does not let its users register models, costs the model and nothing else.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vitpipe.contracts.address import hidden
from vitpipe.track.journal import OfferedModel
from vitpipe.track.mlflow_errors import error_code
from vitpipe.track.mlflow_names import MAX_TAG_LENGTH, PREFIX
from vitpipe.track.model_folder import CARD_FILE, EXAMPLE_FILE, output_columns
from vitpipe.track.outbox import MODEL_FOLDER

CANDIDATE = "candidate"
# mlflow/store/model_registry/dbmodels/models.py (3.17): the column of a description.
_MAX_DESCRIPTION_LENGTH = 5000
_LOGGED = "models:/"  # before the ID of a logged model, in the source of a version
_SERVED = Path(__file__).parent / "served_model.py"
# What predicting needs beside vitpipe itself, which is on no package index.
_LIBRARIES = (
    "mlflow",
    "torch",
    "torchvision",
    "timm",
    "safetensors",
    "pydantic",
    "PyYAML",
    "pillow",
    "numpy",
)
_DENSE_LIBRARIES = ("onedl-mmengine", "onedl-mmcv", "onedl-mmdetection", "onedl-mmsegmentation")
# These pass, and the whole delivery is tried again; any other answer is about the registry alone.
_RETRIED = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED"}


def registered_name(recipe: str, stage: str) -> str:
    """`vitpipe-itpn-pixel_base-finetune`: MLflow's names hold neither slashes nor colons."""
    words = re.sub(r"[^\w-]+", "-", recipe.removesuffix(".yaml")).strip("-")
    return f"vitpipe-{words}-{stage}"


def best_alias(dataset: str) -> str:
    """`best-imagenet-1a2b3c4d` of a set's name and digest, `imagenet 1a2b3c4d...`."""
    return "best-" + re.sub(r"[^\w-]+", "-", dataset)


class Registry:
    """The registry beside a tracking server.

    Args:
        client: MLflow's.
        where: its address, for messages.
        warn: called with one line when a model cannot be registered.
    """

    def __init__(self, client: Any, where: str, warn: Callable[[str], None]) -> None:
        self._client, self._where, self._warn = client, where, warn

    def add(self, run_id: str, model: OfferedModel, folder: Path) -> None:
        """Log the model of a run, register it, and move the aliases.

        Args:
            folder: with the files of `model_folder`.
        """
        with self._refusals(f"The model {model.name} is not in the registry"):
            self._add(run_id, model, folder)

    def replace_card(self, run_id: str, card: str) -> None:
        """Replace the description of the version that a run has made, now that its verdict is known."""
        with self._refusals(f"The model of run {run_id} keeps its first card"):
            for found in self._versions(f"run_id = '{run_id}'"):
                self._client.update_model_version(found.name, found.version, _described(card))
                # `model_id` is empty in what a search finds (MLflow 3.17).
                if found.source.startswith(_LOGGED):
                    with tempfile.TemporaryDirectory(prefix="vitpipe-card-") as name:
                        (Path(name) / CARD_FILE).write_text(hidden(card), encoding="utf-8")
                        place = f"artifacts/{MODEL_FOLDER}"
                        logged = found.source.removeprefix(_LOGGED)
                        self._client.log_model_artifacts(logged, name, place)

    @contextmanager
    def _refusals(self, consequence: str) -> Iterator[None]:
        """Say what a server refuses, instead of sending the stage's records again for ever."""
        try:
            yield
        except Exception as error:
            code = error_code(error)
            if not code or code in _RETRIED:
                raise
            self._warn(f"{consequence} of {self._where}: {str(error).splitlines()[0]}")

    def _add(self, run_id: str, model: OfferedModel, folder: Path) -> None:
        if not self._client.search_registered_models(f"name = '{model.name}'"):
            self._create(model.name)
        if all(found.run_id != run_id for found in self._versions(f"name = '{model.name}'")):
            logged = self._logged_model(run_id, model, folder)
            tags = {f"{PREFIX}{key}": hidden(value)[:MAX_TAG_LENGTH] for key, value in _tags(model).items()}
            card = (folder / CARD_FILE).read_text(encoding="utf-8")
            self._client.create_model_version(
                model.name, f"{_LOGGED}{logged}", run_id, tags=tags, description=_described(card),
                model_id=logged,
            )  # fmt: skip
        self._move_aliases(model)

    def _create(self, name: str) -> None:
        try:
            self._client.create_registered_model(name, description="Trained and registered by vitpipe.")
        except Exception as error:
            # Two stages may create it at the same time.
            if error_code(error) != "RESOURCE_ALREADY_EXISTS":
                raise

    def _logged_model(self, run_id: str, model: OfferedModel, folder: Path) -> str:
        """ID of the run's model among MLflow's logged models, uploaded whole."""
        from mlflow.entities import LoggedModelOutput

        experiment = self._client.get_run(run_id).info.experiment_id
        known = self._client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
        # One that a killed process has left half uploaded is uploaded again.
        found = known[0] if known else None
        if found is not None and str(found.status) == "READY":
            return str(found.model_id)
        if found is None:
            found = self._client.create_logged_model(
                experiment, name=model.name, source_run_id=run_id, model_type=model.kind, params=model.facts
            )
            self._client.log_outputs(run_id, [LoggedModelOutput(model_id=found.model_id, step=0)])
        with tempfile.TemporaryDirectory(prefix="vitpipe-model-") as name:
            package = Path(name) / "package"
            write_package(package, model, folder, run_id, found.model_id)
            self._client.log_model_artifacts(found.model_id, str(package))
        self._client.finalize_logged_model(found.model_id, "READY")
        return str(found.model_id)

    def _versions(self, filter_string: str) -> list[Any]:
        found: list[Any] = []
        token = None
        while True:
            page = self._client.search_model_versions(filter_string, page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def _move_aliases(self, model: OfferedModel) -> None:
        versions = sorted(self._versions(f"name = '{model.name}'"), key=lambda found: int(found.version))
        self._client.set_registered_model_alias(model.name, CANDIDATE, versions[-1].version)
        rivals = [found for found in versions if found.tags.get(f"{PREFIX}dataset") == model.dataset]
        # `max` takes the first of equals: the earlier version keeps the alias.
        best = max(rivals, key=lambda found: float(found.tags[f"{PREFIX}value"]), default=None)
        if best is not None:
            self._client.set_registered_model_alias(model.name, best_alias(model.dataset), best.version)


def write_package(package: Path, model: OfferedModel, folder: Path, run_id: str, model_id: str) -> None:
    """Write the model as MLflow's pyfunc ("models from code": no pickled object) into a new folder."""
    import mlflow.pyfunc
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import AnyType, Array

    def column(name: str, type_: str, is_list: bool) -> Any:
        item: Any = Array(DataType[type_[1:-1]]) if type_.startswith("[") else DataType[type_]
        return ColSpec(Array(item) if is_list else item, name)

    outputs = Schema([column(*described) for described in output_columns(model.kind)])
    # Any: MLflow would decode a binary column itself, and answer null or a number with a TypeError's text.
    inputs = Schema([ColSpec(AnyType(), "image")])
    example = pd.DataFrame({"image": [(folder / EXAMPLE_FILE).read_bytes()]})
    mlflow.pyfunc.save_model(
        str(package),
        python_model=str(_SERVED),
        artifacts={MODEL_FOLDER: str(folder)},
        signature=ModelSignature(inputs=inputs, outputs=outputs),
        input_example=example,
        pip_requirements=_requirements(model.kind),
        metadata=model.facts,
        mlflow_model=Model(run_id=run_id, model_id=model_id),
    )


def _requirements(kind: str) -> list[str]:
    wanted = (*_LIBRARIES, *(_DENSE_LIBRARIES if kind != "classes" else ()))
    found = []
    for name in wanted:
        try:
            # Without the local part (`+cpu`), which other machines cannot install.
            found.append(f"{name}=={version(name).partition('+')[0]}")
        except PackageNotFoundError:
            continue
    return found


def _tags(model: OfferedModel) -> dict[str, str]:
    measured = {"headline": model.headline, "value": json.dumps(model.value), "dataset": model.dataset}
    return {**model.facts, **measured}


def _described(card: str) -> str:
    """The card, cut to what MLflow keeps of a description."""
    text = hidden(card)
    if len(text) <= _MAX_DESCRIPTION_LENGTH:
        return text
    note = f"\n\n*Cut; the whole card is the model's file {CARD_FILE}.*\n"
    return text[: _MAX_DESCRIPTION_LENGTH - len(note)].rpartition("\n")[0] + note
