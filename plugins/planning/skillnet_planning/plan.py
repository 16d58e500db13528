"""``skillnet plan``: whether a training run fits GPUs, and what it costs there, without a GPU."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.training.config.resources import PlannedRun
from skillnet_planning.memory_check import select_largest_runs
from skillnet_platform import cli, console
from skillnet_platform.cli import command
from skillnet_platform.cluster.gpu_types import (
    GB,
    INSTANCE_TYPES,
    OTHER_NODE,
    GpuType,
    InstanceType,
    find_gpu_type,
    read_node_types,
)
from skillnet_platform.cluster.resource_request import ResourceRequest
from skillnet_platform.config import positional_field
from skillnet_platform.config.bounds import PositiveAmount, require_bounds
from skillnet_platform.errors import UserError, suggest_name

if TYPE_CHECKING:
    from skillnet_planning.run_plan import RunPlan
    from skillnet_planning.task_plan import TaskPlan, WorkerPool

#: Options of this command; all others belong to the command that is planned.
OWN_OPTIONS = ("gpus", "cluster", "network_gbit_s", "measurements")


@dataclass
class PlanConfig:
    """Options of ``skillnet plan``.

    Args:
        entry: command that trains, with its options; ``finetune`` without a command.
        gpus: number and type of GPUs, such as ``4xL4``, in as few nodes as AWS allows.
        cluster: file of `ray up` whose GPU instances are planned for, instead of ``gpus``.
        network_gbit_s: bandwidth between two nodes in Gbit/s; null takes that of the instances.
        measurements: CSV of ``make gpu`` on such a GPU; its rates take the place of the data
            sheet's, and its steps stand beside the prediction.
    """

    entry: list[str] = positional_field([])
    gpus: str | None = None
    cluster: str | None = None
    network_gbit_s: PositiveAmount | None = None
    measurements: str | None = None

    def __post_init__(self) -> None:
        require_bounds(self)


def split_plan_arguments(argv: Sequence[str]) -> list[str]:
    """Separate the options of ``skillnet plan``, at any position, from those of the run."""
    own: list[str] = []
    rest: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name = word.partition("=")[0].removeprefix("--")
        if word in ("--json", "-h") or name == "help":
            own.append(word)
            if word == "--help" and words[:1] == ["all"]:
                own.append(words.pop(0))
        elif word.startswith("--") and name in OWN_OPTIONS:
            own.append(word)
            if "=" not in word and words:
                own.append(words.pop(0))
        else:
            rest.append(word)
    return [*own, "--", *rest]


def parse_pool(config: PlanConfig) -> "WorkerPool":
    """Return the GPUs that the options name.

    Raises:
        UserError: neither or both of ``gpus`` and ``cluster``, an unknown type, or a cluster
            without known GPUs.
    """
    if (config.gpus is None) == (config.cluster is None):
        raise UserError("skillnet plan: give --gpus, such as 4xL4, or --cluster FILE")
    if config.cluster is not None:
        return _read_pool(Path(config.cluster), config.network_gbit_s)
    match = re.fullmatch(r"(?:(\d+)[x*])?([A-Za-z][\w-]*)", str(config.gpus))
    if match is None or match[1] == "0":
        raise UserError(f"--gpus {config.gpus}: not a number and a type. Write 4xL4.")
    gpu, workers = find_gpu_type(match[2]), int(match[1] or 1)
    instance = find_instance(gpu, workers)
    # torch loads here: --help and usage errors do not need it.
    from skillnet_planning.task_plan import WorkerPool

    return WorkerPool(
        gpu,
        workers,
        config.network_gbit_s or instance.network_gbit_s,
        workers_per_node=instance.gpus,
    )


def _read_pool(path: Path, network_gbit_s: float | None) -> "WorkerPool":
    kinds = [each for each in read_node_types(path) if each.gpus and each.most]
    for each in kinds:
        if each.gpu is None:
            raise UserError(
                f"{path}: {each.name} has an unknown GPU ({each.machine or 'no InstanceType'}). "
                "Give --gpus instead."
            )
    if not kinds:
        raise UserError(f"{path}: the autoscaler starts no node with a GPU. Give --gpus instead.")
    from skillnet_planning.task_plan import WorkerPool

    known = [(each, each.gpu, each.instance) for each in kinds if each.gpu and each.instance]
    return WorkerPool(
        min((gpu for _, gpu, _ in known), key=lambda gpu: gpu.memory_gb),
        sum(each.gpus * each.most for each in kinds),
        network_gbit_s or min(instance.network_gbit_s for _, _, instance in known),
        min(each.resources.get("CPU", 0) / each.gpus for each in kinds),
        min(each.gpus for each in kinds),
    )


def describe_links(pool: "WorkerPool") -> str:
    """Return the nodes of a pool and the bandwidths within and between them, in words.

    Args:
        pool: GPUs of a plan.
    """
    inside = min(pool.workers, pool.workers_per_node)
    parts = [
        f"{pool.nodes} nodes of {inside} GPUs"
        if pool.nodes > 1
        else f"one node of {inside} GPU" + "s" * (inside > 1)
    ]
    if inside > 1:
        parts.append(f"{pool.rates.link_gb_s:g} GB/s inside a node")
    if pool.nodes > 1:
        parts.append(f"{pool.network_gbit_s:g} Gbit/s between nodes")
    return ", ".join(parts)


def parse_runs(entry: Sequence[str]) -> list[PlannedRun]:
    """Return the runs of the command that is planned: of many, those of the largest models.

    Args:
        entry: its name and arguments; ``finetune`` if the first word is an option.

    Raises:
        UserError: an unknown command, or one that trains nothing.
    """
    words = list(entry)
    name = words.pop(0) if words and not words[0].startswith("-") else "finetune"
    known = cli.find_commands()
    if name not in known:
        raise UserError(f"unknown command {name!r}{suggest_name(name, known)}")
    loaded = known[name].load()
    request = loaded.request_resources(words) if isinstance(loaded, cli.CliCommand) else None
    list_runs = request.list_runs if isinstance(request, ResourceRequest) else None
    runs = select_largest_runs(list_runs()) if list_runs is not None else []
    if not runs:
        raise UserError(
            f"skillnet plan {name}: it trains nothing. Plan finetune, pretrain, grow, sweep or "
            "compare."
        )
    return runs


@dataclass
class CommandPlan:
    """Plans of the runs of a command.

    Args:
        plans: label -> plan; the only run of a command has no label.
    """

    plans: dict[str, "RunPlan"]

    @property
    def fits(self) -> bool:
        """Whether all runs fit."""
        return all(plan.fits for plan in self.plans.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for ``--json``."""
        if list(self.plans) == [""]:
            return self.plans[""].to_dict()
        runs = {label: plan.to_dict() for label, plan in self.plans.items()}
        return {"fits": self.fits, "runs": runs}


