"""Ray Tune's side of a sweep: the function that a trial's process runs, what hands trials to
Tune, and what listens to it.

Only names travel through Tune; a trial's configuration lies in its folder. Nothing here is
restored by Tune: the trials' folders are the ledger.
"""

import contextlib
import ctypes
import logging
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from skillnet.malloc import give_back_freed_memory
from skillnet_platform import console
from skillnet_platform.storage import directories, run_root
from sweeps.trials.ledger import prune_trial
from sweeps.trials.trial import ERROR, LOG, STOP, read_reports, read_trial, run_trial

METRIC, STEP, REPORT, FAILED = "score", "step", "report", "failed"

#: Set while Tune runs, where the user has not.
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a CSV, a JSON and a TensorBoard file per trial
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours ends the MLflow runs as well
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed reports no score
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # its snapshots are of no use to us
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_RESULT_BUFFER_LENGTH": "0",
    # It would ask for a second trial only when the first has begun; Hand says how many at a time.
    "TUNE_MAX_PENDING_TRIALS_PG": "64",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


def run_trial_process(told: dict[str, Any]) -> None:
    """What runs in a trial's process: train, report, and leave the cause of a failure on disk.

    Args:
        told: ``folder`` of the trial, and ``cpus`` and ``gpus`` of it or of each of its workers.
            With a ``store``, the URI of the folder of all trials, ``folder`` stands below this
            host's run root.
    """
    import torch

    from pipelines.runs.mirror import RunMirror
    from sweeps.trials import remote_ledger

    folder, store = run_root() / told["folder"], told["store"]
    mirror = RunMirror(directories.join(store, folder.name), folder) if store else None
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / LOG).open("a", encoding="utf-8", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
        _watch_stop_file(folder / STOP),
    ):
        try:
            if mirror is not None:
                remote_ledger.receive_trial(mirror)
            trial, score, more = read_trial(folder)
            training = trial.config.training
            nested = None
            if training.workers > 1:
                nested = _nested_workers(told)
            elif not training.threads_per_worker:
                torch.set_num_threads(max(1, int(told["cpus"])))
            result = run_trial(
                trial,
                folder,
                tracked=tuple(more["tracked"]),
                score=score,
                report=_report_nested if nested else _report,
                nested=nested,
                store=store,
            )
            if mirror is not None:
                remote_ledger.return_logs(mirror)
                prune_trial(folder)
        except Exception as problem:
            (folder / ERROR).write_text(traceback.format_exc(), encoding="utf-8")
            if mirror is not None:
                remote_ledger.return_logs(mirror)
            tune.report({STEP: 0, FAILED: f"{type(problem).__name__}: {problem}"})
            return
        except _TrialStopped:
            return
        finally:
            give_back_freed_memory()
    made = read_reports(folder)
    last = tune_metrics(made[-1]) if made and made[-1][STEP] == result["step"] else {}
    tune.report({STEP: result["step"], **last})


class _TrialStopped(BaseException):
    """The driver has asked this trial to end."""


