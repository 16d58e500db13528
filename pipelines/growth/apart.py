"""Growths of one base as independent jobs (decision 80): no job needs anything of another.

<run root>/<name>-<task>/          run of each growth, as of a growth alone
<run root>/.jobs/<name>-<task>.log   output of its processes

:func:`plan_growths` checks the growths, and :func:`train_growths` runs them as a queue on Ray, of a
cluster or of this machine. ``skillnet grow --tasks`` calls both.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.growth.single import grow_model
from pipelines.training.config.growth import GrowConfig
from pipelines.training.runs.layout import RESULT, TRAINED
from pipelines.training.runs.progress_log import PROGRESS, read_pace
from skillnet_platform import config as configuration
from skillnet_platform import console
from skillnet_platform.cluster.job_queue import QueuedJob, run_jobs
from skillnet_platform.errors import UserError
from skillnet_platform.storage import data_root, run_root
from skillnet_platform.storage.directories import is_uri
from skillnet_platform.storage.location import parse_location, require_local_folder

if TYPE_CHECKING:
    from pipelines.training.runs.model_source import ModelSource

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
        :func:`pipelines.growth.single.grow_model`.
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
