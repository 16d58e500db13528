"""The README's way through a cluster, walked on hosts made of namespaces: see ``lab``.

What is true here and not on a cloud: the hosts share two cores, a network without delay, and a
folder in the place of a network file system; no host has a GPU; dependencies are there already.
The tests stand in the order of the walk and share one cluster.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from skillnet_platform import config as configuration
from skillnet_platform import environment
from tests.cluster.lab import ROOT, SHARED, Host, lab, missing
from tests.made_corpora import put_archive
from tests.small_corpora import small_config, write_corpora

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(missing()), reason=missing())]
#: A step that takes longer hangs. Ten times what it takes on an idle machine of two cores.
LATE_S = 600.0
DASHBOARD = "http://127.0.0.1:8265"
SKILLNET = (sys.executable, "-m", "skillnet_platform.cli")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lab") / "lab"


@pytest.fixture(scope="module")
def shared(hosts: dict[str, Host], folder: Path) -> Path:
    """The folder that all hosts see at SHARED, as this process sees it."""
    return folder / "shared"


@pytest.fixture(scope="module")
def hosts(folder: Path) -> Iterator[dict[str, Host]]:
    with lab(folder, ["head", "worker"]) as made:
        client = made["client"]
        client.environment |= {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_ADDRESS": DASHBOARD,
            "OMP_NUM_THREADS": "1",
        }
        client.run("ray", "get-auth-token", "--generate")
        write_cluster_file(folder, made)
        yield made


def write_cluster_file(folder: Path, hosts: dict[str, Host]) -> None:
    """on_prem.yaml with what its comments say is to be changed, and dependencies that are there."""
    shutil.copytree(ROOT / "platform/deploy", folder / "deploy")
    (folder / "deploy/requirements.txt").write_text(environment.requirements_text())
    told: dict[str, Any] = yaml.safe_load((folder / "deploy/on_prem.yaml").read_text())
    told["provider"]["head_ip"] = hosts["head"].address
    told["provider"]["worker_ips"] = [hosts["worker"].address]
    told["min_workers"] = told["max_workers"] = 1
    told["auth"] = {"ssh_user": "root", "ssh_private_key": "~/.ssh/id_ed25519"}
    assert f"SKILLNET_HOME={SHARED} " in told["setup_commands"][0]
    told["setup_commands"][0] = f"SKILLNET_VENV={sys.prefix} {told['setup_commands'][0]}"
    told["file_mounts"]["~/.skillnet/deploy"] = str(folder / "deploy")
    (folder / "shared/cluster.yaml").write_text(yaml.safe_dump(told, sort_keys=False))


def submit(
    client: Host, *words: str, check: bool = True, seconds: float = LATE_S
) -> dict[str, Any]:
    """``skillnet submit --json``: what it tells, with the job's log under "log"."""
    done = client.run(*SKILLNET, "submit", "--json", *words, check=check, seconds=seconds)
    return {**json.loads(done.stdout), "log": done.stderr}


CLUSTER = f"{SHARED}/cluster.yaml"


def test_ray_up_and_status(hosts: dict[str, Host]) -> None:
    client = hosts["client"]
    client.run("ray", "up", "-y", "--no-config-cache", CLUSTER, seconds=LATE_S)
    deadline = time.monotonic() + LATE_S
    while True:
        said = client.run("ray", "exec", CLUSTER, "ray status").stdout
        if "2 local.cluster.node" in said:  # of two hosts: the head and its worker
            break
        assert time.monotonic() < deadline, said
        time.sleep(2)


