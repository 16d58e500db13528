"""One task of a SkillNet as a dense model: the skills of each tower merged into one set of weights.

A task has a fixed plan, so its inactive skills are not needed and its active ones are always
averaged. :func:`merge_task_skills` computes the merged weights once. The result is a SkillNet with
one skill per plan; its outputs are those of the source.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from skillnet.encoder import SHARED
from skillnet.layers import SkillWeights
from skillnet.modality import find_modality
from skillnet.model import SkillNet
from skillnet.multitask_model import Batch, TaskModel
from skillnet.objectives.base import find_objective
from skillnet.skills import SkillPlan, find_task
from skillnet.skipped_init import SkippedInit

_WEIGHTS = ".weights."


@torch.no_grad()
def merge_task_skills(model: SkillNet, task: str) -> SkillNet:
    """Return a model of one task, in evaluation mode, with one skill per plan of the task.

    The skill is named after the first tower with its plan. The feed-forward layers of the result
    are as wide as those of all active skills together.

    Args:
        model: trained model; it is not changed.
        task: name of the task.

    Raises:
        ValueError: the model has no such task.
    """
    spec = find_task(task, model.config.tasks)
    merged: dict[tuple[str, ...], str] = {}
    for tower in sorted(spec.towers):
        merged.setdefault(spec.towers[tower].skills, tower)
    towers = {
        tower: SkillPlan((merged[plan.skills],), plan.modality)
        for tower, plan in spec.towers.items()
    }
    # Layers whose feed-forward part has no skills keep their width, and are padded with zeros.
    has_wide = any(layer.feedforward_skills for layer in model.encoder.layers)
    width = model.config.ffn_dim * (max(map(len, merged)) if has_wide else 1)
    config = dataclasses.replace(
        model.config,
        skills=tuple(merged.values()),
        skill_rank=0,
        low_rank_skills={},
        ffn_dim=width,
        tasks={task: dataclasses.replace(spec, towers=towers)},
    )
    some = next(model.parameters())
    with SkippedInit(), some.device:
        dense = SkillNet(config).to(some.dtype)
    known = model.state_dict()
    # Every weight without skills has the same name and shape in both models.
    dense.load_state_dict(
        {name: known[name] for name in dense.state_dict() if _WEIGHTS not in name}, strict=False
    )
    for name, module in model.named_modules():
        if isinstance(module, SkillWeights):
            target = dense.get_submodule(name)
            assert isinstance(target, SkillWeights)
            for skills, merged_name in merged.items():
                is_shared = SHARED[0] in module.weights
                weight = module.merged(SHARED if is_shared else skills, some.dtype)
                wanted = target.weights[SHARED[0] if is_shared else merged_name]
                wanted.copy_(_pad(weight, wanted.shape))
    dense.vocabulary = model.vocabulary.restrict_to(config.tasks)
    return dense.eval()


def _pad(weight: Tensor, shape: torch.Size) -> Tensor:
    """Append zeros: gelu(0) is 0, so a hidden unit without weights changes no output."""
    missing = [wanted - found for found, wanted in zip(weight.shape, shape, strict=True)]
    return F.pad(weight, [n for each in reversed(missing) for n in (0, each)])


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
