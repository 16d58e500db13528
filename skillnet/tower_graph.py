"""Graph of one tower of a task, for runtimes without this package: torch.export and ONNX.

:class:`TowerGraph` takes the tensors of a batch and returns the outputs of the head.
:func:`export_tower` traces it for any number of rows, and for texts of any length up to the model's
limit. Sound is padded to the longest length; its frames say how many are real.

Shapes: B batch, T tokens, N frames, M mel bins.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from skillnet.config import SkillNetConfig
from skillnet.modality import find_modality
from skillnet.multitask_model import Batch, TaskModel
from skillnet.objectives.base import find_objective
from skillnet.skills import SkillPlan, find_task

#: Shortest text of a graph. Tensors of length 1 broadcast, so torch would trace another graph.
MIN_TOKENS = 3


class TowerGraph(nn.Module):
    """One tower of a task with tensors as inputs and outputs.

    Args:
        model: with the task.
        task: name of the task.
        tower: tower of the task, such as ``query``.
    """

    def __init__(self, model: TaskModel, task: str, tower: str) -> None:
        super().__init__()
        self.model, self.task, self.tower = model, task, tower
        self.spec = find_task(task, model.config.tasks)
        self.input_names = find_modality(self.spec.towers[tower].modality).batch
        self.output_names: tuple[str, ...] = ()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the unit vectors of a retrieval tower, or the outputs of the head."""
        batch = dict(zip(self.input_names, tensors, strict=True))
        if find_objective(self.spec.objective).pairs_towers:
            outputs = {"vectors": self.model.embed(self.task, self.tower, batch)}
        else:
            outputs = self.model(self.task, {self.tower: batch})
        self.output_names = tuple(outputs)
        return tuple(outputs.values())


def make_example_batch(
    plan: SkillPlan,
    config: SkillNetConfig,
    rows: int = 3,
    seed: int = 0,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Batch:
    """Return random inputs of a tower, the first row as long as the model reads.

    Args:
        plan: active skills of the tower.
        config: sizes of the inputs.
        rows: B.
        seed: start of the random numbers of the values and lengths.
        settings: preprocessing of the task's corpus.
    """
    draw = torch.Generator().manual_seed(seed)
    half = find_modality(plan.modality).tensor_half
    batch: Batch = half.make_example(config, rows, draw=draw, settings=settings)
    return batch


def export_tower(graph: TowerGraph, batch: Batch) -> ExportedProgram:
    """Trace a tower for any number of rows, and texts of any length up to that of the batch.

    Args:
        graph: traceable module of the tower, its model in evaluation mode.
        batch: inputs of the longest length, at least two rows.
    """
    shapes: list[dict[int, Any]] = []
    for name in graph.input_names:
        axes: dict[int, Any] = {0: Dim.DYNAMIC}
        longest = batch[name].shape[1] if name == "tokens" else 0
        # torch cannot prove that the convolutions of sound give as many tokens as their mask has.
        if longest > MIN_TOKENS:
            axes[1] = Dim("tokens_length", min=MIN_TOKENS, max=longest)
        shapes.append(axes)
    tensors = tuple(batch[name] for name in graph.input_names)
    with torch.no_grad():
        graph(*tensors)  # sets the names of the outputs
        program = torch.export.export(graph, tensors, dynamic_shapes=(tuple(shapes),))
    for node in program.graph.nodes:
        # It names files of this machine, and would be a part of the export.
        node.meta.pop("stack_trace", None)
    return program
