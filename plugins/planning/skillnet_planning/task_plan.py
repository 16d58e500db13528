"""Plan of the steps of one task on GPUs: operations, rates by roofline, launches and traffic.

:func:`plan_task` is called for each task of a run and of other ways to divide it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.training.config.run import FinetuneConfig
from skillnet.modality import find_modality
from skillnet.skills import find_task
from skillnet_planning.example_batches import longest_lengths
from skillnet_planning.measurements import Measurements, describe_step
from skillnet_planning.memory_plan import RunPlanner, WorkerMemory
from skillnet_platform.cluster.gpu_types import GB, GpuType

#: Bytes that AdamW and clipping move per trained weight: weight, gradient and two averages, each
#: read, three of them written; clipping reads the gradient, and reads and writes it again.
OPTIMIZER_BYTES = 28 + 12
#: Time in which the host launches one operation of a step that is not compiled. An assumption.
LAUNCH_S = 10e-6


@dataclass(frozen=True)
class WorkerPool:
    """GPUs that a run is planned for.

    Args:
        gpu: type of the smallest GPU.
        workers: number of GPUs, one per worker.
        network_gbit_s: bandwidth between two nodes in Gbit/s.
        cpus_per_worker: CPUs beside each GPU; 0 if unknown.
        workers_per_node: GPUs of each node; 1 if unknown.
        measured: rates of this GPU in place of its data sheet; None without a measurement.
    """

    gpu: GpuType
    workers: int
    network_gbit_s: float
    cpus_per_worker: float = 0.0
    workers_per_node: int = 1
    measured: Measurements | None = None

    @property
    def rates(self) -> GpuType:
        """The GPU with its measured rates, if there are any."""
        return self.gpu if self.measured is None else self.measured.apply(self.gpu)

    @property
    def launch_s(self) -> float:
        """Seconds in which the host launches one operation of a step that is not compiled."""
        measured = None if self.measured is None else self.measured.launch_s
        return LAUNCH_S if measured is None else measured

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return -(-self.workers // self.workers_per_node)

    def sum_seconds(self, sent: float) -> tuple[float, float]:
        """Return the times of the sum of gradients over all workers, within and between nodes.

        GPUs of a node sum over their link, and nodes over the network, each as a ring that sends
        and receives 2 (n - 1) / n times the bytes. The second follows the first, as in the
        hierarchical sum of Goyal et al. 2017, section 4.

        Args:
            sent: bytes of the gradients of a worker.
        """
        inside, nodes = min(self.workers, self.workers_per_node), self.nodes
        link_s = 2 * (inside - 1) / inside * sent / (self.rates.link_gb_s * GB)
        network_s = 2 * (nodes - 1) / nodes * sent * 8 / (self.network_gbit_s * GB)
        return link_s, network_s


@dataclass(frozen=True)
class TaskPlan:
    """Plan of the steps of one task, for one worker.

    Args:
        task: its name.
        rows: rows of a step per worker.
        tokens: tokens of the longest row, of all towers.
        activation_gb: living tensors at the peak of the step, in GB.
        tflops: arithmetic of a step, in 1e12.
        operations: kernels that the host launches in a step, without the update of the weights.
        compute_s: time of the operations by roofline.
        launch_s: time in which the host launches them, if nothing is compiled.
        link_s: time of the gradients, and of gathered weights, between the GPUs of a node.
        network_s: the same between nodes.
        gathered_gb: weights that a worker gathers from the shards of others, in GB; at most.
        mfu: model FLOP utilisation by roofline, of the peak of the precision; None for a system
            without formulas. Layers that are computed again do not count.
        rows_per_second: rate of all workers.
        loader_cpus: CPUs of a worker that load its batches as fast as it computes.
        measured_s: measured time of such a step of one GPU, without links; None without one.
    """

    task: str
    rows: int
    tokens: int
    activation_gb: float
    tflops: float
    operations: int
    compute_s: float
    launch_s: float
    link_s: float
    network_s: float
    gathered_gb: float
    mfu: float | None
    rows_per_second: float
    loader_cpus: float
    measured_s: float | None = None

    @property
    def step_s(self) -> float:
        """Time of a step: gradients and weights travel beside the passes."""
        return max(self.compute_s, self.link_s + self.network_s)

    @property
    def launched_s(self) -> float:
        """Time of a step that is not compiled: the host launches while the GPU computes."""
        return max(self.step_s, self.launch_s)


def plan_task(planner: RunPlanner, memory: WorkerMemory, name: str, pool: WorkerPool) -> TaskPlan:
    """Plan the steps of one task.

    Args:
        planner: planner of the run.
        memory: bytes of a worker, by part.
        name: name of the task.
        pool: GPUs of the run.
    """
    config, gpu, rates = planner.config, pool.gpu, pool.rates
    cost, passes = planner.measure(name, planner.given)
    trained = planner.trained_sizes[name]
    update_s = OPTIMIZER_BYTES * trained / (rates.bandwidth_gb_s * GB)
    compute_s = passes * cost.seconds(rates) + update_s
    gathers = planner.count_gathers(name)
    gathered = gathers * planner.count_gathered_bytes(name) if gathers else 0
    link_s, network_s = pool.sum_seconds(4 * trained)
    if gathers:
        # A sum is a reduction and a gather of equal traffic; hybrid gathers inside nodes.
        share = (1 + gathered / (4 * trained)) / 2
        link_s *= share
        if planner.given.sharding == "full":
            network_s *= share
    step_s = max(compute_s, link_s + network_s)
    spec, lengths = find_task(name, config.model.tasks), longest_lengths(config, name)
    rows = planner.rows_per_worker(name)
    tokens = sum(
        find_modality(plan.modality).tensor_half.count_tokens(config.model, lengths[tower])
        for tower, plan in spec.towers.items()
    )
    operations, size = passes * len(cost.operations), planner.given.micro_batch_size
    if size is not None and passes > 1:
        # The last part is launched as each other, although it has fewer rows.
        operations *= -(-rows // size) * size / rows
    peak = 1e12 * (gpu.bf16_tflops if planner.precision == "bf16" else gpu.fp32_tflops)
    flops = planner.count_model_flops(name, lengths)
    measured_s = None
    if pool.measured is not None:
        step = describe_step(config, name, rows, size, config.training.compile)
        measured_s = pool.measured.steps.get(step)
    return TaskPlan(
        task=name,
        rows=rows,
        tokens=tokens,
        activation_gb=memory.activations[name] / GB,
        tflops=passes * cost.flops / 1e12,
        operations=round(operations),
        compute_s=compute_s,
        launch_s=operations * pool.launch_s,
        link_s=link_s,
        network_s=network_s,
        gathered_gb=gathered / GB,
        mfu=None if flops is None else rows * flops / step_s / peak,
        rows_per_second=config.tasks[name].batch_size / step_s,
        loader_cpus=rows / step_s * _loader_seconds(config, name, lengths),
        measured_s=measured_s,
    )


def _loader_seconds(config: FinetuneConfig, name: str, lengths: Mapping[str, int]) -> float:
    """Return the CPU seconds that load one row of all towers."""
    model, seconds = config.model, 0.0
    for tower, plan in find_task(name, model.tasks).towers.items():
        half = find_modality(plan.modality).tensor_half
        seconds += half.count_elements(model, lengths[tower]) * half.seconds_per_element
    return seconds
