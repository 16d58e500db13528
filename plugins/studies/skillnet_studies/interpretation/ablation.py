"""Ablation of skills: score drop of a task after removing, adding or swapping a skill.

Nothing is retrained: the same weights run with another skill plan on the same rows, and the rows
are compared in pairs. A skill with a score drop of 0 is not used by the task. This does not show
the score of a model that was trained without the skill.

The entry point is :func:`measure_ablations`, called by
``skillnet_studies.interpretation.analysis``.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.data.shards.dataset import CorpusSplit, PreparedCorpus, open_corpus
from pipelines.training.evaluation.evaluator import (
    locate_task_corpus,
    measure_split,
    uses_all_captions,
)
from pipelines.training.evaluation.inference import InferenceRunner
from pipelines.training.evaluation.outcomes import OutcomeTable, RowOutcomes, paired_difference
from pipelines.training.evaluation.tables import sort_rows
from pipelines.training.runs.vocabulary_match import align_outputs
from skillnet.model import SkillNet
from skillnet.objectives.base import find_objective
from skillnet.skills import SkillPlan, Task, find_task
from skillnet_platform.errors import UserError

REMOVE, ADD, SWAP = "remove", "add", "swap"

#: Keys of a row of :func:`measure_ablations`.
COLUMNS = (
    "task",
    "split",
    "change",
    "skill",
    "other",
    "metric",
    "before",
    "after",
    "score_drop",
    "low",
    "high",
    "rows",
)


@dataclass(frozen=True)
class PlanChange:
    """A changed skill plan of a task.

    Args:
        kind: ``remove``, ``add`` or ``swap``.
        skill: skill that is removed or added.
        other: skill that replaces it; "" unless swapped.
        task: task with the changed plans; None if a tower would have no skill.
    """

    kind: str
    skill: str
    other: str
    task: Task | None


def list_plan_changes(task: Task, skills: Sequence[str], swaps: bool = True) -> list[PlanChange]:
    """Return every change of a task's plans by one skill.

    ``remove`` removes a skill from each tower that activates it. ``add`` adds a skill to every
    tower of a task that does not use it. ``swap`` replaces a skill by another in each tower that
    activates it, if the other skill is active in none of these towers.

    Args:
        task: objective and towers to run.
        skills: all skills of the model.
        swaps: include swaps.
    """
    changes = []
    for skill in skills:
        if skill not in task.skills:
            towers = {name: (*plan.skills, skill) for name, plan in task.towers.items()}
            changes.append(PlanChange(ADD, skill, "", _replace_skills(task, towers)))
            continue
        left = {
            name: tuple(each for each in plan.skills if each != skill)
            for name, plan in task.towers.items()
        }
        changes.append(PlanChange(REMOVE, skill, "", _replace_skills(task, left)))
        # Towers in which the swapped skill is replaced.
        homes = [name for name, plan in task.towers.items() if skill in plan.skills]
        for other in skills if swaps else ():
            # A swap for an active skill would be a removal.
            if any(other in task.towers[name].skills for name in homes):
                continue
            towers = left | {name: (*left[name], other) for name in homes}
            changes.append(PlanChange(SWAP, skill, other, _replace_skills(task, towers)))
    return changes


def measure_ablations(
    model: SkillNet,
    data: str | Path,
    tasks: Sequence[str] | None = None,
    split: str = "test",
    *,
    corpora: Mapping[str, str] | None = None,
    limits: Mapping[str, int | None] | None = None,
    metrics: Mapping[str, str | None] | None = None,
    swaps: bool = True,
    on_change: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Evaluate every task with every change of its plans.

    Args:
        model: a trained model; its weights and configuration are unchanged afterwards.
        data: directory of prepared corpora.
        tasks: task names; None takes all tasks with a headline metric.
        split: split of each task's corpus; tasks without it are skipped.
        corpora: task -> corpus, if it is not the built-in corpus.
        limits: task -> maximum sequence length, as in training.
        metrics: task -> metric that ranks its models; others have the primary one.
        swaps: also replace each active skill by each other skill.
        on_change: called before each evaluation with the task, its rows, and the rows of all
            evaluations that are left, its own included.

    Returns:
        Rows with the keys ``COLUMNS``. ``before``, ``after`` and ``score_drop`` are scores in
        [0, 1] where higher is better (1 − error rate for error rates). ``score_drop`` is before
        minus after, with its paired 95 % interval over held-out units. All but ``before`` are None
        if a tower would have no skill.

    Raises:
        UserError: an unknown task, or no corpus with that split.
    """
    table: list[dict[str, Any]] = []
    runner = InferenceRunner(model)
    measured = list(find_measured_splits(model, data, tasks, split, corpora))
    changes = {
        name: list(list_plan_changes(model.config.tasks[name], model.config.skills, swaps))
        for name, _, _ in measured
    }
    rows_left = sum(part.rows * len(changes[name]) for name, part, _ in measured)
    for name, part, corpus in measured:
        spec = model.config.tasks[name]
        limit, chosen = (limits or {}).get(name), (metrics or {}).get(name)
        metric = find_objective(spec.objective).compared_metric(chosen)
        more = metric.higher_is_better
        # The baseline is measured in the same way, so that differences come from the plan alone.
        baseline = _measure_outcomes(runner, name, spec, part, corpus, limit, chosen)
        for change in changes[name]:
            if on_change is not None:
                on_change(name, part.rows, rows_left)
            rows_left -= part.rows
            row = {
                "task": name,
                "split": split,
                "change": change.kind,
                "skill": change.skill,
                "other": change.other,
                "metric": metric.name,
                "before": _score(baseline.value, more),
                "rows": len(baseline),
            }
            if change.task is not None:
                altered = _measure_outcomes(runner, name, change.task, part, corpus, limit, chosen)
                # For error rates the order is reversed, so that a positive drop is always worse.
                pair = (baseline, altered) if more else (altered, baseline)
                interval = paired_difference(*pair)
                row |= {"after": _score(altered.value, more), "score_drop": interval.value}
                row |= {"low": interval.low, "high": interval.high}
            table.append({column: row.get(column) for column in COLUMNS})
    return table


