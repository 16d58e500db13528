"""Objectives by name: what configurations and commands ask of an objective, without torch.

:func:`find_objective` is the entry point. A third party adds an objective through the entry point
group ``skillnet.objectives``, whose entries name an :class:`Objective`. Facts are fields and
properties. All that computes belongs to the head, a :class:`skillnet.objectives.heads.TaskHead`
that is loaded with the first model. Built-in objectives are declared in the same way.
"""

import contextlib
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple

from skillnet.vocabulary import parse_scale
from skillnet_files.entry_points import find_entries, load_named

GROUP = "skillnet.objectives"
#: Entries name a :class:`RowMetric`, which every task of its objective gets.
METRICS_GROUP = "skillnet.metrics"

#: Towers whose vectors are compared.
PAIR = ("query", "candidate")


class TargetColumn(NamedTuple):
    """Column of the shards that holds a target.

    Args:
        target: name of the target in a batch.
        column: name in the shards.
        kind: a number or array per row (``value``); a list per row as indicators of its outputs
            (``set``); or a list per row, padded, with lengths as ``<target>_lengths``
            (``sequence``).
    """

    target: str
    column: str
    kind: Literal["value", "set", "sequence"] = "value"


@dataclass(frozen=True)
class NamedMetric:
    """Metric of an objective. Intervals stay within its bounds.

    Args:
        name: as in evaluation rows.
        label: in tables; "" takes the words of the name.
        higher_is_better: direction.
        bounds: lowest and highest value. Tables show a metric in [0, 1] in per cent, and others as
            numbers unless their names end with ``rate``.
    """

    name: str
    label: str = ""
    higher_is_better: bool = True
    bounds: tuple[float, float] = (0.0, 1.0)

    @property
    def scale(self) -> Literal["share", "error_rate", "free"]:
        """How the variance of the metric depends on its value."""
        if self.bounds == (0.0, 1.0):
            return "share"
        is_rate = self.bounds == (0.0, math.inf) and self.name.endswith("rate")
        return "error_rate" if is_rate else "free"

    @property
    def is_score(self) -> bool:
        """Whether the metric, or 1 - metric where lower is better, is a score of at most 1."""
        return self.bounds[1] <= 1.0 if self.higher_is_better else self.scale != "free"


@dataclass(frozen=True)
class RowMetric:
    """Further metric of an objective, from another package.

    Args:
        objective: name of the objective whose tasks are measured.
        metric: name, label, direction and bounds.
        score_rows: function, or its ``module:name``, of (predictions, targets) as in
            :meth:`skillnet.objectives.heads.TaskHead.score_rows`; returns numerator and
            denominator of each row, (N,) each. The metric is the ratio of their sums. Runs are
            compared by it only if the denominators do not depend on the predictions.
    """

    objective: str
    metric: NamedMetric
    score_rows: "str | ScoreRows"

    def load(self) -> "ScoreRows":
        """Return the function."""
        if not isinstance(self.score_rows, str):
            return self.score_rows
        function: ScoreRows = pkgutil.resolve_name(self.score_rows)
        return function


#: Maps predictions and targets of N rows to numerators and denominators, (N,) each.
ScoreRows = Callable[[Any, Mapping[str, Any]], tuple[Any, Any]]


