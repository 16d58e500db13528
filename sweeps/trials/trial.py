"""One trial: a training run that a sweep or a study starts, and what became of it.

<folder>/<trial>/        a run's folder, as ``skillnet finetune`` makes it, and beside its files
  trial.json             what the process that runs it needs to know; written by the driver
  reports.jsonl          one line per evaluation: step, score, the tasks' scores, cost
  log.txt                what the trial said
  error.txt              traceback, if it failed
  outcome.json           what became of it, written by the driver; the ledger of the sweep
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config.run import FinetuneConfig, PretrainConfig
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_platform.storage import read_json, write_json

if TYPE_CHECKING:
    from pipelines.training.ray_train.fit import NestedFit
from sweeps.config.trials import ScoreConfig, TrialStatus

TRIAL = "trial.json"
REPORTS = "reports.jsonl"
#: Of an evaluation, as far as they are known.
COSTS = ("activated_params", "flops_per_example")
LOG = "log.txt"
ERROR = "error.txt"
OUTCOME = "outcome.json"
#: The driver puts it there to have the trial stop at once.
STOP = "stop"


@dataclass(frozen=True)
class Trial:
    """A run to make.

    Args:
        name: of its folder and of its MLflow run.
        config: what to train; its ``name`` and ``run_dir`` are the engine's.
        pretrain: a pretraining that comes first and whose model the run starts from. Trials
            with equal pretrainings share one.
        splits: splits that the final model is measured on; none takes the test splits if
            ``config.evaluate`` is set.
        group: trials of one group are repeats of one configuration; none: the name.
        settings: flat key -> value of what sets it apart, for tables and tags.
        brief: it is only ranked: no pictures and no intervals.
    """

    name: str
    config: FinetuneConfig
    pretrain: PretrainConfig | None = None
    splits: tuple[str, ...] | None = None
    group: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    brief: bool = False


@dataclass
class TrialOutcome:
    """What became of a trial.

    Args:
        name: of the trial.
        group: of the trial; repeats of one configuration share it.
        folder: of the run.
        status: ``finished`` with a result; ``stopped`` early by the scheduler; ``failed``;
            ``interrupted`` before its end, to be gone on with.
        result: as ``pipelines.finetune.finetune`` returns it; none unless finished.
        reports: evaluations during training and the final one, in the order of steps.
        error: last line of the exception that ended it.
        log: file with the traceback, or with what the trial said.
        run_id: of its MLflow run.
        settings: of the trial.
        seed: of the trial.
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
        """The score of the last evaluation; none without any."""
        return self.reports[-1]["score"] if self.reports else None

    @property
    def step(self) -> int:
        """Steps done, as far as is known."""
        if self.result is not None:
            return int(self.result["step"])
        return int(self.reports[-1]["step"]) if self.reports else 0

    @property
    def seconds(self) -> float | None:
        """Time in the training loop; none unless finished."""
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
    """Train and evaluate a trial: in this process, or on several nested Ray workers.

    It leaves what every finished run leaves; ``result.json`` is written last. A trial with a
    result gives it; an unfinished one goes on from its newest whole checkpoint.

    Args:
        trial: what to run. Its pretraining is not run here: ``config.init_from`` names its model.
        folder: of the run.
        tracked: MLflow run id and URI. The run is open, and its end is the driver's.
        score: how evaluations are scored; none reports nothing.
        report: told about each evaluation during training: step, score, each task's score,
            cost; {} if it was reported before a crash. With several workers it is called on each
            of them, with {} on all but the first.
        nested: how ``training.workers`` above 1 run below a trial of Ray Tune.
        store: URI of the folder of all trials, to which this run is mirrored; none keeps it here.

    Returns:
        As ``pipelines.finetune.finetune``.
    """
    from pipelines.runs import layout
    from pipelines.runs.mirror import mirror_of
    from pipelines.runs.uploads import upload_results
    from pipelines.training import run as training_run
    from pipelines.training.worker import TRACKER_PATIENCE_S
    from skillnet_platform.tracking import Tracker

    config = training_run.resolved(place_config(trial.config, folder, store))
    mirror = mirror_of(config, folder)
    if mirror is not None:
        mirror.restore(config)
    known = (folder / layout.CONFIG).is_file()
    finished = training_run.open_run(config, folder)
    if finished is not None:
        return finished
    if mirror is not None:
        mirror.check_writable(known)
    checked = training_run.check(config)
    alone = config.training.workers <= 1
    # Trials share the cluster: none grows into the place of another.
    workers = 0 if alone else config.training.workers
    config = replace(config, training=replace(config.training, workers=workers, min_workers=None))
    tracker = Tracker.by_id(*tracked)
    watch = EvaluationRecorder(folder, score, report) if score is not None else None
    try:
        result = training_run.execute(
            config,
            folder,
            tracker,
            checked,
            splits=trial.splits,
            on_evaluation=watch,
            nested=None if alone else nested,
            brief=trial.brief,
        )
    finally:
        # On another host than the driver's nobody would find what is left.
        tracker.settle(TRACKER_PATIENCE_S if mirror is not None else 0.0)
    result["registered"] = None
    if watch is not None and result["evaluation"]:
        watch.record(result["evaluation"], result["step"])
    write_json(folder / layout.RESULT, result)
    if mirror is not None:
        upload_results(mirror, config.training.keep, config.storage.patience)
    return result


