"""``skillnet evaluate``: metrics of a trained model on every test row, with intervals."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.training.config.resources import request_model
from pipelines.training.evaluation.tables import write_evaluation_csv
from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.config import positional_field
from skillnet_platform.config.bounds import SampleCount, require_bounds
from skillnet_platform.errors import check_known_names, first_line
from skillnet_platform.storage import run_root

if TYPE_CHECKING:
    from pipelines.training.runs.model_source import ModelSource


@dataclass
class EvaluateConfig:
    """Evaluate a trained model.

    Args:
        model: registry address (models:/skillnet@champion), name, id or folder of a run,
            checkpoint, or saved model.
        data: directory or URI of prepared corpora; by default those of the model's run, else
            corpora below the run root.
        tasks: tasks to evaluate; by default all tasks of the model.
        splits: splits to evaluate; by default every test split of each corpus.
        corpora: task -> corpus, if it differs from the training run.
        simple_baselines: also evaluate chance and the simple baselines.
        bootstrap_samples: resamples of the intervals of macro-F1 and median rank; 0 omits all
            intervals.
        precision: auto uses bf16 if the device supports it natively.
        output: CSV file; by default below evaluations in the run root.
        log: also log the metrics: to the model's MLflow run those of the corpora that the run was
            trained on, and to a run below it those of other corpora.
        tracking_uri: MLflow tracking URI; by default as in training.
    """

    model: str = positional_field("models:/skillnet@champion")
    data: str | None = None
    tasks: list[str] | None = None
    splits: list[str] | None = None
    corpora: dict[str, str] = field(default_factory=dict)
    simple_baselines: bool = True
    bootstrap_samples: SampleCount = 1000
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    output: str | None = None
    log: bool = True
    tracking_uri: str | None = None

    def __post_init__(self) -> None:
        require_bounds(self)


@dataclass(frozen=True)
class EvaluationResult:
    """Result of :func:`evaluate_trained_model`.

    Args:
        model: name of the model, as requested.
        rows: evaluation rows of the model.
        simple_baselines: evaluation rows of chance and the simple baselines.
        output: CSV file with all rows.
        total_params: parameters of the complete model.
        seconds: duration of the model's own evaluation.
        weak_tests: reasons why figures prove little.
    """

    model: str
    rows: list[dict[str, Any]]
    simple_baselines: list[dict[str, Any]]
    output: Path
    total_params: int
    seconds: float
    weak_tests: list[str]


def evaluate_trained_model(config: EvaluateConfig) -> EvaluationResult:
    """Evaluate a model, write the CSV file and log the metrics to its MLflow run.

    Args:
        config: settings of the command.

    Raises:
        UserError: the model, a corpus, a task or a split is missing, or a file was altered.
    """
    from pipelines.training.runs import model_source

    source = model_source.resolve_model(config.model, config.tracking_uri)
    # torch loads here: --help and wrong names do not need it.
    from pipelines.training.evaluation.evaluator import evaluate_model
    from pipelines.training.evaluation.simple_baselines import evaluate_simple_baselines
    from pipelines.training.evaluation.tables import sort_rows
    from pipelines.training.evaluation.weak_tests import find_weak_tests
    from skillnet.skills import find_task

    model = model_source.load_source_model(source)
    data = source.find_corpora(config.data)
    check_known_names(config.corpora, model.config.tasks, "--corpora", "task")
    corpora = source.corpora | config.corpora
    # A checkpoint of a run may contain auxiliary tasks, which have no test splits.
    tasks = config.tasks or source.trained_tasks(sort_rows(model.config.tasks))
    specs = {name: find_task(name, model.config.tasks) for name in tasks}
    begin = time.monotonic()
    with console.show_progress("evaluating", None, "rows") as bar:
        rows = evaluate_model(
            model,
            data,
            tasks,
            config.splits,
            seed=source.seed,
            corpora=corpora,
            limits=source.limits,
            metrics=source.metrics,
            steps=source.steps,
            precision=config.precision,
            bootstrap_samples=config.bootstrap_samples,
            on_split=lambda task, split, rows, left: bar.begin_part(f"{task} {split}", rows, left),
            # Rows of the usual test splits may be training rows of the fold.
            fold=source.fold,
        )
    # Stopped before the simple baselines, which may come from a cache.
    seconds = time.monotonic() - begin
    baseline_rows: list[dict[str, Any]] = []
    if config.simple_baselines:
        with console.show_progress("simple baselines", len(specs), "tasks") as bar:
            baseline_rows = evaluate_simple_baselines(
                data,
                specs,
                config.splits,
                corpora=corpora,
                bootstrap_samples=config.bootstrap_samples,
                on_task=lambda name: bar.advance(1, name),
                fold=source.fold,
            )
    if config.output:
        output = Path(config.output)
    else:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        # Time and weights are in the name, so that no evaluation overwrites another one.
        output = run_root() / "evaluations" / f"{stamp}-{source.digest[:8]}.csv"
    # Written before the tracking server is asked: its outage must not cost the results.
    write_evaluation_csv([*rows, *baseline_rows], output)
    if config.log and source.run_id:
        log_evaluation(rows, output, source, config.tracking_uri)
    weak = find_weak_tests(
        data,
        specs,
        model_source.list_training_reads(model_source.read_training_settings(source)),
        corpora=corpora,
        splits=config.splits,
        fold=source.fold,
    )
    total = sum(p.numel() for p in model.parameters())
    return EvaluationResult(
        config.model, rows, baseline_rows, output, total, seconds, [each.sentence for each in weak]
    )


def log_evaluation(
    rows: Sequence[dict[str, Any]], path: Path, source: "ModelSource", uri: str | None
) -> None:
    """Log metrics and the CSV file to the MLflow run of a model, or to a run below it.

    The run keeps the metrics of the corpora that it was trained on. Those of other corpora, or of
    other rows under the same name, have a run of their own, because MLflow shows the last value of
    a name.

    Args:
        rows: evaluation rows of the model.
        path: location of the CSV file.
        source: the model, with its run.
        uri: MLflow tracking URI.
    """
    from mlflow.exceptions import MlflowException

    from pipelines.training.evaluation.tables import compute_overall_score, flat_metrics
    from pipelines.training.runs.bundle_manifest import read_bundle_manifest
    from pipelines.training.runs.model_source import is_known_run
    from skillnet_platform.tracking import Tracker, backend, start_child_run

    place = backend.setup_backend(uri)
    run_id = str(source.run_id)
    # The model may have been copied from a machine with another tracker.
    if not is_known_run(run_id, uri):
        console.print_note(f"run {run_id} is not in this tracker; the metrics are only in {path}")
        return
    trained = source.settings.get("corpora") or {}
    digests = {task: trained.get(corpus) for task, corpus in source.corpora.items()}
    if not trained and source.bundle is not None:
        # A model without a training run was measured when it was registered.
        entries = read_bundle_manifest(source.bundle)["tasks"]
        digests = {task: entry["corpus_digest"] for task, entry in entries.items()}
    is_own = [digests.get(row["task"]) == row["corpus_digest"] for row in rows]
    own = [row for row, each in zip(rows, is_own, strict=True) if each]
    others = [row for row, each in zip(rows, is_own, strict=True) if not each]
    # The baselines describe the corpora and not this run; the CSV file contains them.
    logged: list[tuple[Tracker, list[dict[str, Any]], dict[str, float]]]
    logged = [(Tracker(run_id, place.uri), own, {})] if own else []
    if others:
        corpora = {row["corpus"]: row["corpus_digest"] for row in others}
        name = f"evaluation on {', '.join(corpora)}"
        try:
            run = backend.create_client(place.uri).get_run(run_id)
            parent = Tracker(run_id, place.uri, run.info.experiment_id)
            tasks = ", ".join(dict.fromkeys(row["task"] for row in others))
            tags = {backend.SYSTEM_TAG: others[0]["system"], backend.TASKS_TAG: tasks}
            tags |= {f"corpus.{corpus}": digest for corpus, digest in corpora.items()}
            child = start_child_run(parent, name, tags=tags)
        except MlflowException as error:
            console.print_warning(f"MLflow opens no run for {path}: {first_line(error)}")
        else:
            score, _ = compute_overall_score(others, "test")
            logged.append((child, others, {} if score is None else {backend.SCORE_METRIC: score}))
            console.print_note(
                f"run {run_id} was trained on other rows; the metrics are in the run {name!r} "
                "below it"
            )
    for tracker, measured, score_metrics in logged:
        tracker.metrics(flat_metrics(measured) | score_metrics, source.steps or 0)
        # A device has no content to upload, and a pipe would wait for another writer.
        if path.is_file():
            tracker.artifact(path, "evaluation")
        if measured is others:
            tracker.end()
        if not tracker.flush():
            console.print_warning(
                f"MLflow does not answer; the metrics of run {tracker.run_id} wait in the spool"
            )


def show_evaluation(result: EvaluationResult) -> None:
    """Print the tables of an evaluation.

    Args:
        result: result of :func:`evaluate_trained_model`.
    """
    from pipelines.training.evaluation.tables import SYSTEM_LABELS, result_cells

    columns, cells = result_cells(result.rows)
    console.print_table(f"SkillNet, {result.model}", columns, cells)
    for system in ("simple_baseline", "chance"):
        rows = [row for row in result.simple_baselines if row["system"] == system]
        if rows:
            console.print_table(SYSTEM_LABELS[system], *result_cells(rows))
    for sentence in result.weak_tests:
        console.print_warning(f"the test proves little: {sentence}")
    duration = console.format_minutes(result.seconds)
    console.print_note(f"{duration} for the model; all metrics are in {result.output}")


@command(
    EvaluateConfig,
    description="Measure a model on every row of the test sets, each metric with a 95 % "
    "confidence interval, and compare it with chance and simple baselines.",
    example="skillnet evaluate models:/skillnet@champion\n"
    "skillnet evaluate my-run --splits validation --json",
    show=show_evaluation,
    resources=lambda config: request_model(config.model, config.data),
)
def main(config: EvaluateConfig) -> EvaluationResult:
    """Run ``skillnet evaluate``."""
    return evaluate_trained_model(config)


if __name__ == "__main__":
    raise SystemExit(main())
