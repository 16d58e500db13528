"""Traffic and time of the ways to train on several nodes: one task a step, groups, shards.

:func:`compare_schemes` is called by ``skillnet plan`` for more than one node. Groups follow the
schedule of a run for some steps, with its own division of tasks and ranks.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pipelines.training.loading.samplers import BLOCK, TaskSampler
from pipelines.training.loop.task_groups import TaskGroups
from skillnet_planning.memory_plan import RunPlanner
from skillnet_planning.task_plan import OPTIMIZER_BYTES, WorkerPool, plan_task
from skillnet_platform.cluster.gpu_types import GB

#: Skills and rows of the example that the table states.
SKILLS, ROWS = 1000, 1e9

#: Scheme in which all workers compute one task -> ``training.sharding``.
SHARES: dict[str, Literal["none", "full", "hybrid"]] = {
    "one task a step": "none",
    "shards: full": "full",
    "shards: hybrid": "hybrid",
}


@dataclass(frozen=True)
class SchemePlan:
    """Plan of one way to divide a run among workers; all figures are of one worker.

    Args:
        name: options of the scheme.
        rows: rows of a batch, the mean of the tasks.
        link_gb: sent inside the node for a batch, in GB.
        network_gb: sent by the node to others for a batch, in GB.
        batch_s: seconds for each batch of the run, of whichever task.
        hours: for :data:`ROWS` rows of all workers together.
        skills_gb: weights and AdamW state of :data:`SKILLS` skills.
    """

    name: str
    rows: float
    link_gb: float
    network_gb: float
    batch_s: float
    hours: float
    skills_gb: float


def compare_schemes(
    planner: RunPlanner, pool: WorkerPool, shares: Mapping[str, float]
) -> list[SchemePlan]:
    """Plan all schemes of a run.

    Args:
        planner: planner of the run as it is configured.
        pool: its GPUs.
        shares: fraction of the batches per task, summing to 1.
    """
    config = planner.config
    training = replace(config.training, tasks_per_step=1, sharding="none")
    lanes = config.training.tasks_per_step
    if lanes == 1:
        # As many groups as tasks, or a few more, so that all have equal numbers of workers.
        fewest, workers = min(len(config.trained), pool.workers), pool.workers
        lanes = next(n for n in range(fewest, workers + 1) if workers % n == 0)
    found = []
    for name, sharding in SHARES.items():
        own = replace(config, training=replace(training, sharding=sharding))
        found.append(_plan_shares(RunPlanner.of(planner, own, pool.workers), pool, shares, name))
    own = replace(config, training=replace(training, tasks_per_step=lanes))
    groups = _plan_groups(RunPlanner.of(planner, own, pool.workers), pool, shares)
    return [found[0], groups, *found[1:]]


def _skill_gb(planner: RunPlanner, state: float) -> float:
    """Return the GB of all skills of the example, with some bytes for each weight."""
    model = planner.planned.model
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    files = [names for file, names in model.files_of().items() if file.startswith("skill-")]
    mean = sum(sizes[name] for names in files for name in names) / max(len(files), 1)
    return SKILLS * mean * state / GB


def _summarize(
    planner: RunPlanner,
    pool: WorkerPool,
    shares: Mapping[str, float],
    name: str,
    seconds: tuple[float, float, float],
    state: float,
) -> SchemePlan:
    batch_s, link_s, network_s = seconds
    rows = sum(share * planner.config.tasks[task].batch_size for task, share in shares.items())
    return SchemePlan(
        name,
        sum(share * planner.rows_per_worker(task) for task, share in shares.items()),
        link_s * pool.rates.link_gb_s,
        network_s * pool.network_gbit_s / 8,
        batch_s,
        ROWS / rows * batch_s / 3600,
        _skill_gb(planner, state),
    )


def _plan_shares(
    planner: RunPlanner, pool: WorkerPool, shares: Mapping[str, float], name: str
) -> SchemePlan:
    memory, is_compiled = planner.memory(), planner.config.training.compile
    plans = {task: plan_task(planner, memory, task, pool) for task in shares}
    parts = [
        (plan.step_s if is_compiled else plan.launched_s, plan.link_s, plan.network_s)
        for plan in plans.values()
    ]
    means = [
        sum(share * value for share, value in zip(shares.values(), column, strict=True))
        for column in zip(*parts, strict=True)
    ]
    sharing = planner.count_sharing()
    return _summarize(planner, pool, shares, name, (means[0], means[1], means[2]), 12 / sharing)


def _plan_groups(planner: RunPlanner, pool: WorkerPool, shares: Mapping[str, float]) -> SchemePlan:
    config, rates, workers = planner.config, pool.rates, pool.workers
    lanes = config.training.tasks_per_step
    sampler = TaskSampler(shares, config.seed, lanes)
    count = math.gcd(lanes, workers)
    groups = [TaskGroups(sampler.lanes, n * workers // count, workers) for n in range(count)]
    tasks_of: dict[str, tuple[str, ...]] = {}
    for task, named in planner.planned.active.items():
        for name, _ in named:
            tasks_of[name] = (*tasks_of.get(name, ()), task)
    weights: Counter[tuple[str, ...]] = Counter()
    for name, parameter in planner.planned.model.named_parameters():
        if name in tasks_of:
            weights[tasks_of[name]] += parameter.numel()
    owners = {tasks: groups[0].find_owners(tasks) for tasks in weights}
    sums = {
        tasks: replace(pool, workers=len(owners[tasks]) * workers // count).sum_seconds(4 * size)
        for tasks, size in weights.items()
    }
    passes: dict[str, float] = {}
    for task in shares:
        cost, number = planner.measure(task, planner.given)
        launch_s = 0.0 if config.training.compile else len(cost.operations) * pool.launch_s
        passes[task] = number * max(cost.seconds(rates), launch_s)
    total_s = link_s = network_s = 0.0
    for step in range(BLOCK):
        chosen = [sampler.task_at(step * lanes + lane)[0] for lane in range(lanes)]
        slowest = (0.0, 0.0, 0.0)
        for number, group in enumerate(groups):
            held = [
                tasks
                for tasks in weights
                if number in owners[tasks] and not set(chosen).isdisjoint(tasks)
            ]
            update_s = OPTIMIZER_BYTES * sum(weights[each] for each in held)
            compute_s = sum(passes[chosen[lane]] for lane in group.lanes)
            compute_s += update_s / (rates.bandwidth_gb_s * GB)
            link = sum(sums[each][0] for each in held)
            network = sum(sums[each][1] for each in held)
            slowest = max(slowest, (max(compute_s, link + network), link, network))
        total_s, link_s = total_s + slowest[0], link_s + slowest[1]
        network_s += slowest[2]
    batches = BLOCK * lanes
    name = f"training.tasks_per_step {lanes}: {count} groups of {workers // count}"
    # Each rank keeps all weights, and the state of its group's alone.
    return _summarize(
        planner,
        pool,
        shares,
        name,
        (total_s / batches, link_s / batches, network_s / batches),
        4 + 8 / count,
    )
