"""Arms of the study of a stream of tasks: what each trains, and the models that it leaves behind.

All arms train in the ordinary loop, from one base per fold. An added task has the same rows, in the
same order, the same steps and the same batch size in every arm.

grow        a skill and a head per task, one after the other; all else is frozen
merge       the same growths, each from the base alone, joined by ``skillnet merge``
lora        a low-rank skill with as many trainable weights, and a head
head        a head on the frozen base
full        the grown model per task, nothing frozen: a copy each
average     mean of the weights that these copies have in common
ties        the same by :mod:`lab.task_vectors`
joint       base tasks and added tasks in one run, nothing frozen
sequential  one dense model, trained further by task after task
replay      the same, with a step of an old task beside each step, on a part of the old rows
scratch     a SkillNet of its own per task, with random weights
plain       a dense Transformer of its own per task, with as many operations

:func:`list_arms` names them by the trainings that they share; :mod:`lab.task_stream` runs them.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lab.task_vectors import TiesJoin
from pipelines.data.shards.dataset import PreparedCorpus
from pipelines.training.config.growth import GrowConfig, NewSkill, NewTask
from pipelines.training.config.run import FinetuneConfig, TaskTraining, TrainingConfig
from pipelines.training.evaluation.evaluator import evaluate_model, open_task_corpus
from pipelines.training.evaluation.outcomes import OutcomeTable
from pipelines.training.evaluation.tables import compute_overall_score
from pipelines.training.growth import runs, verification
from pipelines.training.loop.loop import TrainResult, train_model
from pipelines.training.loop.resolved_run import ResolvedRun, resolve_run
from pipelines.training.loop.setup import trainable_parameters
from pipelines.training.runs.model_source import ModelSource
from skillnet.config import BASE_SKILL, SkillNetConfig
from skillnet.model import SkillNet
from skillnet.model_merging import add_skill, merge_models, plan_merge, read_parent
from skillnet.multitask_model import TaskModel
from skillnet.serialization import read_manifest, read_tensor_shapes, save_model
from skillnet.skills import SkillPlan, Task
from skillnet.skipped_init import SkippedInit
from skillnet.systems import load_model
from skillnet_platform.tracking import TrackingConfig

#: Bases, by the system that continues from them.
SKILLNET, DENSE = "skillnet", "dense"
#: Characters of the digest of outputs that are kept.
DIGITS = 16


class AddedTask(NamedTuple):
    """A task of the stream.

    Attributes:
        modality: input of the task; the base has a skill of this name.
        outputs: number of classes.
        training: its corpus and batches.
    """

    modality: str
    outputs: int
    training: TaskTraining


@dataclass(frozen=True)
class StreamCell:
    """One fold, label fraction and learning rate: all that an arm needs.

    Args:
        run: run of the SkillNet base, with the fold and seed; its tasks are the old ones.
        dense: run of the dense base, with other options and training settings.
        bases: system -> folder of its trained base.
        added: added task by name, in the order of the stream.
        steps: optimizer steps of each added task.
        rate: learning rate of the arm.
        memory: fraction of the old rows that replay keeps.
        scratch: folder of models that are not kept.
        split: that is measured; ``test`` also compares the outputs of each task before and after.
        corpora: corpus name -> corpus with the splits of the fold, filled by the trainings.
    """

    run: FinetuneConfig
    dense: FinetuneConfig
    bases: Mapping[str, Path]
    added: Mapping[str, AddedTask]
    steps: int
    rate: float
    memory: float
    scratch: Path
    split: str
    corpora: dict[str, PreparedCorpus] = field(default_factory=dict)

    @cached_property
    def tasks(self) -> dict[str, TaskTraining]:
        """Training of all tasks, the old ones first."""
        return dict(self.run.tasks) | {name: task.training for name, task in self.added.items()}

    def digest_bases(self) -> dict[str, str]:
        """Return system -> digest of the weights of its base."""
        return {name: ModelSource(name, place).digest for name, place in self.bases.items()}

    def plan_skills(self, task: str, *skills: str) -> SkillPlan:
        """Return a plan with the skill ``general`` and others, for the modality of an added task.

        Args:
            task: name of the added task.
            skills: further skills; none takes those of the base.
        """
        modality = self.added[task].modality
        return SkillPlan((BASE_SKILL, *(skills or (modality,))), modality)

    def plan_tasks(self, names: Sequence[str], has_skills: bool = False) -> dict[str, Task]:
        """Return the tasks of a model: those of the base, and added ones.

        Args:
            names: tasks of the model.
            has_skills: an added task has a skill of its own.
        """
        tasks = {}
        for name in names:
            if name in self.added:
                added = self.added[name]
                own = (added.modality, name) if has_skills else ()
                plan = self.plan_skills(name, *own)
                tasks[name] = Task("classification", {"input": plan}, added.outputs)
            else:
                tasks[name] = self.run.model.tasks[name]
        return tasks

    def schedule(self, run: FinetuneConfig, steps: int) -> TrainingConfig:
        """Return the training settings of the arm: those of a base, but for steps and rate."""
        return replace(run.training, steps=steps, lr=self.rate, checkpoint_every=0, trainable=[])

    def train(self, config: FinetuneConfig) -> TrainResult:
        """Train a run without a folder of its own, in this process."""
        tracking = TrackingConfig(register=False, system_metrics=False)
        config = replace(config, run_dir=str(self.scratch), tracking=tracking, fold=self.run.fold)
        run = ResolvedRun(resolve_run(config).config, None, self.corpora)
        self.corpora.update(run.corpora)
        return train_model(run)

    def save(self, model: TaskModel, name: str) -> Path:
        """Save a trained model for the rest of the cell, without its start; return its folder."""
        save_model(model, self.scratch / name)
        shutil.rmtree(self.scratch / ".starts", ignore_errors=True)
        return self.scratch / name

    def drop(self, folder: Path) -> None:
        """Remove the model of a task that a later one replaces; a base stays."""
        if folder.parent == self.scratch:
            shutil.rmtree(folder)


@dataclass
class ArmModels:
    """What an arm leaves behind.

    Args:
        places: folder of a saved model -> the tasks that it answers.
        steps: optimizer steps in all.
        seconds: added task -> seconds in the training loop; of ``joint`` the key is ``all``.
        trained: added task -> weights that its training may change.
        before: task -> its score and the digest of its outputs when it was learned.
        has_new_base: the old tasks are measured beside the added ones; otherwise they stay with
            the base.
    """

    places: dict[Path, list[str]] = field(default_factory=dict)
    steps: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    trained: dict[str, int] = field(default_factory=dict)
    before: dict[str, dict[str, Any]] = field(default_factory=dict)
    has_new_base: bool = True

    def add_training(self, task: str, result: TrainResult, config: FinetuneConfig) -> None:
        """Count the steps, seconds and trained weights of an added task.

        Args:
            task: name of the added task, or ``all``.
            result: its training.
            config: settings of the training.
        """
        active = trainable_parameters(result.model, config).values()
        weights = {name: p.numel() for own in active for name, p in own}
        self.trained[task] = sum(weights.values())
        self.seconds[task] = result.seconds
        self.steps += result.step

    def count_weights(self) -> int:
        """Return the weights of all tasks together; a file that several models have counts once."""
        sizes: dict[tuple[str, str], int] = {}
        for folder, tasks in self.places.items():
            model = load_model(folder)
            used = {file for task in tasks for file in model.files_of(task)}
            for path, entry in read_manifest(folder)["files"].items():
                if path.removesuffix(".safetensors") in used:
                    shapes = read_tensor_shapes(folder / path).values()
                    # With its name: equal weights of two skills are weights of both.
                    sizes[path, entry["sha256"]] = sum(map(prod, shapes))
        return sum(sizes.values())

    def measure(
        self, cell: StreamCell, outcomes: OutcomeTable | None = None
    ) -> list[dict[str, Any]]:
        """Return evaluation rows on the split of a cell: of added tasks, and of changed old ones.

        Args:
            cell: with the split.
            outcomes: receives the outcome of each row.
        """
        rows = []
        for folder, tasks in self.places.items():
            own = [task for task in tasks if task in cell.added or self.has_new_base]
            if own:
                rows += measure_tasks(cell, load_model(folder), own, outcomes)
        return rows

    def observe(self, cell: StreamCell) -> dict[str, dict[str, Any]]:
        """Return what the models compute in the end for each task of ``before``."""
        found: dict[str, dict[str, Any]] = {}
        for folder, tasks in self.places.items():
            own = [task for task in tasks if task in self.before]
            found |= observe_tasks(cell, load_model(folder), own) if own else {}
        return found


def measure_tasks(
    cell: StreamCell, model: TaskModel, tasks: Sequence[str], outcomes: OutcomeTable | None = None
) -> list[dict[str, Any]]:
    """Return evaluation rows of some tasks of a model on the split of a cell.

    Args:
        cell: fold, corpora and split.
        model: any system.
        tasks: names of its tasks.
        outcomes: receives the outcome of each row.
    """
    return evaluate_model(
        model,
        str(cell.run.data),
        tasks,
        [cell.split],
        seed=cell.run.seed,
        corpora={name: task.corpus for name, task in cell.tasks.items()},
        limits={name: task.max_length for name, task in cell.tasks.items()},
        bootstrap_samples=0,
        outcomes=outcomes,
        fold=cell.run.fold,
    )


def observe_tasks(
    cell: StreamCell, model: TaskModel, tasks: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return task -> its score on the test rows, and the digest of its raw outputs.

    Args:
        cell: nothing is returned for a cell that reads another split.
        model: any system.
        tasks: names of its tasks.
    """
    if cell.split != "test":
        return {}
    _, scores = compute_overall_score(measure_tasks(cell, model, tasks), cell.split)
    found = {}
    for name in tasks:
        own = cell.tasks[name]
        corpus = open_task_corpus(str(cell.run.data), name, {name: own.corpus}, cell.run.fold)
        digest = verification.digest_outputs(model, name, corpus, cell.split, own.max_length)
        found[name] = {"score": round(scores[name], 6), "outputs": digest[:DIGITS]}
    return found


