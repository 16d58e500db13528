"""``ray up`` with both files for AWS against an EC2 that moto plays; a script plays ssh and rsync.

It carries as far as this: Ray's launcher makes the key, the security group and the head, copies
the files and runs the commands of the file, in their order; Ray's autoscaler, with the file that
the launcher gives the head, starts the workers that waiting work needs, sets them up, and ends
those that idle; their calls are those that EC2 takes. What no mock shows: whether the machines
start, the images fit, and the commands succeed on them; the commands themselves run in
tests/cluster. The tests stand in the order of the walk and share one cloud.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from tests.helpers.waiting import wait_until

pytest.importorskip("moto", reason="moto is not installed: pip install -e '.[dev]'")
boto3 = pytest.importorskip("boto3")

ROOT = Path(__file__).parents[2]
PROFILE = "skillnet-node"
#: ssh and rsync: they write down what they are asked to do, and keep the file from which the
#: autoscaler on the head would read what it may start.
PLAYED = """#!/bin/sh
echo "$(basename "$0") $*" >> "$PLAYED_LOG"
for word; do before="$last"; last="$word"; done
case "$last" in *ray_bootstrap_config.yaml) cp "$before" "$PLAYED_LOG.config" ;; esac
exit 0
"""


@pytest.fixture(scope="module")
def environment() -> Iterator[pytest.MonkeyPatch]:
    """Variables for as long as the cloud is there."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def cloud(environment: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a mocked cloud, which this process and its children use."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    requests.post(f"http://{host}:{port}/moto-api/reset", timeout=300)  # it outlives its server
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        environment.setenv(name, "testing")
    environment.setenv("AWS_DEFAULT_REGION", "us-west-2")
    environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    environment.delenv("AWS_PROFILE", raising=False)
    iam = boto3.client("iam")
    iam.create_instance_profile(InstanceProfileName=PROFILE)
    yield f"http://{host}:{port}"
    server.stop()


def instances() -> list[dict[str, Any]]:
    """All machines that are not ended."""
    reported = boto3.client("ec2").describe_instances()
    found = [each for group in reported["Reservations"] for each in group["Instances"]]
    return [each for each in found if each["State"]["Name"] in ("pending", "running")]


@dataclass(frozen=True)
class ClusterFile:
    """A cluster file: what work waits for machines, and which machines that work needs."""

    path: str
    waiting: list[dict[str, float]]
    wanted: list[str]
    machines: list[str]
    resources: dict[str, dict[str, float]]


HEAD = {"head": {"node:__internal_head__": 1.0}}
FILES = [
    # Training with two workers of a GPU each, and preparation that fills a machine.
    ClusterFile(
        "ray_cluster.yaml",
        [{"CPU": 1, "GPU": 1}] * 2 + [{"CPU": 8}],
        ["data", "gpu", "gpu"],
        ["c6i.2xlarge", "g6.2xlarge", "g6.2xlarge"],
        HEAD | {"gpu": {"CPU": 8.0, "GPU": 1.0}, "data": {"CPU": 8.0}},
    ),
    # Training with twelve workers of a GPU each.
    ClusterFile(
        "platform/deploy/aws_p5.yaml",
        [{"CPU": 1, "GPU": 1}] * 12,
        ["p5", "p5"],
        ["p5.48xlarge", "p5.48xlarge"],
        HEAD | {"p5": {"CPU": 192.0, "GPU": 8.0}},
    ),
]


