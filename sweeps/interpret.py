"""``skillnet interpret``: what the skills of a trained model do."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

from pipelines.config.resources import request_model
from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.config import positional
from skillnet_platform.errors import UserError
from skillnet_platform.storage import data_root, run_root
from skillnet_platform.storage.location import place

if TYPE_CHECKING:
    from pipelines.runs.model_source import ModelSource
    from sweeps.interpretation.analysis import SkillInterpretation

#: Its folder below a run.
INTERPRETATION = "interpretation"


@dataclass
class InterpretConfig:
    """Interpret a trained model.

    Args:
        model: a registry address, a run's name, id or folder, a checkpoint, or a saved model.
        data: directory or URI of prepared corpora; by default corpora below the run root.
        tasks: which tasks; by default all that the model has.
        split: that knock-outs are measured and outputs compared on.
        corpora: task -> corpus, where it is not the one of the training run.
        swaps: also put each other skill in the place of each active one; most of the work.
        tokens: of each modality, that skills' outputs are compared on.
        batches: training batches of each task for the gradient.
        samples: resamplings of each interval.
        seed: of the choice of rows and of resampling.
        precision: auto is bf16 where the machine multiplies it natively.
        output: folder; by default interpretation in the run's folder, or below the run root.
        log: also record it in the model's MLflow run.
        tracking_uri: MLflow tracking URI; by default as in training.
    """

    model: str = positional("models:/skillnet@champion")
    data: Optional[str] = None  # noqa: UP045
    tasks: Optional[list[str]] = None  # noqa: UP045
    split: str = "test"
    corpora: dict[str, str] = field(default_factory=dict)
    swaps: bool = True
    tokens: int = 2048
    batches: int = 8
    bootstrap_samples: int = 1000
    seed: int = 0
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    output: Optional[str] = None  # noqa: UP045
    log: bool = True
    tracking_uri: Optional[str] = None  # noqa: UP045

    def __post_init__(self) -> None:
        for key in ("tokens", "batches", "bootstrap_samples"):
            if getattr(self, key) < 1:
                raise UserError(f"{key} must be at least 1, got {getattr(self, key)}")


def interpret_source(config: InterpretConfig) -> tuple["SkillInterpretation", list[Path]]:
    """Interpret a model, write it down and record it in the model's MLflow run.

    Returns:
        The interpretation, and the files; the page comes first.

    Raises:
        UserError: no such model, a model without skills, corpora that do not fit.
    """
    from pipelines.evaluation.evaluator import machine
    from pipelines.runs import model_source
    from skillnet.model import SkillNet
    from sweeps.interpretation.analysis import interpret_model

    source = model_source.resolve_model(config.model, config.tracking_uri)
    model = model_source.load_trained_tasks(source)
    if not isinstance(model, SkillNet) or model.system != SkillNet.system:
        raise UserError(f"{config.model} is a {model.system} model; only a skillnet has skills")
    begin = time.monotonic()
    with console.progress("interpreting", None, "rows") as bar:
        made = interpret_model(
            model,
            place(config.data, data_root()),
            config.tasks,
            config.split,
            name=config.model,
            corpora=source.corpora | config.corpora,
            limits=source.limits,
            swaps=config.swaps,
            tokens=config.tokens,
            batches=config.batches,
            seed=config.seed,
            bootstrap_samples=config.bootstrap_samples,
            precision=config.precision,
            on_progress=lambda words, count: bar.advance(count, words),
        )
    made.facts.update(
        {
            "weights": source.digest,
            "steps of training": str(source.steps or "unknown"),
            "seed": str(config.seed),
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "seconds": f"{time.monotonic() - begin:.0f}",
        }
    )
    files = made.write(_output_folder(config, source))
    if config.log and source.run_id:
        _record_files(files, source.run_id, config.tracking_uri)
    return made, files


def _output_folder(config: InterpretConfig, source: "ModelSource") -> Path:
    if config.output:
        return Path(config.output)
    if source.run is not None:
        return source.run / INTERPRETATION
    return run_root() / "interpretations" / source.digest[:12]


def _record_files(files: list[Path], run_id: str, uri: str | None) -> None:
    from pipelines.runs.model_source import is_known_run
    from skillnet_platform.tracking import Tracker, backend

    if not is_known_run(run_id, uri):
        console.note(f"the run {run_id} is not in this tracker: the files are on disk only")
        return
    tracker = Tracker.by_id(run_id, backend.resolve_uri(uri))
    for path in files:
        tracker.artifact(path, "interpretation")
    tracker.flush()


def build_ablation_cells(
    rows: list[dict[str, Any]], skills: tuple[str, ...]
) -> tuple[list[str], list[list[str]]]:
    """Columns and cells for the terminal: points lost, in brackets where a skill is put in."""
    from sweeps.interpretation.ablation import ADD, SWAP

    cells: dict[str, list[str]] = {}
    for row in rows:
        line = cells.setdefault(row["task"], [row["task"], *[""] * len(skills)])
        if row["change"] == SWAP:
            continue
        text = "n/a" if row["lost"] is None else f"{100 * row['lost']:.1f}"
        sure = row["lost"] is not None and (row["low"] > 0 or row["high"] < 0)
        text += "*" if sure else ""
        line[1 + skills.index(row["skill"])] = f"({text})" if row["change"] == ADD else text
    return ["task", *skills], list(cells.values())


def show_interpretation(made: "SkillInterpretation", files: list[Path], split: str) -> None:
    """Print the points that each task loses, and where the page is."""
    console.table(
        f"{made.model}: points lost on {split}",
        *build_ablation_cells(made.ablations, made.skills),
        caption="an active skill is left out, (another is put in); *: the interval excludes 0",
    )
    console.note(f"the page is {files[0]}")


def _tables_by_name(made: "SkillInterpretation") -> dict[str, Any]:
    return {name.removesuffix(".csv"): table for name, table in made.tables().items()}


@command(
    InterpretConfig,
    description="Show what the skills of a model do: what every task loses when a skill is "
    "left out, put in or swapped for another; how alike skills are, layer by layer; where the "
    "gradient goes. Writes a page, CSV files and pictures.",
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
