"""A job that takes all cores of the head, so that trials run on the worker."""

import contextlib
import json
import os
import time
from collections.abc import Iterator

from tests.cluster.lab import Host

JOB = "occupied-head"


@contextlib.contextmanager
def occupied_head(client: Host, seconds: float) -> Iterator[None]:
    """Keep the cores of the head busy for the length of a block.

    Otherwise Tune runs all trials on the head if the first ends before the worker's process starts.

    Args:
        client: host with the token and the tunnel of the cluster.
        seconds: how long the start of the job may take.
    """
    client.run(
        *("ray", "job", "submit", "--no-wait", "--submission-id", JOB),
        *("--entrypoint-num-cpus", str(len(os.sched_getaffinity(0)))),
        *("--entrypoint-resources", json.dumps({"node:__internal_head__": 0.001})),
        *("--", "sleep", "infinity"),
    )
    deadline = time.monotonic() + seconds
    while "running" not in (said := client.run("ray", "job", "status", JOB).stdout.lower()):
        assert time.monotonic() < deadline, said
        time.sleep(1)
    try:
        yield
    finally:
        client.run("ray", "job", "stop", JOB)
