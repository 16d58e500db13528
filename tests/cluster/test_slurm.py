"""slurm.sh on hosts made of namespaces, with a stub of SLURM's commands: see ``lab``.

What is true here and not under SLURM: no scheduler sends the notice, and nobody queues a job again.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from skillnet_platform.config.parser import to_yaml
from tests.chaos.namespaces import ROOT, missing
from tests.cluster.cluster_lab import NEEDED, Host, lab
from tests.helpers.small_corpora import small_config, write_corpora
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.cluster
LATE_S = 600.0
STEPS = 120
SCRIPT = ROOT / "platform/deploy/slurm.sh"
#: Runs the command on every node of the job, as srun does: with the environment of its caller.
SRUN = """#!/usr/bin/env bash
while [ "${1:0:2}" = -- ]; do shift; done
words="$(printf '%q ' "$@")"
for node in $SLURM_STUB_NODES; do
    { export -p; echo "cd $PWD && exec $words"; } | ssh "$node" bash -s &
done
wait
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def hosts(folder: Path) -> Iterator[dict[str, Host]]:
    if reason := missing(*NEEDED):
        pytest.skip(reason)
    shared, programs = folder / "shared", folder / "lab/bin"
    programs.mkdir(parents=True)
    for name, text in {"srun": SRUN, "scontrol": f'echo "$@" >>{shared}/requeued\n'}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    write_corpora(shared / "corpora")
    config = small_config(shared / "corpora", workers=2, placement_strategy="strict_spread")
    config.name, config.tracking.register = "spread", False
    config.training.steps, config.training.checkpoint_every = STEPS, 0
    (shared / "run.yaml").write_text(to_yaml(config))
    with lab(folder / "lab", ["head", "worker"], shared) as made:
        for host in made.values():
            host.environment["PATH"] = f"{programs}:{host.environment['PATH']}"
        for host in (made["head"], made["worker"]):
            host.run("bash", "-c", "mkdir -p ~/.ray && echo -n 0123456789abcdef >~/.ray/auth_token")
        made["head"].environment |= {
            "SKILLNET_HOME": str(shared),
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_STUB_NODES": f"{made['head'].address} {made['worker'].address}",
            "SKILLNET_INTERFACE": "eth0",
            "OMP_NUM_THREADS": "1",
        }
        yield made


def start_job(head: Host, shared: Path, log: Path) -> "subprocess.Popen[str]":
    words = ("bash", str(SCRIPT), "finetune", "--config", f"{shared}/run.yaml")
    with log.open("w") as said:
        return head.start("env", f"--chdir={ROOT}", *words, stdout=said, stderr=subprocess.STDOUT)


@pytest.mark.slow("test_preemption.py::test_file_of_the_driver_requests_a_stop")
def test_a_notice_leaves_a_checkpoint_and_the_next_start_ends_the_run(
    hosts: dict[str, Host], folder: Path
) -> None:
    shared, head, log = folder / "shared", hosts["head"], folder / "log"
    run = shared / "spread"
    job = start_job(head, shared, log)
    wait_until(lambda: "training: " in log.read_text(), LATE_S, log.read_text)
    # As `--signal=B:TERM@180`: the shell of the job alone is notified.
    head.run("pkill", "-TERM", "-f", f"^bash {SCRIPT}")
    assert job.wait(LATE_S) == 143, log.read_text()
    assert (shared / "requeued").read_text() == "requeue 17\n"
    assert not (run / "model").exists()
    again = start_job(head, shared, log)
    assert again.wait(LATE_S) == 0, log.read_text()
    trained = json.loads((run / "trained.json").read_text())
    assert (trained["world"], trained["step"]) == (2, STEPS)
    assert 0 < trained["resumed"] < STEPS
    for name in ("head", "worker"):
        logs = "ls /tmp/skillnet-0/ray/session_latest/logs/train"
        assert "-worker-" in hosts[name].run("bash", "-c", logs).stdout, name


def test_what_is_missing_is_named_before_anything_starts(hosts: dict[str, Host]) -> None:
    head = hosts["head"]
    here = ("env", f"--chdir={ROOT}")
    for words, expected in (
        (("bash", str(SCRIPT)), "give a command of skillnet"),
        (("env", "-u", "SLURM_JOB_ID", "bash", str(SCRIPT), "prepare"), "start this script with"),
        (("env", "-u", "SKILLNET_HOME", "bash", str(SCRIPT), "prepare"), "SKILLNET_HOME is not"),
        (("env", "--chdir=/", "bash", str(SCRIPT), "prepare"), "submit from the root"),
        (("env", "RAY_AUTH_TOKEN_PATH=/no", "bash", str(SCRIPT), "prepare"), "no token"),
    ):
        done = head.run(*here, *words, check=False)
        assert (done.returncode, expected in done.stderr) == (2, True), done.stderr