def _measure_outcomes(
    runner: InferenceRunner,
    name: str,
    task: Task,
    part: CorpusSplit,
    corpus: PreparedCorpus,
    limit: int | None,
    chosen: str | None,
) -> RowOutcomes:
    """Return the outcome of every row of a split under a plan, as in an evaluation."""
    outcomes = OutcomeTable()
    # Only a SkillNet has plans; interpret_source has checked this.
    assert isinstance(runner.model, SkillNet)
    with override_plan(runner.model, name, task):
        measure_split(
            runner,
            name,
            part,
            f"{corpus.name}/{part.name}",
            limit=limit,
            # Intervals come from the paired outcomes, so those of the metrics are not needed.
            bootstrap_samples=0,
            outcomes=outcomes,
            chosen=chosen,
            all_captions=uses_all_captions(corpus),
        )
    return outcomes[name, part.name]


def find_measured_splits(
    model: SkillNet,
    data: str | Path,
    tasks: Sequence[str] | None,
    split: str,
    corpora: Mapping[str, str] | None,
) -> list[tuple[str, CorpusSplit, PreparedCorpus]]:
    """Return (task, split, corpus) of the tasks with a headline metric and the split.

    Args:
        model: network whose weights are read.
        data: directory of prepared corpora.
        tasks: task names; None takes all tasks of the model.
        split: name of the split.
        corpora: task -> corpus, if it is not the built-in corpus.

    Raises:
        UserError: an unknown task, or no corpus with that split.
    """
    names = sort_rows(model.config.tasks) if tasks is None else list(tasks)
    measured: list[tuple[str, CorpusSplit, PreparedCorpus]] = []
    seen: set[str] = set()
    for name in names:
        if not find_objective(find_task(name, model.config.tasks).objective).has_labels:
            continue
        corpus = open_corpus(locate_task_corpus(data, name, corpora))
        align_outputs(model, name, corpus)
        seen |= corpus.splits.keys()
        if split in corpus.splits:
            measured.append((name, corpus.splits[split], corpus))
    if not measured:
        raise UserError(
            f"no corpus of the tasks {', '.join(names)} has the split {split!r}; they have "
            f"{', '.join(sorted(seen)) or 'none'}"
        )
    return measured


@contextlib.contextmanager
def override_plan(model: SkillNet, name: str, task: Task) -> Iterator[None]:
    """Run a block with another plan for a task; the weights stay the same.

    Args:
        model: the model, whose configuration is restored afterwards.
        name: name of the task.
        task: the task with the other plan.
    """
    before = model.config
    # Plans are read from the configuration at each forward pass.
    model.config = replace(before, tasks=before.tasks | {name: task})
    try:
        yield
    finally:
        model.config = before
        # Merged weights are cached per plan; train() drops those of plans that do not recur.
        training = model.training
        model.train()
        model.train(training)


def _replace_skills(task: Task, skills: Mapping[str, Sequence[str]]) -> Task | None:
    """Return the task with other skills in its towers; None if a tower would have no skill."""
    # Such a plan is invalid, so the change cannot be measured.
    if not all(skills.values()):
        return None
    towers = {
        name: SkillPlan(tuple(skills[name]), plan.modality) for name, plan in task.towers.items()
    }
    return replace(task, towers=towers)


def _score(value: float, more: bool) -> float:
    return value if more else 1 - value
