"""Ray Tune's side of a sweep: the trial function, and the adapters between Tune and the driver.

Tune receives only names and locations; the configuration of a trial is in its directory. Tune
restores nothing: the trials' directories are the ledger. Called by ``sweeps.trials.engine``.
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

from pipelines.training.loop import preemption
from skillnet.precision import give_back_freed_memory
from skillnet_platform import console, signals
from skillnet_platform.cluster.connect import OwnNodeCheck
from skillnet_platform.errors import TerminatedError
from skillnet_platform.storage import directories, run_root
from skillnet_platform.storage.local import environment_variables
from sweeps.trials.ledger import prune_trial
from sweeps.trials.trial import ERROR, LOG, STOP, read_reports, read_trial, run_trial

METRIC, STEP, REPORT, FAILED = "score", "step", "report", "failed"

#: Seconds after a stop request in which a trial may write a checkpoint. Tune waits ten.
STOP_PATIENCE_S = 8.0

#: Environment variables while Tune runs; values set by the user take precedence.
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a CSV, a JSON and a TensorBoard file per trial
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # our handler also ends the MLflow runs
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial reports no score
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's snapshots are not used
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_RESULT_BUFFER_LENGTH": "0",
    # Otherwise Tune requests a second trial only after the first has started. TrialFeeder limits
    # the number of concurrent trials.
    "TUNE_MAX_PENDING_TRIALS_PG": "64",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


def run_trial_process(arguments: dict[str, Any]) -> None:
    """Train a trial in its process, report evaluations, and store the traceback of a failure.

    Args:
        arguments: ``folder`` of the trial; ``cpus`` and ``gpus`` of the trial or of each of its
            workers; ``store``, the URI of the directory of all trials, or None. With a store
            ``folder`` is relative to this node's run root.
    """
    import torch

    from pipelines.training.runs.mirror import RunMirror
    from sweeps.trials import remote_ledger

    # Each node resolves the path below its own run root.
    folder, store = run_root() / arguments["folder"], arguments["store"]
    mirror = RunMirror(directories.join_uri(store, folder.name), folder) if store else None
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / LOG).open("a", encoding="utf-8", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
        _watch_stop_file(folder / STOP) as watch,
    ):
        try:
            if mirror is not None:
                remote_ledger.receive_trial(mirror)
            trial, score, more = read_trial(folder)
            training = trial.config.training
            nested = None
            if training.workers > 1:
                from ray.tune.integration.ray_train import TuneReportCallback

                from pipelines.training.loop.ray_train.fit import NestedFit

                nested = NestedFit(_resources(arguments), [TuneReportCallback()])
                # The request stays in this process, and its workers would train on.
                watch.patience_s = 0.0
            elif not training.threads_per_worker:
                torch.set_num_threads(max(1, int(arguments["cpus"])))
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
        except Exception as error:
            (folder / ERROR).write_text(traceback.format_exc(), encoding="utf-8")
            if mirror is not None:
                remote_ledger.return_logs(mirror)
            # Reported as an ordinary end: Tune would otherwise repeat a trial that fails again
            # (decision 13).
            tune.report({STEP: 0, FAILED: f"{type(error).__name__}: {error}"})
            return
        except (_TrialStopped, TerminatedError):
            return
        finally:
            give_back_freed_memory()
    reports = read_reports(folder)
    # A report of an earlier step must not be repeated with the last step.
    last = tune_metrics(reports[-1]) if reports and reports[-1][STEP] == result["step"] else {}
    tune.report({STEP: result["step"], **last})


class _TrialStopped(BaseException):
    """Raised in a trial's process when the driver requests its end."""


