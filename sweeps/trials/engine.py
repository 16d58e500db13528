"""Run the trials of sweeps and studies through Ray Tune, recorded and resumable.

The ledger is the trials' directories (decision 13): a trial with an outcome is not run
again, and an unfinished trial is resumed from its latest valid checkpoint. The entry point is
:func:`run_trials`. :class:`TrialDriver` feeds the trials to Tune, opens and ends the MLflow run of
each trial, maintains the ledger, and prints the progress.
"""

import contextlib
import math
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.resolved_run import build_joint_run, resolve_run
from pipelines.training.runs.layout import RUN, describe_run, lock_run_folder
from pipelines.training.runs.mirror import RunMirror
from skillnet_platform import cluster, console, tracking
from skillnet_platform import config as configuration
from skillnet_platform.cluster import capacity
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories, run_root
from skillnet_platform.tracking import Tracker
from skillnet_platform.tracking.spool import is_away
from sweeps.config.trials import AshaConfig, ResourceConfig, ScoreConfig
from sweeps.trials import remote_ledger
from sweeps.trials.ledger import (
    LedgerEntry,
    check_trial_corpora,
    compute_mean_scores,
    last_line,
    prune_entries,
)
from sweeps.trials.trial import (
    ERROR,
    OUTCOME,
    STOP,
    EvaluationRecorder,
    ListedTrials,
    Trial,
    TrialOptions,
    TrialOutcome,
    TrialSource,
    find_first_rung,
    place_config,
    read_reports,
    write_trial,
)


def make_pretraining_name(joint: FinetuneConfig) -> str:
    """Return a name that is equal for equal pretrainings.

    Args:
        joint: the pretraining as a joint run.
    """
    from pipelines.training.runs.identity import compute_identity

    return f"pretraining-{configuration.digest_config(compute_identity(joint))[:10]}"


def run_trials(
    trials: Sequence[Trial] | TrialSource,
    *,
    folder: Path,
    parent: Tracker,
    score: ScoreConfig | None = None,
    resources: ResourceConfig | None = None,
    asha: AshaConfig | None = None,
    keep: int | None = None,
    max_failures: int = 1,
    label: str = "trials",
    store: str | None = None,
    on_outcome: Callable[[TrialOutcome], None] | None = None,
) -> list[TrialOutcome]:
    """Run trials through Ray Tune and return their outcomes.

    Each pretraining that trials name is run once, first. Every trial has an MLflow run nested in
    ``parent``. This process opens and ends it: no run stays RUNNING after an error or interrupt.
    A failed trial does not end the others.

    Args:
        trials: a list, or a source that creates trials one by one. Names must differ.
        folder: directory of all trials; a second call with the same directory resumes.
        parent: the open MLflow run of the sweep or study.
        score: computation of the score; required by ``asha``.
        resources: resources of one trial.
        asha: early stopping; None runs all trials to the end.
        keep: number of groups, best first by mean score, whose models and checkpoints are kept;
            None keeps all. Small result files are always kept.
        max_failures: restarts of a trial whose process died.
        label: label of the progress bar.
        store: URI of the directory of all trials in an object store; None if all nodes share the
            disk of ``folder``. With a store ``folder`` is below the run root.
        on_outcome: called with the outcome of each listed trial when it has ended.

    Returns:
        Outcomes in the order of the trials.

    Raises:
        UserError: a trial does not fit its corpora, the cluster, or an existing run of its name;
            nothing is started.
        KeyboardInterrupt: after a graceful stop by the first Ctrl-C.
        TerminatedError: after a graceful stop by the first SIGTERM or SIGHUP.
    """
    folder = folder.absolute()
    resources = resources or ResourceConfig()
    options = TrialOptions(folder, parent, score, resources, asha, keep, max_failures, label, store)
    # Two drivers would run the same trials in the same directories.
    with lock_run_folder(folder):
        if isinstance(trials, Sequence):
            if not trials:
                return []
            listed = [
                replace(trial, config=resolve_run(replace(trial.config, name=trial.name)).config)
                for trial in trials
            ]
            name, count = Counter(trial.name for trial in listed).most_common(1)[0]
            if count > 1:
                raise UserError(f"two trials are named {name!r}; give each its own name")
            for trial in listed:
                check_trial(trial, folder, score, asha, resources)
            source: TrialSource = ListedTrials(listed, on_outcome)
        else:
            # A source creates trials later, so one example stands for all of them.
            source, listed = trials, [trials.example]
            check_trial(source.example, None, score, asha, resources)
        # Equal pretrainings have equal names, so each runs once.
        joints = [build_joint_run(trial.pretrain) for trial in listed if trial.pretrain]
        named = {make_pretraining_name(joint): joint for joint in joints}
        first = [Trial(name, joint, splits=("validation",)) for name, joint in named.items()]
        failed: dict[str, str] = {}

        def start_from_pretraining(trial: Trial) -> Trial:
            if trial.pretrain is None:
                return trial
            name = make_pretraining_name(build_joint_run(trial.pretrain))
            if name in failed:
                raise UserError(f"its pretraining {name} failed: {failed[name]}")
            path = directories.join_uri(store, name) if store else str(folder / name)
            return replace(trial, config=replace(trial.config, init_from=path), pretrain=None)

        with cluster.ray_session() if first else contextlib.nullcontext():
            if first:
                for trial in first:
                    check_trial(trial, folder, None, None, resources)
                # Pretrainings are neither scored nor stopped early, and their models are needed.
                plain = replace(options, score=None, asha=None, keep=None, label="pretraining")
                ended = TrialDriver(ListedTrials(first), plain).run()
                failed |= {e.name: e.error or e.status for e in ended if e.status != "finished"}
            return TrialDriver(source, options, start_from_pretraining).run()


