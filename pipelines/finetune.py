"""``skillnet finetune``: train the tasks jointly, from a checked configuration to a model on disk.

<run root>/<name>/
  config.yaml      the resolved configuration
  run.json         the MLflow run
  checkpoints/     the newest ones; a run that stopped goes on from there
  progress.jsonl   every logged metric
  model/           the final model
  trained.json     steps, time, throughput
  evaluation.csv   figures on the test sets, and outcomes.parquet, what became of each test row
  result.json      what the command gives; written last
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config.run import FinetuneConfig
from pipelines.runs.progress_log import PROGRESS, followed
from skillnet_platform import console, tracking
from skillnet_platform.cli import command
from skillnet_platform.storage import (
    write_json,
)

if TYPE_CHECKING:
    pass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
from pipelines.runs.layout import CONFIG, RESULT, RUN, make_folder
from pipelines.training.run import check, execute, finished_run, resolved


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Train the tasks of a configuration jointly, evaluate and record the model.

    The name of an unfinished run goes on with it; that of a finished one gives its result.

    Returns:
        Name, folder, steps, seconds, throughput, model and checkpoint paths, MLflow run id, and
        ``evaluation``: tidy rows.

    Raises:
        UserError: a name that another run has, corpora that are missing or do not fit, …
    """
    return carry_out(config, "finetune")


def carry_out(
    config: FinetuneConfig, stage: str, splits: Sequence[str] | None = None
) -> dict[str, Any]:
    """A run from its folder to its registration; see :func:`finetune`.

    Args:
        config: of the run.
        stage: what it is, for its tags and for a fresh name.
        splits: on which the final model is evaluated; none takes the test splits. Without
            ``config.evaluate`` there is no evaluation.
    """
    from pipelines.runs.mirror import mirror_of
    from pipelines.runs.uploads import deliver
    from pipelines.training.final_evaluation import check_splits

    config = resolved(config, stage)
    assert config.name is not None
    run = Path(str(config.run_dir)) / config.name
    mirror = mirror_of(config, run)
    if mirror is not None:
        mirror.take_up(config)
    known = (run / CONFIG).is_file()
    finished = finished_run(config, run)
    if finished is not None:
        if mirror is not None and not mirror.is_finished():
            deliver(mirror, config.training.keep, config.storage.patience)
        console.note(f"{config.name} is finished ({finished['step']} steps); give another name")
        return finished
    checked = check(config)
    if config.evaluate:
        check_splits(config, checked.manifests, splits)
    make_folder(config, run)
    if mirror is not None:
        mirror.begin(known)
    before = tracking.recorded(run / RUN)
    with tracking.start(
        config.name,
        config,
        config.tracking,
        tags={"run_dir": str(run), "stage": stage},
        run_id=before,
    ) as tracker:
        write_json(run / RUN, {"run_id": tracker.run_id, "uri": tracker.uri})
        with followed(run / PROGRESS, config.training.steps):
            chosen = splits if config.evaluate else None
            result = execute(config, run, tracker, checked, splits=chosen)
    result["registered"] = register(config, run, result["evaluation"])
    result["mirror"] = mirror.uri if mirror is not None else None
    write_json(run / RESULT, result)
    if mirror is not None:
        deliver(mirror, config.training.keep, config.storage.patience)
    return result


def show_run(result: dict[str, Any], words: str) -> None:
    """Print the result of a run: its figures, and a line that ends in ``words``."""
    if result["evaluation"]:
        from pipelines.evaluation.tables import result_cells

        console.table(result["name"], *result_cells(result["evaluation"]))
    console.note(f"{result['step']} steps in {result['seconds'] / 60:.1f} min; {words}")


def register(
    config: FinetuneConfig, run: Path, rows: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Register the model of a run, through the gate; none if that is not asked for.

    Args:
        config: of the run.
        run: its folder.
        rows: its evaluation; without one nothing is registered.
    """
    if not config.tracking.register or not rows:
        return None
    from pipelines.runs import model_source
    from pipelines.serving.registration import register_model

    source = model_source.find(str(run), config.tracking.uri)
    made = register_model(source, str(config.data), rows=rows, uri=config.tracking.uri)
    return {"name": made.name, "version": made.version, "alias": made.alias, "uri": made.uri}


@command(
    FinetuneConfig,
    description="Train all tasks jointly: one sparse model, one task a step, only the "
    "skills of that task computed, updated and exchanged.",
    example="skillnet finetune --name first --training.steps 2000\n"
    "skillnet finetune --config tiny --training.workers 2 --json",
    show=lambda result: show_run(result, f"the model is in {result['model']}"),
)
def main(config: FinetuneConfig) -> dict[str, Any]:
    """Run ``skillnet finetune``."""
    return finetune(config)


if __name__ == "__main__":
    raise SystemExit(main())
