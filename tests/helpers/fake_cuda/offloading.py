"""Memory of the fake device in steps whose inactive weights lie in the host's memory.

:mod:`tests.helpers.fake_cuda.census` calls :func:`measure_offloaded_steps`.
"""

from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loading.dataloader import Batch
from pipelines.training.loop.gradient_sync import GradientSync
from pipelines.training.loop.optimizer import WeightAverage, build_optimizer, update_weights
from pipelines.training.loop.residency import CopyStream, TensorKey, WeightResidency
from pipelines.training.loop.setup import trainable_parameters
from pipelines.training.loop.step import backward_step
from skillnet.config import SkillNetConfig
from skillnet.multitask_model import TaskModel
from skillnet.precision import ComputePrecision
from skillnet.skills import SkillPlan, Task
from skillnet.skipped_init import SkippedInit
from skillnet.systems import build_system
from skillnet_planning.fake_weights import replace_weights
from skillnet_planning.step_counter import StepCounter
from tests.helpers.fake_cuda.watch import DeviceWatch, is_cuda

#: Largest number of steps.
STEPS = 12


class FakeResidency(WeightResidency):
    """Residency of fake weights, whose device is an attribute."""

    def _assign(self, key: TensorKey, value: Tensor) -> None:
        super()._assign(key, value)
        if key[1] == "weight":
            parameter: Any = self._parameters[key[0]]
            parameter.fake_device = value.device


class DeviceMemory(StepCounter):
    """Counter of the bytes of living tensors on the fake device."""

    def add(self, tensor: Tensor) -> None:
        if is_cuda(tensor):
            super().add(tensor)


def build_task_per_skill(config: SkillNetConfig, task: str, skills: int) -> SkillNetConfig:
    """Return a model of a number of skills: "general", and one with a task and a head for each.

    Args:
        config: sizes.
        task: a classification task, which all tasks are like.
        skills: their number.
    """
    own = [f"skill_{number}" for number in range(skills - 1)]
    like = config.tasks[task]
    modality = like.towers["input"].modality
    tasks = {
        f"task_{name}": Task(
            like.objective, {"input": SkillPlan(("general", name), modality)}, outputs=like.outputs
        )
        for name in own
    }
    return replace(config, skills=("general", *own), tasks=tasks)


def measure_offloaded_steps(
    config: FinetuneConfig, batch: Batch, skills: int, world: int, mode: FakeTensorMode
) -> tuple[DeviceWatch, dict[str, Any]]:
    """Train steps of several tasks; return what the steps do, and the bytes on the device.

    All weights have optimizer state and an average before, as after many steps.

    Args:
        config: settings of a run; its corpora exist.
        batch: rows of a classification task.
        skills: number of skills of the model.
        world: ranks of the fake process group.
        mode: fake tensors.
    """
    device, sizes = torch.device("cuda", 0), build_task_per_skill(config.model, batch.task, skills)
    training = dict.fromkeys(sizes.tasks, config.tasks[batch.task])
    config = replace(config, model=sizes, tasks=training)
    with torch.device("meta"), SkippedInit():
        model: TaskModel = build_system("skillnet", sizes, {})
    precision = ComputePrecision("bf16", device)
    # Each step has another task, so weights that stay on the device would pile up.
    steps = list(sizes.tasks)[:STEPS]
    # Fake tensors cannot be pinned.
    with mode, mock.patch.object(CopyStream, "pin", lambda _, x: x):
        replace_weights(model, torch.device("cpu")).train()
        optimizer = build_optimizer(model.named_parameters(), config.training)
        average = WeightAverage(0.99)
        for name, parameter in model.named_parameters():
            moments = {key: torch.empty_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.empty(()), **moments}
            average.values[name], average.updates[name] = torch.empty_like(parameter), 1
        active = trainable_parameters(model, config)
        sync = GradientSync(active, world, 2**20)
        residency = FakeResidency(model, optimizer, average, device, steps)
    with mode, DeviceMemory([]) as memory, DeviceWatch() as watch:
        for task, following in zip(steps, [*steps[1:], None], strict=True):
            on_device = replace(batch.to(device), task=task)
            residency.begin_step(task, following)
            sync.begin(task)
            backward_step(model, on_device, precision, config, sync, 0, world)
            sync.finish()
            update_weights(optimizer, active[task], 1.0, average)
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    return watch, {"peak_bytes": memory.peak, "weight_bytes": weights}
