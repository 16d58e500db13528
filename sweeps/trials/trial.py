"""One trial: a training run that is part of a sweep or study, and its outcome.

<folder>/<trial>/        run directory as of ``skillnet finetune``, with additional files
  trial.json             input of the trial's process; written by the driver
  reports.jsonl          one line per evaluation: step, score, score of each task, cost
  log.txt                output of the trial
  error.txt              traceback of a failed trial
  outcome.json           outcome, written by the driver; the ledger of the sweep

:func:`run_trial` trains a trial in its process. A source supplies trials one by one to
:class:`sweeps.trials.engine.TrialDriver`.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipelines.training.config.run import FinetuneConfig, PretrainConfig
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_platform.storage import read_json, write_json
from skillnet_platform.tracking import Tracker

if TYPE_CHECKING:
    from pipelines.training.loop.ray_train.fit import NestedFit
from sweeps.config.trials import AshaConfig, ResourceConfig, ScoreConfig, TrialStatus

#: Input of the trial's process.
TRIAL = "trial.json"
#: Evaluations of a trial, one JSON object per line.
REPORTS = "reports.jsonl"
#: Costs of an evaluation line, where known.
COSTS = ("activated_params", "flops_per_example")
#: Standard output and standard error of the trial's process.
LOG = "log.txt"
#: Traceback of a failed trial.
ERROR = "error.txt"
#: Status, error, score and step of a trial that has ended.
OUTCOME = "outcome.json"
#: The driver creates this file to stop the trial.
STOP = "stop"


@dataclass(frozen=True)
class Trial:
    """A run to train.

    Args:
        name: name of its directory and MLflow run.
        config: configuration of the run; the engine sets ``name`` and ``run_dir``.
        pretrain: pretraining whose model the run starts from. Trials with equal pretrainings
            share one.
        splits: splits for the final evaluation; None takes the test splits if
            ``config.evaluate`` is set.
        group: name of the configuration that this trial repeats; None takes the trial's name.
        settings: flat key -> value that distinguishes it, for tables and tags.
        brief: skip figures and intervals, for runs that are only ranked.
    """

    name: str
    config: FinetuneConfig
    pretrain: PretrainConfig | None = None
    splits: tuple[str, ...] | None = None
    group: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    brief: bool = False


@dataclass
class TrialOutcome:
    """The outcome of a trial.

    Args:
        name: name of the trial.
        group: name of its configuration; all repeats share it.
        folder: run directory.
        status: ``finished`` (with a result), ``stopped`` (early, by the scheduler), ``failed``, or
            ``interrupted`` (to be resumed).
        result: result of the run, as in ``result.json``; None unless finished.
        reports: evaluations during training and the final one, ordered by step.
        error: last line of the exception that ended it.
        log: file with the traceback, or with the output of the trial.
        run_id: id of its MLflow run.
        settings: settings of the trial.
        seed: seed of the trial.
    """

    name: str
    group: str
    folder: Path
    status: TrialStatus
    result: dict[str, Any] | None = None
    reports: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    log: Path | None = None
    run_id: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def score(self) -> float | None:
        """Score of the last evaluation, or None."""
        return self.reports[-1]["score"] if self.reports else None

    @property
    def step(self) -> int:
        """Steps done, as far as known."""
        if self.result is not None:
            return int(self.result["step"])
        return int(self.reports[-1]["step"]) if self.reports else 0

    @property
    def commit(self) -> str | None:
        """Commit of the code that trained it; None unless finished, or if it is not recorded."""
        return self.result.get("commit") if self.result is not None else None

    @property
    def seconds(self) -> float | None:
        """Seconds in the training loop, or None unless finished."""
        return float(self.result["seconds"]) if self.result is not None else None


def run_trial(
    trial: Trial,
    folder: Path,
    *,
    tracked: tuple[str, str],
    score: ScoreConfig | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
    nested: "NestedFit | None" = None,
    store: str | None = None,
) -> dict[str, Any]:
    """Train and evaluate a trial in this process, or on several nested Ray workers.

    The run directory has the files of every finished run; ``result.json`` is written last. A
    finished trial returns its stored result. An unfinished trial is resumed from its latest valid
    checkpoint.

    Args:
        trial: the trial. Its pretraining is not run: ``config.init_from`` names the model.
        folder: run directory.
        tracked: MLflow run id and URI. The run is open; the driver ends it.
        score: computation of the score; None reports nothing.
        report: called with each evaluation during training: step, score, score of each task,
            cost; {} if it was reported before a crash. With several workers every worker calls
            it, all but the first with {}.
        nested: resources and callbacks of nested workers, for ``training.workers`` above 1.
        store: URI of the directory of all trials, to which this run is mirrored, or None.

    Returns:
        The result of the run, as in ``result.json``.
    """
    from pipelines.training.loop.resolved_run import resolve_run
    from pipelines.training.loop.run import open_run_folder, train_and_evaluate, validate_run
    from pipelines.training.loop.worker import TRACKER_PATIENCE_S
    from pipelines.training.runs import layout
    from pipelines.training.runs.mirror import mirror_of, upload_results

    run = resolve_run(place_config(trial.config, folder, store))
    config = run.config
    mirror = mirror_of(config, folder)
    if mirror is not None:
        mirror.restore(config)
    known = (folder / layout.CONFIG).is_file()
    finished = open_run_folder(run)
    if finished is not None:
        return finished
    if mirror is not None:
        mirror.check_writable(known)
    validate_run(run)
    alone = config.training.workers == 1
    # Trials share the cluster, so no trial may grow into the resources of another.
    run = run.with_fixed_workers()
    tracker = Tracker(*tracked)
    watch = EvaluationRecorder(folder, score, report) if score is not None else None
    try:
        result = train_and_evaluate(
            run,
            tracker,
            splits=trial.splits,
            on_evaluation=watch,
            nested=None if alone else nested,
            is_worker=alone,
            brief=trial.brief,
        )
    finally:
        # On another node than the driver's, no later process sends the remaining metrics.
        tracker.settle(TRACKER_PATIENCE_S if mirror is not None else 0.0)
    # Trials are never registered; the key completes the result of a run.
    result["registered"] = None
    if watch is not None and result["evaluation"]:
        watch.record(result["evaluation"], result["step"])
    write_json(folder / layout.RESULT, result)
    if mirror is not None:
        upload_results(mirror, config.training.keep_checkpoints)
    return result


def place_config(config: FinetuneConfig, folder: Path, store: str | None = None) -> FinetuneConfig:
    """Return the configuration of a run in a given directory, without model registration.

    Args:
        config: configuration of the trial.
        folder: run directory.
        store: URI of the directory of all trials, to which the run is mirrored, or None.

    Raises:
        UserError: the trial names its own mirror.
    """
    if config.storage.mirror:
        raise UserError(
            "storage.mirror: trials are stored where their sweep or study is; remove the key, and "
            "give the sweep or study --run_dir s3://… instead"
        )
    return replace(
        config,
        name=folder.name,
        run_dir=str(folder.parent),
        tracking=replace(config.tracking, register=False),
        storage=replace(config.storage, mirror=store),
    )


class EvaluationRecorder:
    """Scores the evaluations of a run, appends them to ``reports.jsonl``, and reports them.

    It can be pickled: with several workers each has a copy, and only the first receives rows.

    Args:
        folder: run directory.
        score: computation of the score.
        report: called with each new line; {} without one.
    """

    def __init__(
        self,
        folder: Path,
        score: ScoreConfig,
        report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._folder, self._score, self._report = folder, score, report

    def __call__(self, rows: list[dict[str, Any]], step: int) -> None:
        """Record and report an evaluation; one that was recorded before a crash is skipped."""
        line = self.record(rows, step) if rows else None
        if self._report is not None:
            self._report(line or {})

    def record(self, rows: list[dict[str, Any]], step: int) -> dict[str, Any] | None:
        """Score rows and append a line for the step; return None if the step has one already.

        Args:
            rows: tidy evaluation rows.
            step: training step of the evaluation.
        """
        score, scores = self._score.compute_score(rows)
        line = {
            "step": step,
            "score": score,
            "scores": scores,
            **compute_mean_costs(rows),
            "time": time.time(),
        }
        # A resumed trial repeats the evaluations after its last checkpoint.
        if step in {known["step"] for known in read_reports(self._folder)}:
            return None
        with (self._folder / REPORTS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        return line


def compute_mean_costs(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean over tasks of activated parameters and FLOPs per example."""
    # Costs are equal in all rows of a task.
    by_task = {row["task"]: row for row in rows}
    costs = {}
    for key in COSTS:
        values = [float(row[key]) for row in by_task.values() if row.get(key) is not None]
        if values:
            costs[key] = sum(values) / len(values)
    return costs


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """Return the evaluations of a trial so far, ordered by step; incomplete lines are skipped.

    Raises:
        UserError: a complete line is not an evaluation.
    """
    path = folder / REPORTS
    if not path.is_file():
        return []
    lines = []
    for number, text in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if not _is_evaluation(line):
            raise UserError(
                f"{path}: line {number} is not an evaluation (step, score, scores); remove that "
                "line"
            )
        lines.append(line)
    return sorted(lines, key=lambda line: line["step"])