@dataclass
class Launcher:
    """Ray's launcher in a checkout of its own, with a home, a log of what it asks of ssh."""

    home: Path
    log: Path
    code: Path
    file: ClusterFile

    def run(self, *words: str) -> None:
        """Run the command ``ray`` in this process, which asks the cloud without pauses."""
        from ray.autoscaler._private import commands, updater
        from ray.autoscaler._private.aws import config
        from ray.scripts.scripts import cli

        with contextlib.chdir(self.code), pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_AUTH_MODE", "token")
            patch.setattr(commands, "POLL_INTERVAL", 0.2)
            patch.setattr(updater, "READY_CHECK_INTERVAL", 0.2)
            # Half a minute, in which roles would reach all of AWS.
            patch.setattr(config, "time", SimpleNamespace(sleep=lambda _: None))
            cli.main(list(words), standalone_mode=False)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(FILES[0], id="small"),
        pytest.param(
            FILES[1], id="large", marks=pytest.mark.slow("test_aws.py::test_ray_up_starts_a_head")
        ),
    ],
)
def launcher(
    request: pytest.FixtureRequest,
    cloud: str,
    tmp_path_factory: pytest.TempPathFactory,
    environment: pytest.MonkeyPatch,
) -> Launcher:
    tmp_path = tmp_path_factory.mktemp("launcher")
    made = Launcher(tmp_path / "home", tmp_path / "log", tmp_path / "checkout", request.param)
    (made.home / ".ray").mkdir(parents=True)
    (made.home / ".ray/auth_token").write_text("secret")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("ssh", "rsync"):
        (tools / name).write_text(PLAYED)
        (tools / name).chmod(0o755)
    (made.code / "platform").mkdir(parents=True)
    shutil.copytree(ROOT / "platform/deploy", made.code / "platform/deploy")
    text = (ROOT / made.file.path).read_text(encoding="utf-8")
    (made.code / made.file.path).write_text(fill_in(text), encoding="utf-8")
    environment.setenv("HOME", str(made.home))
    environment.setenv("PLAYED_LOG", str(made.log))
    environment.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return made


def fill_in(text: str) -> str:
    """Replace what a user replaces in the file of the large machines."""
    client = boto3.client("ec2")
    subnets = client.describe_subnets()["Subnets"]
    public, private = subnets[0], subnets[1]
    if "sg-CHANGE-ME" not in text:
        return text
    group = client.create_security_group(
        GroupName="skillnet-p5", Description="-", VpcId=private["VpcId"]
    )
    text = text.replace("subnet-CHANGE-ME-PUBLIC", public["SubnetId"])
    text = text.replace("subnet-CHANGE-ME", private["SubnetId"])
    return text.replace("sg-CHANGE-ME", group["GroupId"])


def describe_group(head: dict[str, Any]) -> dict[str, Any]:
    """Return the only security group of a machine."""
    (group,) = head["SecurityGroups"]
    client = boto3.client("ec2")
    (found,) = client.describe_security_groups(GroupIds=[group["GroupId"]])["SecurityGroups"]
    return dict(found)


@pytest.mark.integration
def test_ray_up_starts_a_head(launcher: Launcher) -> None:
    launcher.run("up", "-y", "--no-config-cache", launcher.file.path)
    (head,) = instances()
    assert head["InstanceType"] == "m6i.xlarge"
    assert head["IamInstanceProfile"]["Arn"].endswith(PROFILE)
    tags = {tag["Key"]: tag["Value"] for tag in head["Tags"]}
    assert (tags["ray-node-type"], tags["ray-user-node-type"]) == ("head", "head")
    assert tags["ray-node-status"] == "up-to-date"

    rules = describe_group(head)
    if rules["GroupName"] == "skillnet":  # made by Ray; the other one is the user's
        outside = [rule for rule in rules["IpPermissions"] if rule.get("IpRanges")]
        ports = [(r["IpProtocol"], r["FromPort"], r["ToPort"]) for r in outside]
        assert ports == [("tcp", 22, 22)]
        inside = [rule for rule in rules["IpPermissions"] if not rule.get("IpRanges")]
        assert [pair["GroupId"] for rule in inside for pair in rule["UserIdGroupPairs"]] == [
            rules["GroupId"]
        ]

    said = launcher.log.read_text()
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


