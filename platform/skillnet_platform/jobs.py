"""``skillnet submit``: send a command to a cluster, follow its log, find it again.

The client speaks with the job server in Ray's dashboard, which listens on the head's loopback:
``ray dashboard CLUSTER.yaml`` leads there through ssh. A job belongs to the cluster: it goes on
when the client ends.
"""

import contextlib
import getpass
import json
import logging
import os
import re
import secrets
import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from skillnet_platform import cli, cluster, config, console, upload
from skillnet_platform.cli import command
from skillnet_platform.config import positional
from skillnet_platform.errors import UserError, nearest
from skillnet_platform.following import follow
from skillnet_platform.needs import needs, split
from skillnet_platform.versions import pinned_here

NEWEST = "newest"
MARK = "skillnet"
ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
OPEN_A_TUNNEL = (
    "open a tunnel with `ray dashboard ray_cluster.yaml`, then: "
    "export RAY_ADDRESS=http://127.0.0.1:8265"
)
#: Commands that serve or only look: ``--attach`` without an id does not mean them.
SERVICES = ("doctor", "tracker", "ui")
#: A job server that is silent for so long in the middle of an answer is gone.
REQUEST_S = 120.0
#: How long :func:`ask` waits for its answer: as doctor for its slowest node, and a start.
ANSWER_S = 900.0
SECRET = re.compile("PASSWORD|SECRET|TOKEN|CREDENTIAL|_KEY$")


@dataclass
class SubmitConfig:
    """Options of ``skillnet submit``; they stand before the command.

    Args:
        entry: a command of skillnet with its options, as it would run here.
        address: the job server; by default RAY_ADDRESS.
        attach: follow a job that was sent before: its id, or your newest without one.
        detach: send the job and return at once.
        check: look at the cluster first (`skillnet doctor`); errors keep the job from running.
        env: environment variables of the job, such as ``--env.SKILLNET_HOME s3://bucket/runs``.
        env_from: names of variables that the job gets as they are set here; for passwords, which
            would be seen in a command line.
        exclude: names of files and folders that are not uploaded, beside the usual ones.
    """

    entry: list[str] = positional([])
    address: Optional[str] = None  # noqa: UP045 - jsonargparse words this form better
    attach: Optional[str] = None  # noqa: UP045
    detach: bool = False
    check: bool = True
    env: dict[str, str] = field(default_factory=dict)
    env_from: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)


@command
def main(argv: list[str] | None = None) -> int:
    """Send a command, or attach to one; the exit code is the job's."""
    own, words = split(_attach_newest(argv or []))
    if {"--help", "-h"} & set(words):
        return cli.main(words)  # what the command can do is known here
    options = config.parse(
        SubmitConfig,
        [*own, "--", *words],
        prog="skillnet submit",
        description="Send a command with this checkout's code to the cluster of RAY_ADDRESS and "
        "follow its log. The job goes on when this command ends.",
        example="skillnet submit finetune --config small --training.workers 4\n"
        "skillnet submit --attach",
    )
    if bool(options.entry) == bool(options.attach):
        raise UserError(
            "skillnet submit: give a command, such as `skillnet submit finetune --config small`, "
            "or --attach to follow a job that was sent before"
        )
    began = time.monotonic()
    client = connect(options.address)
    told: dict[str, Any] = {"address": client.get_address()}
    if options.attach:
        job = find_job(client, options.attach)
    else:
        job, package = send(client, options)
        told |= {"upload_bytes": package.size, "upload_files": package.files}
    told["job_id"] = job
    if options.detach:
        console.note(f"{job} is on its way; follow it with: skillnet submit --attach {job}")
        told["status"], code = str(client.get_job_status(job).value), 0
    else:
        told["status"], code = follow(client, job)
    if console.json_wanted():
        console.emit_json(told | {"exit_code": code, "seconds": time.monotonic() - began})
    return code


