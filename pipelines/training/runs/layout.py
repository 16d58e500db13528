"""Files in the folder of a run: reading, creating and locking them, and the counts of its tasks.

``trained.json`` and ``state.json`` of a checkpoint have the counts. Registration reads them: a
model with an untrained task must not be registered.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.training.config.run import FinetuneConfig
from skillnet_files.commit import is_temporary, remove_leftovers
from skillnet_platform import config as configuration
from skillnet_platform import console, tracking
from skillnet_platform.storage import atomic_write, read_record
from skillnet_platform.storage.location import Location, join_location
from skillnet_platform.storage.locks import LEASE, hold_lease, hold_lock, is_shared_disk
from skillnet_platform.storage.retry import StoreUnavailableError
from skillnet_platform.tracking.backend import SYSTEM_TAG, TASKS_TAG

CONFIG = "config.yaml"
RUN = "run.json"
RESULT = "result.json"
#: Summary of the training: time, losses, throughput.
TRAINED = "trained.json"
#: Prefix of files about the model that a growth starts from; the second are its evaluation rows.
SOURCE = "source"
SOURCE_ROWS = "source-evaluation.json"
#: File beside a copy of weights: the configuration that they were trained with.
SETTINGS = "settings.json"
LOCK = ".lock"


@contextlib.contextmanager
def lock_run_folder(run: Path, mirror: str | None = None) -> Iterator[None]:
    """Hold the locks of a run's folder, so that no second process works in it on any host.

    The lock ends with its process, so the folder of a killed run can be locked at once. Leases in
    the store, and on a shared disk, hold between hosts. A folder without a run is removed again: a
    rejected configuration does not reserve the name.

    Args:
        run: folder of a run, sweep or study; created if it is missing.
        mirror: URI of its copy in an object store.

    Raises:
        UserError: another process works in the folder; names its process and host.
        StoreUnavailableError: the store does not answer, and the run is not on this machine.
    """

    def describe(place: Location, holder: str) -> str:
        return (
            f"{place}: {holder} works in this folder now. Wait for its end, or choose another "
            "--name"
        )

    with hold_lock(run / LOCK, partial(describe, run)):
        try:
            with contextlib.ExitStack() as stack:
                for place in (run if is_shared_disk(run) else None, mirror):
                    if place is not None:
                        lease = hold_lease(join_location(place, LEASE), partial(describe, place))
                        _enter_lease(stack, lease, run)
                yield
        finally:
            if is_unused(run):
                remove_leftovers(run)
                with contextlib.suppress(OSError):
                    (run / LOCK).unlink(missing_ok=True)
                    run.rmdir()


def _enter_lease(
    stack: contextlib.ExitStack, lease: contextlib.AbstractContextManager[None], run: Path
) -> None:
    try:
        stack.enter_context(lease)
    except StoreUnavailableError as error:
        if is_unused(run):
            raise
        console.print_warning(
            f"{error.reason}. Start no second process for the same run: nothing would refuse it"
        )


def is_unused(run: Path) -> bool:
    """Return whether a folder is missing, or has no file but locks and temporary files.

    A process that is killed before the configuration has its name leaves those two.
    """
    if not run.is_dir():
        return not run.exists()
    return all(path.name in (LOCK, LEASE) or is_temporary(path) for path in run.iterdir())


def create_run_folder(config: FinetuneConfig, run: Path) -> None:
    """Create the folder of a new run with its configuration; an existing one stays.

    Callers validate the run before: the folder reserves the run's name.

    Args:
        config: settings of the run.
        run: its folder.
    """
    stored = run / CONFIG
    if not stored.is_file():
        with atomic_write(stored, "w") as stream:
            stream.write(configuration.to_yaml(config))


def read_result(path: Path) -> dict[str, Any]:
    """Read the result of a run and check the keys that commands show.

    Args:
        path: location of ``result.json``.

    Raises:
        UserError: the file is damaged.
    """
    required: dict[str, type | tuple[type, ...]] = {
        "step": int,
        "seconds": (int, float),
        "model": str,
        "name": str,
        "evaluation": list,
    }
    remedy = "remove it, and the same command resumes from the newest checkpoint"
    return read_record(path, required, remedy)


def describe_run(config: FinetuneConfig, run: Path, stage: str) -> dict[str, str]:
    """Return the tags of an MLflow run, which the list of runs shows.

    Args:
        config: settings of the run, whose tasks are those that it trains, or else measures.
        run: its folder.
        stage: command that makes it.
    """
    tasks = ", ".join(config.trained or config.measured)
    return {"run_dir": str(run), "stage": stage, SYSTEM_TAG: config.system, TASKS_TAG: tasks}


def track_run(
    config: FinetuneConfig,
    run: Path,
    stage: str,
    tags: Mapping[str, str] | None = None,
    parent: str | None = None,
) -> contextlib.AbstractContextManager[tracking.Tracker]:
    """Open the MLflow run of a folder for a block; a resumed run continues the recorded one.

    Args:
        config: settings of the run.
        run: its folder.
        stage: command that makes it.
        tags: further tags.
        parent: id of the parent run.
    """
    return tracking.start_run(
        str(config.name),
        config,
        config.tracking,
        tags={**describe_run(config, run, stage), **(tags or {})},
        record=run / RUN,
        parent=parent,
    )


@dataclass
class TaskCounts:
    """Counts of one task over all ranks.

    Args:
        steps: steps taken.
        nonfinite_steps: steps without an update, because the gradient was not finite.
        consecutive: how many of the newest steps made no update.
        rows: rows read.
        unalignable_rows: rows whose CTC loss is zero, because the audio has too few tokens.
        is_inherited: all weights of the task came from a model in which it is trained.
    """

    steps: int = 0
    nonfinite_steps: int = 0
    consecutive: int = 0
    rows: int = 0
    unalignable_rows: int = 0
    is_inherited: bool = False

    @property
    def untrained_reason(self) -> str | None:
        """Why no step can have changed a weight; None if one can, or if there was no step."""
        if not self.steps:
            return None
        if self.nonfinite_steps == self.steps:
            return f"none of its {self.steps} steps had a finite gradient"
        if self.unalignable_rows == self.rows:
            return f"none of its {self.rows} rows has enough audio for its transcript"
        return None

    @property
    def problems(self) -> str:
        """Counts that are not zero, as a text; "" without any."""
        parts = []
        if self.nonfinite_steps:
            parts.append(f"{self.nonfinite_steps} of {self.steps} steps skipped")
        if self.unalignable_rows:
            parts.append(f"{self.unalignable_rows} of {self.rows} rows too short for CTC")
        return ", ".join(parts)


def parse_task_counts(tree: Any) -> dict[str, TaskCounts]:
    """Return task -> counts from a stored document.

    Args:
        tree: task -> counts as plain values.

    Raises:
        ValueError: the document has another form.
    """
    known = {name: type(value) for name, value in asdict(TaskCounts()).items()}
    is_valid = isinstance(tree, dict) and all(
        isinstance(entry, dict)
        and entry.keys() == known.keys()
        and all(type(value) is known[key] and value >= 0 for key, value in entry.items())
        for entry in tree.values()
    )
    if not is_valid:
        raise ValueError("the counts of its tasks are damaged")
    return {name: TaskCounts(**entry) for name, entry in tree.items()}


def find_untrained_tasks(counts: Mapping[str, TaskCounts]) -> dict[str, str]:
    """Return task -> reason for the tasks whose weights are random: no step changed them."""
    total = sum(each.steps for each in counts.values())
    idle = f"it took none of the {total} steps of its run"
    reasons = {
        name: each.untrained_reason if each.steps or each.is_inherited else idle
        for name, each in counts.items()
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}