class ReportedNodes:
    """What Ray's head tells its autoscaler: who is there, how long idle, and what waits for room.

    In the place of the GCS: nodes whose machines run have joined, unless they were drained.
    """

    address = "10.0.0.1:6379"

    def __init__(self, head: str, resources: dict[str, dict[str, float]]) -> None:
        self.head, self.resources = head, resources
        self.waiting: list[dict[str, float]] = []
        self.idle_ms = 0
        self.drained: set[str] = set()

    def drain_node(self, node_id: Any, **about: Any) -> tuple[bool, str]:
        """Ask the node to end Ray; it does."""
        self.drained.add(node_id)
        return True, ""

    def state(self, _: Any) -> Any:
        """The protocol buffer that the GCS would send."""
        from ray.core.generated import autoscaler_pb2 as reported

        nodes = []
        for each in instances():
            tags = {tag["Key"]: tag["Value"] for tag in each["Tags"]}
            name = each["InstanceId"]
            if tags["ray-node-status"] != "up-to-date":
                continue  # Ray is not started there yet
            idle = name != self.head and self.idle_ms
            over = name.encode().hex() in self.drained
            status = reported.DEAD if over else reported.IDLE if idle else reported.RUNNING
            nodes.append(
                reported.NodeState(
                    node_id=name.encode(),
                    instance_id=name,
                    ray_node_type_name=tags["ray-user-node-type"],
                    total_resources=self.resources[tags["ray-user-node-type"]],
                    available_resources=self.resources[tags["ray-user-node-type"]],
                    status=status,
                    idle_duration_ms=int(idle),
                )
            )
        asked = [
            reported.ResourceRequestByCount(
                request=reported.ResourceRequest(resources_bundle=bundle), count=1
            )
            for bundle in self.waiting
        ]
        return reported.ClusterResourceState(
            cluster_resource_state_version=1,
            node_states=nodes,
            pending_resource_requests=asked,
            cluster_session_name="test",
        )


@pytest.mark.integration
def test_the_autoscaler_starts_what_waits_and_ends_what_idles(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    (head,) = instances()
    # The files that the launcher copied to the head, from which the head serves the workers.
    shutil.copytree(ROOT / "platform/deploy", launcher.home / ".skillnet/deploy")
    (key,) = (launcher.home / ".ssh").glob("*.pem")
    shutil.copy(key, launcher.home / "ray_bootstrap_key.pem")
    launcher.log.unlink()

    from ray.autoscaler.v2 import autoscaler as second
    from ray.autoscaler.v2.instance_manager.config import FileConfigReader

    reported = ReportedNodes(head["InstanceId"], launcher.file.resources)
    monkeypatch.setattr(second, "get_cluster_resource_state", reported.state)
    reader = FileConfigReader(f"{launcher.log}.config", skip_content_hash=True)
    scaler = second.Autoscaler("test", reader, reported)

    def until(wanted: list[str]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        states: list[Any] = []

        def has_wanted() -> bool:
            planned = scaler.update_autoscaling_state()
            found[:] = [each for each in instances() if each["InstanceId"] != reported.head]
            tags = [{tag["Key"]: tag["Value"] for tag in each["Tags"]} for each in found]
            states[:] = [tags, planned]
            ready = all(each["ray-node-status"] == "up-to-date" for each in tags)
            return ready and sorted(each["ray-user-node-type"] for each in tags) == wanted

        wait_until(has_wanted, 120, lambda: states, pause=0.2)
        return found

    reported.waiting = launcher.file.waiting
    started = until(launcher.file.wanted)
    assert sorted(each["InstanceType"] for each in started) == launcher.file.machines
    is_large = "p5" in launcher.file.resources
    group = head["SecurityGroups"][0]["GroupId"]
    for each in started:
        assert each["IamInstanceProfile"]["Arn"].endswith(PROFILE)
        assert (each.get("InstanceLifecycle") == "spot") != is_large
        # The mock knows one card and no placement; tests/unit looks at them.
        cards = each["NetworkInterfaces"]
        assert {one["GroupId"] for card in cards for one in card["Groups"]} == {group}
    said = launcher.log.read_text()
    for each in started:
        address = each["PrivateIpAddress"]
        mine = [line for line in said.splitlines() if address in line]
        steps = ["rsync ", "setup_node.sh install", "setup_node.sh settings", "ray start --address"]
        steps += ["FI_PROVIDER=efa" if is_large else "watch_spot.sh"]
        places = [next(n for n, line in enumerate(mine) if step in line) for step in steps]
        assert places == sorted(places), mine
    assert "RAY_HEAD_IP=10.0.0.1" in said

    # Ten idle minutes are over: all but the head end.
    reported.waiting = []
    reported.idle_ms = 11 * 60 * 1000
    assert until([]) == []
    assert [each["InstanceId"] for each in instances()] == [reported.head]


@pytest.mark.integration
def test_ray_down_ends_the_head(launcher: Launcher) -> None:
    launcher.run("down", "-y", launcher.file.path)
    assert instances() == []
