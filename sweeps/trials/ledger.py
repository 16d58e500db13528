"""The ledger of a sweep: the state of each trial, stored in its directory.

Resuming a sweep needs no other state; see decision 13.
"""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.runs.identity import check_trained_corpora
from pipelines.training.runs.layout import CONFIG, RESULT, RUN, read_result
from pipelines.training.runs.mirror import RunMirror
from pipelines.training.runs.progress_log import PROGRESS, read_pace
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories, read_record, write_json
from skillnet_platform.tracking import Tracker, read_run_id
from sweeps.config.trials import TrialStatus
from sweeps.trials.trial import (
    ERROR,
    LOG,
    OUTCOME,
    REPORTS,
    STOP,
    Trial,
    TrialOutcome,
    read_reports,
)

#: Directories of a trial that are removed unless it is among the best.
WEIGHT_FOLDERS = ("model", "checkpoints", "ray")


@dataclass
class LedgerEntry:
    """One trial in the ledger.

    Args:
        trial: settings, seeds and folder to run.
        folder: run directory.
        mirror: mirror of the run directory in an object store, or None.
        tracker: its open MLflow run, or None.
        outcome: its outcome, once known.
        reported_step: step of the newest evaluation that Ray reported.
        steps_before: steps from which this part of the sweep trains; infinity if already settled.
        log_start: bytes of the progress log that earlier parts of the sweep wrote.
        is_pruned: this command has removed its weights.
    """

    trial: Trial
    folder: Path
    mirror: RunMirror | None = None
    tracker: Tracker | None = None
    outcome: TrialOutcome | None = None
    reported_step: int = 0
    steps_before: float = 0
    log_start: int = 0
    is_pruned: bool = False

    def add_report(self, line: dict[str, Any]) -> None:
        """Store an evaluation that was reported by its process, possibly on another node.

        Args:
            line: step, score, score of each task, costs.
        """
        self.reported_step = max(self.reported_step, int(line["step"]))
        # On a shared disk the trial has already written this line itself.
        if line["step"] not in {known["step"] for known in read_reports(self.folder)}:
            with (self.folder / REPORTS).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")

    def load_settled(self) -> TrialOutcome | None:
        """Return the outcome from an earlier part of the sweep; None if the trial must run.

        A failed trial runs again.

        Raises:
            UserError: a file of the trial is damaged, or the trial ended on another corpus.
        """
        check_trial_corpora(self.trial, self.folder)
        if (self.folder / RESULT).is_file():
            return self.build_outcome("finished")
        if (self.folder / OUTCOME).is_file():
            remedy = "remove it; the same command then resumes the trial"
            record = read_record(self.folder / OUTCOME, {"status": str}, remedy)
            return self.build_outcome("stopped") if record["status"] == "stopped" else None
        return None

    def build_outcome(self, status: TrialStatus, error: str | None = None) -> TrialOutcome:
        """Return an outcome with a given status and the content of the run directory.

        Args:
            status: status of the trial.
            error: last line of the exception, or None.
        """
        result = self.folder / RESULT
        log = next((p for p in (self.folder / ERROR, self.folder / LOG) if p.is_file()), None)
        return TrialOutcome(
            name=self.trial.name,
            group=self.trial.group or self.trial.name,
            folder=self.folder,
            status=status,
            result=read_result(result) if status == "finished" and result.is_file() else None,
            reports=read_reports(self.folder),
            error=error,
            log=log if status == "failed" else self.folder / LOG,
            run_id=self.tracker.run_id if self.tracker else read_run_id(self.folder / RUN),
            settings=dict(self.trial.settings),
            seed=self.trial.config.seed,
        )

    def settle(self, status: TrialStatus, error: str | None = None) -> TrialOutcome:
        """Store the outcome and return it; an interrupted trial stays open in the ledger.

        Args:
            status: status of the trial.
            error: last line of the exception, or None.
        """
        self.outcome = self.build_outcome(status, error)
        # Without an outcome file the trial counts as open and resumes (decision 13).
        if status != "interrupted" and (self.folder / CONFIG).is_file():
            record = {"status": status, "error": error, "score": self.outcome.score}
            write_json(self.folder / OUTCOME, record | {"step": self.outcome.step})
            if self.mirror is not None:
                self.mirror.upload(REPORTS, OUTCOME)
        return self.outcome

    def clear_failure(self) -> None:
        """Remove the files of an earlier failure before the trial runs again."""
        for name in (OUTCOME, ERROR, STOP):
            if (self.folder / name).is_file():
                (self.folder / name).unlink()
                if self.mirror is not None:
                    directories.remove_file(self.mirror.uri_of(name))

    def remove_weights(self) -> None:
        """Remove its model and checkpoints; small files are kept."""
        self.is_pruned = True
        prune_trial(self.folder)
        if self.mirror is not None:
            for name in WEIGHT_FOLDERS:
                self.mirror.remove_if_reachable(name)

    def begin(self) -> None:
        """Note the step from which this part of the sweep trains: that of the newest checkpoint."""
        from pipelines.training.runs.checkpoints import list_checkpoint_folders, step_of

        folders = list_checkpoint_folders(self.folder / "checkpoints")
        self.steps_before = step_of(folders[0].name) if folders else 0
        # Steps after the checkpoint are in the log, and are trained again.
        path = self.folder / PROGRESS
        self.log_start = path.stat().st_size if path.is_file() else 0

    def steps_done(self) -> float:
        """Return the training steps so far, from the last line of the local progress log."""
        known = max(self.reported_step, self.steps_before)
        return max(read_pace(self.folder / PROGRESS, self.log_start)[0], known)


