"""What ``skillnet grow`` is told: what grows, by which skill and task, and how they train."""

from dataclasses import dataclass, field
from typing import Literal

from pipelines.config.run import TaskTraining, TrainingConfig
from skillnet.skills import Objective, SkillPlan
from skillnet_platform.config import ALIAS, positional_field
from skillnet_platform.tracking import TrackingConfig

Reference = Literal["without_skill", "fresh", "everything"]


@dataclass
class NewSkill:
    """The skill that is added, to every module that carries skills.

    Args:
        name: its name, new to the model.
        init_from: a skill of the model whose weights it starts as; none draws fresh ones.
    """

    name: str
    init_from: str | None = None


@dataclass
class NewTask:
    """The task that is added, with its head (and a stem, if it reads a modality that is new).

    Args:
        name: its name, new to the model.
        towers: tower -> plan: ``input``, or ``query`` and ``candidate`` for retrieval.
        training: its corpus, split, batch.
        objective: what its head computes.
        outputs: classes or symbols; 0 takes the number that the corpus has.
    """

    name: str
    towers: dict[str, SkillPlan]
    training: TaskTraining
    objective: Objective = "classification"
    outputs: int = 0


@dataclass
class GrowConfig:
    """What grows, by what, and how the new part is trained.

    Args:
        source: the model that grows: a registry address, a run's name, id or folder, a
            checkpoint, or a saved model.
        skill: what is added.
        task: what the new skill is for.
        name: name of the run and of its directory; that of an unfinished run goes on with it.
        run_dir: directory of runs; none takes the run root.
        seed: of new weights, order, augmentation and dropout.
        data: directory of prepared corpora; none takes ``corpora`` below the run root.
        corpora: old task -> corpus, where it is not the one of the training run.
        training: optimisation, parallelism, rhythm; ``trainable`` is set to the new files.
        references: what the new task is also trained as, with the same steps: ``without_skill``
            is a head on the frozen model; ``fresh`` a new model for this task alone;
            ``everything`` the grown model with nothing frozen, which shows what freezing saves.
        tracking: where it is recorded, and whether it is registered.
    """

    skill: NewSkill
    task: NewTask
    source: str = positional_field("models:/skillnet@champion", **{ALIAS: "from"})
    name: str | None = None
    run_dir: str | None = None
    seed: int = 0
    data: str | None = None
    corpora: dict[str, str] = field(default_factory=dict)
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=600))
    references: list[Reference] = field(default_factory=lambda: ["without_skill", "fresh"])
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if self.training.trainable:
            raise ValueError("training.trainable is set by grow to the new files; leave it out")
        if self.training.precision == "fp64":
            raise ValueError("training.precision fp64 would rewrite every file; use fp32 or auto")
        if not any(self.skill.name in plan.skills for plan in self.task.towers.values()):
            raise ValueError(
                f"no tower of task.towers activates the new skill {self.skill.name!r}; add it to "
                "the skills of one"
            )
        if self.task.training.eval_only or self.task.training.auxiliary:
            raise ValueError("task.training: the new task trains and is measured")
