"""What the nodes saw becomes findings that name the node, the cause and what to do."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from skillnet_cluster import checked_command
from skillnet_cluster import doctor as machine_checks
from skillnet_cluster.checked_command import estimate_checkpoint_bytes, request_resources
from skillnet_cluster.checks import GIB, Finding, node_probe
from skillnet_cluster.checks import cluster as checks
from skillnet_cluster.checks.node_probe import NodeProbe
from skillnet_platform import storage
from skillnet_platform.cluster import capacity
from skillnet_platform.cluster.resource_request import ResourceRequest
from tests.helpers.object_store import ObjectStore

ONE = NodeProbe(
    node="10.0.0.1",
    versions=checked_command.installed_versions(),
    auth_mode="token",
    home="/mnt/runs",
    write_problem="",
    files_seen={"/mnt/runs": ["10.0.0.1", "10.0.0.2"]},
    free_bytes=100 * GIB,
    tracker_problem="",
)
TWO = replace(ONE, node="10.0.0.2")


def check_storage(seen: list[NodeProbe]) -> list[Finding]:
    return checks.check_shared_storage(seen, ["/mnt/runs"])


def node(cpus: float, gpus: float = 0) -> dict[str, dict[str, float]]:
    return {"Resources": {"CPU": cpus, "GPU": gpus}}


def test_a_sound_cluster_has_nothing_to_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    for check in (
        checks.check_node_versions,
        checks.check_authentication,
        checks.check_checkpoint_space,
        checks.check_node_trackers,
        checks.check_clocks,
    ):
        assert [each.level for each in check([ONE, TWO])] == ["ok"], check
    (finding,) = checks.check_shared_storage([ONE, TWO], ["/mnt/runs"])
    assert finding.level == "ok"


def test_another_version_of_the_sender_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(checked_command.VARIABLE, '{"python": "3.1.4", "mlflow": "9.9"}')
    reported = checks.check_node_versions([ONE, TWO])
    assert [each.level for each in reported] == ["warning", "warning"]
    assert "9.9 where the job was sent" in reported[1].seen


@pytest.mark.parametrize(
    ("nodes", "asked", "growth", "level"),
    [
        ([node(2), node(2)], ResourceRequest(4), [], "ok"),
        ([node(2), node(2)], ResourceRequest(5), [], "error"),
        ([node(2), node(2)], ResourceRequest(2, spread=True), [], "ok"),
        ([node(8)], ResourceRequest(2, spread=True), [], "error"),
        ([node(0)], ResourceRequest(2, 2), [{"CPU": 8, "GPU": 1}] * 2, "warning"),
        ([node(0)], ResourceRequest(3, 3), [{"CPU": 8, "GPU": 1}] * 2, "error"),
        ([node(8)], ResourceRequest(1, 1), [], "error"),
        ([node(4)], ResourceRequest(8, min_workers=2), [], "warning"),
        ([node(1)], ResourceRequest(8, min_workers=2), [], "error"),
        ([node(1)], ResourceRequest(8, min_workers=2), [{"CPU": 1}], "warning"),
        ([node(8)], ResourceRequest(4, spread=True, min_workers=2), [], "error"),
        ([node(8)], ResourceRequest(4, cpus=2), [], "ok"),
        ([node(3), node(3)], ResourceRequest(3, cpus=2), [], "error"),
        ([node(0.9)], ResourceRequest(3, cpus=0.3), [], "ok"),
        ([node(8, 1)], ResourceRequest(2, 1), [], "ok"),
    ],
)
def test_resources(nodes, asked, growth, level):
    (finding,) = checks.check_resources(nodes, asked, growth)
    assert finding.level == level
    assert asked.format() in finding.seen


def test_each_stage_is_looked_at() -> None:
    reported = checks.check_resources(
        [node(2)], ResourceRequest(2, next_stage=ResourceRequest(4)), []
    )
    assert [each.level for each in reported] == ["ok", "error"]


def test_the_autoscaler_may_start_what_the_file_says(tmp_path, monkeypatch):
    file = tmp_path / "ray_bootstrap_config.yaml"
    monkeypatch.setattr(capacity, "BOOTSTRAP", file)
    assert capacity.list_startable_nodes() == []
    source = Path(__file__).parents[3] / "ray_cluster.yaml"
    file.write_bytes(source.read_bytes())
    assert sorted(map(str, capacity.list_startable_nodes())) == sorted(
        ["{'CPU': 8, 'GPU': 1}"] * 4 + ["{'CPU': 8}"] * 4
    )


def test_a_node_of_this_machine_that_asks_for_no_token_is_a_warning() -> None:
    here = replace(ONE, node="127.0.0.1", auth_mode="disabled")
    assert checks.check_authentication([here])[0].level == "warning", (
        "for users of this machine alone"
    )


class Answers(BaseHTTPRequestHandler):
    """Stands for servers: with or without a password, as the test says."""

    code = 200

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else self.code)
        self.end_headers()

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    made = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


def test_a_job_server_is_tried_without_the_token(server, monkeypatch):
    (finding,) = checks.check_authentication([ONE, TWO], server)
    assert (finding.level, server in finding.seen) == ("error", True)
    monkeypatch.setattr(Answers, "code", 401)
    assert checks.check_authentication([ONE, TWO], server)[0].level == "ok"


def test_a_tracker_is_asked_for_more_than_its_health(server, monkeypatch):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setattr(Answers, "code", 401)
    (finding,) = machine_checks.check_tracker()
    assert finding.level == "error"
    assert "asks for a password, and none is set" in finding.seen
    assert machine_checks.check_tracker(ResourceRequest())[0].level == "warning", (
        "nothing is recorded"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    problem, access = node_probe._tracker_problems()
    assert (problem, "refuses the user me" in access) == ("", True)
    reported = [ONE, replace(TWO, access_problem=access)]
    assert (
        checks.check_node_trackers(reported, ResourceRequest(uses_tracker=True))[0].level == "error"
    )
    (finding,) = checks.check_node_trackers(reported, ResourceRequest())
    assert finding.level == "warning", "a command that records nothing needs no entry"
    assert "--env_from MLFLOW_TRACKING_USERNAME" in finding.advice


def test_room_is_held_against_what_the_run_takes(run_root, tmp_path, monkeypatch):
    step = tmp_path / "big/mine/checkpoints/step-00000100"
    step.mkdir(parents=True)
    (step / "weights").write_bytes(b"x" * 1000)
    words = ["finetune", "--run_dir", str(tmp_path / "big"), "--training.keep_checkpoints", "3"]
    asked = request_resources([*words, "--name", "mine"])
    assert (asked.run_dir, asked.run_name) == (str(tmp_path / "big"), "mine")
    assert asked.keep_checkpoints == 3
    assert estimate_checkpoint_bytes(asked) == 3 * 1000, "of four, while the oldest is still there"
    assert (
        estimate_checkpoint_bytes(request_resources([*words, "--from", str(step)])) == 4 * 3 * 1000
    )
    assert estimate_checkpoint_bytes(request_resources(words)) == 0
    assert request_resources(["finetune", "--run_dir", "s3://b/runs"]).run_dir == ""
    little = replace(TWO, free_bytes=2999)
    (finding,) = checks.check_checkpoint_space([ONE, little], asked)
    assert finding.level == "error"
    assert finding.seen == "2.9 KiB free on 10.0.0.2; the run needs 2.9 KiB"
    assert (
        checks.check_checkpoint_space([ONE, replace(TWO, free_bytes=3000)], asked)[0].level == "ok"
    )
    monkeypatch.setattr(storage, "free_bytes", lambda path: 2999 if "big" in str(path) else 10**12)
    assert [each.level for each in machine_checks.check_disk(asked)] == ["error"]
    assert [each.level for each in machine_checks.check_disk()] == ["ok"]
    away = node_probe._look_around("10.0.0.1", "x", [], asked.run_dir)
    assert away["free_bytes"] == 2999
    assert not (tmp_path / "new").exists()
    assert machine_checks.check_disk(
        request_resources(["finetune", "--run_dir", str(tmp_path / "new")])
    )
    assert not (tmp_path / "new").exists(), "doctor makes no folder of a run"


@pytest.mark.parametrize(
    ("check", "change", "level", "seen", "advice"),
    [
        (checks.check_node_versions, {"versions": TWO.versions | {"torch": "2.0.0"}}, "error",
         "torch 2.0.0 on 10.0.0.2", "ray up"),
        (checks.check_authentication, {"auth_mode": "disabled"}, "error",
         "without a token: 10.0.0.2", "RAY_AUTH_MODE=token"),
        (checks.check_clocks, {"clock_error_s": checks.CLOCK_ERROR_S + 1}, "error",
         "10.0.0.2: 61 s from the clock of the head", "NTP"),
        (checks.check_checkpoint_space, {"free_bytes": GIB}, "warning",
         "10.0.0.2", "--training.keep_checkpoints"),
        (checks.check_node_trackers, {"tracker_problem": "no server"}, "error",
         "10.0.0.2: no server", "MLFLOW_TRACKING_URI"),
        (check_storage, {"home": ""}, "error", "10.0.0.2: (not set)", "SKILLNET_HOME"),
        (check_storage, {"home": "/other"}, "error", "10.0.0.2: /other", "--run_dir s3://"),
        (check_storage, {"write_problem": "/mnt/runs: denied"}, "error",
         "from 10.0.0.2: /mnt/runs: denied", "SKILLNET_HOME"),
        (check_storage, {"files_seen": {"/mnt/runs": ["10.0.0.2"]}}, "error",
         "10.0.0.2 does not see the file of 10.0.0.1", "--run_dir s3://"),
    ],
)  # fmt: skip
def test_a_node_that_differs_is_named(check, change, level, seen, advice):
    (finding,) = check([ONE, replace(TWO, **change)])
    assert finding.level == level
    assert seen in finding.seen
    assert advice in finding.advice


def test_a_tracker_that_is_a_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("SKILLNET_HOME", "/mnt/runs")
    (finding,) = checks.check_node_trackers([ONE, TWO])
    assert finding.level == "warning"
    assert "skillnet tracker" in finding.advice
    # On a disk that only one host has, the others' metrics would go nowhere.
    monkeypatch.setenv("SKILLNET_HOME", "/root/runs")
    own = [replace(each, files_seen={"/root/runs": [each.node]}) for each in (ONE, TWO)]
    (finding,) = checks.check_node_trackers(own)
    assert finding.level == "error"
    assert "sqlite:////root/runs/mlflow.db: a file. /root/runs: 10.0.0.1 does not" in finding.seen


def test_each_place_that_a_run_names_is_looked_at() -> None:
    both = {"/mnt/runs": ["10.0.0.1", "10.0.0.2"], "s3://b/runs": ["10.0.0.1", "10.0.0.2"]}
    blind = both | {"s3://b/runs": []}
    seen = [replace(ONE, files_seen=both), replace(TWO, files_seen=blind)]
    reported = checks.check_shared_storage(seen, list(both))
    assert [each.level for each in reported] == ["ok", "error"]
    assert reported[1].seen == "s3://b/runs: 10.0.0.2 does not see the file of 10.0.0.1"


@pytest.mark.integration
def test_a_real_node_is_looked_at(tmp_path: Path, ray_session: object) -> None:
    asked = ResourceRequest(2, locations=(str(tmp_path),))
    found = {each.check: each for each in checks.check_cluster(ray_session, asked)}
    assert found["versions"].level == "ok", found["versions"]
    assert found["resources"].level == "ok"
    assert "on 1 node" in found["resources"].seen
    assert found["clock"].level == "ok"
    assert "ray state api" in found
    assert found["authentication"].level == "ok", "the embedded Ray has a token of its own"
    assert found["storage"].seen == f"{tmp_path}: each of 1 nodes reads the files of all"
    # The session's Ray offers GPUs that do not exist.
    assert found["GPU"].level == "error"
    assert "finds no GPU" in found["GPU"].seen
    assert list(tmp_path.iterdir()) == [], "cleaned up"


@pytest.mark.integration
def test_a_node_looks_at_a_store_as_runs_do(object_store: ObjectStore) -> None:
    place, folder = f"{object_store.uri}/runs", ".doctor-test"
    assert node_probe._leave_file("10.0.0.1", folder, [place]) == ""
    assert node_probe._look_around("10.0.0.2", folder, [place])["files_seen"] == {
        place: ["10.0.0.1"]
    }
    node_probe._clean_up(folder, [place])
    assert node_probe._look_around("10.0.0.2", folder, [place])["files_seen"] == {place: []}
    gone = node_probe._leave_file("10.0.0.1", folder, ["s3://no-such-bucket/runs"])
    assert "there is no bucket 'no-such-bucket'" in gone