def show_plans(result: CommandPlan) -> None:
    """Print the plan of a command with one run, or a table of its runs."""
    if list(result.plans) == [""]:
        show_plan(result.plans[""])
        return
    first = next(iter(result.plans.values()))
    rows: list[list[Any]] = [
        [label, plan.memory.largest_task, f"{plan.memory.total / GB:.2f}", f"{plan.hours:.1f}"]
        for label, plan in result.plans.items()
    ]
    gpu = first.pool.gpu
    console.print_table(
        f"Runs on {gpu.describe()}, of which {gpu.usable_bytes / GB:.2f} GB are usable",
        ["run", "largest task", "GB", "hours"],
        rows,
        "Runs that need equal memory are planned once, and of many only the largest models. GB: of "
        "a worker, counted on tensors without values. Hours: a bound by roofline.",
    )
    for label, plan in result.plans.items():
        if not plan.fits:
            console.print_warning(f"{label}: it does not fit. Use {plan.advice}")
        if plan.size_mismatch:
            console.print_warning(f"{label}: {plan.size_mismatch}")


def show_plan(plan: "RunPlan") -> None:
    """Print the memory and the tasks of a plan as tables, and what makes it fit."""
    gpu, pool = plan.pool.gpu, plan.pool
    rows: list[list[Any]] = [[part, f"{size:.2f}"] for part, size in plan.memory_parts().items()]
    rows += [["total", f"{plan.memory.total / GB:.2f}"]]
    rows += [["usable", f"{gpu.usable_bytes / GB:.2f}"]]
    console.print_table(
        f"Memory of each of {pool.workers} workers on {gpu.describe()}, {plan.precision}",
        ["part", "GB"],
        rows,
        "Counted on tensors without values, for batches of the longest rows. Usable is the memory "
        "without 1.5 GB for CUDA and 5 % for gaps, which is an assumption.",
    )
    columns = ["task", "rows", "tokens", "GB", "TFLOP", "MFU", "rows/s", "CPUs"]
    cells: list[list[Any]] = [
        [
            task.task,
            task.rows,
            task.tokens,
            f"{task.activation_gb:.2f}",
            f"{task.tflops:.2f}",
            "" if task.mfu is None else f"{task.mfu:.2f}",
            f"{task.rows_per_second:.0f}",
            f"{task.loader_cpus:.2f}",
        ]
        for task in plan.tasks
    ]
    measured = pool.measured
    source = "the data sheet" if measured is None else f"the rates in {measured.path.name}"
    console.print_table(
        f"Steps by roofline of {source}, which is a bound and not a measurement",
        columns,
        cells,
        "Of one worker: rows, GB, TFLOP, and CPUs that load its batches. Of all workers: rows/s. "
        "MFU: operations of the model without layers that are computed again, of the peak.",
    )
    times: list[list[Any]] = [
        [
            task.task,
            f"{task.compute_s:.3f}",
            task.operations,
            f"{task.launch_s:.3f}",
            f"{task.link_s:.3f}",
            f"{task.network_s:.3f}",
            f"{task.gathered_gb:.2f}",
            *([] if measured is None else [_describe_measured(task)]),
        ]
        for task in plan.tasks
    ]
    heads = [
        "task",
        "compute",
        "operations",
        "launches",
        "NVLink or PCIe",
        "network",
        "gathered GB",
    ]
    is_known = measured is not None and measured.launch_s is not None
    launches = f"{pool.launch_s * 1e6:.3g} us each, {'measured' if is_known else 'an assumption'}"
    beside = "" if measured is None else " Measured: one GPU, without links, beside compute."
    console.print_table(
        "Predicted seconds of a step",
        [*heads, *([] if measured is None else ["measured"])],
        times,
        f"Launches: {launches}, fewer if compiled. Links: {describe_links(pool)}. Gathered: "
        f"weights from shards, at most.{beside}",
    )
    if plan.schemes:
        show_schemes(plan)
    shares = ", tasks weighted equally" if plan.equal_weights else ""
    used = "" if plan.mfu is None else f", MFU {plan.mfu:.2f}"
    console.print_note(
        f"{plan.steps} steps: at least {plan.hours:.1f} h by roofline{used}{shares}; with launches "
        f"{plan.launched_hours:.1f} h"
    )
    if plan.host_gb:
        console.print_note(f"host memory for weights: up to {plan.host_gb:.1f} GB on a node")
    needed = max(task.loader_cpus for task in plan.tasks)
    if 0 < pool.cpus_per_worker < needed:
        console.print_warning(
            f"loading batches as fast as the roofline takes {needed:.1f} CPUs per worker; the "
            f"nodes have {pool.cpus_per_worker:g}"
        )
    if plan.fits:
        console.print_note(f"it fits: {plan.memory.total / GB:.1f} GB of {gpu.describe()}")
        if plan.larger_part:
            console.print_note(f"the largest part that fits: {plan.larger_part}")
    else:
        console.print_warning(f"it does not fit. Use {plan.advice}")
    if plan.size_mismatch:
        console.print_warning(plan.size_mismatch)


