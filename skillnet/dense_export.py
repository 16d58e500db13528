"""One task of a SkillNet as a dense model: the skills of each tower merged into one set of weights.

A task has a fixed plan, so its inactive skills are not needed and its active ones are always
averaged. :func:`merge_task_skills` computes the merged weights once. The result is a SkillNet with
one skill per plan; its outputs are those of the source.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from skillnet.encoder import SHARED
from skillnet.layers import SkillWeights
from skillnet.model import SkillNet
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
