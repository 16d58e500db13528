"""What a plan costs: parameters and floating-point operations, total, activated and executed.

The counts are closed formulas over the model's shapes; tests hold them equal to what
``torch.utils.flop_counter`` counts and to the parameters that a backward pass touches. One
multiply-add is two operations. Element-wise work (norms, activations, merging of skill
weights) is left out, as the counter leaves it out.
"""

from collections.abc import Mapping
from typing import NamedTuple

from skillnet.flops import _flops
from skillnet.model import SkillNet
from skillnet.multitask_model import TaskModel
from skillnet.skills import SkillPlan, check_plan, find_task


class Account(NamedTuple):
    """Cost of one plan or task.

    Attributes:
        total: parameters of the whole model.
        activated: parameters that the plan reads (and that training it would change).
        executed: floating-point operations of a forward pass, per token.
        flops_per_example: the same for one example of ``tokens`` tokens.
        tokens: length of that example (summed over towers for a task).
    """

    total: int
    activated: int
    executed: float
    flops_per_example: int
    tokens: int


def account(model: SkillNet, plan: SkillPlan, length: int | None = None) -> Account:
    """Cost of encoding one example with a plan: stem and encoder, without a head.

    Args:
        model: the model.
        plan: the active skills and the modality.
        length: text and code: tokens; sound: frames. Default: the longest that the model
            reads. Pictures and clips have one size.
    """
    check_plan(plan, model.config.skills)
    flops, tokens = _flops(model, plan, length)
    wanted = {"shared", f"stem-{plan.stem}", *(f"skill-{name}" for name in plan.skills)}
    activated = sum(
        p.numel()
        for name, p in model.named_parameters()
        if model.owner(name) in wanted and not _other_modality(name, plan)
    )
    total = sum(p.numel() for p in model.parameters())
    return Account(total, activated, flops / tokens, flops, tokens)


def account_task(model: TaskModel, task: str, lengths: Mapping[str, int] | None = None) -> Account:
    """Cost of one example of a task, for any system: all its towers and its head.

    ``lengths`` gives a tower's length (see :func:`account`).
    """
    find_task(task, model.config.tasks)
    flops, tokens = model.flops(task, lengths)
    total = sum(p.numel() for p in model.parameters())
    return Account(total, model.activated_parameters(task), flops / tokens, flops, tokens)


def _other_modality(name: str, plan: SkillPlan) -> bool:
    return ".modality." in name and not name.endswith(f".{plan.modality}")