# -- growths -------------------------------------------------------------------------------


def find_equal_rank(config: SkillNetConfig, source: str) -> int:
    """Return the rank of a low-rank skill with as many weights as a whole one, to the nearest.

    Args:
        config: model that grows.
        source: skill that the new one is a difference to.
    """

    def count_skill(rank: int) -> int:
        with torch.device("meta"), SkippedInit():
            model = SkillNet(replace(config, tasks={}))
            before = sum(p.numel() for p in model.parameters())
            return (
                sum(p.numel() for p in add_skill(model, "new", source, rank).parameters()) - before
            )

    # Matrices grow with the rank, and biases do not.
    first, second, whole = count_skill(1), count_skill(2), count_skill(0)
    return min(1 + round((whole - first) / (second - first)), min(config.dim, config.ffn_dim) - 1)


def grow_task(
    cell: StreamCell,
    models: ArmModels,
    source: Path,
    task: str,
    *,
    skill: NewSkill | None = None,
    plan: SkillPlan | None = None,
    is_frozen: bool = True,
) -> Path:
    """Train one growth as ``skillnet grow`` does; return the folder of the grown model.

    Args:
        cell: data and settings.
        models: receives the costs, and what the new task computes.
        source: folder of the model that grows.
        task: name of the added task.
        skill: the new skill; None adds a head alone.
        plan: active skills of the new task; None takes those of the base.
        is_frozen: train the new files only, and check that no other file changes.

    Raises:
        RuntimeError: a frozen file changed.
    """
    known = {name: own.corpus for name, own in cell.tasks.items() if name != task}
    growth = GrowConfig(
        NewTask(task, {"input": plan or cell.plan_skills(task)}, cell.added[task].training),
        skill,
        source=str(source),
        name=task,
        run_dir=str(cell.scratch),
        seed=cell.run.seed,
        data=cell.run.data,
        corpora=known,
        training=cell.schedule(cell.run, cell.steps),
        references=[],
    )
    origin = ModelSource(str(source), source)
    before = runs.load_growable_model(origin)
    config = runs.build_growth_config(growth, origin, before)
    grown = runs.build_grown_model(growth, before, config.model.tasks[task])
    config.training.trainable = verification.added_files(before, grown) if is_frozen else []
    config.init_from = runs.save_start_model(grown, str(cell.scratch))
    result = cell.train(config)
    models.add_training(task, result, config)
    target = cell.save(result.model, f"grown-{task}")
    if is_frozen:
        states = verification.compare_files(origin, before, target)
        verification.assert_files_unchanged([s for s in states if s.before is not None])
        models.before |= observe_tasks(cell, result.model, [task])
    return target


