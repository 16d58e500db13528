"""``skillnet finetune``: train the tasks jointly, from a configuration to a registered model.

<run root>/<name>/
  config.yaml      the resolved configuration
  run.json         id and server of the MLflow run
  .lock            lock of the process that works in the folder
  checkpoints/     the newest ones; an interrupted run resumes from there
  progress.jsonl   every logged metric
  model/           the final model
  trained.json     steps, time, throughput
  evaluation.csv   metrics on the test splits; outcomes.parquet holds the outcome of each row
  evaluated.json   the result before its registration, for a command that resumes after a kill
  result.json      the result of the command; written last
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.training.config.resources import request_training
from pipelines.training.config.run import ESSENTIAL_TRAINING_OPTIONS, FinetuneConfig
from pipelines.training.loop.resolved_run import resolve_run
from pipelines.training.loop.run import find_finished_result, train_and_evaluate, validate_run
from pipelines.training.runs.layout import (
    CONFIG,
    RESULT,
    create_run_folder,
    lock_run_folder,
    parse_task_counts,
    track_run,
)
from pipelines.training.runs.mirror import RunMirror, mirror_of, upload_results
from pipelines.training.runs.progress_log import PROGRESS, follow_progress
from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.config.parser import list_options
from skillnet_platform.errors import UserError
from skillnet_platform.signals import terminate_as_interrupt
from skillnet_platform.storage import write_json

if TYPE_CHECKING:
    from pipelines.training.loop.reporter import LoopCallback
    from pipelines.training.loop.resolved_run import ResolvedRun


def finetune(
    config: FinetuneConfig | str, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Train the tasks of a configuration jointly, evaluate and register the model.

    The name of an unfinished run resumes it. The name of a finished run returns its result.

        finetune("tiny", {"name": "first", "training.steps": 200})

    Args:
        config: settings of the run, or the name of a preset or a YAML file as after ``--config``.
        overrides: dotted key -> value, on top of a preset.

    Returns:
        Name, folder, steps, seconds, throughput, model and checkpoint paths, MLflow run id, and
        ``evaluation``: tidy rows.

    Raises:
        UserError: the name belongs to another run, a corpus is missing or does not fit, …
    """
    if isinstance(config, str):
        config = main.parse_arguments(["--config", config, *list_options(overrides or {})])
    elif overrides:
        raise UserError("overrides: they apply to a preset. Change the configuration itself")
    return run_end_to_end(config, "finetune")


def run_end_to_end(
    config: FinetuneConfig,
    stage: str,
    splits: Sequence[str] | None = None,
    callbacks: "Sequence[LoopCallback]" = (),
) -> dict[str, Any]:
    """Do a run from its folder to its registration; see :func:`finetune`.

    Args:
        config: settings of the run.
        stage: name of the command, for tags and for a generated name.
        splits: to evaluate the final model on; None takes the test splits. Without
            ``config.evaluate`` there is no evaluation.
        callbacks: observers of the training loop.
    """
    run = resolve_run(config, stage)
    mirror = mirror_of(run.config, run.folder)
    # SIGTERM ends every step in a state that the same command continues, not only the training.
    with terminate_as_interrupt(), lock_run_folder(run.folder, mirror.uri if mirror else None):
        return _run_in_folder(run, mirror, stage, splits, callbacks)


def _run_in_folder(
    run: "ResolvedRun",
    mirror: RunMirror | None,
    stage: str,
    splits: Sequence[str] | None,
    callbacks: "Sequence[LoopCallback]",
) -> dict[str, Any]:
    config, folder = run.config, run.folder
    if mirror is not None:
        mirror.restore(config)
    exists = (folder / CONFIG).is_file()
    finished = find_finished_result(run)
    if finished is not None:
        if mirror is not None and not mirror.has(RESULT):
            upload_results(mirror, config.training.keep_checkpoints)
        console.print_note(
            f"{config.name} is finished ({finished['step']} steps); give another name"
        )
        return finished
    # A missing corpus is reported before torch loads, and a missing GPU before rows are read.
    _ = run.corpora
    from pipelines.serving.registration import check_given_name
    from pipelines.training.loop.run_evaluation import check_evaluation_splits
    from pipelines.training.loop.setup import require_devices

    require_devices(config.training)
    validate_run(run)
    if config.evaluate:
        check_evaluation_splits(run, splits)
        check_given_name(config.tracking, config.system)
    create_run_folder(config, folder)
    if mirror is not None:
        mirror.check_writable(exists)
    with (
        track_run(config, folder, stage) as tracker,
        follow_progress(folder / PROGRESS, config.training.steps),
    ):
        requested = splits if config.evaluate else None
        result = train_and_evaluate(run, tracker, splits=requested, callbacks=callbacks)
    result["registered"] = register_run(config, folder, result["evaluation"])
    result["mirror"] = mirror.uri if mirror is not None else None
    write_json(folder / RESULT, result)
    if mirror is not None:
        upload_results(mirror, config.training.keep_checkpoints)
    return result


def print_result(result: dict[str, Any], next_step: str) -> None:
    """Print the metrics of a run, and a line with its duration and the next step."""
    if result["evaluation"]:
        from pipelines.training.evaluation.tables import result_cells

        console.print_table(result["name"], *result_cells(result["evaluation"]))
    problems = {name: c.problems for name, c in parse_task_counts(result.get("tasks", {})).items()}
    rows = [[name, problem] for name, problem in problems.items() if problem]
    if rows:
        console.print_table("training problems", ["task", "problem"], rows)
    for sentence in result.get("weak_tests", ()):
        console.print_warning(f"the test proves little: {sentence}")
    if made := result.get("registered"):
        console.print_note(
            f"registered as {made['uri']}, now models:/{made['name']}@{made['alias']}"
        )
    duration = console.format_minutes(result["seconds"])
    console.print_note(f"{result['step']} steps in {duration}; {next_step}")


def register_run(
    config: FinetuneConfig, run: Path, rows: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Register the model of a run and decide on its promotion.

    A run of a few steps may leave a task untrained, and a given name may belong to another system.
    Such a run is kept, and a warning states the reason. A model of a fold is not registered: the
    champion was compared on other rows.

    Args:
        config: settings of the run.
        run: its folder.
        rows: its evaluation; without rows nothing is registered.

    Returns:
        Name, version, alias and address; None if nothing is registered.
    """
    if not rows or config.fold.count:
        return None
    from pipelines.serving.registration import register_measured_run

    return register_measured_run(config.tracking, [], run, str(config.data), rows)


@command(
    FinetuneConfig,
    description="Train all tasks jointly in one sparse model: each step has one task, and only "
    "the skills of that task are computed, updated and communicated.",
    example="skillnet finetune --name first --training.steps 2000\n"
    "skillnet finetune --tasks.image_classification.corpus mine\n"
    "skillnet finetune --config tiny --training.workers 2 --json",
    show=lambda result: print_result(result, f"the model is in {result['model']}"),
    resources=request_training,
    essential=(
        "name",
        "run_dir",
        "data",
        "init_from",
        "seed",
        "system",
        "model.dim",
        "model.num_layers",
        "tasks.NAME.corpus",
        "tasks.NAME.batch_size",
        *ESSENTIAL_TRAINING_OPTIONS,
    ),
)
def main(config: FinetuneConfig) -> dict[str, Any]:
    """Run ``skillnet finetune``."""
    return finetune(config)


if __name__ == "__main__":
    raise SystemExit(main())
