"""Order of registrations: one at a time per registered model, on one machine and across machines.

On one machine a kernel lock admits one process. Across machines the tracker gives each version the
next number, so the number is a ticket: a version's promotion is decided after those of all earlier
versions. A version is ``pending`` from its creation until its alias is set.
"""

import contextlib
import hashlib
import time
from collections.abc import Iterator
from typing import Any

from skillnet_platform import console, storage
from skillnet_platform.storage.locks import hold_lock
from skillnet_platform.tracking import orphans
from skillnet_platform.tracking.database_uri import is_sqlite, sqlite_path

#: Tag of a version: where its registration stands.
STATE_TAG = "skillnet.state"
PENDING, DONE, ABANDONED = "pending", "done", "abandoned"
#: Seconds that a registration waits for an earlier one on another machine, which may be dead.
EARLIER_PATIENCE_S = 60.0
_PAUSE_S = 0.5


@contextlib.contextmanager
def registration_turn(uri: str, name: str) -> Iterator[None]:
    """Hold the lock of a registered model on this machine while the block runs.

    Processes that share a sqlite database share the lock, also on a shared disk.

    Args:
        uri: address of the tracker, such as ``http://host:5000``.
        name: registered model, as MLflow lists it.
    """
    # The name may contain any character.
    file = f"registry-{hashlib.sha256(f'{uri} {name}'.encode()).hexdigest()[:16]}.lock"
    folder = sqlite_path(uri).parent if is_sqlite(uri) else storage.run_root() / "cache"
    folder.mkdir(parents=True, exist_ok=True)

    def describe(holder: str) -> str:
        return f"{name}: waiting for {holder}, which registers a version of this model"

    with hold_lock(folder / f".{file}", describe, wait=True):
        yield


def is_done(version: Any) -> bool:
    """Return whether the registration of a version is complete: its alias was set."""
    return bool(version.tags.get(STATE_TAG) == DONE)


def wait_for_earlier_versions(client: Any, name: str, number: int) -> None:
    """Wait until the promotion of every earlier version is decided, or its process is dead.

    Args:
        client: ``MlflowClient``.
        name: registered model, as MLflow lists it.
        number: version that waits.
    """
    end: float | None = None
    while True:
        pending = [
            version
            for version in client.search_model_versions(f"name = '{name}'")
            if int(version.version) < number
            and version.tags.get(STATE_TAG) == PENDING
            and not orphans.has_ended(version.tags.get(orphans.PROCESS_TAG, ""))
        ]
        if not pending:
            return
        # MLflow returns numbers or texts, depending on the tracker.
        waited_for = sorted(int(version.version) for version in pending)
        numbers = ", ".join(map(str, waited_for))
        if end is None:
            console.print_note(f"{name}: waiting for the registration of version {numbers}")
            end = time.monotonic() + EARLIER_PATIENCE_S
        if time.monotonic() >= end:
            console.print_warning(
                f"{name}: the registration of version {numbers} did not end in "
                f"{EARLIER_PATIENCE_S:.0f} s. Register that model again"
            )
            # Marked, so that later registrations do not wait for it again.
            for earlier in waited_for:
                client.set_model_version_tag(name, str(earlier), STATE_TAG, ABANDONED)
            return
        time.sleep(_PAUSE_S)
