"""``skillnet prepare`` with its tasks in the driver, one after the other.

Crash tests start it hundreds of times. Reading, transforming, writing and publishing are the real
code; only Ray's scheduling is replaced. Kills under Ray are tested in
``tests/integration/test_prepare.py``.
"""

import json
from collections.abc import Callable, Generator, Sequence
from typing import Any

import ray

from pipelines import prepare as command
from pipelines.data.preprocessing import pipeline
from pipelines.data.preprocessing import prepare as preparation
from pipelines.data.preprocessing.datasource import CorpusJob, read_units
from pipelines.data.preprocessing.pipeline import write_block


class LocalTask:
    """Stand-in for a remote function of Ray: ``remote`` calls it and returns the result."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.remote = function


def run_tasks(
    jobs: Sequence[CorpusJob], session: str, scheduling: pipeline.SchedulingOptions
) -> Generator[dict[str, Any], None, None]:
    """Do what ``pipeline._run_tasks`` does, in this process."""
    for index, job in enumerate(jobs):
        for unit in read_units(index, job):
            done = write_block(jobs, session, unit)
            yield from map(json.loads, done["result"].to_pylist())


def main(argv: list[str] | None = None) -> int:
    """Run ``skillnet prepare``; for a process of its own, because it changes Ray's functions."""
    ray.remote = lambda **options: LocalTask  # type: ignore[assignment]
    ray.get = lambda results: results  # type: ignore[assignment]
    preparation.cluster.ensure_ray = lambda *_: ray  # type: ignore[assignment, misc]
    pipeline._run_tasks = run_tasks  # type: ignore[assignment]
    return command.main(argv)


if __name__ == "__main__":
    raise SystemExit(main())
