"""A cloud's notice that a machine is taken away reaches the training workers, and nobody else."""

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.spot_metadata import Metadata
from tests.helpers.waiting import wait_until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "curl", "pgrep"))),
        reason="needs root, unshare, curl and pgrep: it must see no real workers",
    ),
]
SCRIPT = Path(__file__).parents[2] / "platform/deploy/watch_spot.sh"

#: Processes of a node, by the names that Ray gives them; each notes the signals that it gets.
NODE = """
stand_in() {
  (exec -a "$1" bash -c "trap 'echo $2 >>$LOG' TERM; echo up >>$LOG; while :; do sleep 0.1; done") &
}
stand_in ray::RayTrainWorker.poll_status first
stand_in ray::IDLE idle
stand_in /opt/ray/raylet raylet
bash "$SCRIPT" & watcher=$!
until [ -f "$LOG.more" ]; do sleep 0.1; done
bash "$SCRIPT"; echo "second watcher $?" >>$LOG
stand_in ray::RayTrainWorker later
wait $watcher
"""


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    server = Metadata()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_training_workers_get_sigterm_once_and_nobody_else(
    tmp_path: Path, metadata: Metadata
) -> None:
    log, said = tmp_path / "log", tmp_path / "said"
    process = subprocess.Popen(
        ["unshare", "-p", "-f", "--kill-child", "--mount-proc", "bash", "-uc", NODE],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "LOG": str(log),
            "SCRIPT": str(SCRIPT),
            "SKILLNET_METADATA": metadata.address,
        },
        stdout=said.open("w"),
        stderr=subprocess.STDOUT,
    )

    def lines() -> list[str]:
        return log.read_text().splitlines() if log.is_file() else []

    def wait_for(find: Callable[[], bool]) -> None:
        wait_until(find, 120, said.read_text, process=process)

    try:
        wait_for(lambda: lines() == ["up"] * 3 and metadata.asked > 0)
        metadata.decided = True
        wait_for(lambda: "first" in lines())
        (tmp_path / "log.more").touch()
        # One that starts after the notice; by then the watcher has gone round again.
        wait_for(lambda: "later" in lines())
    finally:
        process.kill()
        process.wait()
    assert lines() == ["up"] * 3 + ["first", "second watcher 0", "up", "later"]
    assert '"action": "terminate"' in said.read_text()
