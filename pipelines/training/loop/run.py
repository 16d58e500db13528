"""A training run from validation to its evaluated model, for all commands that train."""

import functools
import math
import shutil
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipelines.training.config.resources import trains_in_process
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.run_evaluation import (
    check_chosen_metrics,
    check_evaluation_splits,
    find_size_mismatch,
)
from pipelines.training.runs.layout import (
    CONFIG,
    RESULT,
    create_run_folder,
    is_unused,
    parse_task_counts,
    read_result,
)
from skillnet_platform import config as configuration
from skillnet_platform import console
from skillnet_platform.errors import TerminatedError, UserError
from skillnet_platform.storage import read_json

#: Runs of more steps are not checked for tasks without a step.
MAX_CHECKED_STEPS = 4096

if TYPE_CHECKING:
    from pipelines.training.loop.ray_train.fit import NestedFit
    from pipelines.training.loop.reporter import LoopCallback, OnEvaluation
    from pipelines.training.loop.worker import FinalEvaluation
    from skillnet_platform.tracking import Tracker


def validate_run(run: ResolvedRun) -> None:
    """Check before anything starts that corpora, system and initial weights fit.

    Devices are not checked: the driver of a sweep calls this for trials that run elsewhere. See
    :func:`pipelines.training.loop.setup.require_devices`.

    Raises:
        UserError: one of them does not fit; names the key to change.
    """
    from pipelines.training.loop.init_from import check_init_settings
    from pipelines.training.loop.reporter import CALLBACKS, LOGGERS, find_observers
    from pipelines.training.runs.vocabulary_match import check_outputs, find_common_tokenizer
    from skillnet.skills import find_task
    from skillnet.systems import find_system

    # Cheap checks come first: the options of a system need no corpus.
    config = run.config
    check_batch_sizes(config)
    check_init_settings(config, run.opened)
    find_observers(CALLBACKS, config.training.callbacks, "training.callbacks")
    find_observers(LOGGERS, config.tracking.loggers, "tracking.loggers")
    check_chosen_metrics(config)
    system = find_system(config.system)
    system.configure(config.model, system.model.parse_options(config.options))
    mismatch = find_size_mismatch(config)
    if mismatch is not None:
        console.print_warning(f"{mismatch}. Set options.ffn_dim, or report the difference")
    for name, task in config.tasks.items():
        check_outputs(run.corpora[task.corpus], name, find_task(name, config.model.tasks))
    # Building the batches compares each task with its corpus.
    _ = run.dataloader
    for name, dataset in run.dataloader.datasets.items():
        if dataset.unalignable_rows:
            console.print_warning(
                f"{name}: {dataset.unalignable_rows} of {dataset.num_rows} rows of "
                f"{dataset.location} have more symbols than tokens and cannot be learned; lower "
                f"model.mel_stack ({config.model.mel_stack})"
            )
    if config.training.patience:
        check_evaluation_splits(run, ["validation"])
    warn_of_idle_tasks(run)
    find_common_tokenizer(run.manifests)
    _ = run.init_report


def check_batch_sizes(config: FinetuneConfig) -> None:
    """Check that each worker gets a row of its batches, and that a step has one learning rate.

    Raises:
        UserError: a task has fewer rows than workers compute them, or a rate beside other tasks.
    """
    training = config.training
    workers = training.workers // math.gcd(training.workers, training.tasks_per_step)
    for name, task in config.trained.items():
        if task.lr is not None and training.tasks_per_step > 1:
            raise UserError(
                f"tasks.{name}.lr: a step has {training.tasks_per_step} tasks and one learning "
                "rate. Remove the key, or set training.tasks_per_step to 1"
            )
        if task.batch_size < workers:
            whose = "" if workers == training.workers else " of a group"
            most = task.batch_size * training.workers // workers
            raise UserError(
                f"tasks.{name}.batch_size is {task.batch_size}, fewer than training.workers{whose} "
                f"({workers}): a worker would have no row. Set it to {workers} or more, or give "
                f"--training.workers {most}"
            )


def warn_of_idle_tasks(run: ResolvedRun) -> None:
    """Warn of tasks that a run without initial weights is too short for."""
    steps = run.config.training.steps
    # The schedule of a long run is not computed twice; its tasks have steps.
    if steps > MAX_CHECKED_STEPS or run.config.init_from:
        return
    idle = [name for name, count in run.dataloader.count_steps(steps).items() if not count]
    if idle:
        _print_once(
            f"training.steps is {steps}, and no step trains {', '.join(idle)}: random weights stay "
            "in the model, and registration refuses it. Set more steps, or leave tasks out: "
            f"--tasks.{idle[0]} null"
        )


@functools.cache
def _print_once(warning: str) -> None:
    # A study checks a run before it trains it, and many of its runs have the same steps.
    console.print_warning(warning)


