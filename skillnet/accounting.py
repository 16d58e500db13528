"""Cost of a plan or task: total and activated parameters, and executed floating-point operations.

The counts of SkillNet are closed formulas over the shapes of the model. Tests compare them with
``torch.utils.flop_counter`` and with the parameters that a backward pass uses. One multiply-add
is two operations. Element-wise work (norms, activations, merging of skill weights) is excluded,
as in torch's counter. The products of low-rank skills are counted for each example, although a
batch computes them once.
"""

from collections.abc import Mapping
from typing import NamedTuple

from skillnet.flops import plan_flops
from skillnet.model import SkillNet
from skillnet.multitask_model import TaskModel
from skillnet.skill_weights import is_read_by_plan
from skillnet.skills import SkillPlan, check_plan, find_task


class Account(NamedTuple):
    """Cost of one plan or task.

    Attributes:
        total: parameters of the complete model.
        activated: parameters that the plan reads, and that training it can change.
        executed: floating-point operations of a forward pass, per token.
        flops_per_example: floating-point operations of a forward pass, per example.
        tokens: length of the example in tokens, summed over towers for a task.
    """

    total: int
    activated: int
    executed: float
    flops_per_example: int
    tokens: int


def account(model: SkillNet, plan: SkillPlan, length: int | None = None) -> Account:
    """Compute the cost of encoding one example with a plan: stem and encoder, without a head.

    Args:
        model: a SkillNet.
        plan: active skills and modality.
        length: tokens of text or code, or frames of sound; the longest supported input by default.
            Images and videos have one size.

    Raises:
        ValueError: a plan with an unknown skill.
    """
    check_plan(plan, model.config.skills)
    flops, tokens = plan_flops(model, plan, length)
    # A plan reads complete files, except the vectors of other modalities in the token stem, and of
    # skills that are only the source of a low-rank one.
    skills = model.config.find_sources(plan.skills)
    wanted = {"shared", f"stem-{plan.stem}", *(f"skill-{name}" for name in skills)}
    activated = sum(
        p.numel()
        for name, p in model.named_parameters()
        if model.file_of(name) in wanted
        and not _other_modality(name, plan)
        and is_read_by_plan(name, plan.skills)
    )
    total = sum(p.numel() for p in model.parameters())
    return Account(total, activated, flops / tokens, flops, tokens)


def account_task(model: TaskModel, task: str, lengths: Mapping[str, int] | None = None) -> Account:
    """Compute the cost of one example of a task, for any system: all towers and the head.

    Args:
        model: any system.
        task: name of the task.
        lengths: tower -> length (see :func:`account`).

    Raises:
        ValueError: an unknown task.
    """
    find_task(task, model.config.tasks)
    flops, tokens = model.flops(task, lengths)
    total = sum(p.numel() for p in model.parameters())
    return Account(total, model.activated_parameters(task), flops / tokens, flops, tokens)


def _other_modality(name: str, plan: SkillPlan) -> bool:
    return ".modality." in name and not name.endswith(f".{plan.modality}")
