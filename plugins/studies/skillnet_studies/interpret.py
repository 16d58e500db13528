"""``skillnet interpret``: measure the effect of each skill of a trained model.

The entry point is :func:`interpret_source`. ``skillnet compare`` also calls it for its report.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.training.config.resources import request_model
from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.config import positional_field
from skillnet_platform.errors import UserError, check_known_names
from skillnet_platform.storage import run_root

if TYPE_CHECKING:
    from pipelines.training.runs.model_source import ModelSource
    from skillnet_studies.interpretation.analysis import SkillInterpretation

#: Directory of the results below a run directory.
INTERPRETATION = "interpretation"


@dataclass
class InterpretConfig:
    """Measure the effect of the skills of a trained model.

    Args:
        model: registry address, run name, run id, run directory, checkpoint or saved model.
        data: directory or URI of prepared corpora; by default those of the model's run, else
            corpora below the run root.
        tasks: tasks to measure; by default all tasks of the model.
        split: split for ablations and output similarity.
        corpora: task -> corpus, if it differs from the training run.
        swaps: also replace each active skill by each other skill; most of the running time.
        output: output directory; by default interpretation in the run directory, or below the run
            root.
        log: also record the files in the MLflow run of the model.
        tracking_uri: MLflow tracking URI; by default as in training.
    """

    model: str = positional_field("models:/skillnet@champion")
    data: str | None = None
    tasks: list[str] | None = None
    split: str = "test"
    corpora: dict[str, str] = field(default_factory=dict)
    swaps: bool = True
    output: str | None = None
    log: bool = True
    tracking_uri: str | None = None


def interpret_source(config: InterpretConfig) -> tuple["SkillInterpretation", list[Path]]:
    """Interpret a model, write the results, and record them in the MLflow run of the model.

    Returns:
        The interpretation and the files; the HTML page is first.

    Raises:
        UserError: the model does not exist or has no skills, or a corpus does not fit.
    """
    from pipelines.training.runs import model_source

    source = model_source.resolve_model(config.model, config.tracking_uri)
    source.require_own_splits("The interpretation")
    # torch loads here: --help and wrong names do not need it.
    from pipelines.training.evaluation.evaluator import machine_name
    from skillnet.model import SkillNet
    from skillnet_studies.interpretation.analysis import interpret_model

    model = model_source.load_trained_tasks(source)
    # Baselines can subclass SkillNet, so the registered name is compared as well.
    if not isinstance(model, SkillNet) or model.system != SkillNet.system:
        raise UserError(
            f"{config.model} is a {model.system} model without skills; give a skillnet model"
        )
    for option, names in (("--tasks", config.tasks or ()), ("--corpora", config.corpora)):
        check_known_names(names, model.config.tasks, option, "task")
    begin = time.monotonic()
    with console.show_progress("interpreting", None, "rows") as bar:
        interpretation = interpret_model(
            model,
            source.find_corpora(config.data),
            config.tasks,
            config.split,
            name=config.model,
            corpora=source.corpora | config.corpora,
            limits=source.limits,
            metrics=source.metrics,
            swaps=config.swaps,
            on_progress=lambda task, rows, left: bar.begin_part(task, rows, left),
        )
    interpretation.facts.update(
        {
            "weights": source.digest,
            "steps of training": str(source.steps or "unknown"),
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine_name(),
            "seconds": f"{time.monotonic() - begin:.0f}",
        }
    )
    files = interpretation.write(_output_folder(config, source))
    if config.log and source.run_id:
        _record_files(files, source.run_id, config.tracking_uri)
    return interpretation, files


def _output_folder(config: InterpretConfig, source: "ModelSource") -> Path:
    if config.output:
        return Path(config.output)
    if source.run is not None:
        return source.run / INTERPRETATION
    return run_root() / "interpretations" / source.digest[:12]


def _record_files(files: list[Path], run_id: str, uri: str | None) -> None:
    from pipelines.training.runs.model_source import is_known_run
    from skillnet_platform.tracking import Tracker, backend

    # A model copied from elsewhere names a run that this tracking server does not have.
    if not is_known_run(run_id, uri):
        console.print_note(f"the run {run_id} is not in this tracker: the files are only on disk")
        return
    tracker = Tracker(run_id, backend.resolve_uri(uri))
    for path in files:
        tracker.artifact(path, "interpretation")
    tracker.flush()


def build_ablation_cells(
    rows: list[dict[str, Any]], skills: tuple[str, ...]
) -> tuple[list[str], list[list[str]]]:
    """Return columns and cells for the terminal: score drop in points, by task and skill.

    Args:
        rows: result of :func:`skillnet_studies.interpretation.ablation.measure_ablations`.
        skills: skills of the model, in order.

    Returns:
        Columns and cells. Drops after adding a skill are in brackets; * marks intervals without 0.
    """
    from skillnet_studies.interpretation.ablation import ADD, SWAP

    cells: dict[str, list[str]] = {}
    for row in rows:
        line = cells.setdefault(row["task"], [row["task"], *[""] * len(skills)])
        # Swaps have two skills and would need a second table.
        if row["change"] == SWAP:
            continue
        drop = row["score_drop"]
        text = "n/a" if drop is None else f"{100 * drop:.1f}"
        is_significant = drop is not None and (row["low"] > 0 or row["high"] < 0)
        text += "*" if is_significant else ""
        line[1 + skills.index(row["skill"])] = f"({text})" if row["change"] == ADD else text
    return ["task", *skills], list(cells.values())


def show_interpretation(
    interpretation: "SkillInterpretation", files: list[Path], split: str
) -> None:
    """Print the score drop of each task, and the path of the page.

    Args:
        interpretation: ablations, similarities and gradient shares of the model.
        files: its files; the HTML page is first.
        split: split of the ablations.
    """
    console.print_table(
        f"{interpretation.model}: score drop in points on {split}",
        *build_ablation_cells(interpretation.ablations, interpretation.skills),
        caption="after removing an active skill (or adding another); *: the interval excludes 0",
    )
    console.print_note(f"page: {files[0]}")


def _tables_by_name(interpretation: "SkillInterpretation") -> dict[str, Any]:
    return {name.removesuffix(".csv"): table for name, table in interpretation.tables().items()}


@command(
    InterpretConfig,
    description="Measure the effect of each skill of a model: the score drop of every task after "
    "removing, adding or swapping a skill; the similarity of skills by layer; the gradient share "
    "of each skill. Writes an HTML page, CSV files and figures.",
    example="skillnet interpret my-run --split validation",
    show=lambda result: show_interpretation(*result),
    to_json=lambda result: {
        "files": result[1],
        **{name: rows[1] for name, rows in _tables_by_name(result[0]).items()},
    },
    resources=lambda config: request_model(config.model, config.data),
)
def main(config: InterpretConfig) -> tuple["SkillInterpretation", list[Path], str]:
    """Run ``skillnet interpret``."""
    return *interpret_source(config), config.split


if __name__ == "__main__":
    raise SystemExit(main())