def check_trial(
    trial: Trial,
    folder: Path | None,
    score: ScoreConfig | None,
    asha: AshaConfig | None,
    resources: ResourceConfig,
) -> None:
    """Raise UserError for errors that can be found before anything starts.

    Args:
        trial: settings, seeds and folder to run.
        folder: directory of all trials, to compare with an existing run; None skips this.
        score: computation of the score, or None.
        asha: early stopping, or None.
        resources: resources of one trial.
    """
    from pipelines.training.loop.run import find_finished_result, validate_run

    try:
        resources.check(trial.config.training.use_gpu)
        if trial.config.training.patience:
            raise UserError(
                "training.patience: runs of equal length are compared. Remove the key; a sweep "
                "ends bad trials with scheduler: asha"
            )
        validate_run(resolve_run(trial.config))
        if folder is not None and trial.pretrain is None:
            find_finished_result(resolve_run(place_config(trial.config, folder / trial.name)))
        elif folder is not None:
            # Its initial weights are not known yet.
            check_trial_corpora(trial, folder / trial.name)
    except UserError as error:
        raise UserError(f"trial {trial.name}: {error}") from None
    if score is not None:
        score.check(list(trial.config.measured))
    if asha is not None:
        find_first_rung(asha, trial)
        if score is None:
            raise UserError("asha needs a score to stop trials by; set score")


def remove_placement_groups(ray: Any, patience_s: float) -> int:
    """Wait until this driver has no placement groups, then remove the remaining ones.

    Tune and Ray Train remove their own groups, but some seconds after they end.

    Args:
        ray: the connected ``ray`` module.
        patience_s: seconds to wait.

    Returns:
        Number of groups that were removed.
    """
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    end = time.monotonic() + patience_s
    while left := find_placement_groups(ray):
        if time.monotonic() >= end:
            for identity in left:
                remove_placement_group(
                    PlacementGroup(ray.PlacementGroupID(bytes.fromhex(identity)))
                )
            console.print_warning(f"removed {len(left)} placement groups that trials had left")
            return len(left)
        time.sleep(0.1)
    return 0


def find_placement_groups(ray: Any) -> list[str]:
    """Return the ids of this driver's placement groups that hold or wait for resources."""
    from ray.util.placement_group import placement_group_table
    from ray.util.state import list_placement_groups
    from ray.util.state.exception import RayStateApiException

    here = ray.get_runtime_context()
    try:
        # Without an address the call fails if several Ray clusters run on one machine.
        groups = list_placement_groups(
            address=here.gcs_address,
            filters=[("creator_job_id", "=", here.get_job_id()), ("state", "!=", "REMOVED")],
            limit=1000,
        )
    except RayStateApiException:
        # Ctrl-C in a terminal also ends the dashboard of an embedded Ray, which only we use.
        if os.environ.get("RAY_ADDRESS"):
            console.print_warning(
                "cannot check for leftover placement groups: Ray's dashboard is down"
            )
            return []
        table = placement_group_table()
        return [name for name, group in table.items() if group["state"] != "REMOVED"]
    return [group.placement_group_id for group in groups]


#: Seconds that a sweep waits at its end for a tracking server that does not respond.
TRACKER_PATIENCE_S = 60.0
#: Status of a trial -> final status of its MLflow run.
MLFLOW_STATUS = {
    "finished": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}