def test_the_dashboard_answers_through_a_tunnel_only(hosts: dict[str, Host]) -> None:
    client, head = hosts["client"], hosts["head"]
    direct = client.run("curl", "-sS", "-m", "5", f"http://{head.address}:8265", check=False)
    assert direct.returncode == 7, "the dashboard listens on loopback"
    client.start("ray", "dashboard", CLUSTER, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ask = ("curl", "-sS", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}")
    for _ in range(200):
        if client.run(*ask, DASHBOARD, check=False).stdout == "200":
            break
        time.sleep(0.5)
    assert client.run(*ask, f"{DASHBOARD}/api/version").stdout in ("401", "403")
    token = client.run("cat", "/root/.ray/auth_token").stdout.strip()
    header = ("-H", f"Authorization: Bearer {token}")
    assert client.run(*ask, *header, f"{DASHBOARD}/api/version").stdout == "200"


def test_a_job_without_the_token_is_refused(hosts: dict[str, Host]) -> None:
    client = hosts["client"]
    plain = ("ray", "job", "submit", "--", "touch", "/tmp/was-here")
    done = client.run(*plain, check=False, RAY_AUTH_MODE="disabled")
    assert done.returncode != 0
    assert "Missing authentication token" in done.stderr
    wrong = client.run(*SKILLNET, "submit", "prepare", check=False, RAY_AUTH_TOKEN="0" * 64)
    assert wrong.returncode == 2
    assert "refuses the token (RAY_AUTH_TOKEN)" in wrong.stderr
    assert hosts["head"].run("ls", "/tmp/was-here", check=False).returncode != 0


def test_doctor_looks_at_every_node(hosts: dict[str, Host]) -> None:
    asked = ["finetune", "--training.workers", "2", "--training.placement", "strict_spread"]
    done = hosts["client"].run(*SKILLNET, "doctor", "--json", *asked, seconds=LATE_S)
    told = {each["check"]: each for each in json.loads(done.stdout)["findings"]}
    for name in ("versions", "resources", "authentication", "storage", "interface"):
        assert told[name]["level"] == "ok", told[name]
    assert told["storage"]["seen"] == f"{SHARED}: each of 2 nodes reads what all wrote"
    assert "10.77.0.2 by eth0" in told["interface"]["seen"]
    assert told["ray state api"]["seen"] == "2 node(s)"


def test_prepare_by_plain_job_submission_and_by_ours(hosts: dict[str, Host], shared: Path) -> None:
    client = hosts["client"]
    put_archive(shared / "archives")
    words = ("prepare", "tests.made_corpora:Made")
    environment = '{"env_vars": {"PYTHONPATH": "platform"}}'
    client.run(
        *("ray", "job", "submit", "--working-dir", ".", "--runtime-env-json", environment),
        *("--", "python", "-m", "skillnet_platform.cli", *words),
        seconds=LATE_S,
    )
    manifest = json.loads((shared / "corpora/made/manifest.json").read_text())
    assert manifest["rows_in"] == 100
    again = submit(client, *words)
    assert (again["status"], again["exit_code"]) == ("SUCCEEDED", 0)
    assert "unchanged" in again["log"]
    assert 0 < again["upload_bytes"] < 20 * 2**20
    assert "upload: " in again["log"]


def test_training_on_two_hosts(hosts: dict[str, Host], shared: Path) -> None:
    write_corpora(shared / "corpora")
    config = small_config(Path(SHARED) / "corpora", workers=2, placement="strict_spread", steps=6)
    config.name, config.run_dir, config.tracking.register = "two-hosts", None, False
    config.data = None
    (shared / "two.yaml").write_text(configuration.to_yaml(config), encoding="utf-8")
    done = submit(hosts["client"], "finetune", "--config", f"{SHARED}/two.yaml", seconds=LATE_S)
    assert done["exit_code"] == 0, done["log"]
    trained = json.loads((shared / "two-hosts/trained.json").read_text())
    assert (trained["world"], trained["step"]) == (2, 6)
    for name in ("head", "worker"):
        logs = hosts[name].run("bash", "-c", "ls /tmp/ray/session_latest/logs/train").stdout
        assert "-worker-" in logs, f"no training worker ran on {name}: {logs}"


def test_a_sweep_goes_on_without_the_client(hosts: dict[str, Host], shared: Path) -> None:
    client = hosts["client"]
    config = small_config(Path(SHARED) / "corpora", steps=4, workers=1)
    config.tracking.register, config.data, config.run_dir = False, None, None
    run = configuration.to_dict(config) | {"name": None}
    space = {"training.lr": {"choice": [0.001, 0.003]}}
    sweep = {"name": "sweep", "run": run, "space": space, "search": "grid"}
    (shared / "sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    words = ("sweep", "--config", f"{SHARED}/sweep.yaml")
    follower = client.start(
        *SKILLNET, "submit", *words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert follower.stdout is not None
    for line in follower.stdout:
        if line.startswith("job sweep-"):
            break
    follower.kill()
    follower.wait(10)
    follower.stdout.close()
    done = submit(client, "--attach", seconds=LATE_S)
    assert done["job_id"] in line
    assert (done["status"], done["exit_code"]) == ("SUCCEEDED", 0), done["log"]
    result = json.loads((shared / "sweep/result.json").read_text())
    assert result["counts"]["finished"] == 2


def test_the_pages_of_the_runs_through_a_tunnel(hosts: dict[str, Host]) -> None:
    client, head = hosts["client"], hosts["head"]
    job = submit(client, "--detach", "--check", "false", "ui", "--port", "5000")["job_id"]
    client.start("ssh", "-N", "-L", "5000:127.0.0.1:5000", head.address)
    url = "http://127.0.0.1:5000/api/2.0/mlflow/experiments/get-by-name?experiment_name=skillnet"
    for _ in range(200):
        done = client.run("curl", "-sS", "-m", "5", url, check=False)
        if done.returncode == 0:
            break
        time.sleep(1)
    assert json.loads(done.stdout)["experiment"]["name"] == "skillnet"
    client.run("ray", "job", "stop", job)


def test_a_users_mistake_is_told_by_the_job(hosts: dict[str, Host]) -> None:
    client = hosts["client"]
    done = submit(client, "--check", "false", "prepare", "no-such-corpus", check=False)
    assert (done["status"], done["exit_code"]) == ("FAILED", 2)
    assert "unknown corpus 'no-such-corpus'" in done["log"]
    lost = client.run(*SKILLNET, "submit", "--attach", "no-such-job", check=False)
    assert lost.returncode == 2
    assert "no such job on the cluster" in lost.stderr


def test_ray_down_leaves_nothing_running(hosts: dict[str, Host]) -> None:
    hosts["client"].run("ray", "down", "-y", CLUSTER, seconds=LATE_S)
    deadline = time.monotonic() + LATE_S
    for name in ("head", "worker"):
        while hosts[name].run("pgrep", "-x", "raylet", check=False).returncode == 0:
            assert time.monotonic() < deadline, f"{name} still runs a raylet"
            time.sleep(1)
