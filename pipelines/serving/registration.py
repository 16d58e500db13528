"""Registration of a trained model in the MLflow registry, and its promotion to champion.

:func:`register_model` builds the bundle, logs it to the run of the model, and lets
:mod:`skillnet_platform.tracking.champion` decide about the alias. ``skillnet register``, training
runs, ``skillnet grow`` and ``skillnet quickstart`` call it.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.data.shards.dataset import open_corpus
from pipelines.serving import bundle
from pipelines.serving.predictor import DEFAULT_TOP
from pipelines.training.evaluation.evaluator import evaluate_model, locate_task_corpus
from pipelines.training.evaluation.tables import find_ranked_row, run_description
from pipelines.training.evaluation.weak_tests import find_weak_tests
from pipelines.training.runs import model_source
from pipelines.training.runs.model_source import ModelSource
from skillnet_files.commit import remove_leftovers
from skillnet_platform import __version__, console
from skillnet_platform.config import digest_config
from skillnet_platform.errors import UserError
from skillnet_platform.signals import terminate_as_interrupt
from skillnet_platform.storage import run_root, scratch_directory, sha256_file
from skillnet_platform.tracking import TrackingConfig, backend, champion, registry, start_run
from skillnet_platform.tracking.champion import MetricEstimate
from skillnet_platform.tracking.registry import RegisteredVersion
from skillnet_platform.tracking.spool import is_away

#: Tag of a version: the digest of the weights that it was registered from.
WEIGHTS_TAG = "weights_digest"


class UntrainedTaskError(UserError):
    """A task of the model has random weights, so the model is not registered."""


class WeakTestError(UserError):
    """Test rows were in the training of a model, so the model is not registered."""


def register_model(
    source: ModelSource,
    data: str | Path,
    *,
    rows: Sequence[dict[str, Any]] | None = None,
    baseline_rows: Sequence[dict[str, Any]] = (),
    name: str | None = None,
    uri: str | None = None,
    bootstrap_samples: int = 1000,
    force: bool = False,
    description: str = "",
    parents: Sequence[ModelSource] = (),
    allow_weak_test: bool = False,
) -> RegisteredVersion:
    """Register a model as a new version, and set its alias by comparison with the champion.

    The same weights of the same run are registered once: a second call returns their version, and
    a call after a kill or SIGTERM completes the registration.

    Args:
        source: the trained model.
        data: directory of prepared corpora.
        rows: evaluation rows on the test splits; None evaluates the model now.
        baseline_rows: evaluation rows of chance and the simple baselines, for the page of the
            version.
        name: name of the registered model; None takes the name that its training run set, or
            derives one from the experiment and the system.
        uri: MLflow tracking URI.
        bootstrap_samples: resamples of each interval, if the model is evaluated now.
        force: make it champion without the comparison.
        description: added to the page of the version.
        parents: models that this one was made from, whose training counts as its own.
        allow_weak_test: register it although test rows were in its training; its page states this.

    Raises:
        UntrainedTaskError: a task has random weights.
        WeakTestError: test rows were in the training.
        OtherModelError: the registered model has versions of another system, or, without a given
            name, its champion has tasks that this model lacks.
        UserError: a corpus is missing or does not fit the model.
    """
    check_trained_tasks(source)
    source.require_own_splits("Registration")
    # SIGTERM may interrupt any step: the same command completes the registration.
    with terminate_as_interrupt():
        model = model_source.load_trained_tasks(source)
        weak = _find_weak_tests([source, *parents], model, data, allow_weak_test)
        backend.setup_backend(uri)
        client = backend.create_client(backend.resolve_uri(uri))
        settings = source.settings.get("tracking") or {}
        given = name or settings.get("registered_model")
        name = given or champion.choose_model_name(model.system, settings.get("experiment"))
        # Refused before the evaluation, which can take minutes.
        champion.check_system(client, name, model.system)
        if not given:
            champion.check_version_tasks(client, name, list(model.config.tasks))
        key = _registration_key(source, model, data, name, uri)
        known = registry.find_registration(key, name=name, uri=uri)
        if known is not None and champion.is_done(known):
            registered = registry.complete_registration(known, name=name, uri=uri)
            # A kill at the end of that registration left its bundle.
            remove_leftovers(_bundle_place().parent, _bundle_place().name)
            console.print_note(f"{source.name} is registered already: {registered.uri}")
        else:
            if rows is None:
                console.print_note("evaluating the model before its registration")
                rows = evaluate_model(
                    model,
                    data,
                    seed=source.seed,
                    corpora=source.corpora,
                    limits=source.limits,
                    metrics=source.metrics,
                    steps=source.steps,
                    bootstrap_samples=bootstrap_samples,
                )
            total = sum(p.numel() for p in model.parameters())
            page = run_description(rows, baseline_rows, model.config, total, weak_tests=weak)
            page = f"{description}\n\n{page}" if description else page
            registered = _register_bundle(source, model, data, rows, name, uri, key, page)
        # A version that passed the comparison is not recorded as forced.
        if force and registered.alias != champion.CHAMPION:
            verdict = champion.promote_version(registered.version, name=name, uri=uri, force=True)
            registered = dataclasses.replace(registered, alias=champion.CHAMPION, verdict=verdict)
    _warn_if_incomparable(registered, source.name)
    return registered


def _warn_if_incomparable(registered: RegisteredVersion, source: str) -> None:
    """Say how to replace a champion with which no version on these data is ever compared."""
    if registered.alias != champion.CHAMPION and registered.verdict.is_incomparable:
        console.print_warning(
            f"{registered.uri}: not promoted. {registered.verdict}. To make this version the "
            f"champion: skillnet register {source} --force true"
        )


def register_measured_run(
    tracking: TrackingConfig,
    sources: Sequence[ModelSource],
    run: Path,
    data: str,
    rows: Sequence[dict[str, Any]],
    description: str = "",
) -> dict[str, Any] | None:
    """Register a run that was made from trained models and that was measured already.

    Args:
        tracking: MLflow settings of the run; without ``register`` nothing is done.
        sources: models that the run was made from. Their tasks must be trained, because they took
            no step here.
        run: its folder.
        data: directory of prepared corpora.
        rows: evaluation rows of the run. A second evaluation would only take time.
        description: added to the page of the version.

    Returns:
        ``name``, ``version``, ``alias`` and ``uri``; None if the model is not registered, after a
        warning with the reason.
    """
    if not tracking.register:
        return None
    try:
        for source in sources:
            check_trained_tasks(source)
        registered = register_model(
            model_source.resolve_model(str(run), tracking.uri),
            data,
            rows=rows,
            uri=tracking.uri,
            description=description,
            parents=sources,
        )
    except (UntrainedTaskError, WeakTestError, champion.OtherModelError) as error:
        console.print_warning(str(error))
        return None
    return {key: getattr(registered, key) for key in ("name", "version", "alias", "uri")}


def find_unregistered(sources: Sequence[ModelSource], uri: str | None) -> ModelSource | None:
    """Return the first of several models whose weights are no registered version; None for none.

    Args:
        sources: the models.
        uri: MLflow tracking URI.
    """
    client = backend.create_client(backend.resolve_uri(uri))
    for source in sources:
        wanted = f"tags.{WEIGHTS_TAG} = '{source.digest}'"
        if source.version is None and not client.search_model_versions(wanted, max_results=1):
            return source
    return None


def check_trained_tasks(source: ModelSource) -> None:
    """Raise UntrainedTaskError if a task of a model has random weights; name it and the reason."""
    # The final model has no head of an auxiliary task.
    untrained = {k: v for k, v in source.untrained.items() if k not in source.auxiliary}
    for task, reason in untrained.items():
        raise UntrainedTaskError(
            f"{source.name}: the task {task} is untrained, because {reason}, so the model is not "
            f"registered. Train with more steps, or without the task: --tasks.{task} null"
        )


def _find_weak_tests(
    sources: Sequence[ModelSource], model: Any, data: str | Path, allowed: bool
) -> list[str]:
    """Return why the test of a model proves little; refuse test rows of its training by default."""
    source = sources[0]
    reads = [
        read
        for each in sources
        for read in model_source.list_training_reads(model_source.read_training_settings(each))
    ]
    # Promotion compares models on this split.
    found = find_weak_tests(
        data, model.config.tasks, reads, corpora=source.corpora, splits=["test"]
    )
    seen = [each.sentence for each in found if each.is_seen]
    if seen and not allowed:
        raise WeakTestError(
            f"{source.name}: its test proves little, so the model is not registered. "
            f"{'. '.join(seen)}. To register it with this note on its page: "
            f"skillnet register {source.name} --allow_weak_test"
        )
    return [each.sentence for each in found]


def check_given_name(tracking: TrackingConfig, system: str) -> None:
    """Refuse the registered model that a run names, if it has another system.

    A run calls it before its training. A default name contains the system and is not looked up.

    Args:
        tracking: MLflow settings of the run.
        system: registered kind of its model.

    Raises:
        OtherSystemError: the registered model has versions of another system.
    """
    if not tracking.register or not tracking.registered_model:
        return
    backend.setup_backend(tracking.uri)
    client = backend.create_client(backend.resolve_uri(tracking.uri))
    try:
        champion.check_system(client, tracking.registered_model, system)
    except Exception as error:
        # The run starts without its tracker, too; the registration compares again.
        if not is_away(error):
            raise


def _registration_key(
    source: ModelSource, model: Any, data: str | Path, name: str, uri: str | None
) -> str:
    """Return the same key for each registration of a model's weights from the same corpora."""
    corpora = {
        task: open_corpus(locate_task_corpus(data, task, source.corpora)).digest
        for task in model.config.tasks
    }
    is_known = source.run_id is not None and model_source.is_known_run(source.run_id, uri)
    return digest_config([name, source.digest, source.run_id if is_known else None, corpora])