def choose_growth(cell: StreamCell, arm: str, task: str) -> tuple[NewSkill | None, SkillPlan]:
    """Return the new skill of an arm and the plan of the new task.

    Args:
        cell: data and settings.
        arm: ``head``, ``lora``, or another one that adds a whole skill.
        task: name of the added task.
    """
    modality = cell.added[task].modality
    if arm == "head":
        return None, cell.plan_skills(task)
    if arm == "lora":
        # In place of its source, so that the first step computes what the base does.
        rank = find_equal_rank(cell.run.model, modality)
        return NewSkill(task, modality, rank), cell.plan_skills(task, task)
    return NewSkill(task, modality), cell.plan_skills(task, modality, task)


def train_growths(cell: StreamCell, arm: str) -> dict[str, ArmModels]:
    """Grow the base by one task after the other.

    Args:
        cell: data and settings.
        arm: ``grow``, ``lora`` or ``head``.
    """
    models, folder = start_models(cell), cell.bases[SKILLNET]
    for task in cell.added:
        skill, plan = choose_growth(cell, arm, task)
        before, folder = folder, grow_task(cell, models, folder, task, skill=skill, plan=plan)
        cell.drop(before)
    models.places[folder] = list(cell.tasks)
    models.has_new_base = arm == "grow"
    return {arm: models}