class TrialDriver:
    """Runs the trials of a source.

    Args:
        source: source of the trials.
        options: settings of the trials.
        prepare_start: called when a trial starts; returns it with ``init_from`` set.
    """

    def __init__(
        self,
        source: TrialSource,
        options: TrialOptions,
        prepare_start: Callable[[Trial], Trial] | None = None,
    ) -> None:
        self.source, self.options = source, options
        self.entries: dict[str, LedgerEntry] = {}
        self._prepare_start = prepare_start or (lambda trial: trial)
        self._asha: Any = None
        self._has_warned = False
        #: Trials whose MLflow run could not be opened because the server was unreachable.
        self._waiting: list[LedgerEntry] = []
        self._first_assignment: tuple[str, dict[str, Any]] | None = None

    # -- start of trials ----------------------------------------------------------------------

    def next_assignment(self) -> tuple[str, dict[str, Any]] | None:
        """Return the next trial to run as (name, arguments of its process), or None.

        Trials with a stored outcome are reported to the source and skipped.
        """
        assignment, self._first_assignment = self._first_assignment, None
        return assignment or self._find_next()

    def _find_next(self) -> tuple[str, dict[str, Any]] | None:
        while (entry := self._next_entry()) is not None:
            # A trial of an earlier part of the sweep is not repeated.
            settled = entry.load_settled()
            if self._asha is not None:
                # ASHA must know earlier scores before it judges new ones (decision 13).
                self._asha.replay_reports(entry.trial.name, read_reports(entry.folder))
            if settled is None:
                entry.begin()
            else:
                entry.steps_before = math.inf
            self.entries[entry.trial.name] = entry
            try:
                if settled is not None:
                    self._take_over(entry, settled)
                    continue
                self._open_run(entry)
            except UserError as error:
                # A trial that has ended is never failed afterwards.
                if settled is not None:
                    raise
                self._settle(entry, "failed", str(error))
                continue
            except Exception as error:
                if not is_away(error):
                    raise
                # Training without a run would lose its metrics, so the trial waits.
                self._waiting.append(entry)
                if not self._has_warned:
                    console.print_warning(
                        "the tracking server does not respond: new trials wait for it"
                    )
                self._has_warned = True
                return None
            resources, store = self.options.resources, self.options.store
            # Nodes have different run roots, so the path in a store is relative (decision 17).
            folder = entry.folder.relative_to(run_root()) if store else entry.folder
            place = {"folder": str(folder), "store": store}
            return entry.trial.name, place | {"cpus": resources.cpus, "gpus": resources.gpus}
        return None

    def _take_over(self, entry: LedgerEntry, settled: TrialOutcome) -> None:
        """Report a trial of an earlier part of the sweep to the source.

        A trial that ended after the driver was killed has no outcome file. Its MLflow run and its
        outcome are completed first, from the files that its process wrote.

        Args:
            entry: the trial.
            settled: its outcome, as its directory shows it.
        """
        if (entry.folder / OUTCOME).is_file():
            entry.outcome = settled
            self.source.record_outcome(settled)
            return
        if self.options.score is not None and settled.result and settled.result["evaluation"]:
            recorder = EvaluationRecorder(entry.folder, self.options.score)
            # A process on another node reported its last evaluation to the killed driver only.
            recorder.record(settled.result["evaluation"], settled.step)
        entry.tracker = tracking.start_child_run(
            self.options.parent, entry.trial.name, record=entry.folder / RUN
        )
        self._settle(entry, settled.status)

    def is_exhausted(self) -> bool:
        """Return whether all trials have been started."""
        return not self._waiting and self._first_assignment is None and self.source.is_exhausted()

    def _next_entry(self) -> LedgerEntry | None:
        if self._waiting:
            return self._waiting.pop(0)
        trial = self.source.next_trial()
        if trial is None:
            return None
        folder, store = self.options.folder / trial.name, self.options.store
        mirror = RunMirror(directories.join_uri(store, trial.name), folder) if store else None
        return LedgerEntry(trial, folder, mirror)

    def _open_run(self, entry: LedgerEntry) -> None:
        """Create the trial's directory and open its MLflow run."""
        from pipelines.training.loop.run import open_run_folder, validate_run

        # A stop file of an earlier part would end the trial at its first check.
        entry.clear_failure()
        entry.trial = self._prepare_start(entry.trial)
        run = resolve_run(place_config(entry.trial.config, entry.folder))
        config = run.config
        if entry.mirror is not None:
            entry.mirror.relocate_config(config)
        # A sampled point, or a trial with a pretrained model, is not known before it starts.
        validate_run(run)
        open_run_folder(run)
        tags = describe_run(config, entry.folder, "trial") | {"group": entry.trial.group or ""}
        tags |= {f"setting.{key}": value for key, value in entry.trial.settings.items()}
        parent = self.options.parent
        record = entry.folder / RUN
        entry.tracker = tracking.start_child_run(
            parent, entry.trial.name, config, tags, record=record
        )
        tracked = [entry.tracker.run_id, entry.tracker.uri]
        # Written last, because it names the MLflow run to which the trial writes.
        write_trial(entry.trial, entry.folder, self.options.score, tracked=tracked)
        if entry.mirror is not None:
            remote_ledger.send_trial(entry.mirror)

    # -- end of trials ------------------------------------------------------------------------

    def on_report(self, name: str, line: dict[str, Any]) -> None:
        """Store an evaluation of a trial.

        Args:
            name: name of the trial.
            line: step, score, score of each task, costs.
        """
        self.entries[name].add_report(line)

    def on_end(self, name: str, error: str | None) -> None:
        """Settle a trial that Tune has ended.

        Args:
            name: name of the trial.
            error: error that Tune reports, or None.
        """
        entry = self.entries[name]
        error_file = entry.folder / ERROR
        # Tune may report the end of a trial twice.
        if entry.outcome is not None:
            return
        if entry.mirror is not None:
            remote_ledger.fetch_trial(entry.mirror)
        if entry.build_outcome("finished").result is not None:
            self._settle(entry, "finished")
        elif error_file.is_file():
            self._settle(entry, "failed", last_line(error_file.read_text(encoding="utf-8")))
        # The order matters: an error before the signal is still a failure.
        elif self._stopper.stop_requested:
            self._settle(entry, "interrupted")
        elif error is not None:
            error_file.write_text(error + "\n", encoding="utf-8")
            self._settle(entry, "failed", error.strip().splitlines()[0])
        elif self.options.asha is not None and read_reports(entry.folder):
            self._settle(entry, "stopped")
        else:
            self._settle(entry, "failed", "the trial ended without a result and without an error")

    def _settle(self, entry: LedgerEntry, status: Any, error: str | None = None) -> None:
        outcome = entry.build_outcome(status, error)
        if entry.tracker is not None:
            tags = {"outcome": status}
            if error:
                tags["failure"] = error
            if status == "stopped":
                tags["stopped_early"] = f"by successive halving at step {outcome.step}"
            entry.tracker.tags(tags)
            if outcome.score is not None:
                entry.tracker.metrics({"score": outcome.score}, outcome.step)
            entry.tracker.end(MLFLOW_STATUS[status])
        # Written after the records of the MLflow run: an outcome file says that both are complete.
        outcome = entry.settle(status, error)
        # Stopped trials do not resume, so their weights only take space.
        if status == "stopped":
            entry.remove_weights()
        # The weights of a thousand trials fill a disk before the sweep ends.
        prune_entries(list(self.entries.values()), self.options.keep, self.source.count_repeats)
        if status == "failed":
            place = outcome.log or entry.folder
            # A trial that does not fit its corpora or its model leaves no folder.
            more = f" (see {place})" if place.exists() else ""
            console.print_warning(f"trial {entry.trial.name}: {error}{more}")
        # An interrupted trial resumes later, so its score is not final for the source.
        if status != "interrupted":
            self.source.record_outcome(outcome)

    def _flush_trackers(self) -> None:
        """Send the metrics that a busy server did not accept earlier; no later process would."""
        end = time.monotonic() + (0.0 if self._stopper.stop_requested else TRACKER_PATIENCE_S)
        for entry in self.entries.values():
            if entry.tracker is not None:
                entry.tracker.settle(max(end - time.monotonic(), 0.0))

    def _stop_trials(self) -> None:
        for entry in list(self.entries.values()):
            if entry.outcome is None and entry.tracker is not None:
                # Tune waits for the next report; a trial sees this file in 0.2 s (decision 17).
                (entry.folder / STOP).touch()

    # -- run ----------------------------------------------------------------------------------

    def run(self) -> list[TrialOutcome]:
        """Run all trials and return their outcomes; every MLflow run is ended.

        Raises:
            KeyboardInterrupt: after a graceful stop, see ``run_trials``.
        """
        from sweeps.trials import ray_tune

        self._stopper = ray_tune.GracefulStopper(self._stop_trials)
        if self.options.asha is not None:
            example = self.source.example
            last, grace = example.config.training.steps, find_first_rung(self.options.asha, example)
            self._asha = ray_tune.ResumableASHA(last, grace, self.options.asha.reduction_factor)
        try:
            self._first_assignment = self._find_next()
            if self._first_assignment is not None or not self.is_exhausted():
                self._run_tune()
                self._flush_trackers()
        finally:
            for entry in self.entries.values():
                if entry.outcome is None and entry.tracker is not None:
                    # The sweep itself failed: the trial is resumed next time.
                    self._settle(entry, "interrupted")
            shutil.rmtree(self.options.folder / "tune", ignore_errors=True)
        self._stopper.raise_if_stopped()
        prune_entries(list(self.entries.values()), self.options.keep)
        return [entry.outcome for entry in self.entries.values() if entry.outcome is not None]

    def _run_tune(self) -> None:
        from sweeps.trials import ray_tune

        with cluster.ray_session() as ray, ray_tune.quiet_environment(), self._show_progress():
            with self._stopper.handle_signals():
                ray_tune.run_tuner(
                    ray_tune.TrialFeeder(
                        self.next_assignment, self.is_exhausted, self._max_concurrent(ray)
                    ),
                    ray_tune.TrialListener(self.on_end, self.on_report),
                    self._stopper,
                    self._asha.scheduler if self._asha else None,
                    self.options.folder / "tune",
                    nested=self.source.example.config.training.workers > 1,
                    max_failures=self.options.max_failures,
                )
            # After a signal the user waits; a normal end may give Ray more time.
            patience = 5.0 if self._stopper.stop_requested else 15.0
            remove_placement_groups(ray, patience)

    def _max_concurrent(self, ray: Any) -> int:
        """Return the number of concurrent trials: the configured number, limited by resources.

        Raises:
            UserError: the cluster has too few resources for one trial.
        """
        workers = self.source.example.config.training.workers
        # Nodes that the autoscaler may start count: it starts them for the first trials.
        nodes = [*capacity.list_living_nodes(ray), *capacity.list_startable_nodes()]
        have = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
        used = self.options.resources
        fit = self.source.total
        for name, each in (("CPU", used.cpus), ("GPU", used.gpus)):
            if each:
                # 1e-6 absorbs rounding of fractional CPUs and GPUs.
                fit = min(fit, int(have.get(name, 0) / (each * workers) + 1e-6))
                if not fit:
                    raise UserError(
                        f"a trial takes {each * workers:g} {name}s ({workers} worker(s) of "
                        f"{each:g}), but Ray has {have.get(name, 0):g}; lower "
                        f"resources.{name.lower()}s or training.workers"
                    )
        return min(fit, used.max_concurrent_trials or fit)

    @contextlib.contextmanager
    def _show_progress(self) -> Iterator[None]:
        """Show a progress bar of the steps of all trials while a block runs."""
        steps = self.source.example.config.training.steps
        over = threading.Event()

        def count(reached: float) -> int:
            # Infinity stands for a settled trial.
            return int(min(reached, steps))

        def watch() -> None:
            total = self.source.total * steps
            with console.show_progress(self.options.label, total, "steps") as bar:
                while True:
                    last = over.wait(0.5)
                    entries = list(self.entries.values())
                    bar.found(sum(count(entry.steps_before) for entry in entries) - bar.first)
                    done = sum(count(math.inf if e.outcome else e.steps_done()) for e in entries)
                    bar.advance(max(done - bar.done, 0), self._progress_text(entries))
                    if last:
                        return

        thread = threading.Thread(target=watch, name="sweep-progress", daemon=True)
        thread.start()
        begin = time.monotonic()
        try:
            yield
        finally:
            over.set()
            thread.join(timeout=10 + time.monotonic() - begin)

    def _progress_text(self, entries: Sequence[LedgerEntry]) -> str:
        outcomes = [entry.outcome for entry in entries if entry.outcome is not None]
        counts = {
            "done": sum(each.status == "finished" for each in outcomes),
            "stopped": sum(each.status == "stopped" for each in outcomes),
            "failed": sum(each.status == "failed" for each in outcomes),
            "running": sum(
                entry.outcome is None and entry.tracker is not None for entry in entries
            ),
        }
        text = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        best = next(iter(compute_mean_scores(outcomes).items()), None)
        return f"{text}, best {best[1]:.4f} ({best[0]})" if best else text
