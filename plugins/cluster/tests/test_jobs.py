"""Jobs: the upload, finding and following a job, and the message of each error."""

import json
import re
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from skillnet_cluster import checked_command, submit
from skillnet_cluster.checked_command import request_resources, split_own_options
from skillnet_platform import cluster, config
from skillnet_platform.cluster.resource_request import ResourceRequest
from skillnet_platform.errors import UserError


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*submit.ADDRESSES, "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("HOME", str(tmp_path))


def test_own_options_end_where_the_command_begins() -> None:
    words = ["--detach", "--env.A", "b", "--json", "finetune", "--config", "tiny", "--json"]
    assert split_own_options(words) == (words[:4], words[4:])
    assert split_own_options(["--check=false", "--", "prepare"]) == (["--check=false"], ["prepare"])


def test_a_command_states_its_resource_request(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("training: {workers: 3, use_gpu: true}\n")
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(f"run: {{include: {run}, training: {{placement_strategy: strict_spread}}}}\n")
    corpora = "s3://b/corpora"
    assert request_resources([]) == request_resources(["fetch", "headings"]) == ResourceRequest()
    prepare = request_resources(["prepare", "--corpus", "tnews=/data", "--data", corpora, "--json"])
    assert (prepare, prepare.uses_tracker) == (ResourceRequest(locations=(corpora,)), False)
    finetune = ["finetune", "--config", str(run)]
    assert request_resources(finetune) == ResourceRequest(3, 3)
    assert request_resources([*finetune, "--training.workers=2"]) == ResourceRequest(2, 2)
    expected = ResourceRequest(3, 3, spread=True)
    assert request_resources(["sweep", "--config", str(sweep)]) == expected
    assert request_resources(["sweep", "--run.training.workers", "4"]) == ResourceRequest(4)
    assert request_resources(["quickstart", "--json"]).uses_tracker
    assert ResourceRequest(2, 2, spread=True).format() == "2 workers with a GPU each on 2 nodes"
    with pytest.raises(UserError, match="neither a file nor a preset"):
        request_resources(["finetune", "--config", "tinny"])
    with pytest.raises(UserError, match="unknown command 'finetun'; did you mean 'finetune'"):
        request_resources(["finetun"])


def test_locations_without_a_name_are_in_the_run_root() -> None:
    both = ["--run_dir", "s3://b/runs", "--data", "s3://b/corpora"]
    assert request_resources(["finetune", *both]).locations == ("s3://b/runs", "s3://b/corpora")
    assert request_resources(["finetune", *both[:2]]).locations == ("s3://b/runs", "")
    sweep = request_resources(["sweep", *both[:2], "--run.data", both[3]])
    assert sweep.locations == (both[1], both[3])


def test_trials_and_elastic_runs_state_their_resource_request(tmp_path: Path) -> None:
    elastic = request_resources(
        ["finetune", "--training.workers", "8", "--training.min_workers", "2"]
    )
    assert elastic == ResourceRequest(8, min_workers=2)
    assert elastic.format() == "2 to 8 workers"
    trial = ["sweep", "--resources.cpus", "4", "--resources.gpus", "0.5"]
    assert request_resources(trial) == ResourceRequest(1, 0.5, cpus=4)
    study = tmp_path / "study.yaml"
    study.write_text(
        "run: {training: {workers: 2}}\npretraining: {training: {workers: 4}}\n"
        "resources: {cpus: 2}\nsystems: {skillnet: {system: skillnet}}\n"
    )
    compare = ["compare", "--config", str(study)]
    assert request_resources(compare) == ResourceRequest(2, cpus=2)
    asked = request_resources([*compare, "--systems.skillnet.pretrain", "true"])
    assert asked == ResourceRequest(2, cpus=2, next_stage=ResourceRequest(4, cpus=2))
    assert asked.format() == "2 workers with 2 CPUs each"


def test_only_models_with_a_path_are_checked() -> None:
    path = "/mnt/runs/x/model"
    assert request_resources(["finetune", "--from", "s3://b/x"]).models == ("s3://b/x",)
    assert request_resources(["evaluate", "--model", path]).models == (path,)
    for words in (["--from", "x"], ["--from", "models:/skillnet@champion"], ["--model.dim", "64"]):
        assert request_resources(["finetune", *words]).models == ()


@pytest.mark.parametrize(
    ("command", "key"), [("finetune", "training.workers"), ("sweep", "run.training.workers")]
)
def test_a_value_that_cannot_be_read_is_named(command: str, key: str) -> None:
    for text in ("[", "!!python/name:os.system"):
        with pytest.raises(UserError, match=rf"--{key}: cannot read '{re.escape(text)}'"):
            request_resources([command, f"--{key}", text])


def test_a_package_is_the_code_and_nothing_else(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    for name in (
        "skillnet/model.py",
        "run.sh",
        ".git/config",
        "my-env/pyvenv.cfg",
        "my-env/lib/huge.so",
        "skillnet/__pycache__/model.pyc",
        "runs/model.safetensors",
        "elsewhere/model.safetensors",
        "secret/id.pem",
        "secret/id_ed25519",
        ".env",
        "prod.env",
        ".netrc",
        ".aws/credentials",
        ".aws/__init__.py",
        "big/data.bin",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "run.sh").chmod(0o755)
    (root / "outside").symlink_to("/etc/hostname")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKILLNET_HOME", str(root / "elsewhere"))
        first = submit.pack_working_dir(root, tmp_path / "one.zip", ["big"])
        (root / "skillnet/model.py").touch()
        again = submit.pack_working_dir(root, tmp_path / "two.zip", ["big/*"])
    with zipfile.ZipFile(first.path) as package:
        assert package.namelist() == ["run.sh", "skillnet/model.py"]
        assert package.getinfo("run.sh").external_attr >> 16 == 0o755
    assert (first.files, first.size) == (2, first.path.stat().st_size)
    assert again.path.read_bytes() == first.path.read_bytes(), "same content, same bytes"
    assert first.largest[0] == ("skillnet/model.py", 17)
    private = [".aws", ".env", ".netrc", "elsewhere", "prod.env", "runs", "secret/id.pem"]
    assert first.kept == [*private, "secret/id_ed25519"]
    assert first.summary().endswith(
        "; not uploaded: .aws, .env, .netrc, elsewhere, prod.env, runs and 2 more"
    )


def test_too_large_a_package_names_what_is_large(tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    (tmp_path / "code/corpus.bin").write_bytes(b"x" * 5000)
    monkeypatch.setattr(submit, "MAX_BYTES", 10)
    with pytest.raises(UserError, match=r"corpus\.bin \(4\.9 KiB\); exclude some with --excl"):
        submit.pack_working_dir(tmp_path / "code", tmp_path / "code.zip")


@pytest.mark.parametrize(
    ("environment", "words", "message"),
    [
        ({}, ["prepare"], "RAY_ADDRESS is not set"),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, ["prepare"], "the http:// address of the dashboard"),
        ({"RAY_ADDRESS": "http://127.0.0.1:9"}, ["prepare"], "no token in "),
        (
            {"RAY_ADDRESS": "http://127.0.0.1:9", "RAY_AUTH_TOKEN": "a" * 64},
            ["prepare"],
            "no cluster answers there",
        ),
        ({}, [], "give a command"),
        ({}, ["--attach", "job", "prepare"], "give a command"),
    ],
)
def test_what_is_missing_is_said(environment, words, message, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert submit.main(words) == 2
    assert message in capsys.readouterr().err


class Server:
    """Stands for the job server: its log grows by one letter per request, and some fail."""

    def __init__(
        self, log: str = "", status: str = "SUCCEEDED", code: int | None = 0, failures: int = 0
    ) -> None:
        self.log, self.failures, self.status, self.code = log, failures, status, code
        self.sent: dict[str, Any] = {}
        self.stopped: list[str] = []
        self.asked = 0

    def get_job_status(self, job: str) -> Any:
        self.asked += 1
        if self.asked <= self.failures:
            raise (ConnectionError, RuntimeError, requests.Timeout)[self.asked % 3]("no route")
        ended = self.asked >= self.failures + len(self.log)
        return SimpleNamespace(value=self.status, is_terminal=lambda: ended)

    def get_job_info(self, job: str) -> Any:
        if job == "no-such-job":
            raise RuntimeError("Request failed with status code 404")
        status = SimpleNamespace(value=self.status)
        return SimpleNamespace(status=status, driver_exit_code=self.code, message="")

    def get_job_logs(self, job: str) -> str:
        return self.log[: max(self.asked - self.failures, 0)]

    def stop_job(self, job: str) -> bool:
        self.stopped.append(job)
        return True

    def submit_job(self, **given: Any) -> str:
        with zipfile.ZipFile(given["runtime_env"]["working_dir"]) as package:
            self.sent = given | {"files": package.namelist()}
        return str(given["submission_id"])


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "AGAIN_S", 0.0)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("failures", [0, 1, 3])
def test_lost_requests_lose_and_double_nothing(failures, monkeypatch, capsys):
    server = Server("one\ntwo\n", failures=failures)
    assert submit.follow_job(server, "job") == ("SUCCEEDED", 0)
    assert capsys.readouterr().out == "one\ntwo\n"
    monkeypatch.setattr(submit, "PATIENCE_S", 0.0)
    with pytest.raises(UserError, match=r"connection .* is lost .*; the job job continues"):
        submit.follow_job(Server("one", failures=10**9), "job")


@pytest.mark.parametrize(
    ("code", "given"),
    [(2, 2), (1, 1), (130, 130), (143, 143), (139, 139), (-15, 143), (None, 1), (256, 1)],
)
def test_the_exit_code_is_the_jobs(code: int, given: int) -> None:
    assert submit.follow_job(Server(status="FAILED", code=code), "job") == ("FAILED", given)


@pytest.mark.parametrize("problem", [RuntimeError, KeyboardInterrupt])
def test_a_question_that_nobody_waits_for_leaves_no_job(problem, monkeypatch):
    class Pending(Server):
        def get_job_status(self, job: str) -> Any:
            if problem is KeyboardInterrupt:
                raise problem
            return SimpleNamespace(value="PENDING", is_terminal=lambda: False)

    server = Pending()
    monkeypatch.setattr(submit, "ANSWER_S", -1.0)
    monkeypatch.setattr(submit, "connect_job_server", lambda: server)
    monkeypatch.setattr(submit, "submit_job", lambda client, options: ("doctor-1", None))
    with pytest.raises(problem):
        submit.run_job(["doctor", "--json"])
    assert server.stopped == ["doctor-1"]


def test_options_behind_the_command_are_its_own(monkeypatch, capsys):
    server = Server()
    sent: list[list[str]] = []

    def send(client: Any, options: submit.SubmitConfig) -> Any:
        sent.append(options.entry)
        return "finetune-1", SimpleNamespace(size=1, files=1)

    server.get_address = lambda: "http://127.0.0.1:8265"
    monkeypatch.setattr(submit, "connect_job_server", lambda: server)
    monkeypatch.setattr(submit, "submit_job", send)
    assert submit.main(["finetune", "--config", "tiny", "--json"]) == 0
    assert capsys.readouterr().out == "", "submit itself was not asked for JSON"
    assert submit.main(["--json", "finetune", "--seed", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["job_id"] == "finetune-1"
    assert sent == [["finetune", "--config", "tiny", "--json"], ["finetune", "--seed", "1"]]
    assert submit.main(["--attach", "no-such-job"]) == 2
    assert "no such job on the cluster" in capsys.readouterr().err
    assert submit.main(["prepare", "--help"]) == 0
    assert "skillnet prepare" in capsys.readouterr().out
    assert submit.main(["--help"]) == 0
    assert "skillnet submit" in capsys.readouterr().out


def test_passwords_come_from_the_environment(monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parents[3])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "from here")
    secret, server = "from here", Server()
    words = ["--env_from", "MLFLOW_TRACKING_PASSWORD", "--", "finetune"]
    submit.submit_job(server, config.parse_config(submit.SubmitConfig, words, "submit"))
    assert server.sent["runtime_env"]["env_vars"]["MLFLOW_TRACKING_PASSWORD"] == secret
    assert secret not in capsys.readouterr().err
    submit.submit_job(
        server, submit.SubmitConfig(["finetune"], env={"MLFLOW_TRACKING_PASSWORD": "x"})
    )
    assert "give --env_from MLFLOW_TRACKING_PASSWORD" in capsys.readouterr().err
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD is not set here"):
        submit.submit_job(server, config.parse_config(submit.SubmitConfig, words, "submit"))


def test_a_job_servers_address_is_not_one_to_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**given: Any) -> None:
        raise ValueError("Malformed address")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    for address, words in (
        ("http://127.0.0.1:8265", "`skillnet submit`, or unset RAY_ADDRESS"),
        ("nonsense", "RAY_ADDRESS=nonsense: no Ray answers there"),
    ):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(UserError, match=words):
            cluster.ensure_ray()


def test_code_and_environment_go_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    server = Server()
    env = {"SKILLNET_HOME": "s3://b", "PYTHONPATH": "mine"}
    options = submit.SubmitConfig(["finetune", "--config", "tiny"], env=env)
    job, package = submit.submit_job(server, options)
    sent = server.sent
    assert sent["submission_id"] == job
    assert job.startswith("finetune-")
    code = ("skillnet", "pipelines", "sweeps", "platform", "plugins/cluster/skillnet_cluster")
    modules = {path.as_posix() for folder in code for path in Path(folder).rglob("*.py")}
    assert "pipelines/training/runs/checkpoints.py" in modules
    assert modules | {"pyproject.toml"} <= set(sent["files"])
    assert not [name for name in sent["files"] if name.startswith((".git/", "runs/"))]
    assert package.files == len(sent["files"])
    variables = sent["runtime_env"]["env_vars"]
    *folders, given = variables["PYTHONPATH"].split(":")
    assert given == "mine"
    packages = {each.parent.as_posix() for each in Path("plugins").glob("*/skillnet_*/")}
    assert folders == ["platform", *sorted(packages)]
    assert f"FOLDERS={':'.join(folders)}\n" in Path("docs/cluster.md").read_text(encoding="utf-8")
    project = tomllib.loads(
        (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    )
    # The statistics are a distribution of their own in the same checkout.
    packages = {*project["tool"]["hatch"]["build"]["dev-mode-dirs"], "plugins/evidence"}
    assert {".", *folders} == packages
    assert variables["SKILLNET_HOME"] == "s3://b"
    assert (
        json.loads(variables[checked_command.VARIABLE])["ray"]
        == checked_command.installed_versions()["ray"]
    )
    check, run = sent["entrypoint"].split(" && ")
    assert "skillnet_cluster.doctor --only problems finetune --config tiny" in check
    assert run.endswith("skillnet_platform.cli finetune --config tiny")
    with pytest.raises(UserError, match="unknown command 'finetun'; did you mean 'finetune'"):
        submit.submit_job(server, submit.SubmitConfig(["finetun"]))
    monkeypatch.chdir("/")
    with pytest.raises(UserError, match="not the root of the repository"):
        submit.submit_job(server, options)