def start_models(cell: StreamCell, system: str = SKILLNET) -> ArmModels:
    """Return the models of an arm before the stream: what the base computes."""
    base = load_model(cell.bases[system])
    return ArmModels(before=observe_tasks(cell, base, list(cell.run.tasks)))


def grow_from_base(cell: StreamCell, models: ArmModels, is_frozen: bool) -> dict[str, Path]:
    """Return added task -> folder of a growth of the base, in the order of their names.

    Args:
        cell: data and settings.
        models: receives the costs.
        is_frozen: train the new files only.
    """
    found = {}
    for task in sorted(cell.added):
        skill, plan = choose_growth(cell, "grow", task)
        base = cell.bases[SKILLNET]
        found[task] = grow_task(
            cell, models, base, task, skill=skill, plan=plan, is_frozen=is_frozen
        )
    return found


def merge_growths(cell: StreamCell) -> dict[str, ArmModels]:
    """Grow the base by each task alone, and join the growths without a change of any file.

    Raises:
        RuntimeError: the growths have different files in common.
    """
    models = start_models(cell)
    folders = grow_from_base(cell, models, is_frozen=True)
    plan = plan_merge([read_parent(folder, task) for task, folder in folders.items()])
    if not plan.is_exact:
        raise RuntimeError(f"the growths differ in {', '.join(plan.averaged)}")
    target = cell.scratch / "merged"
    merge_models(plan, target)
    models.places[target] = list(cell.tasks)
    return {"merge": models}


def train_copies(cell: StreamCell) -> dict[str, ArmModels]:
    """Train a copy of the base per task, nothing frozen; average the copies, also by TIES."""
    full, base = ArmModels(has_new_base=False), cell.bases[SKILLNET]
    folders = grow_from_base(cell, full, is_frozen=False)
    full.places = {base: list(cell.run.tasks)}
    full.places |= {folder: [task] for task, folder in folders.items()}
    parents = [read_parent(folder, task) for task, folder in folders.items()]
    plan = plan_merge(parents, average_shared=True)
    found = {"full": full}
    ties = TiesJoin(read_parent(base, "the base"), plan)
    for arm, join in (("average", None), ("ties", ties)):
        target = cell.scratch / arm
        merge_models(plan, target, join)
        found[arm] = replace(full, places={target: list(cell.tasks)}, has_new_base=True)
        found[arm].before = observe_tasks(cell, load_model(base), list(cell.run.tasks))
        for task, folder in folders.items():
            found[arm].before |= observe_tasks(cell, load_model(folder), [task])
    return found


