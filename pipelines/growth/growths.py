"""Growths: add a skill and a task to a trained model, and train only these.

<run root>/<name>/          a run with the files of ``skillnet finetune``, and
  grow.yaml                 resolved configuration of the growth
  references/               reference runs of the new task
  growth.json, growth.md    report: unchanged files and metrics, and the benefit of the new skill

A growth is a run of the ordinary training loop. It starts from the grown model (in ``.starts``
beside the runs), and its ``training.trainable`` lists the new files. It resumes like any run.

Several growths of one base are independent jobs (decision 80): no job needs anything of another.
:func:`plan_growths` checks them, and :func:`train_growths` runs them as a queue on Ray, of a
cluster or of this machine:

<run root>/<name>-<task>/            run of each growth, as of a growth alone
<run root>/.jobs/<name>-<task>.log   output of its processes
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.training.config.growth import GrowConfig
from pipelines.training.runs import layout
from pipelines.training.runs.layout import RESULT, TRAINED
from pipelines.training.runs.progress_log import PROGRESS, follow_progress, read_pace
from skillnet_platform import config as configuration
from skillnet_platform import console
from skillnet_platform.cluster.job_queue import QueuedJob, run_jobs
from skillnet_platform.errors import UserError
from skillnet_platform.signals import terminate_as_interrupt
from skillnet_platform.storage import atomic_write, data_root, run_root, write_json
from skillnet_platform.storage.directories import is_uri
from skillnet_platform.storage.location import parse_location, require_local_folder
from skillnet_platform.tracking import TrackingConfig

if TYPE_CHECKING:
    from pipelines.training.config.growth import MergeConfig
    from pipelines.training.config.run import FinetuneConfig
    from pipelines.training.growth.report import ChangeReport
    from pipelines.training.loop.resolved_run import ResolvedRun
    from pipelines.training.runs.model_source import ModelSource
    from skillnet.model import SkillNet
    from skillnet_platform.tracking import Tracker

#: Resolved configuration of a growth, in the folder of its run.
GROW_FILE = "grow.yaml"


def grow_model(config: GrowConfig, *, is_worker: bool = False) -> dict[str, Any]:
    """Grow a model, train the new part, and check that the old parts are unchanged.

    Args:
        config: settings of the growth.
        is_worker: train in this process, such as that of a job. Otherwise
            :func:`pipelines.training.config.resources.trains_in_process` decides.

    Returns:
        The result of :func:`pipelines.finetune.finetune`, and ``growth``: the report.

    Raises:
        UserError: the model or a corpus is missing, a name is in use, or another run has the name.
        RuntimeError: an old part changed; the report names it.
    """
    from pipelines.training.loop.resolved_run import resolve_run
    from pipelines.training.runs import model_source

    config = replace(
        config, run_dir=str(require_local_folder(config.run_dir, run_root(), "run_dir of grow"))
    )
    source = model_source.resolve_model(config.source, config.tracking.uri)
    # torch loads here: --help and wrong names do not need it.
    from pipelines.training.growth import runs

    before = runs.load_growable_model(source)
    resolved = resolve_run(runs.build_growth_config(config, source, before))
    with terminate_as_interrupt(), layout.lock_run_folder(resolved.folder):
        return _grow_in_folder(config, source, before, resolved, is_worker)


def _grow_in_folder(
    config: GrowConfig,
    source: "ModelSource",
    before: "SkillNet",
    resolved: "ResolvedRun",
    is_worker: bool,
) -> dict[str, Any]:
    from pipelines.serving.registration import check_given_name
    from pipelines.training.growth import runs, verification
    from pipelines.training.loop import run as training_run
    from pipelines.training.loop.init_from import read_training_corpora, record_origin
    from pipelines.training.loop.setup import require_devices

    settings = resolved.config
    assert settings.name is not None
    run = Path(str(settings.run_dir)) / settings.name
    grown = runs.build_grown_model(config, before, settings.model.tasks[config.task.name])
    # Read from the model, because a new modality adds a stem to the new skill and head.
    settings.training.trainable = verification.added_files(before, grown)
    start = runs.save_start_model(grown, str(settings.run_dir))
    settings.init_from = record_origin(Path(start), source.name)
    # Checked before training: an old file that saving rewrites would waste the run.
    verification.assert_files_unchanged(
        verification.compare_files(source, before, Path(settings.init_from))
    )
    finished = training_run.find_finished_result(resolved)
    # A result without a report was interrupted after its training, and resumes below.
    if finished is not None and "growth" in finished:
        runs.check_same_references(config, run / GROW_FILE)
        console.print_note(
            f"{settings.name} is finished ({finished['step']} steps); give another --name for a "
            "new growth"
        )
        return finished
    require_devices(settings.training)
    training_run.validate_run(resolved)
    check_given_name(config.tracking, settings.system)
    references = _resolve_references(config, settings, source, run)
    create_derived_run(config, settings, run, GROW_FILE)
    with layout.track_run(settings, run, "grow", {"grown_from": source.digest}) as tracker:
        if finished is None:
            with follow_progress(run / PROGRESS, settings.training.steps):
                finished = training_run.train_and_evaluate(
                    resolved,
                    tracker,
                    is_worker=is_worker,
                    source=str(source.weights.absolute()),
                )
            finished["grown_from"] = {
                "digest": source.digest,
                "corpora": read_training_corpora(source),
            }
            # Written before the report, so that a growth that is killed now does not train again.
            write_json(run / RESULT, finished | {"registered": None})
        result: dict[str, Any] = dict(finished)
        trained = _train_references(references, tracker, is_worker)
        added = (config.skill.name if config.skill is not None else "", config.task.name)
        report = verification.build_growth_report(
            source, before, settings, run, result, trained, added
        )
        report.record(run, tracker)
    # The report is written first, so that it shows what changed if the check fails.
    verification.assert_frozen_unchanged(report)
    return finish_result(result, report, [source], settings, config.tracking)


def _resolve_references(
    config: GrowConfig, settings: "FinetuneConfig", source: "ModelSource", run: Path
) -> "dict[str, ResolvedRun]":
    """Return name -> validated reference run, before the growth has a folder."""
    from pipelines.training.growth import runs
    from pipelines.training.loop.resolved_run import ResolvedRun
    from pipelines.training.loop.run import find_finished_result, validate_run

    resolved: dict[str, ResolvedRun] = {}
    for name in dict.fromkeys(config.references):
        other = runs.build_reference_config(name, config, settings, source, run)
        # Without another skill there is no frozen model to put the head on.
        if other is None:
            reason = "has no other skill" if config.skill is not None else "adds no skill"
            console.print_note(f"{name}: the task {reason}; this reference is skipped")
            continue
        assert other.name is not None
        resolved[name] = ResolvedRun(other, run / "references" / other.name)
        if find_finished_result(resolved[name]) is None:
            validate_run(resolved[name])
    return resolved


def _train_references(
    references: "Mapping[str, ResolvedRun]", tracker: "Tracker", is_worker: bool
) -> dict[str, dict[str, Any]]:
    """Train the reference runs; return name -> result. Each is a child run in MLflow."""
    from pipelines.training.loop import run as training_run

    results: dict[str, dict[str, Any]] = {}
    for name, resolved in references.items():
        other, folder = resolved.config, resolved.folder
        finished = training_run.open_run_folder(resolved)
        if finished is None:
            console.print_note(f"training the reference {name}")
            with (
                layout.track_run(
                    other, folder, "grow", {"reference": name}, tracker.run_id
                ) as child,
                follow_progress(folder / PROGRESS, other.training.steps),
            ):
                finished = training_run.train_and_evaluate(resolved, child, is_worker=is_worker)
            write_json(folder / RESULT, finished)
        results[name] = finished
    return results


def finish_result(
    result: dict[str, Any],
    report: "ChangeReport",
    sources: "Sequence[ModelSource]",
    settings: "FinetuneConfig",
    tracking: TrackingConfig,
) -> dict[str, Any]:
    """Register the model of a growth or merge, and write its result with the report.

    Args:
        result: result of the command so far, with ``run`` and ``evaluation``.
        report: comparison with the models that it was made from.
        sources: models that it was made from.
        settings: configuration of its run.
        tracking: MLflow settings of the command.
    """
    from pipelines.serving.registration import register_measured_run

    folder, rows = Path(result["run"]), result["evaluation"]
    result["registered"] = register_measured_run(
        tracking, sources, folder, str(settings.data), rows, report.summarize()
    )
    result[report.kind] = report.to_dict()
    write_json(folder / RESULT, result)
    return result


def create_derived_run(
    config: "GrowConfig | MergeConfig", settings: "FinetuneConfig", folder: Path, file: str
) -> None:
    """Create the folder of a run that a growth or merge makes.

    Args:
        config: configuration of the command.
        settings: configuration of the run.
        folder: location of the run.
        file: name of the file with ``config``.
    """

    layout.create_run_folder(settings, folder)
    # Written after validation, so that a rejected config does not reserve the name.
    with atomic_write(folder / file, "w") as stream:
        stream.write(configuration.to_yaml(config))


#: Settings that all growths of one command share, because their union has one base.
SHARED_KEYS = ("source", "run_dir", "data", "corpora", "tracking")
COLUMNS = ("growth", "state", "steps", "time left")


def plan_growths(configs: Sequence[GrowConfig]) -> tuple[str, list[GrowConfig]]:
    """Check several growths before anything starts, and name their runs.

    Args:
        configs: settings of each growth.

    Returns:
        Name of the union of all, and the settings of each growth in a job of its own. All of them
        start from the same version of the base.

    Raises:
        UserError: two growths have one name, other bases or other places, or one needs several
            workers; or the base is missing.
    """
    from pipelines.training.runs import model_source
    from skillnet_platform.tracking import backend

    if len(configs) < 2:
        raise UserError(
            "--tasks: give at least two files. A single growth is skillnet grow --config FILE"
        )
    first = configs[0]
    for config in configs:
        _check_growth(config, first)
    for kind, names in (
        ("task", [each.task.name for each in configs]),
        ("skill", [each.skill.name for each in configs if each.skill is not None]),
    ):
        for name in names:
            if names.count(name) > 1:
                raise UserError(
                    f"--tasks: {names.count(name)} growths add a {kind} {name!r}; give each its "
                    "own name"
                )
    # A file may name its own growth, so the name of all is that on which all files agree.
    together = first.name if len({each.name for each in configs}) == 1 else None
    if together is None:
        together = time.strftime("grow-%Y%m%d-%H%M%S")
        console.print_note(f"to resume these growths, repeat the command with --name {together}")
    source = model_source.resolve_model(first.source, first.tracking.uri)
    run_dir = require_local_folder(first.run_dir, run_root(), "run_dir of grow")
    uri = backend.setup_backend(first.tracking.uri, first.tracking.experiment).uri
    shared: dict[str, Any] = {
        "source": _pin_address(source),
        "run_dir": str(run_dir),
        "data": str(parse_location(first.data, data_root())),
        # The union is registered, not its parts.
        "tracking": replace(first.tracking, uri=uri, register=False),
    }
    return together, [
        replace(
            each,
            name=f"{together}-{each.task.name}",
            # A thread more or less rounds differently, so the cores of a host must not decide.
            training=replace(
                each.training, threads_per_worker=each.training.threads_per_worker or 1
            ),
            **shared,
        )
        for each in configs
    ]


def _check_growth(config: GrowConfig, first: GrowConfig) -> None:
    task, training = config.task.name, config.training
    for key in SHARED_KEYS:
        if getattr(config, key) != getattr(first, key):
            raise UserError(
                f"--tasks: {key} differs between {first.task.name} and {task}. All growths share "
                f"it: give --{key} once, on the command line"
            )
    if training.workers > 1 or training.min_workers:
        raise UserError(
            f"--tasks: the growth of {task} has training.workers {training.workers}, but a job "
            "trains in one process. Give --training.workers 1, or grow this task alone"
        )


def _pin_address(source: "ModelSource") -> str:
    """Return an address that names the same weights until all growths have ended, on any node."""
    if source.version is None and source.run is not None:
        is_final = source.weights == source.run / "model"
        return str((source.run if is_final else source.weights).absolute())
    if source.version is None:
        return source.name if is_uri(source.name) else str(source.weights.absolute())
    # The champion may change while the growths train.
    model = source.name.removeprefix("models:/").partition("@")[0].partition("/")[0]
    return f"models:/{model}/{source.version}"


def grow_in_job(arguments: dict[str, Any]) -> dict[str, Any]:
    """Train one growth in this process, for :func:`train_growths`.

    Args:
        arguments: settings of the growth as plain values.
    """
    import torch

    from pipelines.training.loop import preemption
    from skillnet.precision import give_back_freed_memory

    config = configuration.build_config(GrowConfig, arguments)
    torch.set_num_threads(config.training.threads_per_worker)
    # The process may have run another growth before.
    preemption.clear_request()
    try:
        return grow_model(config, is_worker=True)
    finally:
        give_back_freed_memory()


def train_growths(configs: Sequence[GrowConfig]) -> list[dict[str, Any]]:
    """Train growths as independent jobs, and return what became of each.

    A lost process or host costs its growth the time since its newest checkpoint. A failed growth
    does not end the others. The same growths again resume.

    Args:
        configs: as of :func:`plan_growths`.

    Returns:
        For each growth ``task``, ``name``, ``run``, ``state`` (done or failed), ``steps``,
        ``seconds``, ``restarts``, ``error``, ``is_user_error`` and ``result``, that of
        :func:`pipelines.growth.growths.grow_model`.
    """
    from pipelines.training.loop.ray_train.fit import WORKER_ENVIRONMENT

    runs = [Path(str(config.run_dir)) / str(config.name) for config in configs]
    jobs = [
        QueuedJob(
            config.task.name,
            configuration.to_dict(config),
            run.parent / ".jobs" / f"{run.name}.log",
            lambda run=run: _count_progress(run),  # type: ignore[misc]
            cpus=config.training.threads_per_worker,
            gpus=float(config.training.use_gpu),
            max_failures=config.training.max_failures,
        )
        for config, run in zip(configs, runs, strict=True)
    ]
    with console.show_live_table("Growths", COLUMNS) as show:
        run_jobs(
            jobs,
            grow_in_job,
            environment=WORKER_ENVIRONMENT,
            show=lambda: show(list(map(_describe_job, jobs, configs, runs))),
        )
    return [
        {
            "task": job.name,
            "name": run.name,
            "run": str(run),
            "state": job.state,
            "steps": read_pace(run / PROGRESS)[0] if job.result is None else job.result["step"],
            "seconds": job.seconds,
            "restarts": job.restarts,
            "error": job.error,
            "is_user_error": job.is_user_error,
            "result": job.result,
        }
        for job, run in zip(jobs, runs, strict=True)
    ]


def _count_progress(run: Path) -> float:
    """Return the steps of a growth and its references, and their files that show an end."""
    folders = [run, *(run / "references").glob("*")]
    steps = sum(read_pace(folder / PROGRESS)[0] for folder in folders)
    ends = (folder / name for folder in folders for name in (TRAINED, RESULT))
    return steps + sum(path.is_file() for path in ends)


def _describe_job(job: QueuedJob, config: GrowConfig, run: Path) -> tuple[str, ...]:
    """Return the row of a growth: name, state, steps and time left, as far as they are known."""
    total = config.training.steps
    step, pace = read_pace(run / PROGRESS)
    left, state = "–", str(job.state)
    if job.state == "done":
        step = total
    if job.state == "running" and pace > 0 and step < total:
        left = console.format_minutes((total - step) / pace)
    if job.state == "running" and step >= total:
        # References train after the growth, and the old tasks are measured.
        references = sum(1 for _ in run.glob(f"references/*/{PROGRESS}"))
        state = f"reference {references} of {len(config.references)}" if references else "measuring"
    return job.name, state, f"{step}/{total}", left
