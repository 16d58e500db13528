"""A job that takes all cores of the head, so that trials run on the worker."""

import contextlib
import json
import os
from collections.abc import Iterator

from tests.cluster.cluster_lab import HOST_HOME, Host
from tests.helpers.waiting import wait_until

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

    token = client.run("cat", f"{HOST_HOME}/.ray/auth_token").stdout.strip()
    job = f"{client.environment['RAY_ADDRESS']}/api/jobs/{JOB}"
    # Each `ray job status` would import Ray.
    ask = ("curl", "-sS", "-H", f"Authorization: Bearer {token}")

    def read_status() -> str:
        return client.run(*ask, job).stdout

    wait_until(lambda: "RUNNING" in read_status(), seconds, read_status, pause=0.5)
    try:
        yield
    finally:
        client.run("ray", "job", "stop", JOB)
