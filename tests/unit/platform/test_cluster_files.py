"""The cluster files fit Ray's own schema, keep ports closed, and share one node set-up script."""

import json
import lzma
import os
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from pipelines import finetune
from skillnet_cluster import pin_nodes
from skillnet_cluster.submit import SOURCE_FOLDERS
from skillnet_platform.errors import UserError

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "platform/deploy"
AWS, ON_PREM, LARGE = ROOT / "ray_cluster.yaml", DEPLOY / "on_prem.yaml", DEPLOY / "aws_p5.yaml"
SCRIPT = DEPLOY / "setup_node.sh"


def load(path: Path) -> dict[str, Any]:
    reported: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return reported


def containers() -> list[dict[str, Any]]:
    spec = load(DEPLOY / "kuberay.yaml")["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"]["containers"][0] for group in groups]


@pytest.mark.parametrize("path", [AWS, ON_PREM, LARGE], ids=lambda path: path.name)
def test_rays_own_schema_takes_the_file(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(load(path)))
    wrong = load(path) | {"max_wrokers": 2}
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(wrong)


def reject_unknown(schema: Any) -> Any:
    """Return a schema of Kubernetes as its strict validation reads it."""
    if isinstance(schema, list):
        return [reject_unknown(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: reject_unknown(value) for key, value in schema.items()}
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("anyOf", None)
        return schema | {"type": ["integer", "string"]}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    return schema


def find_errors(document: dict[str, Any]) -> list[str]:
    """Return what KubeRay's own definition refuses."""
    schemas = json.loads(
        lzma.decompress((ROOT / "tests/golden/kuberay_schemas.json.xz").read_bytes())
    )
    schema = reject_unknown(schemas["schemas"][document["kind"]])
    schema["properties"]["metadata"] = {"type": "object"}
    found = Draft202012Validator(schema).iter_errors(document)
    return [f"{'.'.join(map(str, each.absolute_path))}: {each.message}" for each in found]


@pytest.mark.parametrize("name", ["kuberay.yaml", "kuberay_job.yaml"])
def test_kuberays_own_definition_takes_the_file(name: str) -> None:
    document = load(DEPLOY / name)
    assert find_errors(document) == []
    spec = document["spec"]
    assert len(find_errors(document | {"spec": spec | {"rayVersoin": "2.60.0"}})) == 1
    assert len(find_errors(document | {"spec": spec | {"suspend": "no"}})) == 1


def test_the_job_on_kubernetes_runs_the_checkout_on_the_cluster_of_the_other_file() -> None:
    cluster, job = (load(DEPLOY / name) for name in ("kuberay.yaml", "kuberay_job.yaml"))
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    path = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]["PYTHONPATH"].split(":")
    code = path[0]
    assert path[1:] == [f"{code}/{folder}" for folder in SOURCE_FOLDERS]
    (mount,) = (m for m in containers()[0]["volumeMounts"] if m["name"] == "runs")
    assert code.startswith(f"{mount['mountPath']}/")
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "skillnet_platform.cli"]
    finetune.main.parse_arguments(words[4:])


def test_the_head_on_aws_gives_no_cpu_away() -> None:
    reported = load(AWS)
    kinds = reported["available_node_types"]
    assert kinds[reported["head_node_type"]]["resources"] == {"CPU": 0}
    gpu = [kind for kind in kinds.values() if kind["resources"].get("GPU")]
    cpu = [name for name, kind in kinds.items() if kind["resources"] == {"CPU": 8}]
    assert [(kind["min_workers"], kind["max_workers"]) for kind in gpu] == [(0, 4)]
    assert cpu == ["data"]
    assert all(
        k["node_config"]["MetadataOptions"]["HttpTokens"] == "required" for k in kinds.values()
    )


def test_every_spot_machine_watches_for_its_notice() -> None:
    reported = load(AWS)
    spot = {
        name
        for name, kind in reported["available_node_types"].items()
        if kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    }
    assert spot == reported["available_node_types"].keys() - {reported["head_node_type"]}
    mounted, source = next(iter(reported["file_mounts"].items()))
    command = reported["worker_start_ray_commands"][-1]
    assert command.startswith(f"setsid --fork bash {mounted}/watch_spot.sh")
    assert "</dev/null" in command, "it must not hold the connection by which it is started"
    assert (ROOT / source / "watch_spot.sh").is_file()


def test_each_network_card_of_a_large_machine_carries_efa() -> None:
    machine = load(LARGE)["available_node_types"]["p5"]["node_config"]
    cards = machine["NetworkInterfaces"]
    assert [each["NetworkCardIndex"] for each in cards] == list(range(32))
    # A machine has addresses on its first card only, which cannot be without them.
    assert [each["DeviceIndex"] for each in cards] == [0] + [1] * 31
    assert [each["InterfaceType"] for each in cards] == ["efa"] + ["efa-only"] * 31
    assert len({(each["SubnetId"], *each["Groups"]) for each in cards}) == 1
    assert not any("AssociatePublicIpAddress" in each for each in cards), "AWS refuses it"
    assert machine["Placement"] == {"GroupName": "skillnet-p5"}


