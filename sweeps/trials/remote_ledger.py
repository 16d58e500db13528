"""A sweep or a study in a store: its ledger is kept there, so that hosts need no common disk.

    <run_dir>/<sweep>/
      sweep.yaml, run.json, trials.csv, best.yaml, score.png, result.json
      trials/proposed.jsonl        what Optuna proposed
      trials/<trial>/              a run in a store (pipelines/runs/mirror.py), and beside its files
        trial.json                 from the driver, before the process of the trial starts
        log.txt, error.txt         from that process, at its end
        reports.jsonl, outcome.json   from the driver, when it knows what became of the trial

A study has two folders of trials, ``tuning`` and ``runs``, and its own files: ``study.yaml``,
``study.json`` and the report. The driver's disk holds the same files and no models; a trial's
process works on the disk of its host. Whoever finds its disk empty takes up what the store has.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pipelines.runs.mirror import CONFIG, RESULT, STATE, RunMirror
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories, read_json, run_root
from skillnet_platform.storage.directories import StoreUnavailable
from sweeps.trials.source import PROPOSALS
from sweeps.trials.trial import ERROR, LOG, OUTCOME, REPORTS, TRIAL

#: Of a sweep or a study: its MLflow run.
RUN = "run.json"
#: What a trial's process leaves, beside what every run leaves.
PROCESS_FILES = (LOG, ERROR)
#: What the driver writes about a trial.
DRIVER_FILES = (REPORTS, OUTCOME)
#: What a study tells of its tuning and its runs.
STUDY_LEDGER = "study.json"
#: Of a sweep itself: what it comes to, the result last.
RESULT_FILES = ("trials.csv", "score.png", "best.yaml", "result.json")


def send_trial(trial: RunMirror) -> None:
    """Before a trial's process starts, on whichever host: what it needs to know."""
    trial.upload_files(CONFIG, *STATE, TRIAL)
    RunMirror(directories.join(trial.uri, ".."), trial.run.parent).upload_files(PROPOSALS)


def receive_trial(trial: RunMirror) -> None:
    """In the process of a trial: what the driver handed over."""
    directories.get_file(trial.place(TRIAL), trial.run / TRIAL)


def return_logs(trial: RunMirror) -> None:
    """At the end of a trial's process: what it said. The run itself is in the store by then.

    Without an answer of the store that is all that is missing: Ray tells the driver the error.
    """
    try:
        trial.upload_files(*PROCESS_FILES)
    except StoreUnavailable as problem:
        console.warn(f"the log of the trial is on this host only: {problem.reason}")


def fetch_trial(trial: RunMirror) -> None:
    """Have on this disk what the store knows of a trial, but models and checkpoints.

    What only the driver writes is taken where it is missing; it may be newer here.
    """
    there = {entry.name for entry in directories.list_files(trial.uri) if "/" not in entry.name}
    if not there:
        return
    # First of all: a folder without it is taken for somebody else's.
    for name in (CONFIG, TRIAL, *STATE[:1], *DRIVER_FILES):
        if name in there and not (trial.run / name).is_file():
            directories.get_file(trial.place(name), trial.run / name)
    for name in (*STATE[1:], *PROCESS_FILES):
        if name in there:
            directories.get_file(trial.place(name), trial.run / name)
    if RESULT in there and not (trial.run / RESULT).is_file():
        trial.download_results(folders=())


def restore_ledger(whole: RunMirror, begun: Sequence[str], groups: Sequence[str]) -> None:
    """Bring the ledger of a sweep or study that was begun on another machine.

    Args:
        whole: its place in the store, and its folder here.
        begun: files that it begins with; without the first it was not begun.
        groups: names of its folders of trials.

    Raises:
        UserError, StoreUnavailable: the store refuses, or does not answer.
    """
    if not directories.exists(whole.uri_of(begun[0])):
        return
    folder, known = whole.run, (whole.run / begun[0]).is_file()
    for name in (*begun, *(f"{group}/{PROPOSALS}" for group in groups)):
        if not (folder / name).is_file() and directories.exists(whole.uri_of(name)):
            directories.get_file(whole.uri_of(name), folder / name)
    for group in groups:
        for name in directories.list_folders(whole.uri_of(group)):
            trial = RunMirror(whole.uri_of(group, name), folder / group / name)
            if not any((trial.run / done).is_file() for done in (OUTCOME, RESULT)):
                fetch_trial(trial)
    if not known:
        console.note(f"{folder.name} is taken up from {whole.uri}")


def fetch_finished_runs(uri: str) -> Path:
    """Copy a finished run, or all finished runs of a study, from a store: no models.

    Args:
        uri: of the folder of a run, or of a study.

    Returns:
        The folder that stands for it here.

    Raises:
        UserError: there is no finished run, or the store refuses.
        StoreUnavailable: the store does not answer.
    """
    kept = run_root() / "cache" / "runs" / hashlib.sha256(uri.encode()).hexdigest()[:16]
    whole = RunMirror(uri, kept / uri.rstrip("/").rpartition("/")[2])
    if not directories.exists(whole.uri_of(STUDY_LEDGER)):
        _fetch_run(whole)
        return whole.run
    directories.get_file(whole.uri_of(STUDY_LEDGER), whole.run / STUDY_LEDGER)
    for entry in read_json(whole.run / STUDY_LEDGER)["runs"]:
        # A name out of the store: it must not lead out of the folder.
        names = PurePosixPath(str(entry["folder"])).parts
        if entry["status"] == "finished" and ".." not in names and "/" not in names:
            _fetch_run(RunMirror(whole.uri_of(*names), whole.run.joinpath(*names)))
    return whole.run


def _fetch_run(run: RunMirror) -> None:
    if not run.is_finished():
        raise UserError(f"{run.uri} holds no finished run ({RESULT}) and no study ({STUDY_LEDGER})")
    for name in (CONFIG, *STATE):
        if directories.exists(run.place(name)):
            directories.get_file(run.place(name), run.run / name)
    run.download_results(folders=())
