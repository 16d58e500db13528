"""The ledger of a sweep or study in an object store, for nodes without a shared disk.

    <run_dir>/<sweep>/
      sweep.yaml, run.json, trials.csv, best.yaml, score.png, result.json
      trials/proposed.jsonl        Optuna's proposals
      trials/<trial>/              mirror of a run (pipelines/training/runs/mirror.py), and beside
      its files
        trial.json                 written by the driver before the trial's process starts
        log.txt, error.txt         written by that process at its end
        reports.jsonl, outcome.json   written by the driver when the outcome is known

A study has two directories of trials, ``tuning`` and ``runs``, and its own files: ``study.yaml``,
``study.json`` and the report. The driver's disk holds the same files without models. A trial's
process uses the disk of its node. A driver with an empty disk restores the ledger from the store.
"""

from collections.abc import Sequence

from pipelines.training.runs.mirror import CONFIG, RESULT, START, STATE, RunMirror
from skillnet_platform import console
from skillnet_platform.storage import directories
from skillnet_platform.storage.location import SyncedFolder
from skillnet_platform.storage.retry import StoreUnavailableError
from sweeps.trials.trial import ERROR, LOG, OUTCOME, PROPOSALS, REPORTS, TRIAL

#: MLflow run of a sweep or study.
RUN = "run.json"
#: Files that a trial's process writes in addition to those of every run.
PROCESS_FILES = (LOG, ERROR)
#: Files of a trial that the driver writes.
DRIVER_FILES = (REPORTS, OUTCOME)
#: Results of a sweep; ``result.json`` is uploaded last.
RESULT_FILES = ("trials.csv", "score.png", "best.yaml", "result.json")


def send_trial(trial: RunMirror) -> None:
    """Upload the input of a trial before its process starts on any node."""
    trial.upload(*START, TRIAL)
    SyncedFolder(trial.uri_of(".."), trial.local.parent).upload(PROPOSALS)


def receive_trial(trial: RunMirror) -> None:
    """Download the input of a trial; called in its process."""
    directories.get_file(trial.uri_of(TRIAL), trial.local / TRIAL)


def return_logs(trial: RunMirror) -> None:
    """Upload the logs of a trial at the end of its process; its run is in the store already.

    If the store does not respond, only the logs are missing: Ray reports the error to the driver.
    """
    try:
        trial.upload(*PROCESS_FILES)
    except StoreUnavailableError as error:
        console.print_warning(f"the log of the trial is on this node only: {error.reason}")


def fetch_trial(trial: RunMirror) -> None:
    """Download the files of a trial, except models and checkpoints.

    Files that only the driver writes are downloaded if missing; the local copy may be newer.
    """
    if not directories.list_files(trial.uri):
        return
    # The configuration comes first: a directory without it counts as foreign.
    trial.download(CONFIG, TRIAL, *STATE[:1], *DRIVER_FILES, missing_only=True)
    trial.download(*STATE[1:], *PROCESS_FILES)
    if not (trial.local / RESULT).is_file() and trial.has(RESULT):
        trial.download_results()


def restore_ledger(ledger: RunMirror, start_files: Sequence[str], groups: Sequence[str]) -> None:
    """Download the ledger of a sweep or study that was started on another machine.

    Args:
        ledger: mirror of the sweep or study.
        start_files: files that exist from the start; without the first there is nothing to restore.
        groups: names of its directories of trials.

    Raises:
        UserError: the store rejects the request.
        StoreUnavailableError: the store does not respond.
    """
    if not ledger.has(start_files[0]):
        return
    folder, known = ledger.local, (ledger.local / start_files[0]).is_file()
    proposals = [f"{group}/{PROPOSALS}" for group in groups]
    ledger.download(*start_files, *proposals, missing_only=True)
    for group in groups:
        for name in directories.list_folders(ledger.uri_of(group)):
            trial = RunMirror(ledger.uri_of(group, name), folder / group / name)
            if not any((trial.local / done).is_file() for done in (OUTCOME, RESULT)):
                fetch_trial(trial)
    if not known:
        console.print_note(f"{folder.name} is resumed from {ledger.uri}")