@contextlib.contextmanager
def _watch_stop_file(path: Path) -> Iterator[SimpleNamespace]:
    """End the trial in this thread once the driver creates the file ``path``.

    Tune stops a trial only when it reports, and kills its process ten seconds later. The training
    is asked to write a checkpoint after its step. If it does not end in time, ``_TrialStopped`` is
    raised in this thread: a checkpoint is either complete or absent at any time. The value has the
    seconds for that, ``patience_s``.
    """
    over, target = threading.Event(), threading.get_ident()
    watched = SimpleNamespace(patience_s=STOP_PATIENCE_S)

    def watch() -> None:
        # Polling also sees a file that another node creates on a shared disk.
        while not over.wait(0.2):
            if path.exists():
                preemption.request_stop()
                if not over.wait(watched.patience_s):
                    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
                    raise_in(ctypes.c_ulong(target), ctypes.py_object(_TrialStopped))
                return

    # The process of an earlier trial may run this one.
    preemption.clear_request()
    thread = threading.Thread(target=watch, name="stop-watch", daemon=True)
    thread.start()
    try:
        yield watched
    finally:
        over.set()
        thread.join()
        preemption.clear_request()


def _report(line: dict[str, Any]) -> None:
    if line:
        tune.report(tune_metrics(line))


def tune_metrics(line: dict[str, Any]) -> dict[str, Any]:
    """Return an evaluation as Tune's metrics: step and score for Tune, all of it for the driver.

    Args:
        line: step, score, score of each task, costs.
    """
    return {STEP: line[STEP], METRIC: line[METRIC], REPORT: line}


def _report_nested(line: dict[str, Any]) -> None:
    """Report from each of several workers; Ray Train passes the first worker's metrics to Tune."""
    import ray.train

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    ray.train.report(tune_metrics(line) if line else {})


def _resources(arguments: dict[str, Any]) -> dict[str, float]:
    gpus = {"GPU": arguments["gpus"]} if arguments["gpus"] else {}
    return {"CPU": arguments["cpus"]} | gpus


class TrialFeeder(Searcher):
    """Feeds trials to Tune one by one, up to a maximum of concurrent trials.

    Args:
        next_assignment: returns the next trial as (name, arguments of its process), or None.
        is_exhausted: returns whether no further trial will come.
        max_concurrent: maximum number of concurrent trials.
    """

    def __init__(
        self,
        next_assignment: Callable[[], tuple[str, dict[str, Any]] | None],
        is_exhausted: Callable[[], bool],
        max_concurrent: int,
    ) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._next_assignment, self._is_exhausted = next_assignment, is_exhausted
        self._max_concurrent = max_concurrent
        self._live: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        """Return the arguments of the next trial's process, FINISHED, or None for now."""
        # None means "not now" to Tune; FINISHED would end the sweep.
        if len(self._live) >= self._max_concurrent:
            return None
        assignment = self._next_assignment()
        if assignment is None:
            return Searcher.FINISHED if self._is_exhausted() else None
        name, arguments = assignment
        self._live.add(trial_id)
        return {"name": name, **arguments}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Free the slot of a trial."""
        self._live.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the ledger is on disk."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the ledger is on disk."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class TrialListener(tune.Callback):
    """Reports evaluations and ends of trials to the driver.

    Args:
        on_end: called with a trial's name and the error that Tune reports, or None.
        on_report: called with a trial's name and each of its evaluations.
    """

    def __init__(
        self,
        on_end: Callable[[str, str | None], None],
        on_report: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self._on_end, self._on_report = on_end, on_report
        self._own_node = OwnNodeCheck()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """End the sweep if its node is lost: Tune would wait for its trials for ever."""
        self._own_node.require_alive()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Pass an evaluation to the driver."""
        if REPORT in result:
            self._on_report(trial.config["name"], result[REPORT])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Pass the end of a trial to the driver, whether finished or stopped."""
        self._on_end(trial.config["name"], (trial.last_result or {}).get(FAILED))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Pass the end of a trial whose process died and has no restarts left."""
        error = trial.get_error()
        text = f"{type(error).__name__}: {error}" if error else "its process died"
        self._on_end(trial.config["name"], text)

    def __getstate__(self) -> dict[str, Any]:
        return {}


