"""Memory of a GPU worker by part, and the option that makes a run fit.

:class:`RunPlanner` counts the steps of all tasks on fake tensors, so that the figures follow from
the code that trains. :func:`describe_overflow` is the check of ``skillnet submit``, and
:mod:`skillnet_planning.run_plan` adds rates and hours for ``skillnet plan``.
"""

import itertools
import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.setup import count_sharing_workers
from pipelines.training.loop.step import count_parts
from pipelines.training.loop.telemetry import PASSES
from skillnet.multitask_model import TaskModel
from skillnet.objectives.base import find_objective
from skillnet.skills import find_task
from skillnet_planning.example_batches import build_example_batch
from skillnet_planning.step_counter import PlannedModel, StepCost, measure_step
from skillnet_platform.cluster.gpu_types import GB, GpuType
from skillnet_platform.errors import UserError

#: Tensors (B, G) of float32 that the contrastive loss keeps in its two directions: similarities,
#: their logarithms and targets.
SIMILARITY_TENSORS = 6
#: Tasks among which the three with the most weights are looked for.
MOST_COMPARED_TASKS = 16
#: Fewest rows that are worth a pass; below, layers are computed again first.
FEW_ROWS = 16


@dataclass(frozen=True)
class MemoryOptions:
    """Options that trade operations for memory.

    Args:
        micro_batch_size: rows that a worker computes at a time; None for all.
        kept_tokens: tokens whose tensors are kept for the backward pass; None keeps all.
        sharding: ``training.sharding``: ``host`` keeps weights of other tasks in the host's memory,
            ``full`` divides weights and state among the workers.
    """

    micro_batch_size: int | None
    kept_tokens: int | None
    sharding: str = "none"

    @property
    def is_plain(self) -> bool:
        """Whether each worker keeps all weights on its GPU."""
        return self.sharding == "none"

    def describe(self, before: "MemoryOptions", prefix: str = "") -> str:
        """Return the command line options that change other options into these.

        Args:
            before: the other options.
            prefix: beginning of the options of a run, such as ``run.`` in a sweep.
        """
        words = []
        if self.micro_batch_size != before.micro_batch_size:
            size = "null" if self.micro_batch_size is None else self.micro_batch_size
            words.append(f"--{prefix}training.micro_batch_size {size}")
        if self.kept_tokens != before.kept_tokens:
            words.append(f"--{prefix}training.kept_tokens {self.kept_tokens}")
        if self.sharding != before.sharding:
            words.append(f"--{prefix}training.sharding {self.sharding}")
        return " ".join(words)


