"""MLflow shows classes by their names, files keep their keys."""

from __future__ import annotations

import csv
import json

from vitpipe.contracts.address import Address
from vitpipe.data.manifest import ShardManifest
from vitpipe.prepare.set_summary import readable_classes
from vitpipe.track.stage_run import stage_run


def test_tables_have_names_in_mlflow_and_keys_in_files(recipe, tmp_path):
    (tmp_path / "out").mkdir()
    names = {"n01440764": "tench"}
    with stage_run(
        stage="finetune", recipe=recipe, folder=tmp_path / "out", state=tmp_path / ".out.state",
        class_names=names, address=Address("off"),
    ) as run:  # fmt: skip
        run.table("confusion", [{"true": "n01440764", "predicted": "n2", "images": 3}])
        run.table("other", [{"file": "n01440764"}])
    files = tmp_path / ".out.state" / "track" / "files" / "tables"
    shown = json.loads((files / "confusion.json").read_text())
    assert shown == {"columns": ["true", "predicted", "images"], "data": [["tench", "n2", 3]]}
    assert json.loads((files / "other.json").read_text())["data"] == [["n01440764"]]
    with (tmp_path / "out" / "tables" / "confusion.csv").open() as handle:
        assert next(csv.DictReader(handle))["true"] == "n01440764"


def test_classes_that_share_a_name_stay_apart():
    manifest = ShardManifest(
        dataset="x",
        classes=("n1", "n2", "n3", "n4"),
        class_names=("crane", "tench", "crane", ""),
        splits={},
        digest="d",
    )
    assert readable_classes(manifest) == {"n1": "crane (n1)", "n2": "tench", "n3": "crane (n3)"}
    assert readable_classes(manifest.model_copy(update={"class_names": ()})) == {}