@dataclass(frozen=True)
class Objective:
    """An objective: facts that need no model, and references to the code.

    Args:
        name: as in configurations and saved models.
        head: ``module:Class`` of a subclass of :class:`skillnet.objectives.heads.TaskHead`, which
            owns targets, forward pass, loss, predictions, scores and answers.
        metrics: measures of an evaluation, the primary metric first.
        towers: names of the towers of a task; ``PAIR`` for two towers with one vector space.
        columns: columns of the shards that hold the targets.
        output: raw output of the head for one row, ``""`` for an embedding per tower.
        listed: key of a manifest that lists the names of the outputs. A task of such an objective
            has a number of outputs.
        unnamed_outputs: outputs before the first named one, such as the blank of CTC.
        has_scale: whether its target is a number, standardized by the training rows.
        has_labels: whether an evaluation compares with labels of a test split. Otherwise the
            metric is measured on the validation split.
        hides_inputs: whether it predicts parts of its input that the data loader masks.
        weighs_rows: whether its loss multiplies each row by the target ``weights``, (B,), if a
            batch has one. A task of it may set ``class_weights``.
        aligns_targets: whether targets follow the tokens of a row in their order, so that a row
            is read whole and needs enough tokens.
        baseline: ``module:function`` that measures ``chance`` and ``simple_baseline``, see
            :class:`pipelines.training.evaluation.simple_baselines.BaselineRows`; ``""`` if no such
            method is known.
        further: metrics of other packages; they follow ``metrics``.
    """

    name: str
    head: str
    metrics: tuple[NamedMetric, ...]
    towers: tuple[str, ...] = ("input",)
    columns: tuple[TargetColumn, ...] = ()
    output: str = ""
    listed: str | None = None
    unnamed_outputs: int = 0
    has_scale: bool = False
    has_labels: bool = True
    hides_inputs: bool = False
    weighs_rows: bool = False
    aligns_targets: bool = False
    baseline: str = ""
    further: tuple[RowMetric, ...] = ()

    @property
    def primary(self) -> NamedMetric:
        """Metric that models are compared by, unless their task chooses another one."""
        return self.metrics[0]

    def compared_metric(self, chosen: str | None) -> NamedMetric:
        """Return the metric of the rows of a task, which comparisons of rows use.

        Only a metric of another package is known to be a ratio of sums over rows. Their scores are
        averaged, so one that is no score leaves the comparison to the primary metric.

        Args:
            chosen: name of the metric that ranks models of the task; None for the primary one.
        """
        scores = {each.metric.name: each.metric for each in self.further if each.metric.is_score}
        return self.primary if chosen is None else scores.get(chosen, self.primary)

    @property
    def target_columns(self) -> tuple[str, ...]:
        """Columns of the shards that hold the targets."""
        return tuple(each.column for each in self.columns)

    @property
    def pairs_towers(self) -> bool:
        """Whether two towers map rows to one vector space, in which rows are searched."""
        return self.towers == PAIR

    @property
    def can_pretrain(self) -> bool:
        """Whether rows without labels can train it: hidden parts of inputs, or pairs."""
        return not self.has_labels or self.pairs_towers

    def count_names(self, manifest: Mapping[str, Any]) -> int | None:
        """Return how many outputs the manifest of a corpus names; None if it lists none."""
        names = manifest.get(self.listed or "")
        return len(names) if isinstance(names, list) else None

    def read_scale(self, manifest: Mapping[str, Any]) -> tuple[float, float] | None:
        """Return mean and deviation of the training values of a corpus; None without a scale.

        Args:
            manifest: parsed description of the corpus.

        Raises:
            ValueError: the manifest has no usable scale.
        """
        if not self.has_scale:
            return None
        return parse_scale(manifest.get("value_scale"), f"{manifest.get('corpus')}: value_scale")

    def load_head(self) -> Any:
        """Return the class of the head; importing it imports torch."""
        return _resolve_name(self.head)

    def load_baseline(self) -> Callable[[Any], dict[str, Any]] | None:
        """Return the function that measures the simple baselines, None if there is none."""
        return _resolve_name(self.baseline) if self.baseline else None


@cache
def _resolve_name(name: str) -> Any:
    # Each pass of a model asks for its head.
    return pkgutil.resolve_name(name)


_BASELINES = "pipelines.training.evaluation.simple_baselines"

_RANKS = (
    NamedMetric("recall_at_10", "R@10"),
    NamedMetric("recall_at_5", "R@5"),
    NamedMetric("recall_at_1", "R@1"),
    NamedMetric("median_rank", higher_is_better=False, bounds=(1.0, math.inf)),
)