@dataclass(frozen=True)
class WorkerMemory:
    """Memory of one worker by part, in bytes.

    Args:
        weights: number of elements of the complete model, or of three tasks if the host keeps the
            others. With shards those of the worker and of the largest task.
        optimizer: AdamW's two averages of the trained weights that the worker keeps.
        gradients: those of the largest task; with shards also the worker's sums.
        average: average of the weights, with ``training.ema``.
        best: copy of the weights of the best validation, with ``training.patience``.
        activations: task -> living tensors at the peak of its step.
    """

    weights: int
    optimizer: int
    gradients: int
    average: int
    best: int
    activations: dict[str, int]

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the rows of a step."""
        return self.weights + self.optimizer + self.gradients + self.average + self.best

    @property
    def largest_task(self) -> str:
        """Task with the largest peak."""
        return max(self.activations, key=lambda name: self.activations[name])

    @property
    def total(self) -> int:
        """Bytes at the peak of the largest task."""
        return self.fixed + max(self.activations.values())


class RunPlanner:
    """Planner of one run on one type of GPU.

    Args:
        config: settings of the run.
        gpu: type of each worker's GPU.
        workers: number of workers.
        workers_per_node: workers that divide the weights with ``training.sharding`` hybrid.

    Raises:
        UserError: the system cannot be planned.
    """

    def __init__(
        self, config: FinetuneConfig, gpu: GpuType, workers: int, workers_per_node: int = 1
    ) -> None:
        self.workers_per_node = workers_per_node
        self.config = config.joint()
        training = self.config.training
        # The workers that compute a batch together.
        self.gpu, self.workers = gpu, workers // math.gcd(workers, training.tasks_per_step)
        if training.precision == "fp64":
            raise UserError("training.precision: fp64 is not planned for GPUs. Set auto.")
        automatic = "bf16" if gpu.has_bf16 else "fp32"
        self.precision = automatic if training.precision == "auto" else training.precision
        self.given = MemoryOptions(
            training.micro_batch_size,
            training.kept_tokens,
            training.sharding,
        )
        self._costs: dict[tuple[str, int, MemoryOptions], StepCost] = {}

    @classmethod
    def of(cls, other: "RunPlanner", config: FinetuneConfig, workers: int) -> "RunPlanner":
        """Return the planner of other options for the same model, with the steps counted so far.

        Args:
            other: planner of the model.
            config: settings of the run.
            workers: number of workers.
        """
        made = cls(config, other.gpu, workers, other.workers_per_node)
        made.planned, made._costs = other.planned, other._costs
        return made

    def count_sharing(self) -> int:
        """Return the number of workers that divide the weights among themselves."""
        return count_sharing_workers(self.given.sharding, self.workers, self.workers_per_node)

    def rows_per_worker(self, task: str) -> int:
        """Return the rows of a step that the first worker computes."""
        return -(-self.config.tasks[task].batch_size // self.workers)

    def measure(self, task: str, options: MemoryOptions) -> tuple[StepCost, float]:
        """Count a step of a task, and return how many such passes make the step.

        A micro-batch costs as much as every other, so only two of them are counted.

        Args:
            task: its name.
            options: memory options.
        """
        rows, size = self.rows_per_worker(task), options.micro_batch_size
        if size is None or size >= rows:
            return self._measure(task, rows, replace(options, micro_batch_size=None)), 1.0
        if find_objective(find_task(task, self.config.model.tasks).objective).pairs_towers:
            counted = min(rows, 2 * size)
            return self._measure(task, counted, options), rows / counted
        return self._measure(task, size, replace(options, micro_batch_size=None)), rows / size

    def _measure(self, task: str, rows: int, options: MemoryOptions) -> StepCost:
        # Where weights lie does not change the other tensors of a step.
        options = replace(options, sharding="none")
        key = (task, rows, options)
        if key not in self._costs:
            with self.planned.fake:
                batch = build_example_batch(self.config, task, rows, rows)
            size, kept = options.micro_batch_size, options.kept_tokens
            self._costs[key] = measure_step(self.planned, batch, self.precision, size, kept)
        return self._costs[key]

    def memory(
        self, options: MemoryOptions | None = None, tasks: Collection[str] | None = None
    ) -> WorkerMemory:
        """Return the memory of a worker.

        Args:
            options: memory options; None takes those of the configuration.
            tasks: whose activations are counted; None counts those of all trained tasks.
        """
        chosen = options or self.given
        training, trained = self.config.training, self.trained_parameters
        resident = self.total_parameters
        if chosen.sharding == "host":
            resident, trained = self.resident_parameters
        largest, step = max(self.trained_sizes.values()), 0
        share = count_sharing_workers(chosen.sharding, self.workers, self.workers_per_node)
        if share > 1:
            # A step gathers the weights of its task.
            resident, trained, step = -(-resident // share), -(-trained // share), largest
        gathered = max(map(self.count_gathered_bytes, self.config.trained)) if step else 0
        return WorkerMemory(
            weights=4 * resident + gathered,
            optimizer=8 * trained,
            gradients=4 * (largest + step // share),
            average=4 * trained if training.ema else 0,
            best=4 * trained if training.patience else 0,
            activations={
                name: self._activations(name, chosen)
                for name in (self.config.trained if tasks is None else tasks)
            },
        )

    def _activations(self, task: str, options: MemoryOptions) -> int:
        cost, _ = self.measure(task, options)
        rows, total = self.rows_per_worker(task), self.config.tasks[task].batch_size
        more = 0
        if find_objective(find_task(task, self.config.model.tasks).objective).pairs_towers:
            counted = min(rows, 2 * (options.micro_batch_size or rows))
            # A worker compares its rows with those of all workers.
            more = 4 * SIMILARITY_TENSORS * (rows * total - counted * counted)
        return cost.peak_bytes + more

    @cached_property
    def planned(self) -> PlannedModel:
        """Model of the run on fake tensors."""
        return PlannedModel(self.config)

    @cached_property
    def total_parameters(self) -> int:
        """Number of weights of the model."""
        return sum(p.numel() for p in self.planned.model.parameters())

    @cached_property
    def trained_sizes(self) -> dict[str, int]:
        """Task -> number of weights that its steps change."""
        active = self.planned.active
        return {task: sum(p.numel() for _, p in named) for task, named in active.items()}

    @cached_property
    def trained_parameters(self) -> int:
        """Number of weights that the steps of all tasks change."""
        tasks = self.planned.active.values()
        return sum({id(p): p.numel() for named in tasks for _, p in named}.values())

    @cached_property
    def resident_parameters(self) -> tuple[int, int]:
        """Largest numbers of weights, and of trained weights, of three consecutive tasks.

        Those of the current task, of the next one, and of the one before, which are on their way to
        the host.
        """
        planned = self.planned
        used = [planned.model.active_parameters(task) for task in planned.active]
        return _largest_union(used), _largest_union(planned.active.values())

    def fits(self, memory: WorkerMemory) -> bool:
        """Return whether the tensors of a worker fit its GPU."""
        return memory.total <= self.gpu.usable_bytes

    def find_fitting_options(self) -> MemoryOptions | None:
        """Return the given options if they fit, else the cheapest options that do; or None."""
        if self.fits(self.memory()):
            return self.given
        for placed in self._list_placements():
            for kept, fewest in {self.given.kept_tokens: FEW_ROWS, 0: 1}.items():
                options = replace(placed, kept_tokens=kept)
                found = self._largest_micro_batch(options, fewest)
                if found is not None:
                    return found
        return None

    def _list_placements(self) -> list[MemoryOptions]:
        """Return the given options with the places of weights that are tried, cheapest first."""
        placed = [self.given]
        if self.given.is_plain:
            # The copy of the best weights is whole, so a run with a patience cannot divide them.
            has_shards = self.workers > 1 and not self.config.training.patience
            if has_shards and can_shard(self.planned.model):
                placed.append(replace(self.given, sharding="full"))
            placed.append(replace(self.given, sharding="host"))
        return placed

    def _fits_with(self, options: MemoryOptions) -> bool:
        plain = self.memory()
        fixed = self.memory(options, tasks=()).fixed
        if fixed > self.gpu.usable_bytes:
            return False
        # The first task that does not fit ends the search; the largest is tried first.
        for task in sorted(plain.activations, key=lambda name: -plain.activations[name]):
            if fixed + self._activations(task, options) > self.gpu.usable_bytes:
                return False
        return True

    def _largest_micro_batch(self, options: MemoryOptions, fewest: int) -> MemoryOptions | None:
        try:
            if self._fits_with(options):
                return options
        except ValueError:
            return None  # the system cannot compute layers again
        most = max(self.rows_per_worker(task) for task in self.config.trained)
        most = min(most, options.micro_batch_size or most)
        largest = max((most - 1).bit_length() - 1, 0)
        smaller = [
            replace(options, micro_batch_size=1 << power)
            for power in range(largest, -1, -1)
            if 1 << power >= fewest
        ]
        # A smaller part needs less memory, and a step is counted in a second, so few are.
        first = bisect_left(smaller, True, key=self._fits_with)
        return smaller[first] if first < len(smaller) else None

    def propose_larger_part(self, prefix: str = "") -> str:
        """Return the option with the largest micro-batch that fits; empty if none is larger.

        Args:
            prefix: beginning of the options of the run on the command line.
        """
        size = self.given.micro_batch_size
        if size is None or size >= max(map(self.rows_per_worker, self.config.trained)):
            return ""
        whole = replace(self.given, micro_batch_size=None)
        found = self._largest_micro_batch(whole, size + 1)
        return "" if found is None else found.describe(self.given, prefix)

    def count_gathered_bytes(self, task: str) -> int:
        """Return the bytes of the weights of a task as shards send them.

        Args:
            task: its name.
        """
        size = 2 if self.precision == "bf16" else 4
        return sum(
            p.numel() * (size if name in self._rounded else 4)
            for name, p in self.planned.active[task]
        )

    @cached_property
    def _rounded(self) -> set[str]:
        # Only a run with shards asks.
        from pipelines.training.loop.sharding import find_rounded_weights

        return find_rounded_weights(self.planned.model)

    def count_gathers(self, task: str) -> int:
        """Return how often a step gathers the weights of its task from shards, at most.

        They stay for the step. If layers are computed again, each is freed after each pass: a part
        goes forward and back, and first forward without gradients for a contrastive loss.

        Args:
            task: its name.
        """
        if self.given.sharding not in ("full", "hybrid") or self.workers == 1:
            return 0
        if self.given.kept_tokens is None:
            return 1
        rows = self.config.tasks[task].batch_size
        parts = count_parts(rows, self.workers, self.given.micro_batch_size)
        spec = find_task(task, self.config.model.tasks)
        return parts * (3 if parts > 1 and find_objective(spec.objective).pairs_towers else 2)

    def count_model_flops(self, task: str, lengths: Mapping[str, int]) -> float | None:
        """Return the operations of a row as the metrics of a run count them; None without formulas.

        Args:
            task: its name.
            lengths: tower -> length of its row.
        """
        model = self.planned.model
        # The base class counts by running the model.
        if type(model).flops is TaskModel.flops:
            return None
        try:
            return float(PASSES * model.flops(task, lengths)[0])
        except TypeError:  # the formulas do not know a stem of a third party
            return None

    def advise(self, prefix: str = "") -> str:
        """Return the options that make the run fit, or the resource that it lacks.

        Args:
            prefix: beginning of the options of the run on the command line.
        """
        options = self.find_fitting_options()
        if options is not None:
            return options.describe(self.given, prefix)
        placed = [replace(each, micro_batch_size=1) for each in self._list_placements()]
        try:
            few = [replace(each, kept_tokens=0) for each in placed]
            least = min(self.memory(each).total for each in few)
        except ValueError:  # the system cannot compute layers again
            least = min(self.memory(each).total for each in placed)
        return (
            f"a GPU with more than {least / GB:.1f} GB for the tensors of a worker, or a smaller "
            f"model: --{prefix}model.dim, --{prefix}model.num_layers"
        )


def can_shard(model: TaskModel) -> bool:
    """Return whether ``training.sharding`` takes a model."""
    # Only a run that does not fit asks.
    from pipelines.training.loop.sharding import require_sharding

    try:
        require_sharding(model)
    except UserError:
        return False
    return True


def _largest_union(of_tasks: Iterable[Iterable[tuple[str, nn.Parameter]]]) -> int:
    sizes = [{id(p): p.numel() for _, p in named} for named in of_tasks]
    largest = sorted(sizes, key=lambda size: -sum(size.values()))[:MOST_COMPARED_TASKS]
    groups = itertools.combinations(largest, min(3, len(largest)))
    unions = ({key: n for size in each for key, n in size.items()} for each in groups)
    return max(sum(union.values()) for union in unions)


def describe_overflow(
    config: FinetuneConfig, gpu: GpuType, prefix: str = ""
) -> tuple[str, str] | None:
    """Return why a run does not fit a type of GPU, and the remedy; None if it fits.

    Args:
        config: settings of the run, with its number of workers.
        gpu: smallest GPU of the cluster, or the part of it that a worker gets.
        prefix: beginning of the options of the run on the command line.

    Raises:
        UserError: the system cannot be planned.
    """
    training = config.training
    # With the fewest workers of an elastic run, each computes the most rows.
    planner = RunPlanner(config, gpu, training.min_workers or training.workers)
    memory = planner.memory()
    if planner.fits(memory):
        return None
    seen = (
        f"{memory.largest_task} needs {memory.total / GB:.1f} GB on each {gpu.describe()}, of "
        f"which {gpu.usable_bytes / GB:.1f} GB are usable"
    )
    return seen, planner.advise(prefix)
