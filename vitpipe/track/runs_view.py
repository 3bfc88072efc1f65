"""The columns that MLflow's runs table opens with: what was run, and the main metric of every stage.

MLflow shows no metric until a person has chosen columns. A shared view is a tag of the experiment, which the
address of the runs table names (MLflow 3.17, `viewStateShareKey`).
"""

from __future__ import annotations

import json
from typing import Any

from vitpipe.contracts.graph import all_stages

VIEW = "vitpipe"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"


def view_state() -> str:
    """The tag's value: filters as MLflow has them by default, and our columns."""
    measured = [
        f"metrics.`{stage.name}/{stage.headline}`" for stage in all_stages().values() if stage.headline
    ]
    chosen = [f"params.`{name}`" for name in ("name", "profile", "seed")]
    return json.dumps(
        {
            "searchFilter": "",
            "orderByKey": "attributes.start_time",
            "orderByAsc": False,
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "datasetsFilter": [],
            "selectedColumns": [*chosen, *measured, "attributes.`Duration`"],
        }
    )


def share_view(client: Any, experiment: str) -> None:
    """Give an experiment the view, unless it has it already."""
    from mlflow.exceptions import MlflowException

    try:
        if client.get_experiment(experiment).tags.get(VIEW_TAG) != view_state():
            client.set_experiment_tag(experiment, VIEW_TAG, view_state())
    except MlflowException:
        # A server may allow its users to write runs only. Nothing of the run depends on its columns.
        return