def test_on_prem_counts_its_workers() -> None:
    reported = load(ON_PREM)
    count = len(reported["provider"]["worker_ips"])
    assert (reported["min_workers"], reported["max_workers"]) == (count, count)


@pytest.mark.parametrize("path", [AWS, ON_PREM, LARGE], ids=lambda path: path.name)
def test_a_node_gets_dependencies_token_and_a_closed_dashboard(path: Path) -> None:
    reported = load(path)
    (setup,) = reported["setup_commands"]
    assert setup.endswith("bash ~/.skillnet/deploy/setup_node.sh install")
    assert reported["file_mounts"] == {
        "~/.skillnet/deploy": "platform/deploy",
        "~/.ray/auth_token": "~/.ray/auth_token",
    }
    (start,) = [line for line in reported["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in start
    for line in [*reported["head_start_ray_commands"], *reported["worker_start_ray_commands"]]:
        if "ray start" in line:
            assert line.startswith('settings="$(bash ~/.skillnet/deploy/')
    assert "IpPermissions" not in reported["provider"].get("security_group", {})


def test_the_kubernetes_manifest_is_a_cluster_with_a_token() -> None:
    reported = load(DEPLOY / "kuberay.yaml")
    assert (reported["apiVersion"], reported["kind"]) == ("ray.io/v1", "RayCluster")
    spec = reported["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    pinned = version("ray")
    assert spec["rayVersion"] == pinned, "change it with the version of ray"
    for each in containers():
        assert each["image"].startswith(f"rayproject/ray:{pinned}-")
        assert "/skillnet/setup_node.sh install &&" in each["args"][0]
        assert each["args"][0].endswith('eval "$KUBERAY_GEN_RAY_START_CMD"')
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        template = group["template"]
        assert template["metadata"]["annotations"] == {"ray.io/overwrite-container-cmd": "true"}
        mounted = {mount["name"] for mount in template["spec"]["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in template["spec"]["volumes"]}
    kinds = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    limits = kinds["gpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1"


def test_shell_scripts_are_sound() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    checker = Path(sys.executable).with_name("shellcheck")
    if not checker.is_file():
        pytest.skip("shellcheck is not installed: pip install -e '.[dev]'")
    done = subprocess.run(
        [str(checker), *map(str, DEPLOY.glob("*.sh")), str(ROOT / ".ci/run")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def run_script(home: Path, word: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", str(home / "deploy/setup_node.sh"), word],
        env={"HOME": str(home), "PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A home as `ray up` leaves it before the set-up: the script, requirements, no token."""
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy/setup_node.sh").write_bytes(SCRIPT.read_bytes())
    (tmp_path / "deploy/requirements.txt").write_text("# python 3.11\n")
    return tmp_path


def test_a_node_is_set_up_twice_with_the_same_result(node: Path) -> None:
    python = node / "venv/bin/python"  # says how it was called; pip itself runs in tests/cluster
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@" >>"$HOME/called"\n')
    python.chmod(0o755)
    settings = {"SKILLNET_HOME": "/mnt/runs", "SKILLNET_VENV": str(node / "venv")}
    missing = run_script(node, "install", **settings)
    assert missing.returncode == 1
    assert "ray get-auth-token --generate" in missing.stderr
    (node / ".ray").mkdir()
    (node / ".ray/auth_token").write_text("secret")
    (node / ".bashrc").write_text("case $- in *i*) ;; *) return ;; esac\n")
    for _ in range(2):
        done = run_script(node, "install", **settings)
        assert done.returncode == 0, done.stderr
    assert f"--requirement {node}/deploy/requirements.txt" in (node / "called").read_text()
    lines = (node / ".bashrc").read_text().splitlines()
    assert lines == ['. "$HOME/.skillnet/env.sh"', "case $- in *i*) ;; *) return ;; esac"]
    assert (node / ".ray/auth_token").stat().st_mode & 0o777 == 0o600
    reported = subprocess.run(
        ["bash", "-c", ". ~/.bashrc; . ~/.bashrc; echo $SKILLNET_HOME $RAY_AUTH_MODE $PATH"],
        env={"HOME": str(node), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    ).stdout.split()
    assert reported == ["/mnt/runs", "token", f"{node}/venv/bin:/usr/bin:/bin"]


def test_a_node_without_its_settings_reports_the_missing_ones(node: Path) -> None:
    assert "SKILLNET_HOME is not set" in run_script(node, "install").stderr
    bucket = run_script(node, "install", SKILLNET_HOME="s3://bucket/runs")
    assert "SKILLNET_HOME is a path" in bucket.stderr
    (node / "deploy/requirements.txt").unlink()
    done = run_script(node, "install", SKILLNET_HOME="/mnt/runs")
    assert done.returncode == 1
    assert "skillnet pin-nodes" in done.stderr
    assert "unknown argument; use install or settings" in run_script(node, "go").stderr


def test_a_node_finds_the_interface_of_the_head(node: Path) -> None:
    done = run_script(node, "settings", RAY_HEAD_IP="127.0.0.1")
    assert done.returncode == 0, done.stderr
    assert "export SKILLNET_NODE_IP=127.0.0.1" in done.stdout
    assert "GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo" in done.stdout
    assert "ulimit -S -n " in done.stdout
    named = run_script(node, "settings", SKILLNET_INTERFACE="lo")
    assert "SKILLNET_NODE_IP=127.0.0.1" in named.stdout
    wrong = run_script(node, "settings", SKILLNET_INTERFACE="none0")
    assert wrong.returncode == 1
    assert "none0 has no IPv4 address" in wrong.stderr


def test_a_node_keeps_the_sessions_of_ray_private(node: Path) -> None:
    private = Path(f"/tmp/skillnet-{os.getuid()}")
    done = run_script(node, "settings", SKILLNET_INTERFACE="lo")
    assert f"export RAY_TMPDIR={private}\n" in done.stdout
    assert private.stat().st_mode & 0o7777 == 0o700
    chosen = run_script(node, "settings", SKILLNET_INTERFACE="lo", RAY_TMPDIR="/large/disk")
    assert "export RAY_TMPDIR=/large/disk\n" in chosen.stdout


@pytest.mark.parametrize("planted", ["link", "open directory", "directory of another user"])
def test_a_node_refuses_a_planted_directory_of_sessions(
    node: Path, tmp_path: Path, planted: str
) -> None:
    if planted == "directory of another user" and os.geteuid() != 0:
        pytest.skip("needs root")
    place = tmp_path / "planted"
    if planted == "link":
        place.symlink_to("/tmp")
    else:
        place.mkdir(mode=0o700)
        if planted == "open directory":
            place.chmod(0o755)
        else:
            os.chown(place, 54321, 54321)
    script = node / "deploy/setup_node.sh"
    text = script.read_text()
    assert '"/tmp/skillnet-$(id -u)"' in text
    script.write_text(text.replace('"/tmp/skillnet-$(id -u)"', str(place)))
    done = run_script(node, "settings", SKILLNET_INTERFACE="lo")
    assert done.returncode == 1
    assert f"{place} is not a directory of mode 0700 of this user" in done.stderr


def test_requirements_are_this_environment(tmp_path: Path) -> None:
    path = tmp_path / "requirements.txt"
    assert pin_nodes.main([str(path)]) == 0
    lines = path.read_text().splitlines()
    assert lines[0] == f"# python {sys.version_info.major}.{sys.version_info.minor}"
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert pins["ray"] == version("ray")
    assert pins["torch"] == version("torch").partition("+")[0]
    assert {"aiohttp", "grpcio", "ray"} <= set(pins), "what ray[default] brings is pinned too"
    # What the stores and the tracker of a cluster need, as far as it is here.
    assert {"boto3", "s3fs", "psycopg-binary", "flask-wtf"} <= set(pins)
    ours = {"skillnet-platform", "skillnet-evidence"}
    assert not (ours | {"pytest", "ruff"}) & set(pins), "no code of ours, no tools"


def test_requirements_name_what_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_installed-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="half-installed>=1 is not installed here"):
        pin_nodes.pin_packages(["half-installed>=1"])
    with pytest.raises(UserError, match="no-such-package>=1 is not installed here"):
        pin_nodes.pin_packages(["no-such-package>=1"])
    with pytest.raises(UserError, match=r"pytest<1 is needed, .* is installed here"):
        pin_nodes.pin_packages(["pytest<1"])
    # The code of a local distribution comes with the checkout, and what it requires is installed.
    (tmp_path / "own").mkdir()
    (tmp_path / "own/pyproject.toml").write_text('[project]\nname = "own"\ndependencies = ["a>1"]')
    (tmp_path / "project.toml").write_text(
        '[project]\nname = "x"\ndependencies = ["own>=1", "b"]\n'
        '[tool.uv.sources]\nown = { path = "own" }\n'
    )
    assert pin_nodes.read_dependencies(tmp_path / "project.toml") == ["b", "a>1"]
    with pytest.raises(UserError, match="a checkout of the repository"):
        pin_nodes.read_dependencies(tmp_path / "pyproject.toml")