def show_schemes(plan: "RunPlan") -> None:
    """Print the ways to divide a run among several nodes as a table."""
    console.print_table(
        f"Ways to train on {plan.pool.nodes} nodes, predicted",
        ["scheme", "rows", "GB in a node", "GB between", "ms", "h for 1e9 rows", "1,000 skills"],
        [
            [
                each.name,
                f"{each.rows:.1f}",
                f"{each.link_gb:.2f}",
                f"{each.network_gb:.2f}",
                f"{1000 * each.batch_s:.1f}",
                f"{each.hours:.1f}",
                f"{each.skills_gb:.0f} GB",
            ]
            for each in plan.schemes
        ],
        "For each batch of one task: rows of a GPU, GB that it sends over NVLink or PCIe, GB that "
        "its node sends, ms of all groups together. 1,000 skills: their weights and AdamW state "
        "on a GPU, each of the mean size of the model's skills.",
    )


def _describe_measured(task: "TaskPlan") -> str:
    """Return the measured seconds of a step and their ratio to the prediction, or a dash."""
    if task.measured_s is None:
        return "–"
    predicted = max(task.compute_s, task.launch_s)
    return f"{task.measured_s:.3f} ({task.measured_s / predicted:.2f} x)"


def find_instance(gpu: GpuType, gpus: int) -> InstanceType:
    """Return the smallest instance that holds all GPUs, or else the largest one of their type.

    Args:
        gpu: type of the GPUs.
        gpus: their number.

    Returns:
        Of equal instances the one with the slower network; :data:`OTHER_NODE` for a type of GPU
        that no listed instance has.
    """
    known = [each for each in INSTANCE_TYPES.values() if each.gpu == gpu.name] or [OTHER_NODE]
    most = max(each.gpus for each in known)
    enough = [each for each in known if each.gpus >= min(gpus, most)]
    return min(enough, key=lambda each: (each.gpus, each.network_gbit_s))


