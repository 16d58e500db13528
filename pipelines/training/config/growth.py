"""Configuration of ``skillnet grow``: the new skill, the new task and their training."""

import re
from dataclasses import dataclass, field
from typing import Literal

from pipelines.training.config.run import TaskTraining, TrainingConfig
from skillnet.bounds import OptionalSize
from skillnet.skills import SkillPlan
from skillnet_platform.config import ALIAS, positional_field
from skillnet_platform.config.bounds import RandomSeed
from skillnet_platform.errors import UserError
from skillnet_platform.tracking import TrackingConfig

Reference = Literal["without_skill", "fresh", "everything"]


@dataclass
class NewSkill:
    """Skill to add to every skill module of the model.

    Args:
        name: name that the model does not have yet.
        init_from: skill of the model whose weights are copied; null starts from random weights.
        rank: number of columns of a low-rank difference to ``init_from`` (LoRA), for small files;
            0 trains whole matrices.
    """

    name: str
    init_from: str | None = None
    rank: OptionalSize = 0

    def __post_init__(self) -> None:
        if self.rank and self.init_from is None:
            raise ValueError(
                "skill.rank: a low-rank skill is a difference to another one; name it: "
                "skill.init_from. For whole matrices set the rank to 0"
            )


@dataclass
class NewTask:
    """Task to add, with its head, and a stem if its modality is new.

    Args:
        name: name that the model does not have yet.
        towers: tower -> plan: ``input``, or ``query`` and ``candidate`` for retrieval.
        training: its corpus, split and batch size.
        objective: objective of its head.
        outputs: classes or symbols; 0 takes the number of the corpus.
    """

    name: str
    towers: dict[str, SkillPlan]
    training: TaskTraining
    objective: str = "classification"
    outputs: OptionalSize = 0


@dataclass
class GrowConfig:
    """Configuration of a growth: a model, a new skill and task, and their training.

    Args:
        source: the model to grow: a registry address, a run's name, id or folder, a
            checkpoint, or a saved model.
        task: the new task, which activates the new skill.
        skill: the new skill; null adds only the task, whose head uses the skills of the model.
        name: name of the run and of its directory; the name of an unfinished run resumes it.
        run_dir: directory of runs; null takes the run root.
        seed: seed of new weights, order, augmentation and dropout.
        data: directory of prepared corpora; null takes ``corpora`` in the run root.
        corpora: old task -> corpus, if it differs from that of the training run.
        training: optimizer, workers and intervals; ``trainable`` is set to the new files.
        references: comparison runs of the new task with the same steps: ``without_skill`` trains
            a head on the frozen model; ``fresh`` a new model for this task alone;
            ``everything`` the grown model with nothing frozen, to measure the effect of freezing.
        tracking: MLflow server, experiment and registration.
    """

    task: NewTask
    skill: NewSkill | None = None
    source: str = positional_field("models:/skillnet@champion", **{ALIAS: "from"})
    name: str | None = None
    run_dir: str | None = None
    seed: RandomSeed = 0
    data: str | None = None
    corpora: dict[str, str] = field(default_factory=dict)
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=600))
    references: list[Reference] = field(default_factory=lambda: ["without_skill", "fresh"])
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if self.training.trainable:
            raise ValueError("training.trainable is set by grow to the new files; leave it out")
        if self.training.precision == "fp64":
            raise ValueError("training.precision fp64 would change every file; use fp32 or auto")
        new = self.skill.name if self.skill is not None else None
        if new is not None and not any(new in plan.skills for plan in self.task.towers.values()):
            raise ValueError(
                f"no tower of task.towers activates the new skill {new!r}; add it to "
                "the skills of one of them"
            )
        if self.task.training.eval_only or self.task.training.auxiliary:
            raise ValueError(
                "task.training: the new task must be trained and evaluated; remove auxiliary and "
                "eval_only"
            )


RENAME = re.compile(r"(?:(?P<model>\d+):)?(?P<old>[^=:]+)=(?P<new>[^=:]+)")


@dataclass
class MergeConfig:
    """Configuration of a merge of models that grew from one base.

    Args:
        models: at least two models: registry addresses, names, ids or folders of runs, or saved
            models.
        rename: ``OLD=NEW`` renames a skill or a task of every model after the first that has it;
            ``2:OLD=NEW`` only of the second model.
        without: skills that the merged model leaves out. No task may need them.
        average_shared: average the files that differ between the models, heads of one task
            included; the report then measures the loss of each task.
        name: name of the run and of its directory.
        run_dir: directory of runs; null takes the run root.
        data: directory of prepared corpora; null takes ``corpora`` in the run root.
        corpora: task -> corpus, if it differs from that of the training run; with the new names.
        tracking: MLflow server, experiment and registration.
    """

    models: list[str] = positional_field([])
    rename: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)
    average_shared: bool = False
    name: str | None = None
    run_dir: str | None = None
    data: str | None = None
    corpora: dict[str, str] = field(default_factory=dict)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if len(self.models) < 2:
            raise UserError("give at least two models to merge: skillnet merge MODEL MODEL")
        for entry in self.rename:
            found = RENAME.fullmatch(entry)
            if found is None:
                raise UserError(f"rename {entry!r}: write OLD=NEW, or 2:OLD=NEW for the 2nd model")
            model = found["model"]
            if model is not None and not 1 <= int(model) <= len(self.models):
                raise UserError(
                    f"rename {entry!r}: there are {len(self.models)} models, numbered from 1"
                )

    def renames_of(self, position: int) -> dict[str, tuple[str, bool]]:
        """Return the renames of a model.

        Args:
            position: index of the model, from 0.

        Returns:
            Old name -> (new name, whether the model must have it).
        """
        names: dict[str, tuple[str, bool]] = {}
        for entry in self.rename:
            found = RENAME.fullmatch(entry)
            assert found is not None
            if found["model"] is not None and int(found["model"]) == position + 1:
                names[found["old"]] = found["new"], True
            elif found["model"] is None and position:
                names[found["old"]] = found["new"], False
        return names
