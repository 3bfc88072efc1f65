"""The run of Kubeflow that a stage is a task of: what MLflow shows of it."""

from __future__ import annotations

import os
from dataclasses import dataclass

# Set by the package (pipelines/place.py) and in the pods of a job; the pod's name comes from Kubernetes.
IMAGE_VARIABLE, POD_VARIABLE, PAGES_VARIABLE = "VITPIPE_IMAGE", "POD_NAME", "VITPIPE_KUBEFLOW_PAGES"
# Task at a pipeline's end, and its parameter with Kubeflow's PipelineTaskFinalStatus.
CONCLUSION, STATUS = "conclude", "status"
# The same of a table's pipeline; its parameters (runs per recipe, which rows), and the types of its pages.
COMPARISON, SEEDS, ROWS = "compare-table", "seeds", "rows"
TABLE_PAGES = {"table": "HTML", "rows_beside_published": "Markdown"}
# Verb of the tasks at its beginning, and their parameter: stage -> digest of its code, as JSON.
CHECK, CODE_DIGESTS = "check-pod", "code_digests"


def own_pod() -> str:
    """Name of the pod that this process runs in; empty elsewhere."""
    # A package of another project may not set it; Kubeflow sets the second one in its tasks.
    return os.environ.get(POD_VARIABLE) or os.environ.get("KFP_POD_NAME", "")


@dataclass(frozen=True)
class PipelineRun:
    """One run of a pipeline.

    Attributes:
        folder: address below which Kubeflow keeps all outputs of the run, without a slash at its end; empty
            when it cannot be seen. All tasks of a run have the same one, tasks of other runs another.
    """

    folder: str

    @property
    def run_id(self) -> str:
        """Kubeflow's ID of the run; in a local run the name of its folder."""
        # Not a parameter of the task: it would differ in every run, and nothing would be cached.
        return self.folder.rpartition("/")[2]

    def tags(self) -> dict[str, str]:
        """Tags of the stage's MLflow run: the run and its page, pod and image, as far as they are known."""
        pages = os.environ.get(PAGES_VARIABLE, "").rstrip("/")
        found = {
            "kubeflow_run": self.run_id,
            "kubeflow_page": f"{pages}/#/runs/details/{self.run_id}" if pages and self.run_id else "",
            "kubeflow_pod": own_pod(),
            "image": os.environ.get(IMAGE_VARIABLE, ""),
        }
        return {name: value for name, value in found.items() if value}
