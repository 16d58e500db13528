"""Memory of a plan against a step that computes, and the options that make a run fit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.finetune import main as finetune
from pipelines.pretrain import main as pretrain
from pipelines.training.config.run import FinetuneConfig, TaskTraining, TrainingConfig
from pipelines.training.loop.gradient_sync import GradientSync
from pipelines.training.loop.optimizer import build_optimizer
from pipelines.training.loop.resolved_run import check_unlabelled_tasks
from pipelines.training.loop.step import backward_step, step_loss
from skillnet.config import SkillNetConfig
from skillnet.precision import ComputePrecision, assume_gpu
from skillnet.skills import masked_tasks
from skillnet.systems import build_system
from skillnet_planning.example_batches import build_example_batch
from skillnet_planning.memory_plan import MemoryOptions, RunPlanner, describe_overflow
from skillnet_planning.step_counter import PlannedModel, StepCounter, measure_step
from skillnet_platform.cli import CliCommand
from skillnet_platform.cluster.gpu_types import GPU_TYPES, GpuType
from skillnet_platform.errors import UserError
from tests.helpers.small_models import small_config

CPU = torch.device("cpu")
TASKS = tuple(small_config().tasks)
LARGE = GpuType("large", 1000, 1000, 100, 10)


def config_of(system: str = "skillnet", **training: Any) -> FinetuneConfig:
    """A run of the five tasks, 12 rows each, with random layers left out at times."""
    tasks = {name: TaskTraining("any", batch_size=12) for name in TASKS}
    model = small_config(num_layers=3, drop_path=0.2, mel_stack=2)
    return FinetuneConfig(
        system=system, model=model, tasks=tasks, training=TrainingConfig(**training)
    )


def kept_bytes(config: FinetuneConfig, task: str, precision: str) -> int:
    """Bytes that autograd keeps between the passes of a step on real tensors, without weights."""
    model = build_system(config.system, config.model, config.options).train()
    model.limit_kept_tokens(config.training.kept_tokens)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    batch = build_example_batch(config, task, 12, 12)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    compute = ComputePrecision(precision, CPU)
    with assume_gpu(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = step_loss(model, config.model.tasks[task], batch, compute, config)
    loss.backward()
    return sum(kept.values())


# Layers differ by system, and stems and losses by task.
@pytest.mark.parametrize(
    ("system", "task"),
    [
        *(("skillnet", task) for task in TASKS),
        *((system, task) for system in ("dense", "moe") for task in TASKS[1:3]),
    ],
)
def test_kept_bytes_equal_those_of_a_real_step(system: str, task: str) -> None:
    config = config_of(system)
    planned = PlannedModel(config)
    with planned.fake:
        batch = build_example_batch(config, task, 12, 12)
    # In fp32 the host reads the number of tokens of each expert.
    for precision in ("bf16",) if system == "moe" else ("fp32", "bf16"):
        counted = measure_step(planned, batch, precision).kept_bytes
        real = kept_bytes(config, task, precision)
        # The count also has the inputs, and outputs that no gradient needs.
        assert real <= counted <= 1.1 * real + 10_000, precision


# The counter measures the parts of a contrastive step, and one part of the other steps.
@pytest.mark.parametrize(
    ("task", "size"), [*((task, None) for task in TASKS), ("text_to_image", 4)]
)
def test_peak_equals_that_of_a_real_step(task: str, size: int | None) -> None:
    config = config_of(micro_batch_size=size)
    planned = PlannedModel(config)
    with planned.fake:
        batch = build_example_batch(config, task, 12, 12)
    counted = measure_step(planned, batch, "fp32", size)
    model = build_system(config.system, config.model).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    real_batch = build_example_batch(config, task, 12, 12)
    with assume_gpu(), StepCounter(known) as counter:
        for tensors in (*real_batch.towers.values(), real_batch.targets):
            for tensor in tensors.values():
                counter.add(tensor)
        sync = GradientSync({}, 1, 1.0)
        backward_step(model, real_batch, ComputePrecision("fp32", CPU), config, sync)
    assert counted.peak_bytes == pytest.approx(counter.peak, rel=0.01)
    assert counted.flops == sum(each.flops for each in counter.operations)


def test_fixed_memory_equals_that_of_a_real_run() -> None:
    config = config_of(ema=0.9)
    memory = RunPlanner(config, LARGE, 4).memory()
    model = build_system(config.system, config.model)
    optimizer = build_optimizer(model.named_parameters(), config.training)
    for task in TASKS:
        for _, parameter in model.active_parameters(task):
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = sum(
        x.nbytes for each in optimizer.state.values() for x in each.values() if x.ndim and x.nbytes
    )
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    scalars = [p for p in model.parameters() if not p.ndim]
    assert memory.optimizer == state + 8 * len(scalars)
    assert memory.average == memory.optimizer // 2
    # Weights that are averaged are copied at the best validation.
    patient = RunPlanner(config_of(ema=0.9, patience=2, evaluate_every=1), LARGE, 4)
    assert patient.memory(tasks=()).fixed == memory.fixed + memory.average
    # Gradients exist for the task of a step only.
    sizes = [sum(p.nbytes for _, p in model.active_parameters(task)) for task in TASKS]
    assert memory.gradients == max(sizes) < memory.average


def test_weights_in_the_host_are_an_option_that_makes_a_run_fit() -> None:
    tasks = {name: TaskTraining("any", batch_size=2) for name in TASKS[:4]}
    config = replace(
        config_of("specialist"), model=small_config(num_layers=1, mel_stack=2), tasks=tasks
    )
    planner = RunPlanner(config, LARGE, 1)
    plain, offloaded = planner.memory(), planner.memory(MemoryOptions(None, None, "host"))
    # Three of four models of their own.
    assert offloaded.weights < 0.9 * plain.weights
    assert offloaded.optimizer == 2 * offloaded.weights
    assert offloaded.activations == plain.activations
    problem = describe_overflow(config, card_of(offloaded.total + 1))
    assert "--training.sharding host" in problem[1]
    given = replace(config, training=TrainingConfig(sharding="host"))
    assert RunPlanner(given, LARGE, 1).memory(tasks=()).fixed == offloaded.fixed


def short_config(**training: Any) -> FinetuneConfig:
    """A run of two tasks in one layer, 64 rows each: its plan takes little time."""
    tasks = {name: TaskTraining("any", batch_size=64) for name in TASKS[:3:2]}
    model = small_config(num_layers=1)
    return FinetuneConfig(model=model, tasks=tasks, training=TrainingConfig(**training))


def test_checkpointing_and_micro_batches_need_less() -> None:
    planner = RunPlanner(short_config(), LARGE, 1)
    plain = planner.memory().total
    layers = planner.memory(MemoryOptions(None, 0)).total
    parts = planner.memory(MemoryOptions(4, None)).total
    both = planner.memory(MemoryOptions(4, 0)).total
    assert both < min(layers, parts) <= max(layers, parts) < plain
    # More workers divide the rows.
    activations = RunPlanner(short_config(), LARGE, 4).memory().activations
    assert all(activations[name] < size for name, size in planner.memory().activations.items())


def card_of(usable: float) -> GpuType:
    """A GPU with this many usable bytes."""
    return GpuType("small", (usable + 1.5e9) / 0.95e9, 300, 121, 30)


@pytest.mark.slow(
    "test_memory_plan.py::test_weights_in_the_host_are_an_option_that_makes_a_run_fit"
)
def test_a_run_that_does_not_fit_gets_the_option_that_makes_it_fit() -> None:
    config = short_config()
    planner = RunPlanner(config, LARGE, 1)
    enough = planner.memory(MemoryOptions(16, None)).total
    assert describe_overflow(config, LARGE) is None
    problem = describe_overflow(config, card_of(enough + 1))
    assert "GB on each small" in problem[0]
    assert problem[1] == "--training.micro_batch_size 16"
    with_layers = planner.memory(MemoryOptions(None, 0)).total
    problem = describe_overflow(config, card_of(with_layers + 1))
    assert "--training." in problem[1]
    problem = describe_overflow(config, card_of(planner.memory().fixed))
    assert problem[1].startswith("a GPU with")


@pytest.mark.parametrize(
    "command",
    [
        finetune,
        pytest.param(
            pretrain,
            marks=pytest.mark.slow(
                "test_memory_plan.py::test_base_fits_the_machines_of_the_cluster_file"
            ),
        ),
    ],
)
def test_base_fits_the_machines_of_the_cluster_file(command: CliCommand[Any]) -> None:
    config = command.parse_arguments(["--config", "base", "--training.workers", "4"])
    planner = RunPlanner(config, GPU_TYPES["L4"], 4)
    # The task with the longest rows; the plan of all twelve tasks takes 20 s.
    memory = planner.memory(tasks=["text_to_code"])
    assert planner.fits(memory), memory


def test_the_tasks_of_base_are_those_of_a_pretraining() -> None:
    config = pretrain.parse_arguments(["--config", "base"]).joint()
    check_unlabelled_tasks(config)
    assert len(config.tasks) == 12


def test_shards_are_an_option_that_makes_a_run_fit() -> None:
    config = short_config()
    planner = RunPlanner(config, LARGE, 4)
    plain, sharded = planner.memory(), planner.memory(MemoryOptions(None, None, sharding="full"))
    largest = max(planner.trained_sizes.values())
    assert sharded.optimizer == pytest.approx(plain.optimizer / 4, abs=8)
    # A step gathers the weights of its task, those of layers in bf16, and sums its gradients.
    gathered = max(map(planner.count_gathered_bytes, config.tasks))
    assert 2 * largest < gathered < 3 * largest
    assert sharded.weights == pytest.approx(plain.weights / 4 + gathered, abs=4)
    assert sharded.gradients == pytest.approx(5 * largest, abs=4)
    assert sharded.activations == plain.activations
    # Nodes of one worker have nothing to divide.
    assert planner.memory(MemoryOptions(None, None, sharding="hybrid")) == plain
    assert (
        RunPlanner(config, LARGE, 4, 4).memory(MemoryOptions(None, None, sharding="hybrid"))
        == sharded
    )
    assert planner._list_placements()[1].describe(planner.given) == "--training.sharding full"
    # One worker divides nothing; several workers divide the experts of a baseline as well.
    one, experts = RunPlanner(config, LARGE, 1), RunPlanner(config_of("moe"), LARGE, 4)
    assert [each.sharding for each in one._list_placements()] == ["none", "host"]
    assert [each.sharding for each in experts._list_placements()] == ["none", "full", "host"]
    # A copy of the best weights is whole: advice that the training refuses would not help.
    patient = RunPlanner(short_config(patience=1, evaluate_every=1), LARGE, 2)
    assert [each.sharding for each in patient._list_placements()] == ["none", "host"]


MASKED = {name: TaskTraining("any", batch_size=4) for name in masked_tasks()}


def masked_model() -> SkillNetConfig:
    """A small model of the masked tasks."""
    return small_config(tasks=masked_tasks())


def test_masked_tasks_are_planned() -> None:
    config = replace(pretrain.parse_arguments([]), model=masked_model(), tasks=MASKED)
    memory = RunPlanner(config, LARGE, 2).memory()
    assert set(memory.activations) == set(MASKED)
    assert min(memory.activations.values()) > 0


def test_a_system_whose_operations_depend_on_the_data_says_so() -> None:
    # Without bf16 products the host reads the number of tokens of each expert.
    config = config_of("moe", precision="fp32")
    with pytest.raises(UserError, match="system moe: its operations depend on the data"):
        RunPlanner(config, LARGE, 1).memory()


def test_experts_are_planned_by_the_products_of_gpus() -> None:
    planner = RunPlanner(config_of("moe"), LARGE, 1)
    cost, _ = planner.measure("text_classification", planner.given)
    dense, _ = RunPlanner(config_of("dense"), LARGE, 1).measure(
        "text_classification", planner.given
    )
    # The experts of a token are as wide as the layer of the dense system.
    assert cost.flops == pytest.approx(dense.flops, rel=0.1)