def _register_bundle(
    source: ModelSource,
    model: Any,
    data: str | Path,
    rows: Sequence[dict[str, Any]],
    name: str,
    uri: str | None,
    key: str,
    page: str,
) -> RegisteredVersion:
    # The directory is private: another registration at the same time writes to its own.
    with (
        _open_run(source, uri, key) as run_id,
        scratch_directory(_bundle_place()) as scratch,
    ):
        folder = bundle.build_bundle(source, data, scratch / model_source.BUNDLE, rows)
        # The bundle is read back, so that a damaged one is never registered.
        manifest = bundle.check_bundle(folder)
        digests = {entry["corpus"]: entry["corpus_digest"] for entry in manifest["tasks"].values()}
        sealed = sha256_file(folder / bundle.MANIFEST)
        return registry.register_version(
            run_id,
            # MLflow stores the file as code, so that the version contains no pickle file.
            Path(__file__).with_name("mlflow_model.py"),
            {model_source.BUNDLE: folder},
            registry_metrics(rows, model.config.tasks, manifest),
            uri=uri,
            name=name,
            signature=model_signature(),
            metadata={"manifest_sha256": sealed},
            requirements=[
                # Another version may not read this bundle format, so the requirement is exact.
                f"skillnet-platform=={__version__}",
                *registry.installed_requirements(registry.REQUIREMENTS),
            ],
            description=page,
            tags={
                # `skillnet verify` compares these digests with the present files.
                champion.SYSTEM_TAG: model.system,
                WEIGHTS_TAG: source.digest,
                "manifest_sha256": sealed,
                "package": __version__,
                **{f"corpus.{corpus}": value for corpus, value in digests.items()},
            },
            key=key,
        )


