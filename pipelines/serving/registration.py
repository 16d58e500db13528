"""TODO: pipelines.serving.registration."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillnet_platform import console
from skillnet_platform.storage import run_root, sha256_file

if TYPE_CHECKING:
    from pipelines.runs.model_source import ModelSource
    from skillnet_platform.tracking.promotion import Figure
    from skillnet_platform.tracking.registry import Registered


def register_model(
    source: "ModelSource",
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
    from pipelines.evaluation.tables import run_description as describe
    from pipelines.runs.model_source import BUNDLE, load_trained_tasks
    from pipelines.serving import bundle
    from skillnet_platform import __version__
    from skillnet_platform.tracking import registry

    model = load_trained_tasks(source)
    if rows is None:
        rows = _evaluate(source, model, data, samples)
    total = sum(p.numel() for p in model.parameters())
    with _run_of(source, uri) as run_id:
        folder = run_root() / "cache" / "registering" / BUNDLE
        bundle.build_bundle(source, data, folder)
        about = bundle.check_bundle(folder)
        digests = {entry["corpus"]: entry["corpus_digest"] for entry in about["tasks"].values()}
        made = registry.register(
            run_id,
            Path(__file__).with_name("mlflow_model.py"),
            {BUNDLE: folder},
            registry_metrics(rows, model.config.tasks, about),
            uri=uri,
            name=name,
            signature=model_signature(),
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


def registry_metrics(
    rows: Sequence[dict[str, Any]], tasks: Mapping[str, Any], about: Mapping[str, Any]
) -> "dict[str, Figure]":
    """The headline of each task on ``test``, as the gate compares it."""
    from pipelines.evaluation.tables import HEADLINE, find_row
    from skillnet_platform.tracking.promotion import Figure

    found: dict[str, Figure] = {}
    for task, spec in tasks.items():
        metric, more = HEADLINE[spec.objective]
        row = find_row(rows, task, metric)
        if row is not None:
            data = about["tasks"][task]["corpus_digest"]
            found[task] = Figure(metric, row["value"], row["low"], row["high"], more, data)
    return found


def model_signature() -> Any:
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


def _evaluate(
    source: "ModelSource", model: Any, data: str | Path, samples: int
) -> list[dict[str, Any]]:
    from pipelines.evaluation.evaluator import evaluate_model

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
def _run_of(source: "ModelSource", uri: str | None) -> Iterator[str]:
    """Id of the run that made the model; a run for this registration if it has none."""
    from pipelines.runs.model_source import is_known_run
    from skillnet_platform import tracking
    from skillnet_platform.tracking import backend

    backend.setup(uri)
    if source.run_id is not None and is_known_run(source.run_id, uri):
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
