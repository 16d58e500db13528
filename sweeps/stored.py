"""A sweep in a store: its ledger is kept there, so that hosts need no common disk.

    <run_dir>/<sweep>/
      sweep.yaml, run.json, trials.csv, best.yaml, score.png, result.json
      trials/proposed.jsonl        what Optuna proposed
      trials/<trial>/              a run in a store (pipelines/mirror.py), and beside its files
        trial.json                 from the driver, before the process of the trial starts
        log.txt, error.txt         from that process, at its end
        reports.jsonl, outcome.json   from the driver, when it knows what became of the trial

The driver's disk holds the same files and no models; a trial's process works on the disk of its
host. Whoever finds its disk empty takes up what the store has.
"""

from pathlib import Path

from pipelines.mirror import CONFIG, RESULT, STATE, Mirror
from skillnet_platform import console, remote
from skillnet_platform.remote import StoreUnavailable
from sweeps.search import PROPOSED
from sweeps.trial import ERROR, LOG, OUTCOME, REPORTS, TRIAL

#: What a trial's process leaves, beside what every run leaves.
TOLD = (LOG, ERROR)
#: What the driver writes about a trial.
LEDGER = (REPORTS, OUTCOME)
#: Of a sweep itself: what it begins with, and what it comes to, the result last.
BEGUN = ("sweep.yaml", "run.json")
ENDED = ("trials.csv", "score.png", "best.yaml", "result.json")


def hand_over(trial: Mirror) -> None:
    """Before a trial's process starts, on whichever host: what it needs to know."""
    trial.put_files(CONFIG, *STATE, TRIAL)
    Mirror(remote.join(trial.uri, ".."), trial.run.parent).put_files(PROPOSED)


def receive(trial: Mirror) -> None:
    """In the process of a trial: what the driver handed over."""
    remote.get_file(trial.place(TRIAL), trial.run / TRIAL)


def hand_back(trial: Mirror) -> None:
    """At the end of a trial's process: what it said. The run itself is in the store by then.

    Without an answer of the store that is all that is missing: Ray tells the driver the error.
    """
    try:
        trial.put_files(*TOLD)
    except StoreUnavailable as problem:
        console.warn(f"the log of the trial is on this host only: {problem.reason}")


def bring(trial: Mirror) -> None:
    """Have on this disk what the store knows of a trial, but models and checkpoints.

    What only the driver writes is taken where it is missing; it may be newer here.
    """
    there = {entry.name for entry in remote.list_files(trial.uri) if "/" not in entry.name}
    if not there:
        return
    # First of all: a folder without it is taken for somebody else's.
    for name in (CONFIG, TRIAL, *STATE[:1], *LEDGER):
        if name in there and not (trial.run / name).is_file():
            remote.get_file(trial.place(name), trial.run / name)
    for name in (*STATE[1:], *TOLD):
        if name in there:
            remote.get_file(trial.place(name), trial.run / name)
    if RESULT in there and not (trial.run / RESULT).is_file():
        trial.take_results(folders=())


def take_up(uri: str, folder: Path) -> None:
    """Bring the ledger of a sweep that was begun on another machine.

    Args:
        uri: of the sweep.
        folder: of the sweep on this machine.

    Raises:
        UserError, StoreUnavailable: the store refuses, or does not answer.
    """
    whole = Mirror(uri, folder)
    if not remote.exists(whole.place(BEGUN[0])):
        return
    known = (folder / BEGUN[0]).is_file()
    for name in (*BEGUN, f"trials/{PROPOSED}"):
        if not (folder / name).is_file() and remote.exists(whole.place(name)):
            remote.get_file(whole.place(name), folder / name)
    for name in remote.list_folders(whole.place("trials")):
        trial = Mirror(whole.place("trials", name), folder / "trials" / name)
        if not any((trial.run / done).is_file() for done in (OUTCOME, RESULT)):
            bring(trial)
    if not known:
        console.note(f"{folder.name} is taken up from {uri}")
