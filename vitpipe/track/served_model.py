"""The model that MLflow serves; MLflow runs this file when it loads one ("models from code").

    mlflow models serve --env-manager local -m models:/vitpipe-itpn-pixel_base-finetune@candidate

Request: `{"dataframe_records": [{"image": "BASE64 OF A JPEG OR PNG, OR A DATA URL"}]}`. With
`VITPIPE_DEVICE=cuda` in its environment the server predicts on a GPU.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

from vitpipe.contracts.errors import InputError
from vitpipe.track.model_folder import open_predictor

MODEL = "model"  # name of the folder among MLflow's artifacts


class ServedModel(PythonModel):
    """Images in a column `image` (`posted_pictures`); see `model_folder` for the columns of the answer."""

    def load_context(self, context: Any) -> None:
        """Build the network and load its weights. Raises as `open_predictor`."""
        folder = Path(context.artifacts[MODEL])
        self.predictor = open_predictor(folder, os.environ.get("VITPIPE_DEVICE", "cpu"))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """Predict every row.

        Raises:
            MlflowException: a row holds no image; the server answers with status 400.
        """
        posted = model_input["image"].tolist()
        # MLflow passes `{"inputs": {"image": [...]}}` on as one row that holds the list.
        if len(posted) == 1 and isinstance(posted[0], list):
            (posted,) = posted
        try:
            rows = self.predictor(posted)
        except InputError as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from error
        return pd.DataFrame(rows)


mlflow.models.set_model(ServedModel())