class GracefulStopper(Stopper):
    """Stops a sweep gracefully on the first Ctrl-C or stop signal; the second ends it at once.

    Args:
        on_request: called on the first signal, in the signal handler.
    """

    def __init__(self, on_request: Callable[[], None]) -> None:
        self.stop_requested = False
        self._received = signal.SIGINT
        self._on_request = on_request

    def __getstate__(self) -> dict[str, Any]:
        return {"stop_requested": self.stop_requested}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Return whether all trials must stop."""
        return self.stop_requested

    @contextlib.contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handle the signals while a block runs; only in the main thread."""

        def request_stop(number: int, frame: FrameType | None) -> None:
            if self.stop_requested:
                raise KeyboardInterrupt
            self.stop_requested, self._received = True, signal.Signals(number)
            console.print_note("stopping the trials; the same command resumes them")
            self._on_request()

        with signals.handle_signals(request_stop, (signal.SIGINT, *signals.STOP_SIGNALS)):
            yield

    def raise_if_stopped(self) -> None:
        """Raise the interrupt of the first signal, after a graceful stop.

        Raises:
            KeyboardInterrupt: it was Ctrl-C.
            TerminatedError: it was another signal.
        """
        if not self.stop_requested:
            return
        if self._received is signal.SIGINT:
            raise KeyboardInterrupt
        raise TerminatedError(f"ended by {self._received.name}; {signals.RESUMES}", self._received)


class ResumableASHA:
    """ASHA that accounts for the reports of an earlier part of the sweep.

    Args:
        last_step: steps of a complete trial.
        grace: steps before a trial may be stopped.
        reduction: ratio between the steps of two rungs.
    """

    def __init__(self, last_step: int, grace: int, reduction: float) -> None:
        self.scheduler: TrialScheduler = ASHAScheduler(
            time_attr=STEP,
            metric=METRIC,
            mode="max",
            max_t=last_step,
            grace_period=grace,
            reduction_factor=reduction,
            # A trial ends at its last step itself; Tune could stop it before it writes its result.
            stop_last_trials=False,
        )

    def replay_reports(self, name: str, reports: list[dict[str, Any]]) -> None:
        """Enter the earlier scores of a trial into the rungs.

        Args:
            name: name of the trial.
            reports: its evaluations before the driver ended.
        """
        # The scheduler reads only the id, and a prefix keeps it apart from the resumed trial.
        past: Any = SimpleNamespace(trial_id=f"past-{name}")
        if reports:
            self.scheduler.on_trial_add(None, past)  # type: ignore[arg-type]
        for line in reports:
            self.scheduler.on_trial_result(None, past, line)  # type: ignore[arg-type]


def run_tuner(
    feeder: TrialFeeder,
    listener: TrialListener,
    stopper: GracefulStopper,
    scheduler: TrialScheduler | None,
    folder: Path,
    *,
    nested: bool,
    max_failures: int,
) -> None:
    """Let Tune run all trials of a feeder.

    Args:
        feeder: supplies the trials.
        listener: receives evaluations and ends of trials.
        stopper: stops all trials on a signal.
        scheduler: ASHA, or None.
        folder: scratch directory of Tune; not needed afterwards.
        nested: trials start workers of their own and need almost no resources themselves.
        max_failures: restarts of a trial whose process died.
    """

    def resources(arguments: dict[str, Any]) -> tune.PlacementGroupFactory:
        # Ray rejects an empty bundle; one byte of memory is always available and needs no core.
        bundle = {"memory": 1.0} if nested else _resources(arguments)
        return tune.PlacementGroupFactory([bundle])

    # A reused process saves its start; trials with several workers are fits (decision 13).
    tuner = tune.Tuner(
        tune.with_resources(run_trial_process, resources),
        tune_config=tune.TuneConfig(
            search_alg=feeder, scheduler=scheduler, num_samples=-1, reuse_actors=not nested
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            callbacks=[listener],
            stop=stopper,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=max_failures),
        ),
    )
    tuner.fit()


@contextlib.contextmanager
def quiet_environment() -> Iterator[None]:
    """Silence Tune, and disable its files and signal handler, while a block runs."""
    # Settings of the user have priority.
    unset = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "optuna")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with environment_variables(unset):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
