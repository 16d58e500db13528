"""``skillnet register``: put a trained model into the registry, behind the gate."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.config import parse, positional
from skillnet_platform.errors import UserError
from skillnet_platform.storage import data_root, run_root, sha256_file
from skillnet_platform.storage.location import place

if TYPE_CHECKING:
    from pipelines.sources import Source
    from skillnet_platform.tracking.promotion import Figure
    from skillnet_platform.tracking.registry import Registered


@dataclass
class RegisterConfig:
    """Register a trained model as a new version.

    Args:
        source: a run's name, id or folder, a checkpoint, or a saved model.
        name: of the registered model.
        data: directory or URI of prepared corpora; by default corpora below the run root.
        samples: resamplings of the intervals that the gate compares.
        force: make it champion whatever the gate says.
        description: added to the page of the version.
        corpora: task -> corpus, where it is not the one of the training run.
        tracking_uri: MLflow tracking URI; by default as in training.
    """

    source: str = positional()
    name: str = "skillnet"
    data: Optional[str] = None  # noqa: UP045
    samples: int = 1000
    force: bool = False
    description: str = ""
    corpora: dict[str, str] = field(default_factory=dict)
    tracking_uri: Optional[str] = None  # noqa: UP045


def register_model(
    source: "Source",
    data: str | Path,
    *,
    rows: Sequence[dict[str, Any]] | None = None,
    others: Sequence[dict[str, Any]] = (),
    name: str = "skillnet",
    uri: str | None = None,
    samples: int = 1000,
    force: bool = False,
    description: str = "",
) -> "Registered":
    """Make a model a version of the registry and give it the alias that it has earned.

    Args:
        source: the trained model.
        data: directory of prepared corpora.
        rows: its evaluation on the test splits; none evaluates it now.
        others: rows of chance and the simple references, for the page of the version.
        name: of the registered model.
        uri: MLflow tracking URI.
        samples: resamplings, where it is evaluated now.
        force: make it champion whatever the gate says.
        description: added to the page of the version.

    Raises:
        UserError: corpora that are missing or do not fit the model.
    """
    from pipelines import bundle
    from pipelines.reporting import description as describe
    from pipelines.sources import BUNDLE, load_at_work
    from skillnet_platform import __version__
    from skillnet_platform.tracking import registry

    model = load_at_work(source)
    if rows is None:
        rows = _evaluate(source, model, data, samples)
    total = sum(p.numel() for p in model.parameters())
    with _run_of(source, uri) as run_id:
        folder = run_root() / "cache" / "registering" / BUNDLE
        bundle.build(source, data, folder)
        about = bundle.check(folder)
        digests = {entry["corpus"]: entry["corpus_digest"] for entry in about["tasks"].values()}
        made = registry.register(
            run_id,
            Path(__file__).with_name("serving.py"),
            {BUNDLE: folder},
            figures(rows, model.config.tasks, about),
            uri=uri,
            name=name,
            signature=signature(),
            input_example=None,
            metadata={"serving_sha256": sha256_file(folder / bundle.ABOUT)},
            requirements=[
                f"skillnet-platform=={__version__}",
                *registry.installed(registry.REQUIREMENTS),
            ],
            description="\n\n".join(
                part for part in (description, describe(rows, others, model.config, total)) if part
            ),
            tags={
                "weights_digest": source.digest,
                "serving_sha256": sha256_file(folder / bundle.ABOUT),
                "package": __version__,
                **{f"corpus.{corpus}": value for corpus, value in digests.items()},
            },
        )
    if force and made.alias != registry.CHAMPION:
        verdict = registry.promote(made.version, name=name, uri=uri, force=True)
        made = registry.Registered(
            made.name, made.version, made.uri, made.run_id, registry.CHAMPION, verdict
        )
    return made


def figures(
    rows: Sequence[dict[str, Any]], tasks: Mapping[str, Any], about: Mapping[str, Any]
) -> "dict[str, Figure]":
    """The headline of each task on ``test``, as the gate compares it."""
    from pipelines.reporting import HEADLINE, find
    from skillnet_platform.tracking.promotion import Figure

    found: dict[str, Figure] = {}
    for task, spec in tasks.items():
        metric, more = HEADLINE[spec.objective]
        row = find(rows, task, metric)
        if row is not None:
            data = about["tasks"][task]["corpus_digest"]
            found[task] = Figure(metric, row["value"], row["low"], row["high"], more, data)
    return found


def signature() -> Any:
    """What the registered model takes and gives, as MLflow writes it down."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    text, number = DataType.string, DataType.double
    inputs = Schema(
        [
            ColSpec(text, "text", required=False),
            ColSpec(text, "file", required=False),
            ColSpec(text, "name", required=False),
            ColSpec(text, "task", required=False),
        ]
    )
    outputs = Schema(
        [
            ColSpec(text, "input"),
            ColSpec(text, "task"),
            ColSpec(text, "answer"),
            ColSpec(number, "score", required=False),
            ColSpec(Array(text), "alternatives"),
            ColSpec(Array(number), "scores"),
            ColSpec(Array(number), "embedding"),
        ]
    )
    return ModelSignature(inputs, outputs, ParamSchema([ParamSpec("top", DataType.long, 5)]))


