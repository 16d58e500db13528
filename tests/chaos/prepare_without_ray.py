"""``skillnet prepare`` with its tasks in the driver, one after the other.

Crash tests start it hundreds of times. Reading, transforming, writing and publishing are the real
code; only Ray's scheduling is replaced. Kills under Ray are tested in
``tests/integration/test_prepare.py``.
"""

from typing import Any

from pipelines import prepare as command
from pipelines.data.preprocessing import prepare as preparation
from pipelines.data.preprocessing.local_tasks import LocalTasks


def start_here(*given: Any) -> LocalTasks:
    """Do what ``prepare._start_tasks`` does, without processes and for media too."""
    return LocalTasks(1)


def main(argv: list[str] | None = None) -> int:
    """Run ``skillnet prepare``; for a process of its own, because it replaces a function."""
    preparation._start_tasks = start_here  # type: ignore[assignment]
    return command.main(argv)


if __name__ == "__main__":
    raise SystemExit(main())
