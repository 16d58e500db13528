"""Work of one worker of a run, with and without Ray.

Rank 0 logs metrics to MLflow by run id and appends them to ``progress.jsonl`` in the run's folder.
The driver follows that file, so its output is the same for any number of workers.
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from pipelines.training.evaluation.ranks import EvaluationRanks
from pipelines.training.loop import preemption
from pipelines.training.loop.callbacks import CALLBACKS, LoopCallback, find_observers
from pipelines.training.loop.final_evaluation import (
    EvaluationStoppedError,
    FinalEvaluation,
    evaluate_final,
)
from pipelines.training.loop.loop import TrainResult, train_model
from pipelines.training.loop.reporter import LoopReporter, OnEvaluation, RunReporter, SilentReporter
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.setup import pick_device
from pipelines.training.runs.layout import TRAINED
from pipelines.training.runs.mirror import mirror_of
from pipelines.training.runs.uploads import CheckpointUploads, restore_latest, upload_trained
from skillnet.growth import remove_skill, remove_task
from skillnet.model import SkillNet
from skillnet.multitask_model import TaskModel
from skillnet.saved_model import save_model
from skillnet_platform.ray_internals.errors import WorkerGroupResize
from skillnet_platform.storage import write_json
from skillnet_platform.tracking import Tracker
from skillnet_platform.tracking.source_commit import find_source_commit

MODEL = "model"

#: Seconds that a worker without the driver's disk waits for the tracker at its end.
TRACKER_PATIENCE_S = 60.0


def run_worker(
    run: ResolvedRun,
    rank: int = 0,
    world: int = 1,
    tracked: tuple[str, str] | None = None,
    on_evaluation: OnEvaluation | None = None,
    is_remote: bool = False,
    node_id: str | None = None,
    callbacks: Sequence[LoopCallback] = (),
    final: FinalEvaluation | None = None,
) -> None:
    """Train and evaluate as one of ``world`` workers; rank 0 writes the results to the run.

    Args:
        run: configuration with absolute paths, and the run's folder.
        rank: index of this worker, from 0.
        world: number of workers.
        tracked: MLflow run id and URI.
        on_evaluation: called after each evaluation: with its rows on rank 0, with none elsewhere.
        is_remote: the driver does not see this worker's disk, so rank 0 sends it the final model
            through the run's mirror.
        node_id: id of this worker's node in an elastic run; None in other runs.
        callbacks: called by the training loop.
        final: how all workers evaluate the final model; None leaves that out.

    Raises:
        WorkerGroupResize: the workers of an elastic run wrote a checkpoint and must restart.
    """
    config, folder = run.config, run.folder
    # Every node restores from the mirror, because a checkpoint may be on another node's disk.
    mirror = mirror_of(config, folder)
    if mirror is not None:
        restore_latest(mirror)
    named = find_observers(CALLBACKS, config.training.callbacks, "training.callbacks")
    callbacks = [*callbacks, *(kind() for kind in named)]
    ranks = EvaluationRanks(rank, world, pick_device(config.training.use_gpu))
    if rank:
        silent = SilentReporter(config, on_evaluation, ranks)
        result = train_model(run, rank=rank, world=world, reporter=silent, callbacks=callbacks)
        if result.shards is not None and not result.preempted:
            remove_untrained_parts(run, result.model)
            result.shards.gather_files(result.model)
        if final is not None:
            _evaluate(run, result, final, ranks, silent)
        if result.preempted and node_id is not None:
            _end_for_resize(world, node_id)
        return
    tracker = Tracker.by_id(*tracked) if tracked else None
    uploads = (
        CheckpointUploads(mirror, config.training.keep_checkpoints) if mirror is not None else None
    )
    is_remote = is_remote and mirror is not None
    reporter = RunReporter(config, folder, tracker, on_evaluation, uploads, world, is_remote, ranks)
    try:
        result = train_model(run, rank=rank, world=world, reporter=reporter, callbacks=callbacks)
        # A preempted run has no final model; it resumes from its checkpoint.
        if not result.preempted:
            remove_untrained_parts(run, result.model)
            read = None if result.shards is None else result.shards.gather_weight
            save_model(result.model, folder / MODEL, read)
        rows = _evaluate(run, result, final, ranks, reporter) if final is not None else []
        reporter.log_final(rows, result.step)
        if result.preempted and node_id is not None:
            if uploads is not None:
                uploads.close()
            _end_for_resize(world, node_id)
        summary = {"world": world, "seed": config.seed, "evaluation": rows}
        # A report states it, also where the tracker of the run is gone.
        summary["commit"] = find_source_commit()
        write_json(folder / TRAINED, result.to_dict() | summary)
    finally:
        reporter.close()
    if is_remote and tracker is not None:
        tracker.settle(TRACKER_PATIENCE_S)
    if mirror is not None and uploads is not None:
        upload_trained(mirror, uploads, is_remote)


def _evaluate(
    run: ResolvedRun,
    result: TrainResult,
    final: FinalEvaluation,
    ranks: EvaluationRanks,
    reporter: LoopReporter,
) -> list[dict[str, Any]]:
    """Evaluate the final model, unless the training was preempted or the evaluation is."""
    if result.preempted:
        return []
    try:
        return evaluate_final(run, result.model, final, ranks, reporter, result.step)
    except EvaluationStoppedError:
        # As a preempted training: the last checkpoint exists, and the same command resumes.
        result.preempted = True
        return []


def remove_untrained_parts(run: ResolvedRun, model: TaskModel) -> None:
    """Remove, in place, heads of auxiliary tasks, and skills that have random weights.

    A skill is random if no task of the run activates it and no start model has it: a run on one
    own corpus uses two of the seven default skills.

    Args:
        run: settings with their corpora, tasks and sizes resolved.
        model: at its end.
    """
    if isinstance(model, SkillNet):
        used = {skill for task in model.config.tasks.values() for skill in task.skills}
        used |= set(model.config.base_skills)
        unused = [skill for skill in model.config.skills if skill not in used]
        # The report loads the initial weights once more, so it is made only if it matters.
        taken = run.init_report.taken if unused and run.init_report is not None else []
        for skill in unused:
            if f"skill-{skill}" not in taken:
                remove_skill(model, skill)
    for name in run.config.tasks.keys() - run.config.measured.keys():
        remove_task(model, name)


def _end_for_resize(world: int, node_id: str) -> None:
    """End this worker together with the others, unless the driver asked the run to stop.

    Raises:
        WorkerGroupResize: with the same nodes on all ranks.
    """
    own = (
        preemption.stop_requested_by_driver(),
        node_id if preemption.stop_requested_by_signal() else None,
    )
    ranks: list[Any] = [own] * world
    if world > 1:
        dist.all_gather_object(ranks, own)
    # A stop of the driver ends the run; only a stop of workers restarts the group.
    if not any(by_driver for by_driver, _ in ranks):
        leaving = sorted({node for _, node in ranks if node is not None})
        raise WorkerGroupResize(leaving)
