"""``SkillNet.fit``: train a model in place, by the loop of ``skillnet finetune``."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.fitting.training_data import TrainingData
from pipelines.training.loop.reporter import LoopCallback, RunLogger
from pipelines.training.loop.resolved_run import InProcessParts
from pipelines.training.loop.run import find_finished_result, validate_run
from pipelines.training.loop.run_evaluation import check_evaluation_splits, find_run_weaknesses
from pipelines.training.loop.worker import (
    MODEL,
    FinalEvaluation,
    remove_untrained_parts,
    run_worker,
)
from pipelines.training.runs.layout import RESULT, TRAINED, create_run_folder, lock_run_folder
from pipelines.training.runs.model_source import resolve_model
from pipelines.training.runs.progress_log import PROGRESS, follow_progress
from skillnet.multitask_model import TaskModel
from skillnet.objectives.base import RowMetric, add_metrics
from skillnet.systems import load_model
from skillnet_platform import console
from skillnet_platform.errors import UserError, check_known_names
from skillnet_platform.storage import read_json, write_json


def fit_model(
    model: TaskModel,
    data: "TrainingData | Mapping[str, Any]",
    settings: Mapping[str, Any] | None = None,
    *,
    output: str | Path | None = None,
    run_dir: str | Path | None = None,
    callbacks: Sequence[LoopCallback] = (),
    loggers: Sequence[RunLogger] = (),
    losses: Mapping[str, Callable[..., Any]] | None = None,
    metrics: Sequence[RowMetric] = (),
) -> dict[str, Any]:
    """Train a model on data, evaluate it, and give it what predictions need.

    Neither Ray nor MLflow is used. Steps, batches and numbers are those of ``skillnet finetune``
    with the same settings, corpora and initial weights.

    Args:
        model: is trained in place. Skills that no task activates are removed.
        data: rows of its tasks; a mapping is prepared, see :class:`TrainingData`.
        settings: dotted key of ``skillnet finetune`` -> value, such as ``training.steps``.
        output: folder of the trained model, which must not exist; see ``save_pretrained``.
        run_dir: directory of the run's folder, ``fit`` or the setting ``name``, with checkpoints
            and metrics. The same call resumes an interrupted run. Without it nothing is kept.
        callbacks: called before each step.
        loggers: receive metrics.
        losses: task -> function of outputs and targets; returns the mean loss of the rows.
        metrics: measured beside those of the objectives.

    Returns:
        The result of ``finetune`` without MLflow: ``step``, ``seconds``, ``losses`` per task,
        ``evaluation`` (tidy rows), ``weak_tests`` and others. Its folder is deleted with a run that
        is not kept.

    Raises:
        UserError: data and model do not fit, or a setting is invalid.
    """
    if not isinstance(data, TrainingData):
        data = TrainingData(data)
    check_known_names(losses or {}, model.config.tasks, "losses", "task")
    if output is not None and Path(output).exists():
        raise UserError(f"{output}: exists. Give output another folder")
    with tempfile.TemporaryDirectory(prefix="skillnet-run-") as scratch:
        run = data.resolve(model, settings, run_dir or scratch)
        run.parts = InProcessParts(model, losses or {}, loggers)
        with lock_run_folder(run.folder), add_metrics(metrics):
            result = find_finished_result(run)
            if result is not None:
                console.print_note(f"{run.config.name} is finished ({result['step']} steps)")
                remove_untrained_parts(run, model)
                model.load_state_dict(load_model(run.folder / MODEL).state_dict())
            else:
                validate_run(run)
                if run.config.evaluate:
                    check_evaluation_splits(run, None)
                create_run_folder(run.config, run.folder)
                steps = run.config.training.steps
                with follow_progress(run.folder / PROGRESS, steps):
                    run_worker(run, callbacks=callbacks, final=FinalEvaluation())
                result = {
                    "name": run.config.name,
                    "run": str(run.folder),
                    "model": str(run.folder / MODEL),
                    **read_json(run.folder / TRAINED),
                }
                result["weak_tests"] = find_run_weaknesses(run.config, result["evaluation"], None)
                for sentence in result["weak_tests"]:
                    console.print_warning(f"the test proves little: {sentence}")
                write_json(run.folder / RESULT, result)
            data.finish(model, resolve_model(str(run.folder)), result["evaluation"])
    if output is not None:
        model.save_pretrained(output)
    return result
