"""Check that the runs of a command fit a GPU.

:func:`find_memory_problem` is the entry point of the group ``skillnet.planners``, which ``skillnet
doctor`` and ``skillnet submit`` ask with the runs of a command's resource request.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict

from pipelines.training.config.resources import PlannedRun
from pipelines.training.config.run import FinetuneConfig
from skillnet_platform.cluster.gpu_types import GpuType

#: Runs of one command that are planned, of more the largest: at base a plan takes ten seconds.
MAX_PLANNED_RUNS = 6


def find_memory_problem(runs: Sequence[PlannedRun], gpu: GpuType) -> tuple[str, str] | None:
    """Return why a run does not fit a type of GPU, and the remedy; None if all fit.

    Args:
        runs: training runs of one command.
        gpu: smallest GPU of the cluster.

    Raises:
        UserError: a run cannot be planned.
    """
    from skillnet_planning.memory_plan import describe_overflow

    for run in select_largest_runs(runs):
        problem = describe_overflow(run.config, run.take_share(gpu), run.prefix)
        if problem is not None:
            seen, remedy = problem
            return (f"{run.label}: {seen}" if run.label else seen), remedy
    return None


def select_largest_runs(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Return the runs whose memory differs; of many, those of the largest models."""
    distinct: dict[str, PlannedRun] = {}
    for run in runs:
        distinct.setdefault(_memory_key(run.config), run)
    chosen = list(distinct.values())
    if len(chosen) > MAX_PLANNED_RUNS:
        chosen = sorted(chosen, key=_size_of, reverse=True)[:MAX_PLANNED_RUNS]
    return chosen


def _memory_key(config: FinetuneConfig) -> str:
    """Return a text that is equal for runs that need equal memory."""
    joint = config.joint()
    training = joint.training
    tasks = {
        name: [task.batch_size, task.max_length, task.views, task.eval_only]
        for name, task in joint.tasks.items()
    }
    key = [
        joint.system,
        joint.options,
        asdict(joint.model),
        tasks,
        training.masking,
        [training.workers, training.min_workers, training.precision],
        [training.ema > 0, training.patience is not None],
        [training.micro_batch_size, training.kept_tokens],
        training.sharding,
        training.trainable,
    ]
    return json.dumps(key, sort_keys=True, default=str)


def _size_of(run: PlannedRun) -> tuple[int, int]:
    """Return the number of weights and the largest batch of a run."""
    import torch

    from skillnet.skipped_init import SkippedInit
    from skillnet.systems import build_system

    config = run.config.joint()
    with torch.device("meta"), SkippedInit():
        model = build_system(config.system, config.model, config.options)
    batches = [task.batch_size for task in config.trained.values()]
    return sum(p.numel() for p in model.parameters()), max(batches, default=0)