@contextlib.contextmanager
def _watch_stop_file(path: Path) -> Iterator[None]:
    """Raise ``_Stopped`` in this thread when the driver puts the file ``path`` there.

    Tune asks a trial to stop only when it reports, and kills its process ten seconds later. Here
    it leaves what it does at once and in order: checkpoints are whole or not there at any moment.
    """
    over, target = threading.Event(), threading.get_ident()

    def watch() -> None:
        while not over.wait(0.2):
            if path.exists():
                raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
                raise_in(ctypes.c_ulong(target), ctypes.py_object(_TrialStopped))
                return

    thread = threading.Thread(target=watch, name="stop-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _report(made: dict[str, Any]) -> None:
    if made:
        tune.report(tune_metrics(made))


def tune_metrics(line: dict[str, Any]) -> dict[str, Any]:
    """What Tune is told of an evaluation: two numbers for itself, and all of it for the driver."""
    return {STEP: line[STEP], METRIC: line[METRIC], REPORT: line}


def _report_nested(made: dict[str, Any]) -> None:
    """In each of several workers, together: Ray Train passes the first one's on to Tune."""
    import ray.train

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    ray.train.report(tune_metrics(made) if made else {})


def _nested_workers(told: dict[str, Any]) -> Any:
    from ray.tune.integration.ray_train import TuneReportCallback

    from pipelines.training.ray_train.fit import NestedFit

    resources = {"CPU": told["cpus"]} | ({"GPU": told["gpus"]} if told["gpus"] else {})
    return NestedFit(resources, [TuneReportCallback()])


class TrialFeeder(Searcher):
    """Hands trials to Tune one after the other, never more than ``parallel`` at a time.

    Args:
        give: the next trial as (name, what its process is told); none if there is none now.
        ended: whether there will be none any more.
        parallel: largest number of trials at the same time.
    """

    def __init__(
        self,
        give: Callable[[], tuple[str, dict[str, Any]] | None],
        ended: Callable[[], bool],
        parallel: int,
    ) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._next_assignment, self._is_exhausted, self._max_concurrent = give, ended, parallel
        self._live: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        """What the process of the next trial is told, or FINISHED, or none for now."""
        if len(self._live) >= self._max_concurrent:
            return None
        given = self._next_assignment()
        if given is None:
            return Searcher.FINISHED if self._is_exhausted() else None
        name, told = given
        self._live.add(trial_id)
        return {"name": name, **told}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Makes room for the next."""
        self._live.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is on disk."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class TrialListener(tune.Callback):
    """Tells the driver's side of a sweep about ends of trials.

    Args:
        on_end: called with a trial's name and the error that Tune has of it, or none.
        on_report: called with a trial's name and each evaluation that it reports.
    """

    def __init__(
        self,
        on_end: Callable[[str, str | None], None],
        on_report: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self._on_end, self._on_report = on_end, on_report

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial was evaluated."""
        if REPORT in result:
            self._on_report(trial.config["name"], result[REPORT])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has come to its end, or was stopped."""
        self._on_end(trial.config["name"], (trial.last_result or {}).get(FAILED))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The process of a trial has died, once too often."""
        problem = trial.get_error()
        text = f"{type(problem).__name__}: {problem}" if problem else "its process died"
        self._on_end(trial.config["name"], text)

    def __getstate__(self) -> dict[str, Any]:
        return {}


class GracefulStopper(Stopper):
    """Ends a sweep in order on the first Ctrl-C or SIGTERM; a second one ends it at once.

    Args:
        on_ask: called on the first one, in the signal handler.
    """

    def __init__(self, on_ask: Callable[[], None]) -> None:
        self.stop_requested = False
        self._on_request = on_ask

    def __getstate__(self) -> dict[str, Any]:
        return {"wanted": self.stop_requested}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Whether all trials are to be stopped."""
        return self.stop_requested

    @contextlib.contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Take the signals for the length of a block."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self.stop_requested:
                raise KeyboardInterrupt
            self.stop_requested = True
            console.note("stopping the trials; the same command goes on with them")
            self._on_request()

        before = {each: signal.signal(each, ask) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


class ResumableASHA:
    """ASHA, that can be told what trials reported in an earlier part of the sweep."""

    def __init__(self, last_step: int, grace: int, reduction: float) -> None:
        self.scheduler: TrialScheduler = ASHAScheduler(
            time_attr=STEP,
            metric=METRIC,
            mode="max",
            max_t=last_step,
            grace_period=grace,
            reduction_factor=reduction,
            stop_last_trials=False,
        )

    def replay_reports(self, name: str, reports: list[dict[str, Any]]) -> None:
        """Put the scores that a trial had before the driver was killed into the rungs."""
        past: Any = SimpleNamespace(trial_id=f"past-{name}")
        if reports:
            self.scheduler.on_trial_add(None, past)  # type: ignore[arg-type]
        for line in reports:
            self.scheduler.on_trial_result(None, past, line)  # type: ignore[arg-type]


def run_tuner(
    hand: TrialFeeder,
    listener: TrialListener,
    interrupt: GracefulStopper,
    scheduler: TrialScheduler | None,
    folder: Path,
    *,
    nested: bool,
    max_failures: int,
) -> None:
    """Let Tune run all that ``hand`` gives. What it keeps in ``folder`` is of no use afterwards.

    ``nested``: trials start workers of their own, and take next to nothing themselves.
    """

    # An empty bundle is refused; one byte of memory is there everywhere and takes no core.
    def resources(told: dict[str, Any]) -> tune.PlacementGroupFactory:
        plain = {"CPU": told["cpus"]} | ({"GPU": told["gpus"]} if told["gpus"] else {})
        return tune.PlacementGroupFactory([{"memory": 1.0} if nested else plain])

    tuner = tune.Tuner(
        tune.with_resources(run_trial_process, resources),
        tune_config=tune.TuneConfig(
            search_alg=hand, scheduler=scheduler, num_samples=-1, reuse_actors=not nested
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            callbacks=[listener],
            stop=interrupt,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=max_failures),
        ),
    )
    tuner.fit()


@contextlib.contextmanager
def quiet_environment() -> Iterator[None]:
    """Tune says nothing, and does nothing that we do ourselves, for the length of a block."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "optuna")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, earlier in before.items():
            if earlier is None:
                os.environ.pop(name, None)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