def _is_evaluation(line: Any) -> bool:
    if not isinstance(line, dict) or not isinstance(line.get("scores"), dict):
        return False
    costs = [line[key] for key in COSTS if line.get(key) is not None]
    numbers = [line.get("score"), *line["scores"].values(), *costs]
    return isinstance(line.get("step"), int) and all(isinstance(n, int | float) for n in numbers)


def write_trial(trial: Trial, folder: Path, score: ScoreConfig | None, **more: Any) -> None:
    """Write the input of a trial's process to its directory.

    Args:
        trial: settings, seeds and folder to run.
        folder: run directory.
        score: computation of the score, or None.
        more: further entries of the file.
    """
    scored = configuration.to_dict(score) if score is not None else None
    write_json(folder / TRIAL, configuration.to_dict(trial) | {"score": scored, **more})


def read_trial(folder: Path) -> tuple[Trial, ScoreConfig | None, dict[str, Any]]:
    """Read the input of a trial's process.

    Args:
        folder: run directory.

    Returns:
        The trial, the computation of its score, and the complete content of the file.
    """
    record = read_json(folder / TRIAL)
    own = {each.name: record[each.name] for each in fields(Trial) if each.name in record}
    trial = configuration.build_config(Trial, own)
    score = configuration.build_config(ScoreConfig, record["score"]) if record["score"] else None
    return trial, score, record


