"""Plan of a run on GPUs: memory, operations, rates by roofline, loader CPUs and hours.

:func:`plan_run` is called by ``skillnet plan``. A roofline is a bound, not a measurement: each
operation takes the time of its memory traffic or of its arithmetic at the peak of the data sheet.
Launches of kernels and the host cost nothing, and the network is as fast as its vendor says.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.run_evaluation import find_size_mismatch
from skillnet.modality import find_modality
from skillnet.skills import find_task
from skillnet_planning.example_batches import longest_lengths
from skillnet_planning.memory_plan import MemoryOptions, RunPlanner, WorkerMemory
from skillnet_platform.cluster.gpu_types import GB, GpuType

#: Bytes that AdamW and clipping move per trained weight: weight, gradient and two averages, each
#: read, three of them written; clipping reads the gradient, and reads and writes it again.
OPTIMIZER_BYTES = 28 + 12


@dataclass(frozen=True)
class WorkerPool:
    """GPUs that a run is planned for.

    Args:
        gpu: type of the smallest GPU.
        workers: number of GPUs, one per worker.
        network_gbit_s: bandwidth between two nodes in Gbit/s.
        cpus_per_worker: CPUs beside each GPU; 0 if unknown.
        workers_per_node: GPUs of each node; 1 if unknown.
    """

    gpu: GpuType
    workers: int
    network_gbit_s: float
    cpus_per_worker: float = 0.0
    workers_per_node: int = 1

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return -(-self.workers // self.workers_per_node)

    def sum_seconds(self, sent: float) -> float:
        """Return the time of the sum of gradients over all workers.

        GPUs of a node sum over their link, and nodes over the network, each as a ring that sends
        and receives 2 (n - 1) / n times the bytes. The second follows the first, as in the
        hierarchical sum of Goyal et al. 2017, section 4.

        Args:
            sent: bytes of the gradients of a worker.
        """
        inside, nodes = min(self.workers, self.workers_per_node), self.nodes
        link_s = 2 * (inside - 1) / inside * sent / (self.gpu.link_gb_s * GB)
        network_s = 2 * (nodes - 1) / nodes * sent * 8 / (self.network_gbit_s * GB)
        return link_s + network_s


@dataclass(frozen=True)
class TaskPlan:
    """Plan of the steps of one task, for one worker.

    Args:
        task: its name.
        rows: rows of a step per worker.
        tokens: tokens of the longest row, of all towers.
        activation_gb: living tensors at the peak of the step, in GB.
        tflops: operations of a step, in 1e12.
        compute_s: time of the operations by roofline.
        network_s: time of the sum of gradients by the bandwidths within and between nodes.
        rows_per_second: rate of all workers.
        loader_cpus: CPUs of a worker that load its batches as fast as it computes.
    """

    task: str
    rows: int
    tokens: int
    activation_gb: float
    tflops: float
    compute_s: float
    network_s: float
    rows_per_second: float
    loader_cpus: float

    @property
    def step_s(self) -> float:
        """Time of a step: the sum of gradients runs beside the backward pass."""
        return max(self.compute_s, self.network_s)


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
        equal_weights: a task has no weight, so its share of the steps is unknown.
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
    equal_weights: bool
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
            "method": "roofline, not a measurement",
            "tasks": [asdict(task) | {"step_s": task.step_s} for task in self.tasks],
            "steps": self.steps,
            "hours": self.hours,
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
    tasks = [_plan_task(planner, memory, name, pool) for name in planner.config.trained]
    weights = {name: task.weight for name, task in planner.config.trained.items()}
    given = [weight for weight in weights.values() if weight is not None]
    equal = len(given) < len(weights)
    share = {name: 1.0 if equal else float(weight or 0) for name, weight in weights.items()}
    total = sum(share.values())
    mean = sum(share[task.task] / total * task.step_s for task in tasks)
    steps = planner.config.training.steps
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
        equal_weights=equal,
        size_mismatch=find_size_mismatch(planner.config) or "",
    )


def _plan_task(planner: RunPlanner, memory: WorkerMemory, name: str, pool: WorkerPool) -> TaskPlan:
    config, gpu = planner.config, pool.gpu
    cost, passes = planner.measure(name, planner.given)
    trained = planner.trained_sizes[name]
    update_s = OPTIMIZER_BYTES * trained / (gpu.bandwidth_gb_s * GB)
    compute_s = passes * cost.seconds(gpu) + update_s
    network_s = pool.sum_seconds(4 * trained)
    step_s = max(compute_s, network_s)
    spec, lengths = find_task(name, config.model.tasks), longest_lengths(config, name)
    rows = planner.rows_per_worker(name)
    tokens = sum(
        find_modality(plan.modality).tensor_half.count_tokens(config.model, lengths[tower])
        for tower, plan in spec.towers.items()
    )
    return TaskPlan(
        task=name,
        rows=rows,
        tokens=tokens,
        activation_gb=memory.activations[name] / GB,
        tflops=passes * cost.flops / 1e12,
        compute_s=compute_s,
        network_s=network_s,
        rows_per_second=config.tasks[name].batch_size / step_s,
        loader_cpus=rows / step_s * _loader_seconds(config, name, lengths),
    )


def _loader_seconds(config: FinetuneConfig, name: str, lengths: Mapping[str, int]) -> float:
    """Return the CPU seconds that load one row of all towers."""
    model, seconds = config.model, 0.0
    for tower, plan in find_task(name, model.tasks).towers.items():
        half = find_modality(plan.modality).tensor_half
        seconds += half.count_elements(model, lengths[tower]) * half.seconds_per_element
    return seconds
