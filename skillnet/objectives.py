"""Objectives of tasks by name: towers, head, target columns and primary metric.

:func:`find_objective` is the entry point; tasks, heads, the data loader and evaluations call it. A
third party adds an objective through the entry point group ``skillnet.objectives``, whose entries
name a :class:`TaskObjective`. This module is pure Python without torch, because configurations are
built from it: an objective names the class of its head, which is loaded with the first model.
"""

import math
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

GROUP = "skillnet.objectives"


@dataclass(frozen=True)
class TaskObjective:
    """Declaration of an objective.

    Args:
        name: as in configurations and saved models.
        head: ``module:Class`` of its head, a subclass of :class:`skillnet.heads.TaskHead`, which
            owns the forward pass of the towers, the loss and the predictions.
        metric: primary metric, as in evaluation rows.
        higher_is_better: direction of the primary metric.
        bounds: lowest and highest value that the primary metric can have. Tables show a metric in
            [0, 1] in per cent, and others as numbers unless their names end with ``rate``.
            Intervals stay within the bounds.
        towers: names of the towers of a task.
        columns: name of a target -> column of the shards that holds it.
        output: raw output of the head for one row, ``""`` for an embedding per tower.
        listed: key of a manifest that lists the names of the outputs. A task of such an objective
            has a number of outputs.
        has_scale: whether its target is a number, standardized by the training rows.
        has_labels: whether an evaluation compares with labels of a test split. Otherwise the
            metric is a loss on the validation split.
    """

    name: str
    head: str
    metric: str
    higher_is_better: bool = True
    bounds: tuple[float, float] = (0.0, 1.0)
    towers: tuple[str, ...] = ("input",)
    columns: tuple[tuple[str, str], ...] = ()
    output: str = ""
    listed: str | None = None
    has_scale: bool = False
    has_labels: bool = True

    @property
    def scale(self) -> Literal["share", "error_rate", "free"]:
        """How the variance of the primary metric depends on its value."""
        if self.bounds == (0.0, 1.0):
            return "share"
        is_rate = self.bounds == (0.0, math.inf) and self.metric.endswith("rate")
        return "error_rate" if is_rate else "free"

    @property
    def target_columns(self) -> tuple[str, ...]:
        """Columns of the shards that hold the targets."""
        return tuple(column for _, column in self.columns)

    def load_head(self) -> Any:
        """Return the class of the head; importing it imports torch."""
        return pkgutil.resolve_name(self.head)


_BUILT_IN = (
    TaskObjective(
        "classification",
        "skillnet.heads:ClassificationHead",
        "accuracy",
        columns=(("labels", "label"),),
        output="logits",
        listed="labels",
    ),
    TaskObjective(
        "multi_label",
        "skillnet.value_heads:MultiLabelHead",
        "average_precision",
        columns=(("label_sets", "label_set"),),
        output="logits",
        listed="labels",
    ),
    TaskObjective(
        "regression",
        "skillnet.value_heads:RegressionHead",
        "r_squared",
        bounds=(-math.inf, 1.0),
        columns=(("numbers", "value"),),
        output="number",
        has_scale=True,
    ),
    TaskObjective(
        "ctc",
        "skillnet.heads:CTCHead",
        "token_error_rate",
        higher_is_better=False,
        bounds=(0.0, math.inf),
        columns=(("symbols", "symbols"),),
        output="log_probs",
        listed="symbols",
    ),
    TaskObjective(
        "retrieval",
        "skillnet.heads:RetrievalHead",
        "recall_at_10",
        towers=("query", "candidate"),
        columns=(("captions", "caption_tokens"),),
    ),
    TaskObjective(
        "masked",
        "skillnet.heads:MaskedHead",
        "masked_loss",
        higher_is_better=False,
        bounds=(0.0, math.inf),
        output="predicted",
        has_labels=False,
    ),
)

#: Objectives of this package, so that a checkout works where the package is not installed.
BUILT_IN_OBJECTIVES: Mapping[str, TaskObjective] = {each.name: each for each in _BUILT_IN}


def objective_names() -> list[str]:
    """Return the names of all installed objectives, the built-in ones first."""
    return [*BUILT_IN_OBJECTIVES, *_other_entries()]


@cache
def _other_entries() -> dict[str, EntryPoint]:
    # Built-in names win: saved models and published figures rely on their meaning.
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    return {name: found[name] for name in sorted(found.keys() - BUILT_IN_OBJECTIVES.keys())}


@cache
def find_objective(name: str) -> TaskObjective:
    """Return the objective of a name.

    Args:
        name: as in a task's ``objective``.

    Raises:
        ValueError: no objective has this name, or its entry point does not name a
            :class:`TaskObjective` of the same name.
    """
    if name in BUILT_IN_OBJECTIVES:
        return BUILT_IN_OBJECTIVES[name]
    entry = _other_entries().get(name)
    if entry is None:
        raise ValueError(f"unknown objective {name!r}; known: {', '.join(objective_names())}")
    found = entry.load()
    if not isinstance(found, TaskObjective) or found.name != name:
        raise ValueError(
            f"the entry point {GROUP}:{name} names no TaskObjective {name!r}: {entry.value}"
        )
    return found


def list_objectives() -> list[TaskObjective]:
    """Return all installed objectives, the built-in ones first."""
    return [find_objective(name) for name in objective_names()]