@command(
    PlanConfig,
    description="Compute, without a GPU, whether a training run fits the memory of GPUs, which "
    "option makes it fit, and its rate by roofline: a bound from data sheets, not a measurement. "
    "Exits with 1 if the run does not fit.",
    example="skillnet plan --config base --gpus 4xL4\n"
    "skillnet plan pretrain --config base --cluster ray_cluster.yaml\n"
    "skillnet plan compare --config studies/headline --gpus 1xA10G --json",
    show=show_plans,
    to_json=lambda plan: plan.to_dict(),
    exit_code=lambda plan: int(not plan.fits),
    rewrite_arguments=split_plan_arguments,
)
def main(config: PlanConfig) -> CommandPlan:
    """Run ``skillnet plan``."""
    # The types of GPUs load torch, so the runs come first.
    runs, pool = parse_runs(config.entry), parse_pool(config)
    from skillnet_planning.measurements import read_measurements
    from skillnet_planning.run_plan import plan_run

    if config.measurements is not None:
        pool = replace(pool, measured=read_measurements(Path(config.measurements)))

    plans: dict[str, RunPlan] = {}
    for run in runs:
        training = replace(run.config.training, use_gpu=True)
        # A single run uses all GPUs; each trial of a sweep has its own workers.
        workers = training.workers if run.prefix else pool.workers
        own = replace(pool, gpu=run.take_share(pool.gpu), workers=min(workers, pool.workers))
        plans[run.label] = plan_run(replace(run.config, training=training), own, run.prefix)
    return CommandPlan(plans)


if __name__ == "__main__":
    raise SystemExit(main())