def _bundle_place() -> Path:
    """Return the path beside which the bundle of a registration is built."""
    return run_root() / "cache" / "registering"


def registry_metrics(
    rows: Sequence[dict[str, Any]], tasks: Mapping[str, Any], manifest: Mapping[str, Any]
) -> dict[str, MetricEstimate]:
    """Return the metric of each task that ranks its models, on ``test``, for the promotion.

    Args:
        rows: evaluation rows of the model.
        tasks: name -> task.
        manifest: entry ``serving`` of the bundle's manifest, with the digests of the corpora.
    """
    estimates: dict[str, MetricEstimate] = {}
    for task, spec in tasks.items():
        row, metric = find_ranked_row(rows, task, spec.objective)
        if row is not None:
            # Promotion compares a metric only with one of the same corpus (decision 4).
            data = manifest["tasks"][task]["corpus_digest"]
            estimates[task] = MetricEstimate(
                metric.name, row["value"], row["low"], row["high"], metric.higher_is_better, data
            )
    return estimates


def model_signature() -> Any:
    """Return the MLflow signature of a registered model: input and output columns, parameters."""
    # MLflow takes a second to load, and a run with wrong settings ends before it needs MLflow.
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    text, number = DataType.string, DataType.double
    inputs = Schema(
        [
            # MLflow rejects rows without a required column, and a row has either text or file.
            ColSpec(text, name, required=False)
            for name in ("text", "file", "name", "task")
        ]
    )
    outputs = Schema(
        [
            *(ColSpec(text, name) for name in ("input", "task", "answer")),
            # A query has no score: its embedding is the result.
            ColSpec(number, "score", required=False),
            ColSpec(Array(text), "alternatives"),
            *(ColSpec(Array(number), name) for name in ("scores", "embedding")),
            ColSpec(number, "confidence"),
        ]
    )
    return ModelSignature(
        inputs, outputs, ParamSchema([ParamSpec("top", DataType.long, DEFAULT_TOP)])
    )


@contextlib.contextmanager
def _open_run(source: ModelSource, uri: str | None, key: str) -> Iterator[str]:
    """Yield the id of the run that trained the model, or of its registration if it has none."""
    if source.run_id is not None and model_source.is_known_run(source.run_id, uri):
        yield source.run_id
        return

    # The load of this machine says nothing about the model.
    settings = TrackingConfig(uri=uri, system_metrics=False)
    with start_run(
        f"register {Path(source.name).name}",
        tracking=settings,
        description=f"Registered from `{source.weights}`, which has no run in this tracker.",
        # The run may exist in another tracker, so its id is kept.
        tags={"trained_as": source.run_id} if source.run_id else None,
        # A registration that was killed continues in the run that it opened.
        key=key,
    ) as tracker:
        yield tracker.run_id
