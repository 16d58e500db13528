"""The README's way through a cluster, walked on hosts made of namespaces: see ``lab``.

What is true here and not on a cloud: the hosts share their cores and a network without delay; no
host has a GPU; dependencies are there already; the store is moto's and keeps objects in memory.
The tests stand in the order of the walk and share one cluster.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from skillnet_cluster import pin_nodes
from skillnet_cluster.submit import SOURCE_FOLDERS
from skillnet_platform import config as configuration
from tests.chaos.namespaces import ROOT, missing
from tests.cluster.cluster_lab import HOST_HOME, NEEDED, Host, lab
from tests.cluster.occupied_head import occupied_head
from tests.helpers.object_store import KEYS
from tests.helpers.small_corpora import small_config
from tests.helpers.synthetic_corpora import SLOW, put_archive
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.cluster
#: A step that takes longer hangs. Ten times what it takes on an idle machine of two cores.
LATE_S = 600.0
DASHBOARD = "http://127.0.0.1:8265"
SKILLNET = (sys.executable, "-m", "skillnet_platform.cli")
#: Where runs are kept on each host: in its home, which no other host sees.
HOME = f"{HOST_HOME}/runs"
TRACKS = f"sqlite:///{HOME}/mlflow.db"
BUCKET = "skillnet"
SOURCES = os.pathsep.join(SOURCE_FOLDERS)
CORPORA, RUNS = f"s3://{BUCKET}/corpora", f"s3://{BUCKET}/runs"
#: Run on the client: makes the bucket, and puts small prepared corpora there.
FILL = f"""
import pathlib, tempfile
import boto3
from skillnet_platform.storage import directories
from tests.helpers.small_corpora import write_corpora
boto3.client("s3").create_bucket(Bucket="{BUCKET}")
for corpus in write_corpora(pathlib.Path(tempfile.mkdtemp())).iterdir():
    directories.put_directory(corpus, "{CORPORA}/" + corpus.name)
"""


@pytest.fixture(scope="module", autouse=True)
def hosts_can_be_made() -> None:
    """Looked at here and not above: every collection of tests would make hosts."""
    if reason := missing(*NEEDED):
        pytest.skip(reason)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lab") / "lab"


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
        start_store(client, folder)
        write_cluster_file(folder, made)
        yield made


def start_store(client: Host, folder: Path) -> None:
    """An S3-compatible server on the client, which all hosts find through ``~/.aws``."""
    server = Path(sys.executable).with_name("moto_server")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    client.start(str(server), "-H", client.address, "-p", "9000", **quiet)
    (folder / "config").write_text(
        f"[default]\nregion = {KEYS['AWS_DEFAULT_REGION']}\nendpoint_url = {store_of(client)}\n"
    )
    (folder / "credentials").write_text(
        f"[default]\naws_access_key_id = {KEYS['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {KEYS['AWS_SECRET_ACCESS_KEY']}\n"
    )
    client.run("mkdir", "-m", "700", f"{HOST_HOME}/.aws")
    client.run("cp", f"{folder}/config", f"{folder}/credentials", f"{HOST_HOME}/.aws")
    until_it_answers(client, f"{store_of(client)}/moto-api/data.json")
    client.run(sys.executable, "-c", FILL)


def store_of(client: Host) -> str:
    return f"http://{client.address}:9000"


def stored(client: Host, name: str) -> str:
    """The content of an object of the bucket."""
    url = f"{store_of(client)}/{BUCKET}/{name}"
    return client.run("curl", "-sSf", "-H", "Authorization: AWS testing:testing", url).stdout


def until_it_answers(client: Host, url: str, *words: str) -> str:
    """What a server that was just started says."""

    ask = ("curl", "-sSf", "-m", "5", *words, url)

    def find_answer() -> "subprocess.CompletedProcess[str] | None":
        done = client.run(*ask, check=False)
        return done if done.returncode == 0 else None

    def read_error() -> str:
        return f"{url}: {client.run(*ask, check=False).stderr}"

    answer = wait_until(find_answer, LATE_S, read_error, pause=0.5)
    assert answer is not None
    return answer.stdout


def write_cluster_file(folder: Path, hosts: dict[str, Host]) -> None:
    """on_prem.yaml with what its comments say is to be changed, and dependencies that are there."""
    shutil.copytree(ROOT / "platform/deploy", folder / "deploy")
    (folder / "deploy/requirements.txt").write_text(pin_nodes.format_requirements())
    text = (folder / "deploy/on_prem.yaml").read_text()
    assert "  # ~/.aws: ~/.aws " in text
    reported: dict[str, Any] = yaml.safe_load(
        text.replace("  # ~/.aws: ~/.aws ", "  ~/.aws: ~/.aws ")
    )
    reported["provider"]["head_ip"] = hosts["head"].address
    reported["provider"]["worker_ips"] = [hosts["worker"].address]
    reported["min_workers"] = reported["max_workers"] = 1
    reported["auth"] = {"ssh_user": "root", "ssh_private_key": "~/.ssh/id_ed25519"}
    before, home, after = reported["setup_commands"][0].partition("SKILLNET_HOME=/mnt/skillnet ")
    assert home
    own = f"SKILLNET_HOME={HOME} MLFLOW_TRACKING_URI={tracker_of(hosts)} "
    reported["setup_commands"][0] = f"SKILLNET_VENV={sys.prefix} {before}{own}{after}"
    reported["file_mounts"]["~/.skillnet/deploy"] = str(folder / "deploy")
    (folder / "cluster.yaml").write_text(yaml.safe_dump(reported, sort_keys=False))


def tracker_of(hosts: dict[str, Host]) -> str:
    return f"http://{hosts['head'].address}:5000"


@pytest.fixture(scope="module")
def cluster(folder: Path) -> str:
    """Path of the cluster's file, on the client."""
    return f"{folder}/cluster.yaml"


