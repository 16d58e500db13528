"""Control for joint training: a SkillNet of its own for each task, with the plans of the study.

All models are in one module, but no two tasks share a parameter. Clipping, weight decay and the
optimizer apply only to the parameters of a step. Each model is therefore trained exactly as if it
were alone. The difference to ``skillnet`` is the effect of one model for all tasks; the difference
of a specialist to this system is the effect of skills within a task.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from skillnet.config import SkillNetConfig
from skillnet.flops import task_flops
from skillnet.model import SkillNet
from skillnet.multitask_model import Batch, TaskModel, Tokens
from skillnet.objectives.base import find_objective
from skillnet.skill_weights import require_unused_name
from skillnet.skills import find_task
from skillnet.systems import System


class SeparateSkillNets(TaskModel):
    """One SkillNet per task, each with the skills and stems that its task activates."""

    system = "alone"

    def __init__(self, config: SkillNetConfig, options: Any = None) -> None:
        super().__init__(config, options)
        self.models = nn.ModuleDict()
        for task in config.tasks:
            require_unused_name(self.models, task, "task")
            model = SkillNet(SkillNet.config_for(config, task))
            # The heads of all tasks are in one place, as in every system.
            del model.heads[task]
            self.models[task] = model
        self.add_heads()

    def model_of(self, task: str) -> SkillNet:
        """Return the stems and the encoder of a task.

        Args:
            task: name of the task.

        Raises:
            ValueError: an unknown task.
        """
        find_task(task, self.config.tasks)
        model = self.models[task]
        assert isinstance(model, SkillNet)
        return model

    def tower_tokens(self, task: str, tower: str, batch: Batch) -> Tokens:
        """Encode the input of a task's tower with the task's own model."""
        return self.model_of(task).tower_tokens(task, tower, batch)

    def token_embedding(self, task: str, tower: str) -> Tensor:
        """Return the embedding (V, D) of the task's own tokens."""
        return self.model_of(task).token_embedding(task, tower)

    def file_of(self, name: str) -> str:
        """Return the file: ``alone-TASK`` or ``head-TASK``."""
        kind, task = name.split(".")[:2]
        return f"head-{task}" if kind == "heads" else f"alone-{task}"

    @classmethod
    def possible_files(cls, config: SkillNetConfig) -> set[str]:
        """Return the two files of each task."""
        return {f"{kind}-{task}" for kind in ("alone", "head") for task in config.tasks}

    def uses_parameter(self, name: str, task: str) -> bool:
        """Return whether a parameter belongs to the task's model and its plans read it."""
        kind, of, rest = name.split(".", 2)
        if of != task:
            return False
        return kind == "heads" or self.model_of(task).uses_parameter(rest, task)

    def flops(self, task: str, lengths: Mapping[str, int] | None = None) -> tuple[int, int]:
        """Compute the forward cost by the formulas of SkillNet."""
        return task_flops(self.model_of(task), task, lengths)

    def drop_task(self, task: str) -> None:
        """Delete the task's model and head."""
        super().drop_task(task)
        del self.models[task]


def _check_tasks(config: SkillNetConfig, options: Any) -> SkillNetConfig:
    masked = [
        name for name, task in config.tasks.items() if find_objective(task.objective).hides_inputs
    ]
    if masked:
        raise ValueError(
            f"system alone has no pretraining, because a task of its own shares no weights with "
            f"{masked[0]}; pretrain the system skillnet on the modalities of one task instead"
        )
    return config


ALONE = System(
    "alone",
    SeparateSkillNets,
    _check_tasks,
    shares_weights=False,
    summary="a SkillNet of its own for each task, with the same plans",
)
