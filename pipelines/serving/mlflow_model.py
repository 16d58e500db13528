"""Model code of registered versions: MLflow runs this file to load and to serve a SkillNet.

It reads safetensors and JSON only, never pickle files. It requires the package skillnet-platform in
the version that the model's requirements name.

    echo '{"dataframe_records": [{"text": "中国古代文学史"}]}' |
      curl -s -H 'Content-Type: application/json' -d @- http://127.0.0.1:5001/invocations
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from pipelines.serving.bundle import open_bundle
from pipelines.serving.inputs import parse_request_row
from pipelines.serving.predictor import DEFAULT_TOP, TaskPrediction
from skillnet_platform.errors import UserError


class SkillNetModel(PythonModel):
    """MLflow model that predicts for rows of texts and files.

    Every input column is optional, but each row has one of ``text`` and ``file``. ``file`` is the
    content of a media file in base64, and ``name`` its file name. ``task`` selects a task; it
    may be left out. The output columns are the fields of
    :class:`pipelines.serving.predictor.TaskPrediction`. A Python file gives a row for each
    function, and an input without a task one for each task of its domain.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Open the bundle among the model's artifacts.

        Args:
            context: paths of the artifacts, from MLflow.
        """
        self.predictor = open_bundle(context.artifacts["bundle"])

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: Mapping[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Predict for each row.

        Args:
            context: paths of the artifacts, from MLflow.
            model_input: rows, see the class.
            params: ``top``, the number of alternatives.

        Raises:
            UserError: a row is unusable, or the input is a list of texts or has other columns.
        """
        # A table of answers has no place for the reason of a rejected row.
        rows = [parse_request_row(row, n, True) for n, row in enumerate(_records(model_input))]
        answers = self.predictor.answer_rows(rows, int((params or {}).get("top", DEFAULT_TOP)))
        return prediction_frame([made for each in answers for _, made in each.answered])


def prediction_frame(predictions: Sequence[TaskPrediction]) -> pd.DataFrame:
    """Return predictions as the table of the model's output.

    Args:
        predictions: in order.
    """
    return pd.DataFrame(
        {
            "input": [p.input for p in predictions],
            "task": [p.task for p in predictions],
            "answer": [p.answer for p in predictions],
            "score": [p.score for p in predictions],
            "alternatives": [[name for name, _ in p.alternatives] for p in predictions],
            # The columns of the signature are lists of one type, so names and scores are separate.
            "scores": [[score for _, score in p.alternatives] for p in predictions],
            "embedding": [p.embedding for p in predictions],
            "confidence": [p.confidence for p in predictions],
        }
    )


def _records(model_input: pd.DataFrame) -> list[dict[str, Any]]:
    # MLflow drops columns that the signature does not name, and so all of a list of texts.
    if not len(model_input.columns):
        raise UserError(
            "the input has no column text or file. Give a table: "
            'pandas.DataFrame({"text": ["…", "…"]})'
        )
    # pandas marks absent cells by NaN, a float; the checks below expect None.
    frame = model_input.astype(object).where(model_input.notna(), None)
    return [{str(name): cell for name, cell in row.items()} for row in frame.to_dict("records")]


# MLflow runs this file and takes the object that is set here, so a version needs no pickle file.
mlflow.models.set_model(SkillNetModel())
