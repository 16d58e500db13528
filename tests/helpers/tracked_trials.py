"""Trials of a sweep as their tracker meets them: processes, each with a run that the driver opened.

Each is a fork of a server that imported MLflow once, as ten imports on few cores take a while.
"""

import os
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from skillnet_platform.tracking import Tracker

#: Steps that a trial tells, in three parts of one length.
STEPS = 24
#: A trial that waits longer hangs.
PATIENCE_S = 600.0
CONTEXT = get_context("forkserver")


def setting(number: int) -> dict[str, Any]:
    """The configuration that a trial records, as parameters and as ``config.yaml``."""
    return {"trial": {"number": number, "lr": number / 1000}}


def values(number: int, step: int) -> dict[str, float]:
    """The metrics of a step."""
    return {"loss": number + step / 100, "other": float(step)}


def report(number: int) -> dict[str, Any]:
    """What a trial keeps as the artifact ``reports/trial.json``."""
    return {"trial": number, "curve": [values(number, step)["loss"] for step in range(STEPS)]}


def start(runs: Sequence[Tracker], home: Path, *waits: Any) -> list[Any]:
    """Start a process for each of those runs.

    Args:
        runs: opened by the driver.
        home: the run root of the trials.
        waits: two barriers, at which they wait after the first and after the second part.
    """
    CONTEXT.set_forkserver_preload([__name__, "mlflow"])
    made = []
    for number, run in enumerate(runs):
        reported = (number, run.run_id, run.uri, str(home), waits)
        made.append(CONTEXT.Process(target=_trial, args=reported, daemon=True))
        made[-1].start()
    return made


def _trial(number: int, run_id: str, uri: str, home: str, waits: Sequence[Any]) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]  # only the server knows the store and its keys
    os.environ["SKILLNET_HOME"] = home
    tracker = Tracker(run_id, uri)
    tracker.params(setting(number))
    part = STEPS // (len(waits) + 1)
    for step in range(STEPS):
        if step and step % part == 0:
            waits[step // part - 1].wait(PATIENCE_S)
        tracker.metrics(values(number, step), step)
    tracker.dict(report(number), "reports/trial.json")
    tracker.tags({"seed": number})
    if not tracker.settle(PATIENCE_S):
        raise RuntimeError("the tracker did not take what waited")