def last_line(text: str) -> str:
    """Return the last line of a traceback: the exception and its message."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def compute_mean_scores(outcomes: Iterable[TrialOutcome]) -> dict[str, float]:
    """Return group -> mean score over its repeats, best first.

    Repeats without a score are ignored. A trial that was stopped early counts with its last score,
    and its group ranks behind all groups whose repeats finished.
    """
    scores: dict[str, list[float]] = {}
    short: set[str] = set()
    for outcome in outcomes:
        if outcome.score is not None:
            scores.setdefault(outcome.group, []).append(outcome.score)
        # A score after fewer steps is not comparable with a final one.
        if outcome.status != "finished":
            short.add(outcome.group)
    means = {group: fmean(values) for group, values in scores.items()}
    # False sorts before True: complete groups come first.
    return dict(sorted(means.items(), key=lambda item: (item[0] in short, -item[1])))


def prune_entries(
    entries: Sequence[LedgerEntry], keep: int | None, repeats: Callable[[str], int] | None = None
) -> None:
    """Remove models and checkpoints of trials that are not among the best groups.

    Failed and interrupted trials keep their checkpoints, from which they are resumed. While trials
    run, only weights are removed that no later score can bring back: the mean of a group counts
    when all of its repeats have finished.

    Args:
        entries: all trials so far, in the order of their start.
        keep: number of groups to keep, best first; None keeps all.
        repeats: returns the number of repeats of a group, while trials run; None at the end.
    """
    if keep is None:
        return
    outcomes = [entry.outcome for entry in entries if entry.outcome is not None]
    if repeats is not None and keep:
        ended = Counter(each.group for each in outcomes if each.status in ("finished", "stopped"))
        outcomes = [each for each in outcomes if ended[each.group] == repeats(each.group)]
    best = set(list(compute_mean_scores(outcomes))[:keep])
    lost = {each.group for each in outcomes} - best
    for entry in entries:
        if entry.outcome is None or entry.outcome.status in ("failed", "interrupted"):
            continue
        # A stopped trial cannot become the model of its group.
        if entry.outcome.group not in lost and entry.outcome.status != "stopped":
            continue
        # The last call tries a store again that was away.
        if repeats is None or not entry.is_pruned:
            entry.remove_weights()


def check_trial_corpora(trial: Trial, folder: Path) -> None:
    """Raise UserError if the run in a trial's directory was trained on other corpora.

    Scores of a sweep are compared, so all of its trials must read the same rows.

    Args:
        trial: the trial, with the digests of its corpora as far as they are known.
        folder: run directory, which may be missing.
    """
    stored = folder / CONFIG
    if not stored.is_file():
        return
    try:
        before = configuration.build_config(FinetuneConfig, configuration.load_yaml(stored))
    except UserError as error:
        raise UserError(f"{stored} is damaged: {error}") from None
    check_trained_corpora(trial.config, before, stored)


def prune_trial(folder: Path) -> None:
    """Remove the model and checkpoints of a run; small files are kept."""
    for name in WEIGHT_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def outcome_to_dict(outcome: TrialOutcome) -> dict[str, Any]:
    """Return an outcome as plain values for JSON, without the long parts of its result."""
    values: Mapping[str, Any] = dataclasses.asdict(outcome)
    short = {key: value for key, value in values.items() if key not in ("result", "reports")}
    last = outcome.reports[-1] if outcome.reports else {}
    return short | {
        "folder": str(outcome.folder),
        "log": str(outcome.log) if outcome.log else None,
        "score": outcome.score,
        "scores": last.get("scores", {}),
        "step": outcome.step,
        "seconds": outcome.seconds,
        "activated_params": last.get("activated_params"),
        "flops_per_example": last.get("flops_per_example"),
    }
