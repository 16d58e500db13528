"""What each worker of a run does, with and without Ray, and how it tells the driver.

Rank 0 writes metrics to MLflow by run id, and each line of progress to ``progress.jsonl`` in the
run's folder, which the driver follows: so the driver shows the same with any number of workers.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from pipelines.config.run import FinetuneConfig
from pipelines.runs.mirror import TRAINED, mirror_of
from pipelines.runs.uploads import Uploads, bring, send_trained
from pipelines.training import preemption
from pipelines.training.loop import train
from skillnet.growth import remove_task
from skillnet_platform.storage import write_json
from skillnet_platform.tracking import Tracker

if TYPE_CHECKING:
    pass
from pipelines.training.reporter import OnEvaluation, RunReporter, _Others

MODEL = "model"

#: Seconds that a worker whose spool the driver does not see waits for the tracker at its end.
TRACKER_PATIENCE_S = 60.0


def work(
    config: FinetuneConfig,
    run: Path,
    rank: int = 0,
    world: int = 1,
    tracked: tuple[str, str] | None = None,
    on_evaluation: OnEvaluation | None = None,
    apart: bool = False,
    host: str | None = None,
) -> None:
    """Train as one of ``world`` workers; rank 0 leaves the model and a summary in the run.

    Args:
        config: of the run, with absolute paths.
        run: folder of the run.
        rank: this worker.
        world: number of workers.
        tracked: MLflow run id and URI.
        on_evaluation: called after each evaluation: with its rows on rank 0, with none elsewhere.
        apart: the driver does not see this worker's disk: rank 0 sends it the final model
            through the run's mirror.
        host: id of this worker's host in an elastic run; none in others.

    Raises:
        Regroup: the workers of an elastic run left to start again, with a checkpoint.
    """
    mirror = mirror_of(config, run)
    if mirror is not None:
        bring(mirror)
    if rank:
        done = train(config, rank=rank, world=world, run=run, reporter=_Others(on_evaluation))
        if done.left and host is not None:
            _regroup(world, host)
        return
    tracker = Tracker.by_id(*tracked) if tracked else None
    uploads = Uploads(mirror, config.training.keep) if mirror is not None else None
    aloud = apart and mirror is not None
    reporter = RunReporter(config, run, tracker, on_evaluation, uploads, world, aloud)
    try:
        done = train(config, rank=rank, world=world, run=run, reporter=reporter)
        if done.left and host is not None:
            if uploads is not None:
                uploads.close(config.storage.patience)
            _regroup(world, host)
        if not done.left:
            for name in config.tasks.keys() - config.measured.keys():
                remove_task(done.model, name)
            done.model.save_pretrained(run / MODEL)
        write_json(run / TRAINED, done.summary() | {"world": world, "seed": config.seed})
    finally:
        reporter.close()
    if aloud and tracker is not None:
        tracker.settle(TRACKER_PATIENCE_S)
    if mirror is not None and uploads is not None:
        send_trained(mirror, uploads, config.storage.patience, apart)


def _regroup(world: int, host: str) -> None:
    """End this worker together with the others, unless it was the driver who asked.

    Raises:
        Regroup: the same on all of them.
    """
    mine = (preemption.ordered(), host if preemption.signalled() else None)
    each: list[Any] = [mine] * world
    if world > 1:
        dist.all_gather_object(each, mine)
    if not any(ordered for ordered, _ in each):
        raise preemption.Regroup(sorted({left for _, left in each if left is not None}))