def password(head: Host) -> str:
    """What the tracker made, from the file of its host that only its owner may read."""
    return head.run("cat", f"{HOME}/tracker/admin-password").stdout.strip()


def submit(
    client: Host, *words: str, check: bool = True, seconds: float = LATE_S
) -> dict[str, Any]:
    """``skillnet submit --json``: what it tells, with the job's log under "log"."""
    done = client.run(*SKILLNET, "submit", "--json", *words, check=check, seconds=seconds)
    return {**json.loads(done.stdout), "log": done.stderr}


def credentials(hosts: dict[str, Host]) -> dict[str, str]:
    """Variables that let a job into the tracker."""
    word = password(hosts["head"])
    return {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": word}


def tracked(hosts: dict[str, Host]) -> list[str]:
    """Options of ``submit`` that let a job into the tracker."""
    reported = credentials(hosts).items()
    return [word for name, value in reported for word in (f"--env.{name}", value)]


def plain(client: Host, environment: dict[str, str], *words: str) -> str:
    """Plain ``ray job submit`` of one of our commands, as the guide has it: the job's log."""
    runtime = json.dumps({"env_vars": {"PYTHONPATH": SOURCES, **environment}})
    return client.run(
        *("ray", "job", "submit", "--working-dir", ".", "--runtime-env-json", runtime),
        *("--", "python", "-m", "skillnet_platform.cli", *words),
        seconds=LATE_S,
    ).stdout


def give(client: Host, head: Host, name: str, content: Any) -> str:
    """A file of a run that both the client and the head have; its path."""
    path = f"{HOST_HOME}/{name}"
    client.run("bash", "-c", f"cat >{path} <<'END'\n{yaml.safe_dump(content)}END")
    client.run("rsync", path, f"{head.address}:{path}")
    return path


def test_ray_up_and_status(hosts: dict[str, Host], cluster: str) -> None:
    client = hosts["client"]
    client.run("ray", "up", "-y", "--no-config-cache", cluster, seconds=LATE_S)

    def read_status() -> str:
        return client.run("ray", "exec", cluster, "ray status").stdout

    # Each question starts two programs, so the first one waits for the worker.
    has_joined = partial(hosts["worker"].run, "pgrep", "-x", "raylet", check=False)
    wait_until(lambda: has_joined().returncode == 0, LATE_S, read_status, pause=0.5)
    # Of two hosts: the head and its worker.
    wait_until(lambda: "2 local.cluster.node" in read_status(), LATE_S, read_status, pause=2)


def test_the_dashboard_answers_through_a_tunnel_only(hosts: dict[str, Host], cluster: str) -> None:
    client, head = hosts["client"], hosts["head"]
    direct = client.run("curl", "-sS", "-m", "5", f"http://{head.address}:8265", check=False)
    assert direct.returncode == 7, "the dashboard listens on loopback"
    client.start("ray", "dashboard", cluster, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ask = ("curl", "-sS", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}")
    wait_until(lambda: client.run(*ask, DASHBOARD, check=False).stdout == "200", 120, pause=0.5)
    assert client.run(*ask, f"{DASHBOARD}/api/version").stdout in ("401", "403")
    token = client.run("cat", f"{HOST_HOME}/.ray/auth_token").stdout.strip()
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


def test_the_head_runs_a_tracker_behind_a_password(hosts: dict[str, Host]) -> None:
    client, head = hosts["client"], hosts["head"]
    submit(
        *(client, "--detach", "--check", "false", "--env.MLFLOW_WORKERS", "1"),
        *("--env.MLFLOW_ARTIFACTS_DESTINATION", f"s3://{BUCKET}/mlflow"),
        *("tracker", "--host", head.address, "--auth", "true", "--store", TRACKS),
    )
    assert until_it_answers(client, f"{tracker_of(hosts)}/health") == "OK"
    ask = ("curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}")
    page = f"{tracker_of(hosts)}/api/2.0/mlflow/experiments/get?experiment_id=0"
    assert client.run(*ask, page).stdout == "401"
    assert client.run(*ask, "-u", f"admin:{password(head)}", page).stdout == "200"


@pytest.mark.slow("test_cluster_checks.py::test_a_real_node_is_looked_at")
def test_doctor_looks_at_every_node(hosts: dict[str, Host]) -> None:
    client = hosts["client"]
    asked = [
        "finetune",
        "--training.workers",
        "2",
        "--training.placement_strategy",
        "strict_spread",
    ]
    places = ["--data", CORPORA, "--run_dir", RUNS]
    entry = "MLFLOW_TRACKING_USERNAME,MLFLOW_TRACKING_PASSWORD"
    done = client.run(
        *(*SKILLNET, "doctor", "--json", "--env_from", entry, *asked, *places),
        seconds=LATE_S,
        **credentials(hosts),
    )
    reported: dict[str, list[dict[str, str]]] = {}
    for each in json.loads(done.stdout)["findings"]:
        reported.setdefault(each["check"], []).append(each)
    for name in ("versions", "resources", "authentication", "storage", "clock", "all-reduce"):
        assert [each["level"] for each in reported[name]] == ["ok"] * len(reported[name]), reported[
            name
        ]
    assert [each["seen"] for each in reported["storage"]] == [
        f"{place}: each of 2 nodes reads the files of all" for place in (CORPORA, RUNS)
    ]
    assert reported["tracker on nodes"][0]["seen"] == tracker_of(hosts)
    assert reported["ray state api"][0]["seen"] == "2 node(s)"


@pytest.mark.slow("test_cluster_checks.py::test_a_node_that_differs_is_named")
def test_a_run_on_disks_that_nobody_shares_is_refused(hosts: dict[str, Host]) -> None:
    done = submit(hosts["client"], "finetune", "--training.workers", "2", check=False)
    assert (done["status"], done["exit_code"]) == ("FAILED", 1)
    assert {"storage", "error", "--run_dir"} <= set(done["log"].split())
    assert hosts["head"].run("bash", "-c", f"ls {HOME} | grep finetune", check=False).returncode


@pytest.mark.slow("test_prepare.py::test_every_row_is_in_a_split_or_in_the_quarantine")
def test_prepare_by_plain_job_submission_and_by_ours(
    hosts: dict[str, Host], cluster: str, folder: Path
) -> None:
    client = hosts["client"]
    put_archive(folder / "archives")
    client.run("ray", "rsync-up", cluster, f"{folder}/archives/", f"{HOME}/archives/")
    words = ("prepare", "made", "--data", f"s3://{BUCKET}/made")
    path = "tests/made_corpora"  # its entry points name the corpus
    # Blocks take a moment each, so that both hosts get some.
    plain(client, {SLOW: "500", "PYTHONPATH": f"{SOURCES}:{path}"}, *words)
    manifest = json.loads(stored(client, "made/made/manifest.json"))
    assert manifest["rows_in"] == 100
    made = hosts["worker"].run("ls", "-A", f"{HOME}/staging/visiting").stdout
    assert made.startswith(".made.partial-"), "the other host has transformed blocks, too"
    again = submit(client, "--check", "false", "--env.PYTHONPATH", path, *words)
    assert (again["status"], again["exit_code"]) == ("SUCCEEDED", 0)
    assert "cached" in again["log"]
    assert 0 < again["upload_bytes"] < 20 * 2**20
    assert "upload: " in again["log"]


def test_training_on_two_hosts(hosts: dict[str, Host]) -> None:
    client = hosts["client"]
    # A worker on each host, from the store and into it.
    config = small_config(Path(), workers=2, placement_strategy="strict_spread", steps=6)
    config.name, config.data, config.tracking.register = "two-hosts", CORPORA, False
    config.run_dir = RUNS
    path = give(client, hosts["head"], "two-hosts.yaml", configuration.to_dict(config))
    done = submit(client, *tracked(hosts), "finetune", "--config", path)
    assert done["exit_code"] == 0, done["log"]
    trained = json.loads(stored(client, "runs/two-hosts/trained.json"))
    assert (trained["world"], trained["step"]) == (2, 6)
    assert json.loads(stored(client, "runs/two-hosts/model/manifest.json"))["files"]
    for name in ("head", "worker"):
        logs = (
            hosts[name].run("bash", "-c", "ls /tmp/skillnet-0/ray/session_latest/logs/train").stdout
        )
        assert "-worker-" in logs, f"no training worker ran on {name}: {logs}"
        # The shards came from the store to a cache of the host's own.
        cached = hosts[name].run("bash", "-c", f"ls {HOME}/cache/shards | wc -l").stdout
        assert int(cached) > 0, name


@pytest.mark.slow("test_sweeps.py::test_asha_a_failure_and_a_resumed_sweep")
def test_a_sweep_continues_without_the_client(hosts: dict[str, Host]) -> None:
    client = hosts["client"]
    # Two trials, each of which takes all cores of a host.
    config = small_config(Path(), steps=4, workers=1)
    config.data, config.tracking.register = CORPORA, False
    body = {
        "name": "sweep",
        "run_dir": RUNS,
        "run": configuration.to_dict(config) | {"name": None},
        "space": {"training.lr": {"choice": [0.001, 0.003]}},
        "resources": {"cpus": len(os.sched_getaffinity(0))},
    }
    path = give(client, hosts["head"], "sweep.yaml", body)
    words = ("--check", "false", *tracked(hosts), "sweep", "--config", path)
    with occupied_head(client, LATE_S):
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
        job = line.split()[1].rstrip(":")
        done = submit(client, "--attach", job, seconds=LATE_S)
    assert done["job_id"] == job
    assert (done["status"], done["exit_code"]) == ("SUCCEEDED", 0), done["log"]
    result = json.loads(stored(client, "runs/sweep/result.json"))
    assert result["counts"]["finished"] == 2
    ran = hosts["worker"].run("ls", f"{HOME}/sweep/trials").stdout.split()
    assert len(ran) == 2, "the trials ran on the host that is not the driver's"
    for each in ran:
        assert stored(client, f"runs/sweep/trials/{each}/reports.jsonl")


@pytest.mark.slow("test_walk.py::test_the_head_runs_a_tracker_behind_a_password")
def test_the_pages_of_the_runs_through_a_tunnel(hosts: dict[str, Host], cluster: str) -> None:
    client = hosts["client"]
    words = ("tracker", "--port", "5001", "--store", TRACKS)
    submit(client, "--detach", "--check", "false", "--env.MLFLOW_WORKERS", "1", *words)
    # As long as its input is open; without a terminal the shell that it opens would end at once.
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    attached = client.start(
        *("ray", "attach", cluster, "--port-forward", "5001"), stdin=subprocess.PIPE, **quiet
    )
    api = "http://127.0.0.1:5001/api/2.0/mlflow"
    found = []
    for name in ("skillnet", "skillnet-sweeps"):
        said = until_it_answers(client, f"{api}/experiments/get-by-name?experiment_name={name}")
        found.append(json.loads(said)["experiment"]["experiment_id"])
    asked = json.dumps({"experiment_ids": found})
    kind = ("-H", "Content-Type: application/json", "-d", asked)
    runs = json.loads(until_it_answers(client, f"{api}/runs/search", *kind))["runs"]
    ended = {run["info"]["run_name"]: run["info"]["status"] for run in runs}
    names = ("two-hosts", "sweep", "000-seed0", "001-seed0")
    assert ended == dict.fromkeys(names, "FINISHED")
    # Every evaluation and step of every host came to the tracker of the head.
    two = next(run["data"] for run in runs if run["info"]["run_name"] == "two-hosts")
    assert "training/total_params" in {param["key"] for param in two["params"]}
    attached.kill()


@pytest.mark.slow("test_jobs.py::test_the_exit_code_is_the_jobs")
def test_a_user_error_is_reported_by_the_job(hosts: dict[str, Host]) -> None:
    client = hosts["client"]
    done = submit(client, "--check", "false", "prepare", "no-such-corpus", check=False)
    assert (done["status"], done["exit_code"]) == ("FAILED", 2)
    assert "unknown corpus 'no-such-corpus'" in done["log"]
    lost = client.run(*SKILLNET, "submit", "--attach", "no-such-job", check=False)
    assert lost.returncode == 2
    assert "no such job on the cluster" in lost.stderr


def test_ray_down_leaves_nothing_running(hosts: dict[str, Host], cluster: str) -> None:
    hosts["client"].run("ray", "down", "-y", cluster, seconds=LATE_S)
    for name in ("head", "worker"):
        wait_until(
            lambda host=hosts[name]: host.run("pgrep", "-x", "raylet", check=False).returncode != 0,
            LATE_S,
            lambda name=name: f"{name} still runs a raylet",
            pause=1,
        )
