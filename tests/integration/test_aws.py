"""``ray up ray_cluster.yaml`` against an EC2 that moto plays, ssh and rsync played by a script.

It carries as far as this: Ray's launcher makes the key, the security group and the head, copies
the files and runs the commands of the file, in their order, and its calls are those that EC2
takes. What no mock shows: whether the machines start, the images fit, and the commands succeed
on them; the commands themselves run in tests/cluster.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

pytest.importorskip("moto", reason="moto is not installed: pip install -e '.[dev]'")
boto3 = pytest.importorskip("boto3")

ROOT = Path(__file__).parents[2]
PROFILE = "skillnet-node"
PLAYED = """#!/bin/sh
echo "$(basename "$0") $*" >> "$PLAYED_LOG"
"""


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a mocked cloud, which this process and its children use."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    requests.post(f"http://{host}:{port}/moto-api/reset", timeout=30)  # it outlives its server
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    iam = boto3.client("iam")
    iam.create_instance_profile(InstanceProfileName=PROFILE)
    yield f"http://{host}:{port}"
    server.stop()


def instances() -> list[dict[str, Any]]:
    """All machines that are not ended."""
    told = boto3.client("ec2").describe_instances()
    found = [each for group in told["Reservations"] for each in group["Instances"]]
    return [each for each in found if each["State"]["Name"] in ("pending", "running")]


@pytest.mark.integration
def test_ray_up_starts_a_head_and_ray_down_ends_it(cloud: str, tmp_path: Path) -> None:
    home, log, tools = tmp_path / "home", tmp_path / "log", tmp_path / "tools"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray/auth_token").write_text("secret")
    tools.mkdir()
    for name in ("ssh", "rsync"):
        (tools / name).write_text(PLAYED)
        (tools / name).chmod(0o755)
    code = tmp_path / "checkout"
    (code / "platform").mkdir(parents=True)
    shutil.copytree(ROOT / "platform/deploy", code / "platform/deploy")
    shutil.copy(ROOT / "ray_cluster.yaml", code)

    def ray(*words: str) -> str:
        done = subprocess.run(
            [str(Path(sys.executable).with_name("ray")), *words],
            cwd=code,
            env={
                **os.environ,
                "HOME": str(home),
                "PLAYED_LOG": str(log),
                "PATH": f"{tools}:{os.environ['PATH']}",
                "RAY_AUTH_MODE": "token",
            },
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    ray("up", "-y", "--no-config-cache", "ray_cluster.yaml")
    (head,) = instances()
    assert head["InstanceType"] == "m6i.xlarge"
    assert head["IamInstanceProfile"]["Arn"].endswith(PROFILE)
    tags = {tag["Key"]: tag["Value"] for tag in head["Tags"]}
    assert (tags["ray-node-type"], tags["ray-user-node-type"]) == ("head", "head")
    assert tags["ray-node-status"] == "up-to-date"

    (group,) = head["SecurityGroups"]
    (rules,) = boto3.client("ec2").describe_security_groups(GroupIds=[group["GroupId"]])[
        "SecurityGroups"
    ]
    assert rules["GroupName"] == "skillnet"
    outside = [rule for rule in rules["IpPermissions"] if rule.get("IpRanges")]
    assert [(r["IpProtocol"], r["FromPort"], r["ToPort"]) for r in outside] == [("tcp", 22, 22)]
    inside = [rule for rule in rules["IpPermissions"] if not rule.get("IpRanges")]
    assert [pair["GroupId"] for rule in inside for pair in rule["UserIdGroupPairs"]] == [
        group["GroupId"]
    ]

    said = log.read_text()
    steps = [
        "ssh ",  # waits for the machine
        "rsync ",
        "setup_node.sh install",
        "setup_node.sh settings",
        "ray start --head",
    ]
    places = [said.index(step) for step in steps]
    assert places == sorted(places), said
    assert "auth_token" in said
    assert "--dashboard-host=127.0.0.1" in said
    assert "0.0.0.0" not in said

    ray("down", "-y", "ray_cluster.yaml")
    assert instances() == []