def train_jointly(cell: StreamCell) -> dict[str, ArmModels]:
    """Train the base tasks and all added tasks in one run, nothing frozen, a skill per task."""
    model = load_model(cell.bases[SKILLNET])
    assert isinstance(model, SkillNet)
    for task, added in cell.added.items():
        skill, plan = choose_growth(cell, "grow", task)
        new = NewTask(task, {"input": plan}, added.training)
        growth = GrowConfig(new, skill, seed=cell.run.seed, data=cell.run.data)
        model = runs.build_grown_model(growth, model, runs.resolve_new_task(growth))
    steps = cell.steps * len(cell.tasks)
    config = replace(
        cell.run,
        name="joint",
        init_from=runs.save_start_model(model, str(cell.scratch)),
        model=model.config,
        tasks={name: replace(task, weight=1.0) for name, task in cell.tasks.items()},
        training=cell.schedule(cell.run, steps),
    )
    models = start_models(cell)
    result = cell.train(config)
    models.add_training("all", result, config)
    models.places[cell.save(result.model, "joint")] = list(cell.tasks)
    return {"joint": models}


# -- dense models, and models of a task ----------------------------------------------------


def train_further(cell: StreamCell, arm: str) -> dict[str, ArmModels]:
    """Train all weights of the dense base further, by one task after the other.

    Args:
        cell: data and settings.
        arm: ``sequential``, or ``replay``: as many steps of old tasks, in equal parts, lie among
            the steps of the new one.
    """
    models, folder = start_models(cell, DENSE), cell.bases[DENSE]
    known = list(cell.run.tasks)
    for task, added in cell.added.items():
        tasks = {name: replace(cell.tasks[name], eval_only=True) for name in known}
        steps = cell.steps
        if arm == "replay":
            steps *= 2
            tasks = {
                name: replace(
                    own,
                    weight=1 / len(known),
                    label_fraction=cell.memory * own.label_fraction,
                )
                for name, own in ((name, cell.tasks[name]) for name in known)
            }
        known.append(task)
        config = replace(
            cell.dense,
            name=task,
            init_from=str(folder),
            model=replace(cell.dense.model, tasks=cell.plan_tasks(known)),
            tasks=tasks | {task: replace(added.training, weight=1.0)},
            training=cell.schedule(cell.dense, steps),
        )
        result = cell.train(config)
        models.add_training(task, result, config)
        before, folder = folder, cell.save(result.model, f"further-{task}")
        cell.drop(before)
        models.before |= observe_tasks(cell, result.model, [task])
    models.places[folder] = known
    return {arm: models}


def train_alone(cell: StreamCell, arm: str) -> dict[str, ArmModels]:
    """Train a model of its own for each added task, from random weights.

    Args:
        cell: data and settings.
        arm: ``scratch`` for a SkillNet of the skills that the grown task reads, ``plain`` for a
            dense model with as many operations.
    """
    places = {cell.bases[SKILLNET]: list(cell.run.tasks)}
    models = ArmModels(places, has_new_base=False)
    run = cell.run if arm == "scratch" else cell.dense
    for task, added in cell.added.items():
        plans = cell.plan_tasks([task], has_skills=True)
        config = replace(
            run,
            name=task,
            model=replace(run.model, skills=plans[task].skills, tasks=plans),
            tasks={task: added.training},
            training=cell.schedule(run, cell.steps),
        )
        result = cell.train(config)
        models.add_training(task, result, config)
        models.places[cell.save(result.model, f"alone-{task}")] = [task]
    return {arm: models}


#: Trains one or several arms in a cell; returns arm -> its models.
ArmTraining = Callable[[StreamCell], dict[str, ArmModels]]


def list_arms() -> dict[tuple[str, ...], ArmTraining]:
    """Return the arms that one training gives -> that training."""
    single: dict[str, Callable[[StreamCell, str], dict[str, ArmModels]]] = {
        "grow": train_growths,
        "lora": train_growths,
        "head": train_growths,
        "sequential": train_further,
        "replay": train_further,
        "scratch": train_alone,
        "plain": train_alone,
    }
    found: dict[tuple[str, ...], ArmTraining] = {
        (arm,): lambda cell, arm=arm, run=run: run(cell, arm)  # type: ignore[misc]
        for arm, run in single.items()
    }
    return found | {
        ("merge",): merge_growths,
        ("full", "average", "ties"): train_copies,
        ("joint",): train_jointly,
    }
