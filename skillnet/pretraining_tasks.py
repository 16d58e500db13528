"""Self-supervised tasks, and the tasks that a pretraining knows: :func:`pretraining_tasks`."""

from skillnet.modality import modality_names
from skillnet.objectives.base import find_objective
from skillnet.skills import SkillPlan, Task, default_tasks, masked_tasks

#: Pairs of a text and code that need no label, as a comment and the lines below it.
CODE_PAIRS = "pairs_code"


def pretraining_tasks() -> dict[str, Task]:
    """Return masked tasks, the paper's five, pairs within a modality, and pairs of text and code.

    Pairs within a modality are two views of an image, a video or a function, or a word and its
    definition.
    """
    pairs = {f"views_{modality}": _pair_within(modality) for modality in modality_names()}
    pairs["text_to_definition"] = _pair_within("text")
    pairs[CODE_PAIRS] = default_tasks()["text_to_code"]
    return masked_tasks() | default_tasks() | pairs


def _pair_within(modality: str) -> Task:
    plan = SkillPlan(("general", modality, "alignment"), modality)
    return Task("retrieval", {"query": plan, "candidate": plan})


def pretrained_modalities(name: str, task: Task) -> frozenset[str]:
    """Return the modalities that a self-supervised task trains; none for other tasks.

    Masked modelling, pairs within one modality and ``pairs_code`` are self-supervised.

    Args:
        name: key of the task in ``model.tasks``.
        task: its objective and towers.
    """
    modalities = frozenset(plan.modality for plan in task.towers.values())
    can_pretrain = find_objective(task.objective).can_pretrain
    if name == CODE_PAIRS or (can_pretrain and len(modalities) == 1):
        return modalities
    return frozenset()