def job_server(address: str | None = None) -> str:
    """The URL of the job server: the one given, or that of the environment.

    Raises:
        UserError: there is none, or it is not a URL.
    """
    found = address or next((os.environ[name] for name in ADDRESSES if os.environ.get(name)), "")
    if not found:
        raise UserError(f"RAY_ADDRESS is not set: no cluster to send to; {OPEN_A_TUNNEL}")
    if not found.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS={found}: a job is sent to the http:// address of the dashboard; "
            f"{OPEN_A_TUNNEL}"
        )
    return found.rstrip("/")


def connect(address: str | None = None) -> Any:
    """A ``JobSubmissionClient`` that was answered.

    Raises:
        UserError: no address, no token, a token that the cluster refuses, nothing that answers.
    """
    url = job_server(address)
    # A cluster of ours always asks for the token; the embedded Ray never does.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    cluster.prepare_environment()
    place = token_place() if os.environ["RAY_AUTH_MODE"] == "token" else "RAY_AUTH_MODE=disabled"
    import requests

    logging.getLogger("ray").setLevel(logging.ERROR)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard").setLevel(logging.ERROR)

    class Client(JobSubmissionClient):
        """Ray's own waits for an answer for ever."""

        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            return super()._do_request(*arguments, **{"timeout": REQUEST_S, **options})

    try:
        # The first request of the constructor is the version of the cluster's Ray.
        return Client(url)
    except AuthenticationError:
        raise UserError(
            f"{url}: the cluster refuses the token ({place}); take the cluster's own, which "
            "`ray up` copied to ~/.ray/auth_token of its head"
        ) from None
    except (ConnectionError, requests.RequestException) as problem:
        raise UserError(
            f"{url}: no cluster answers there ({type(problem).__name__}); is it up, and the "
            f"tunnel open? `ray dashboard CLUSTER.yaml` opens one"
        ) from None


def token_place() -> str:
    """Where the token comes from.

    Raises:
        UserError: there is none.
    """
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        if path.read_text(encoding="utf-8").strip():
            return str(path)
    except OSError:
        pass
    raise UserError(
        f"no token in {path}: a cluster takes jobs only with its own; copy it from "
        "~/.ray/auth_token of the head, or make one before `ray up` with: "
        "ray get-auth-token --generate"
    )


def send(client: Any, options: SubmitConfig) -> tuple[str, upload.Package]:
    """Upload the code in the working directory and start the job; its id.

    Raises:
        UserError: an unknown command or preset, a folder without our code, too large an upload.
    """
    known = cli.commands()
    if options.entry[0] not in known:
        raise UserError(f"unknown command {options.entry[0]!r}{nearest(options.entry[0], known)}")
    here = Path.cwd()
    if not (here / "platform" / "skillnet_platform").is_dir():
        raise UserError(f"{here}: not the root of the repository, whose code is sent with a job")
    if options.check:
        needs(options.entry)  # a missing preset shows before anything is sent
    variables = {**job_environment(), **options.env, **from_here(options.env_from)}
    for name in options.env:
        if SECRET.search(name.upper()):
            console.warn(
                f"--env.{name}: other users of this machine see command lines; export {name} and "
                f"give --env_from {name}"
            )
    with tempfile.TemporaryDirectory() as folder:
        package = upload.pack(here, Path(folder) / "code.zip", options.exclude)
        console.note(f"upload: {package.words()}")
        if package.size > upload.UNUSUAL:
            console.warn(upload.heaviest(package))
        job = client.submit_job(
            entrypoint=entrypoint(options.entry, options.check),
            submission_id=_new_id(options.entry[0]),
            runtime_env={"working_dir": str(package.path), "env_vars": variables},
            metadata={MARK: shlex.join(options.entry), "user": getpass.getuser()},
        )
    console.note(f"job {job}: {shlex.join(options.entry)}")
    return str(job), package


