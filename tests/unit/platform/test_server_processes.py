"""A server and its children end with the process that started them, however it ends."""

import os
import subprocess
import sys

import psutil
import pytest

from skillnet_platform.tracking import server as tracking_server

#: A server with a child, both of which say who they are.
SERVER = "echo $$; sleep 1000 & echo $!; wait"
STARTS = f"""
import os, time
from skillnet_platform.tracking import server
with server.running_server(["sh", "-c", {SERVER!r}], os.environ):
    os.write(1, b"in\\n")  # print may write the line in two parts
    time.sleep(1000)
"""


def test_a_killed_process_leaves_no_server() -> None:
    with subprocess.Popen([sys.executable, "-c", STARTS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        # The server may print before its watcher knows of it; the watcher confirms by "in".
        said = {process.stdout.readline().strip() for _ in range(3)}
        try:
            below = [psutil.Process(int(number)) for number in said - {b"in"}]
        finally:
            process.kill()
        _, alive = psutil.wait_procs(below, timeout=60)
        assert not alive


def test_a_server_that_does_not_listen_is_killed_and_so_is_what_it_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracking_server, "END_S", 0.5)
    deaf = "trap '' TERM; sleep 1000 & echo $!; wait; sleep 1000"
    with tracking_server.running_server(
        ["sh", "-c", deaf], os.environ, stdout=subprocess.PIPE
    ) as server:
        # By a pipe: capfd's file, read while it is being written, loses what comes in between.
        assert server.stdout is not None
        child = psutil.Process(int(server.stdout.readline()))
    server.stdout.close()
    assert server.returncode is not None
    _, alive = psutil.wait_procs([child], timeout=60)
    assert not alive
