"""Plan of a run on GPUs: memory, operations, rates by roofline, loader CPUs and hours.

:func:`plan_run` is called by ``skillnet plan``. A roofline is a bound, not a measurement: each
operation takes the time of its memory traffic or of its arithmetic at the peak of the data sheet,
and the network is as fast as its vendor says. Launches are counted beside it.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.run_evaluation import find_size_mismatch
from skillnet_planning.memory_plan import MemoryOptions, RunPlanner, WorkerMemory
from skillnet_planning.schemes import SchemePlan, compare_schemes
from skillnet_planning.task_plan import TaskPlan, WorkerPool, plan_task
from skillnet_platform.cluster.gpu_types import GB


@dataclass(frozen=True)
class RunPlan:
    """Plan of a run.

    Args:
        pool: its GPUs.
        precision: number type of the products.
        options: memory options of the configuration.
        memory: bytes of a worker, by part.
        fits: whether it fits the GPU.
        advice: options that make it fit, or the GPU that it needs; empty if it fits.
        tasks: plans of the trained tasks.
        steps: number of optimizer steps of the run.
        hours: time bound of all steps by roofline; tasks without a weight count equally.
        launched_hours: the same with launches of operations that are not compiled.
        mfu: model FLOP utilisation of all steps by roofline; None for a system without formulas.
        larger_part: option with the largest micro-batch that fits; empty if none is larger.
        host_gb: memory of a node for the weights that ``training.sharding`` host keeps there, and
            for the copy of a checkpoint that is being written.
        equal_weights: a task has no weight, so its share of the steps is unknown.
        schemes: ways to divide the run among nodes; empty for one node.
        size_mismatch: in words, how the size of a baseline misses the size that it aims at; empty
            if it has that size.
    """

    pool: WorkerPool
    precision: str
    options: MemoryOptions
    memory: WorkerMemory
    fits: bool
    advice: str
    tasks: list[TaskPlan]
    steps: int
    hours: float
    launched_hours: float
    mfu: float | None
    larger_part: str
    host_gb: float
    equal_weights: bool
    schemes: list[SchemePlan]
    size_mismatch: str = ""

    def memory_parts(self) -> dict[str, float]:
        """Return part -> GB of a worker, at the peak of the largest task."""
        memory = self.memory
        parts = {
            "weights": memory.weights,
            "Adam state": memory.optimizer,
            "gradients": memory.gradients,
            "average of weights": memory.average,
            "best weights": memory.best,
            f"activations of {memory.largest_task}": memory.activations[memory.largest_task],
        }
        return {name: size / GB for name, size in parts.items() if size}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for ``--json``."""
        gpu = self.pool.gpu
        return {
            "gpu": asdict(gpu),
            "workers": self.pool.workers,
            "nodes": self.pool.nodes,
            "network_gbit_s": self.pool.network_gbit_s,
            "precision": self.precision,
            **asdict(self.options),
            "memory_gb": self.memory_parts(),
            "total_gb": self.memory.total / GB,
            "usable_gb": gpu.usable_bytes / GB,
            "fits": self.fits,
            "advice": self.advice,
            "method": "roofline, not a measurement"
            if self.pool.measured is None
            else f"roofline of the rates in {self.pool.measured.path}",
            "tasks": [asdict(task) | {"step_s": task.step_s} for task in self.tasks],
            "steps": self.steps,
            "hours": self.hours,
            "launched_hours": self.launched_hours,
            "mfu": self.mfu,
            "larger_part": self.larger_part,
            "host_gb": self.host_gb,
            "schemes": [asdict(scheme) for scheme in self.schemes],
            "size_mismatch": self.size_mismatch,
        }


def plan_run(config: FinetuneConfig, pool: WorkerPool, prefix: str = "") -> RunPlan:
    """Plan a run on GPUs.

    Args:
        config: settings of the run.
        pool: its GPUs.
        prefix: beginning of the options of the run on the command line.

    Raises:
        UserError: the system cannot be planned.
    """
    planner = RunPlanner(config, pool.gpu, pool.workers, pool.workers_per_node)
    memory = planner.memory()
    fits = planner.fits(memory)
    advice = "" if fits else planner.advise(prefix)
    tasks = [plan_task(planner, memory, name, pool) for name in planner.config.trained]
    weights = {name: task.weight for name, task in planner.config.trained.items()}
    given = [weight for weight in weights.values() if weight is not None]
    equal = len(given) < len(weights)
    share = {name: 1.0 if equal else float(weight or 0) for name, weight in weights.items()}
    total = sum(share.values())

    def average(values: Iterable[float]) -> float:
        return sum(
            share[task.task] / total * value for task, value in zip(tasks, values, strict=True)
        )

    mean = average(task.step_s for task in tasks)
    used = [task.mfu * task.step_s for task in tasks if task.mfu is not None]
    training, inside = planner.config.training, min(pool.workers, pool.workers_per_node)
    kept = planner.trained_parameters * (16 if training.ema else 12)
    is_whole = training.sharding in ("none", "host")
    steps = planner.config.training.steps
    schemes: list[SchemePlan] = []
    if pool.nodes > 1:
        schemes = compare_schemes(planner, pool, {n: w / total for n, w in share.items()})
    return RunPlan(
        pool=pool,
        precision=planner.precision,
        options=planner.given,
        memory=memory,
        fits=fits,
        advice=advice,
        tasks=tasks,
        steps=steps,
        hours=steps * mean / 3600,
        launched_hours=steps * average(task.launched_s for task in tasks) / 3600,
        mfu=average(used) / mean if len(used) == len(tasks) else None,
        larger_part=planner.propose_larger_part(prefix) if fits else "",
        # Each worker keeps its weights. The first one also copies them for a checkpoint.
        host_gb=(inside * (training.sharding == "host") + is_whole) * kept / GB,
        equal_weights=equal,
        schemes=schemes,
        size_mismatch=find_size_mismatch(planner.config) or "",
    )