def ask(words: Sequence[str], env_from: Sequence[str] = ()) -> dict[str, Any]:
    """Run a command as a job and give the JSON document that it prints.

    The job does not outlive the question: it is stopped when nobody waits for it any more.

    Raises:
        UserError: as :func:`connect` and :func:`send`.
        RuntimeError: the job printed no document, with the end of its log; or took too long.
    """
    client = connect()
    job, _ = send(client, SubmitConfig(list(words), check=False, env_from=[*env_from]))
    deadline, ended = time.monotonic() + ANSWER_S, False
    try:
        while not ended:
            status = client.get_job_status(job)
            ended = status.is_terminal()
            if not ended and time.monotonic() > deadline:
                raise RuntimeError(
                    f"the job {job} is {status.value} after {ANSWER_S:.0f} s and was stopped; "
                    "see `ray status`: is there a node with room for it?"
                )
            if not ended:
                time.sleep(0.5)
    finally:
        if not ended:
            with contextlib.suppress(Exception):
                client.stop_job(job)
    log = str(client.get_job_logs(job))
    begin, end = log.find("{\n"), log.rfind("\n}")
    if begin < 0 or end < 0:
        raise RuntimeError(f"the job {job} gave no answer: {log[-500:].strip()}")
    told: dict[str, Any] = json.loads(log[begin : end + 2])
    return told


def entrypoint(words: Sequence[str], check: bool = True) -> str:
    """The shell command of a job."""
    run = shlex.join(["python", "-m", "skillnet_platform.cli", *words])
    if not check:
        return run
    look = ["python", "-m", "skillnet_platform.preflight", "--only", "problems", *words]
    return f"{shlex.join(look)} && {run}"


def job_environment() -> dict[str, str]:
    """Variables of every job: our code comes with it, and the versions it was tried with."""
    return {"PYTHONPATH": "platform", "PYTHONUNBUFFERED": "1", **pinned_here()}


def from_here(names: Sequence[str]) -> dict[str, str]:
    """Those environment variables of this process.

    Raises:
        UserError: one is not set.
    """
    for name in names:
        if name not in os.environ:
            raise UserError(f"--env_from {name}: {name} is not set here; export it first")
    return {name: os.environ[name] for name in names}


def find_job(client: Any, wanted: str) -> str:
    """The id of a job that was sent: as given, or this user's newest that is a run.

    Raises:
        UserError: there is no such job, or none at all.
    """
    jobs = {each.submission_id: each for each in client.list_jobs() if each.submission_id}
    if wanted != NEWEST:
        if wanted not in jobs:
            raise UserError(f"--attach {wanted}: no such job on the cluster{nearest(wanted, jobs)}")
        return wanted
    me = getpass.getuser()
    runs = [each for each in jobs.values() if _command(each) not in ("", *SERVICES)]
    mine = [each for each in runs if each.metadata.get("user") == me]
    if not mine:
        others = ", ".join(sorted(f"{e.submission_id} of {e.metadata.get('user')}" for e in runs))
        raise UserError(
            f"--attach: {me} has sent no run to this cluster with `skillnet submit`; "
            + (f"give an id: {others}" if others else "a job that serves is followed by its id")
        )
    return str(max(mine, key=lambda each: each.start_time or 0).submission_id)


def _command(job: Any) -> str:
    """The command of skillnet that a job runs; empty if it is no job of ours."""
    return next(iter(shlex.split((job.metadata or {}).get(MARK, ""))), "")


def _attach_newest(argv: Sequence[str]) -> list[str]:
    """``--attach`` without an id means the newest job."""
    words = list(argv)
    if "--attach" in words:
        place = words.index("--attach")
        if place + 1 == len(words) or words[place + 1].startswith("--"):
            words.insert(place + 1, NEWEST)
    return words


def _new_id(name: str) -> str:
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


if __name__ == "__main__":
    raise SystemExit(main())