_BUILT_IN = (
    Objective(
        "classification",
        "skillnet.objectives.classification:ClassificationHead",
        (NamedMetric("accuracy"), NamedMetric("macro_f1", "macro-F1")),
        columns=(TargetColumn("labels", "label"),),
        output="logits",
        listed="labels",
        weighs_rows=True,
        baseline=f"{_BASELINES}:measure_class_baselines",
    ),
    Objective(
        "multi_label",
        "skillnet.objectives.multi_label:MultiLabelHead",
        (NamedMetric("average_precision"), NamedMetric("micro_f1", "micro-F1")),
        columns=(TargetColumn("label_sets", "label_set", "set"),),
        output="logits",
        listed="labels",
        baseline=f"{_BASELINES}:measure_label_baselines",
    ),
    Objective(
        "regression",
        "skillnet.objectives.regression:RegressionHead",
        (
            NamedMetric("r_squared", "R²", bounds=(-math.inf, 1.0)),
            NamedMetric("mean_absolute_error", higher_is_better=False, bounds=(0.0, math.inf)),
        ),
        columns=(TargetColumn("numbers", "value"),),
        output="number",
        has_scale=True,
        baseline=f"{_BASELINES}:measure_number_baselines",
    ),
    Objective(
        "ctc",
        "skillnet.objectives.ctc:CTCHead",
        (
            NamedMetric("token_error_rate", "token error", False, (0.0, math.inf)),
            NamedMetric("exact_rate", "exact"),
        ),
        columns=(TargetColumn("symbols", "symbols", "sequence"),),
        output="log_probs",
        listed="symbols",
        unnamed_outputs=1,
        aligns_targets=True,
        baseline=f"{_BASELINES}:measure_transcript_baselines",
    ),
    Objective(
        "retrieval",
        "skillnet.objectives.retrieval:RetrievalHead",
        _RANKS + tuple(replace(each, name=f"reverse_{each.name}") for each in _RANKS),
        towers=PAIR,
        columns=(TargetColumn("groups", "group"),),
        baseline=f"{_BASELINES}:measure_search_baselines",
    ),
    Objective(
        "masked",
        "skillnet.objectives.masked:MaskedHead",
        (
            NamedMetric("masked_loss", higher_is_better=False, bounds=(0.0, math.inf)),
            NamedMetric("masked_accuracy", "masked token accuracy"),
        ),
        output="predicted",
        has_labels=False,
        hides_inputs=True,
    ),
)

#: Objectives of this package, so that a checkout works where the package is not installed.
BUILT_IN_OBJECTIVES: Mapping[str, Objective] = {each.name: each for each in _BUILT_IN}


def objective_names() -> list[str]:
    """Return the names of all installed objectives, the built-in ones first."""
    others = find_entries(GROUP).keys() - BUILT_IN_OBJECTIVES.keys()
    return [*BUILT_IN_OBJECTIVES, *sorted(others)]


@cache
def find_objective(name: str) -> Objective:
    """Return the objective of a name.

    Args:
        name: as in a task's ``objective``.

    Raises:
        ValueError: no objective has this name, or its entry point does not name an
            :class:`Objective` of the same name.
    """
    # Saved models and published figures rely on the meaning of built-in names.
    if name in BUILT_IN_OBJECTIVES:
        return _add_metrics(BUILT_IN_OBJECTIVES[name])
    found = load_named(GROUP, name, Objective)
    if found is None:
        raise ValueError(f"unknown objective {name!r}; known: {', '.join(objective_names())}")
    return _add_metrics(found)


#: Metrics of this process, with where they come from.
_own_metrics: list[tuple[str, Any]] = []


@contextlib.contextmanager
def add_metrics(metrics: Sequence[RowMetric]) -> Iterator[None]:
    """Measure further metrics inside a block of this process.

    Args:
        metrics: those of an entry point are measured without it.
    """
    _own_metrics.extend(("metrics", each) for each in metrics)
    find_objective.cache_clear()
    try:
        yield
    finally:
        del _own_metrics[len(_own_metrics) - len(metrics) :]
        find_objective.cache_clear()


def _add_metrics(objective: Objective) -> Objective:
    """Return an objective with the metrics that other packages, or this process, add to it."""
    taken = {each.name for each in objective.metrics}
    further = []
    entries = sorted(find_entries(METRICS_GROUP).items())
    given = [(f"the entry point {METRICS_GROUP}:{name}", each.load()) for name, each in entries]
    for place, found in given + _own_metrics:
        if not isinstance(found, RowMetric):
            raise ValueError(f"{place} names no RowMetric")
        if found.objective != objective.name:
            continue
        if found.metric.name in taken:
            raise ValueError(
                f"{place} adds {found.metric.name}, which {objective.name} has; give its metric "
                "another name"
            )
        taken.add(found.metric.name)
        further.append(found)
    metrics = (*objective.metrics, *(each.metric for each in further))
    return replace(objective, metrics=metrics, further=tuple(further)) if further else objective


def list_objectives() -> list[Objective]:
    """Return all objectives that can be loaded, the built-in ones first."""
    found = []
    for name in objective_names():
        # A broken package stops its own tasks only, with the message of find_objective.
        with contextlib.suppress(Exception):
            found.append(find_objective(name))
    return found