def train_and_evaluate(
    run: ResolvedRun,
    tracker: "Tracker",
    *,
    splits: Sequence[str] | None = None,
    on_evaluation: "OnEvaluation | None" = None,
    nested: "NestedFit | None" = None,
    is_worker: bool = False,
    brief: bool = False,
    callbacks: "Sequence[LoopCallback]" = (),
    source: str | None = None,
) -> dict[str, Any]:
    """Train and evaluate in a run whose folder and MLflow run are open; the caller ends both.

    Args:
        run: validated, see :func:`validate_run`.
        tracker: client of its MLflow run.
        splits: to evaluate the final model on; None takes the test splits if ``config.evaluate``
            is set.
        on_evaluation: called with the rows of each evaluation during training, and the step. All
            workers call it; those but the first pass no rows.
        nested: how several workers run inside a trial of Ray Tune.
        is_worker: this process is the worker, such as that of a trial. Other processes train
            themselves if :func:`pipelines.training.config.resources.trains_in_process` holds.
        brief: compute no intervals, for a run that is only ranked among others.
        callbacks: observers of the training loop.
        source: folder of the model that a growth starts from, see
            :class:`pipelines.training.loop.worker.FinalEvaluation`.

    Returns:
        The result of :func:`pipelines.finetune.finetune` before registration. The caller writes
        it to the run's folder.

    Raises:
        TerminatedError: the run was preempted, after a checkpoint.
    """
    from pipelines.training.loop.run_evaluation import complete_result, resume_evaluation
    from pipelines.training.loop.worker import FinalEvaluation

    config, report = run.config, run.init_report
    tracker.inputs(run.manifests)
    begin = time.monotonic()
    if report is not None:
        for line in report.describe():
            console.print_note(line)
        tracker.tags({"init_from": report.source, "init_from_digest": report.digest})
    evaluated = resume_evaluation(run, tracker, splits, brief)
    if evaluated is not None:
        return evaluated
    final = FinalEvaluation(tuple(splits) if splits is not None else None, brief, source)
    is_worker = is_worker or trains_in_process(config.training)
    _train(run, tracker, on_evaluation, nested, is_worker, callbacks, final)
    result = {
        "name": config.name,
        "run": str(run.folder),
        "run_id": tracker.run_id,
        "model": str(run.folder / "model"),
        "init_from": report.to_dict() if report else None,
        "corpora": {name: manifest["digest"] for name, manifest in run.manifests.items()},
        **read_json(run.folder / "trained.json"),
        "wall_seconds": time.monotonic() - begin,
    }
    return complete_result(config, run.folder, tracker, result, splits, brief)


def open_run_folder(run: ResolvedRun) -> dict[str, Any] | None:
    """Create the run's folder unless it exists; return the result if the run is finished."""
    result = find_finished_result(run)
    create_run_folder(run.config, run.folder)
    return result


def find_finished_result(run: ResolvedRun) -> dict[str, Any] | None:
    """Return the result of a finished run, or None; write nothing.

    Raises:
        UserError: the folder is no run, a run of another configuration, or damaged.
    """
    from pipelines.training.runs.identity import (
        check_trained_corpora,
        find_identity_differences,
        is_corpus_key,
    )

    config, folder = run.config, run.folder
    stored = folder / CONFIG
    if not stored.is_file():
        if not is_unused(folder):
            raise UserError(f"{folder} exists but is not a run directory; choose another --name")
        return None
    try:
        before = configuration.build_config(FinetuneConfig, configuration.load_yaml(stored))
    except UserError as error:
        raise UserError(f"{stored} is damaged: {error}") from None
    differing = find_identity_differences(before, config)
    settings = [key for key in differing if not is_corpus_key(key)]
    if settings:
        old, new = differing[settings[0]]
        more = f" and {len(settings) - 1} more" if len(settings) > 1 else ""
        raise UserError(
            f"the run {config.name} has {settings[0]} {old}, not {new}{more}; give another --name, "
            f"or --config {stored} to resume it"
        )
    check_trained_corpora(config, before, stored)
    if (folder / RESULT).is_file():
        result = read_result(folder / RESULT)
        # A run that was stopped is not finished, but one that its patience ended is.
        if result["step"] >= config.training.steps or result.get("has_converged"):
            return result
    return None


def _train(
    run: ResolvedRun,
    tracker: "Tracker",
    on_evaluation: "OnEvaluation | None",
    nested: "NestedFit | None",
    is_worker: bool,
    callbacks: "Sequence[LoopCallback]",
    final: "FinalEvaluation",
) -> None:
    from pipelines.training.loop import preemption
    from pipelines.training.loop.worker import DeviceWatch, run_worker
    from pipelines.training.runs.mirror import mirror_of
    from skillnet.precision import keep_freed_memory

    config, folder = run.config, run.folder
    tracked = (tracker.run_id, tracker.uri)
    if is_worker:
        # The training process reuses freed memory; Ray workers get this by their environment.
        keep_freed_memory()
        watch = DeviceWatch(config, folder)
        with preemption.listen_in_driver(), watch.explain_errors():
            run_worker(
                run,
                tracked=tracked,
                on_evaluation=on_evaluation,
                callbacks=[watch, *callbacks],
                final=final,
            )
    else:
        from pipelines.training.loop.ray_train.fit import fit_on_ray

        fit_on_ray(run, tracked, on_evaluation, nested, callbacks, final)
    mirror = mirror_of(config, folder)
    if mirror is not None:
        mirror.download_trained()
        if not is_worker:
            mirror.remove_if_reachable("ray")
    # Ray's files of a fit are not used after it: checkpoints and logs are the run's own.
    shutil.rmtree(folder / "ray", ignore_errors=True)
    trained = read_json(folder / "trained.json")
    for name, counts in parse_task_counts(trained["tasks"]).items():
        if counts.problems:
            console.print_warning(f"{name}: {counts.problems}")
    if trained["stopped_early"]:
        is_wanted = trained.get("has_converged")
        (console.print_note if is_wanted else console.print_warning)(trained["stopped_early"])
        tracker.tags({"stopped_early": trained["stopped_early"]})
    if trained["preempted"]:
        received = preemption.received_signal()
        raise TerminatedError(
            f"ended by {received.name} after step {trained['step']} of {config.training.steps}, "
            f"with the checkpoint {trained['checkpoint']}; run the same command with --name "
            f"{config.name} to resume",
            received,
        )
