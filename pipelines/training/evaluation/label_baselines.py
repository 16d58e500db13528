"""Simple baselines of rows with several labels, and of rows with a number.

``chance`` predicts the shares of the training labels, or the mean of the training values, for every
row. ``simple_baseline`` is logistic regression per label, or ridge regression.
:mod:`pipelines.training.evaluation.simple_baselines` provides the features and calls
:func:`measure_label_baselines`.
"""

import warnings
from typing import Any

import numpy as np

from pipelines.training.evaluation.row_scores import score_predictions
from pipelines.training.evaluation.task_metrics import TaskMetrics
from skillnet.skills import Task

#: Strength of the penalty of ridge regression, on values of unit variance.
RIDGE_PENALTY = 1.0


def measure_label_baselines(
    spec: Task,
    features: tuple[Any, Any],
    targets: tuple[dict[str, np.ndarray], dict[str, np.ndarray]],
    bootstrap_samples: int,
    units: np.ndarray,
) -> dict[str, TaskMetrics]:
    """Return system -> metrics of one task on one split.

    Args:
        spec: a task of the objective ``multi_label`` or ``regression``.
        features: of the training rows and of the split's rows.
        targets: of the training rows and of the split's rows.
        bootstrap_samples: resamples of each interval; 0 omits intervals.
        units: (N,) number of the unit of each row.
    """
    predict = _predict_labels if spec.objective == "multi_label" else _predict_numbers
    train, test = targets
    predictions = predict(features, train, len(units))
    return {
        system: score_predictions(spec, values, test, bootstrap_samples, units).metrics
        for system, values in zip(("chance", "simple_baseline"), predictions, strict=True)
    }


def _predict_labels(
    features: tuple[Any, Any], train: dict[str, np.ndarray], rows: int
) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    truth_NC = train["label_sets"] > 0
    shares_C = truth_NC.mean(0)
    model = OneVsRestClassifier(LogisticRegression(C=3.0, max_iter=200, tol=1e-3))
    with warnings.catch_warnings():
        # A label of every training row, or of none, is predicted as such.
        warnings.simplefilter("ignore")
        found = model.fit(features[0], truth_NC.astype(int)).predict_proba(features[1])
    return np.tile(shares_C, (rows, 1)), found


def _predict_numbers(
    features: tuple[Any, Any], train: dict[str, np.ndarray], rows: int
) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.linear_model import Ridge

    right_N = train["numbers"].astype(np.float64)
    mean, deviation = right_N.mean(), right_N.std() or 1.0
    model = Ridge(RIDGE_PENALTY).fit(features[0], (right_N - mean) / deviation)
    found_N1 = mean + deviation * np.asarray(model.predict(features[1])).reshape(-1, 1)
    return np.full((rows, 1), mean), found_N1