def _evaluate(source: "Source", model: Any, data: str | Path, samples: int) -> list[dict[str, Any]]:
    from pipelines.evaluation import evaluate_model

    console.note("evaluating for the gate")
    return evaluate_model(
        model,
        data,
        seed=source.seed,
        corpora=source.corpora,
        limits=source.limits,
        steps=source.steps,
        samples=samples,
    )


@contextlib.contextmanager
def _run_of(source: "Source", uri: str | None) -> Iterator[str]:
    """Id of the run that made the model; a run for this registration if it has none."""
    from pipelines.sources import knows_run
    from skillnet_platform import tracking
    from skillnet_platform.tracking import backend

    backend.setup(uri)
    if source.run_id is not None and knows_run(source.run_id, uri):
        yield source.run_id
        return

    settings = tracking.TrackingConfig(uri=uri, system_metrics=False)
    with tracking.start(
        f"register {Path(source.name).name}",
        tracking=settings,
        description=f"Registered from `{source.weights}`, which belongs to no run here.",
        tags={"trained_as": source.run_id} if source.run_id else None,
    ) as tracker:
        yield tracker.run_id


def show(made: "Registered") -> None:
    """Print what was registered, under which alias, and why."""
    console.note(f"{made.uri} is now @{made.alias}")
    rows = [reason.partition(": ")[::2] for reason in made.verdict.reasons]
    console.table("the gate", ["task", "verdict"], rows)
    console.note(f"try: skillnet predict --model models:/{made.name}@{made.alias} --text …")


@command
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``skillnet register``."""
    config = parse(
        RegisterConfig,
        argv or [],
        "skillnet register",
        description="Log a trained model with its tokenizer and names, make it a version of the "
        "registry, and let the gate decide whether it becomes the champion: at least as good on "
        "all tasks and better on one, by confidence interval.",
        example="skillnet register my-run",
    )
    from dataclasses import replace

    from pipelines import sources

    if config.samples < 1:
        raise UserError("the gate compares intervals: samples must be at least 1")
    source = sources.find(config.source, config.tracking_uri)
    if config.corpora:
        tasks = source.settings.get("tasks", {})
        named = {
            task: {**tasks.get(task, {}), "corpus": name} for task, name in config.corpora.items()
        }
        source = replace(source, settings={**source.settings, "tasks": {**tasks, **named}})
    made = register_model(
        source,
        place(config.data, data_root()),
        name=config.name,
        uri=config.tracking_uri,
        samples=config.samples,
        force=config.force,
        description=config.description,
    )
    if console.json_wanted():
        console.emit_json(made)
    else:
        show(made)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
