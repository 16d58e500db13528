"""``skillnet evaluate``: a trained model on every row of the test sets, with intervals."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipelines.config.resources import request_model
from pipelines.evaluation.tables import write_evaluation_csv
from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.errors import UserError
from skillnet_platform.storage import data_root, run_root
from skillnet_platform.storage.location import place


@dataclass
class EvaluateConfig:
    """Evaluate a trained model.

    Args:
        model: a registry address (models:/skillnet@champion), a run's name, id or folder, a
            checkpoint, or a saved model; by default the champion.
        checkpoint: the folder of a checkpoint or saved model; the same as --model.
        run: a run's name, id or folder; the same as --model.
        data: directory or URI of prepared corpora; by default corpora below the run root.
        tasks: which tasks; by default all that the model has.
        splits: which splits; by default every test set of each corpus.
        corpora: task -> corpus, where it is not the one of the training run.
        references: also compute chance and the simple references.
        samples: resamplings of each interval.
        precision: auto is bf16 where the machine multiplies it natively.
        output: CSV file; by default below evaluations in the run root.
        log: also record the figures in the model's MLflow run.
        tracking_uri: MLflow tracking URI; by default as in training.
    """

    model: str | None = None
    checkpoint: str | None = None
    run: str | None = None
    data: str | None = None
    tasks: list[str] | None = None
    splits: list[str] | None = None
    corpora: dict[str, str] = field(default_factory=dict)
    references: bool = True
    samples: int = 1000
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    output: str | None = None
    log: bool = True
    tracking_uri: str | None = None

    def __post_init__(self) -> None:
        given = [key for key in ("model", "checkpoint", "run") if getattr(self, key)]
        if len(given) > 1:
            raise UserError(f"give one of --{' and --'.join(given)}, not both")
        if self.samples < 0:
            raise UserError(f"samples must not be negative, got {self.samples}")

    @property
    def source(self) -> str:
        """The model that was asked for."""
        from pipelines.runs.model_source import DEFAULT_MODEL

        return self.model or self.checkpoint or self.run or DEFAULT_MODEL


@dataclass(frozen=True)
class EvaluationResult:
    """What ``evaluate`` gives.

    Args:
        model: as it was asked for.
        rows: tidy rows of the model.
        references: tidy rows of chance and the simple references.
        output: the CSV file with all rows.
        total_params: parameters of the whole model.
        seconds: what the model's own evaluation took.
    """

    model: str
    rows: list[dict[str, Any]]
    references: list[dict[str, Any]]
    output: Path
    total_params: int
    seconds: float


def evaluate_trained_model(config: EvaluateConfig) -> EvaluationResult:
    """Evaluate a model, write the CSV file and record the figures in its MLflow run.

    Raises:
        UserError: no such model, corpus, task or split; files that were altered.
    """
    from pipelines.evaluation.evaluator import evaluate_model
    from pipelines.evaluation.simple_baselines import evaluate_simple_baselines
    from pipelines.evaluation.tables import sort_rows
    from pipelines.runs import model_source
    from skillnet.skills import find_task

    source = model_source.resolve_model(config.source, config.tracking_uri)
    model = model_source.load_source_model(source)
    data = place(config.data, data_root())
    corpora = source.corpora | config.corpora
    chosen = config.tasks or source.trained_tasks(sort_rows(model.config.tasks))
    specs = {name: find_task(name, model.config.tasks) for name in chosen}
    begin = time.monotonic()
    with console.progress("evaluating", None, "rows") as bar:
        rows = evaluate_model(
            model,
            data,
            chosen,
            config.splits,
            seed=source.seed,
            corpora=corpora,
            limits=source.limits,
            steps=source.steps,
            precision=config.precision,
            samples=config.samples,
            on_split=lambda task, split, count: bar.advance(count, f"{task} {split}"),
        )
    seconds = time.monotonic() - begin
    beside: list[dict[str, Any]] = []
    if config.references:
        with console.progress("simple references", len(specs), "tasks") as bar:
            beside = evaluate_simple_baselines(
                data,
                specs,
                config.splits,
                corpora=corpora,
                samples=config.samples,
                on_task=lambda name: bar.advance(1, name),
            )
    if config.output:
        output = Path(config.output)
    else:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        output = run_root() / "evaluations" / f"{stamp}-{source.digest[:8]}.csv"
    write_evaluation_csv([*rows, *beside], output)
    if config.log and source.run_id:
        log_evaluation(rows, output, source.run_id, source.steps, config.tracking_uri)
    total = sum(p.numel() for p in model.parameters())
    return EvaluationResult(config.source, rows, beside, output, total, seconds)


def log_evaluation(
    rows: Sequence[dict[str, Any]], path: Path, run_id: str, step: int | None, uri: str | None
) -> None:
    """Record figures and the CSV file in an MLflow run."""
    from pipelines.evaluation.tables import flat_metrics
    from pipelines.runs.model_source import is_known_run
    from skillnet_platform.tracking import Tracker, backend

    backend.setup(uri)
    if not is_known_run(run_id, uri):
        console.note(f"run {run_id} is not in this tracker; the figures are in {path} only")
        return
    tracker = Tracker.by_id(run_id, backend.resolve_uri(uri))
    tracker.metrics(flat_metrics(rows), step or 0)
    tracker.artifact(path, "evaluation")
    if not tracker.flush():
        console.warn(f"MLflow does not answer; the figures of run {run_id} wait in the spool")


def show_evaluation(result: EvaluationResult) -> None:
    """Print the tables of an evaluation."""
    from pipelines.evaluation.tables import result_cells

    columns, cells = result_cells(result.rows)
    console.table(f"SkillNet, {result.model}", columns, cells)
    for system in ("reference", "chance"):
        rows = [row for row in result.references if row["system"] == system]
        if rows:
            title = "simple references" if system == "reference" else "chance"
            console.table(title, *result_cells(rows))
    console.note(f"{result.seconds:.1f} s for the model; all figures are in {result.output}")


@command(
    EvaluateConfig,
    description="Measure a model on every row of the test sets, each figure with a 95 % "
    "bootstrap interval, beside chance and simple references.",
    example="skillnet evaluate --model models:/skillnet@champion\n"
    "skillnet evaluate --run my-run --splits validation --json",
    show=show_evaluation,
    resources=lambda config: request_model(
        config.model or config.checkpoint or config.run, config.data
    ),
)
def main(config: EvaluateConfig) -> EvaluationResult:
    """Run ``skillnet evaluate``."""
    return evaluate_trained_model(config)


if __name__ == "__main__":
    raise SystemExit(main())