def place_config(config: FinetuneConfig, folder: Path, store: str | None = None) -> FinetuneConfig:
    """The configuration of a run in that very folder, which registers no model.

    Args:
        config: of the trial.
        folder: of the run.
        store: URI of the folder of all trials, to which the run is mirrored; none keeps it here.

    Raises:
        UserError: the trial names a mirror of its own.
    """
    if config.storage.mirror:
        raise UserError(
            "storage.mirror: trials are kept where their sweep or study is; leave it out, and "
            "give that --run_dir s3://… instead"
        )
    return replace(
        config,
        name=folder.name,
        run_dir=str(folder.parent),
        tracking=replace(config.tracking, register=False),
        storage=replace(config.storage, mirror=store),
    )


class EvaluationRecorder:
    """Scores the evaluations of a run, keeps them in ``reports.jsonl``, and passes them on.

    Picklable: with several workers each has its own copy, and only the first gets rows.
    """

    def __init__(
        self,
        folder: Path,
        score: ScoreConfig,
        report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._folder, self._score, self._report = folder, score, report

    def __call__(self, rows: list[dict[str, Any]], step: int) -> None:
        """An evaluation at ``step``. One that was reported before a crash is not said twice."""
        made = self.record(rows, step) if rows else None
        if self._report is not None:
            self._report(made or {})

    def record(self, rows: list[dict[str, Any]], step: int) -> dict[str, Any] | None:
        """Score rows and keep the line of that step; none if it is known already."""
        score, scores = self._score.compute_score(rows)
        line = {
            "step": step,
            "score": score,
            "scores": scores,
            **compute_mean_costs(rows),
            "time": time.time(),
        }
        if step in {known["step"] for known in read_reports(self._folder)}:
            return None
        with (self._folder / REPORTS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        return line


def compute_mean_costs(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean over tasks of activated parameters and of FLOPs per example, from tidy rows."""
    by_task = {row["task"]: row for row in rows}
    costs = {}
    for key in COSTS:
        values = [float(row[key]) for row in by_task.values() if row.get(key) is not None]
        if values:
            costs[key] = sum(values) / len(values)
    return costs


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of a trial so far, in the order of steps; a line cut short is left out.

    Raises:
        UserError: a line is whole, and is no evaluation.
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
                f"{path}: line {number} is no evaluation (step, score, scores); remove that line"
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
    """Leave in the trial's folder what the process that runs it needs."""
    write_json(
        folder / TRIAL,
        {
            "name": trial.name,
            "config": configuration.to_dict(trial.config),
            "splits": list(trial.splits) if trial.splits is not None else None,
            "group": trial.group,
            "settings": dict(trial.settings),
            "brief": trial.brief,
            "score": configuration.to_dict(score) if score is not None else None,
            **more,
        },
    )


def read_trial(folder: Path) -> tuple[Trial, ScoreConfig | None, dict[str, Any]]:
    """The trial of a folder, its score, and everything that was written with them."""
    told = read_json(folder / TRIAL)
    trial = Trial(
        told["name"],
        configuration.build(FinetuneConfig, told["config"]),
        splits=tuple(told["splits"]) if told["splits"] is not None else None,
        group=told["group"],
        settings=told["settings"],
        brief=told["brief"],
    )
    score = configuration.build(ScoreConfig, told["score"]) if told["score"] is not None else None
    return trial, score, told