#: Log of Optuna's proposals, one point per line, from which a sweep is resumed.
PROPOSALS = "proposed.jsonl"


@dataclass(frozen=True)
class TrialOptions:
    """Options of a set of trials; see :func:`sweeps.trials.engine.run_trials` for each."""

    folder: Path
    parent: Tracker
    score: ScoreConfig | None
    resources: ResourceConfig
    asha: AshaConfig | None
    keep: int | None
    max_failures: int
    label: str
    store: str | None = None


class TrialSource(Protocol):
    """A source that supplies trials one by one.

    Attributes:
        total: number of trials.
        example: a trial whose common settings hold for all.
    """

    total: int
    example: Trial

    def next_trial(self) -> Trial | None:
        """Return the next trial; None if none is available now."""

    def is_exhausted(self) -> bool:
        """Return whether no further trial will come."""

    def record_outcome(self, outcome: TrialOutcome) -> None:
        """Receive the outcome of a trial that ended, now or in an earlier part of the sweep."""

    def count_repeats(self, group: str) -> int:
        """Return the number of trials of a configuration, which differ in their seeds."""


class ListedTrials:
    """A source of trials that are known from the start.

    Args:
        trials: all of them.
        on_outcome: called with the outcome of each trial that ended.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        on_outcome: Callable[[TrialOutcome], None] | None = None,
    ) -> None:
        self.total, self.example = len(trials), trials[0]
        self._waiting, self._on_outcome = list(trials), on_outcome
        self._repeats = Counter(trial.group or trial.name for trial in trials)

    def next_trial(self) -> Trial | None:
        """Return the next trial of the list."""
        return self._waiting.pop(0) if self._waiting else None

    def is_exhausted(self) -> bool:
        """Return whether the list is at its end."""
        return not self._waiting

    def record_outcome(self, outcome: TrialOutcome) -> None:
        """Pass the outcome on; later trials do not depend on it."""
        if self._on_outcome is not None:
            self._on_outcome(outcome)

    def count_repeats(self, group: str) -> int:
        """Return the number of trials of a configuration, which differ in their seeds."""
        return self._repeats[group]


def find_first_rung(asha: AshaConfig, trial: Trial) -> int:
    """Return the step at which ASHA first compares a trial with others.

    Args:
        asha: grace period and reduction factor.
        trial: any trial of the sweep.

    Raises:
        UserError: trials are not evaluated during training, or end before the first rung.
    """
    every, steps = trial.config.training.evaluate_every, trial.config.training.steps
    if not 0 < every < steps:
        raise UserError(
            "asha stops trials by their evaluations: set training.evaluate_every between 1 "
            f"and training.steps - 1 ({steps - 1}), not {every}"
        )
    if asha.grace_period > steps:
        raise UserError(
            f"asha.grace_period {asha.grace_period} is more than training.steps {steps}"
        )
    # Without a grace period the first evaluation is the first rung.
    return asha.grace_period or every
