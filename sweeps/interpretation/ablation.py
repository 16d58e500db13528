"""What a task loses when a skill is left out of its plans, another put in, or both.

Nothing is trained anew: the same weights run with another plan, on the same rows, and the rows are
compared in pairs. A skill whose loss is nil is one that the task does without; that says nothing
of what a model trained without it would reach.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.evaluation.evaluator import asks_with_all, corpus_path, measure
from pipelines.evaluation.inference import Runner
from pipelines.evaluation.outcomes import Outcomes, RowOutcomes, paired_difference
from pipelines.evaluation.tables import HEADLINE, in_order
from pipelines.shards.dataset import CorpusSplit, PreparedCorpus, open_corpus
from skillnet.model import SkillNet
from skillnet.skills import SkillPlan, Task, find_task
from skillnet_platform.errors import UserError

REMOVE, ADD, SWAP = "left out", "put in", "swapped"

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
    "lost",
    "low",
    "high",
    "rows",
)


@dataclass(frozen=True)
class PlanChange:
    """Another plan for a task.

    Args:
        kind: ``left out``, ``put in`` or ``swapped``.
        skill: that is left out, or put in.
        other: that is put in its place; "" unless swapped.
        task: with the changed plans; None where a tower would be left without a skill.
    """

    kind: str
    skill: str
    other: str
    task: Task | None


def list_plan_changes(task: Task, skills: Sequence[str], swaps: bool = True) -> list[PlanChange]:
    """Every change of a task's plans by one skill.

    A skill is left out of each tower that activates it; put in, it joins every tower of a task
    that does without it; swapped, another takes its place wherever it is active, if that other
    is active in none of these towers.
    """
    found = []
    for skill in skills:
        if skill not in task.skills:
            towers = {name: (*plan.skills, skill) for name, plan in task.towers.items()}
            found.append(PlanChange(ADD, skill, "", _replace_skills(task, towers)))
            continue
        left = {
            name: tuple(each for each in plan.skills if each != skill)
            for name, plan in task.towers.items()
        }
        found.append(PlanChange(REMOVE, skill, "", _replace_skills(task, left)))
        homes = [name for name, plan in task.towers.items() if skill in plan.skills]
        for other in skills if swaps else ():
            if any(other in task.towers[name].skills for name in homes):
                continue
            towers = left | {name: (*left[name], other) for name in homes}
            found.append(PlanChange(SWAP, skill, other, _replace_skills(task, towers)))
    return found


def measure_ablations(
    model: SkillNet,
    data: str | Path,
    tasks: Sequence[str] | None = None,
    split: str = "test",
    *,
    corpora: Mapping[str, str] | None = None,
    limits: Mapping[str, int | None] | None = None,
    swaps: bool = True,
    seed: int = 0,
    bootstrap_samples: int = 1000,
    precision: str = "auto",
    on_change: Callable[[str, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure every task under every change of its plans.

    Args:
        model: a trained model; its weights are only read, its configuration is put back.
        data: directory of prepared corpora.
        tasks: names; none takes all that are measured by a headline figure.
        split: of each task's corpus; a task whose corpus lacks it is left out.
        corpora: task -> corpus, where it is not the built-in one.
        limits: task -> longest sequence, as in training.
        swaps: also put each other skill in the place of each active one.
        seed: of the resampling of rows.
        bootstrap_samples: resamplings of each interval.
        precision: see :class:`pipelines.evaluation.inference.Runner`.
        on_change: called with the task and the rows before each measurement.

    Returns:
        Rows with the keys ``COLUMNS``. ``before``, ``after`` and ``lost`` are scores in [0, 1],
        higher is better (of an error rate: 1 less it); ``lost`` is before less after, with its
        paired 95 % bootstrap interval over rows. All but ``before`` are None where a tower would
        be left without a skill.

    Raises:
        UserError: an unknown task, or no corpus with that split.
    """
    found: list[dict[str, Any]] = []
    runner = Runner(model, precision)
    for name, part, corpus in find_measured_splits(model, data, tasks, split, corpora):
        spec = model.config.tasks[name]
        metric, more = HEADLINE[spec.objective]
        limit = (limits or {}).get(name)
        whole = _measure_outcomes(runner, name, spec, part, corpus, limit)
        for change in list_plan_changes(spec, model.config.skills, swaps):
            if on_change is not None:
                on_change(name, part.rows)
            row = {
                "task": name,
                "split": split,
                "change": change.kind,
                "skill": change.skill,
                "other": change.other,
                "metric": metric,
                "before": _score(whole.value, more),
                "rows": len(whole),
            }
            if change.task is not None:
                altered = _measure_outcomes(runner, name, change.task, part, corpus, limit)
                pair = (whole, altered) if more else (altered, whole)
                interval = paired_difference(*pair, seed=seed, samples=bootstrap_samples)
                row |= {"after": _score(altered.value, more), "lost": interval.value}
                row |= {"low": interval.low, "high": interval.high}
            found.append({column: row.get(column) for column in COLUMNS})
    return found


def _measure_outcomes(
    runner: Runner,
    name: str,
    task: Task,
    part: CorpusSplit,
    corpus: PreparedCorpus,
    limit: int | None,
) -> RowOutcomes:
    """What becomes of every row of a split under a plan, asked as the evaluation asks."""
    kept = Outcomes()
    assert isinstance(runner.model, SkillNet)
    with override_plan(runner.model, name, task):
        measure(
            runner,
            name,
            part,
            f"{corpus.name}/{part.name}",
            limit=limit,
            samples=0,
            outcomes=kept,
            every_caption=asks_with_all(corpus),
        )
    return kept[name, part.name]


def find_measured_splits(
    model: SkillNet,
    data: str | Path,
    tasks: Sequence[str] | None,
    split: str,
    corpora: Mapping[str, str] | None,
) -> list[tuple[str, CorpusSplit, PreparedCorpus]]:
    """(task, its split, its corpus) of the tasks that have a headline figure and the split.

    Raises:
        UserError: an unknown task, or no corpus with that split.
    """
    names = in_order(model.config.tasks) if tasks is None else list(tasks)
    found: list[tuple[str, CorpusSplit, PreparedCorpus]] = []
    seen: set[str] = set()
    for name in names:
        if find_task(name, model.config.tasks).objective not in HEADLINE:
            continue
        corpus = open_corpus(corpus_path(data, name, corpora))
        seen |= corpus.splits.keys()
        if split in corpus.splits:
            found.append((name, corpus.splits[split], corpus))
    if not found:
        raise UserError(
            f"no corpus of the tasks {', '.join(names)} has the split {split!r}; they have "
            f"{', '.join(sorted(seen)) or 'none'}"
        )
    return found


@contextlib.contextmanager
def override_plan(model: SkillNet, name: str, task: Task) -> Iterator[None]:
    """The model with another plan for a task, for the length of a block; weights stay."""
    before = model.config
    model.config = replace(before, tasks=before.tasks | {name: task})
    try:
        yield
    finally:
        model.config = before
        # Merged weights are kept per plan: of plans that do not come again they are waste.
        training = model.training
        model.train()
        model.train(training)


def _replace_skills(task: Task, skills: Mapping[str, Sequence[str]]) -> Task | None:
    """The task with other skills in its towers; None if a tower had none left."""
    if not all(skills.values()):
        return None
    towers = {
        name: SkillPlan(tuple(skills[name]), plan.modality) for name, plan in task.towers.items()
    }
    return replace(task, towers=towers)


def _score(value: float, more: bool) -> float:
    return value if more else 1 - value
