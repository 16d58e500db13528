"""``skillnet submit``: send a command to a cluster, follow its log, find it again.

The client speaks with the job server in Ray's dashboard, which listens on the head's loopback:
``ray dashboard CLUSTER.yaml`` leads there through ssh. A job belongs to the cluster: it goes on
when the client ends.
"""

import asyncio
import contextlib
import getpass
import json
import logging
import os
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from skillnet_platform import cluster, config, console, upload
from skillnet_platform.cli import command
from skillnet_platform.config import positional
from skillnet_platform.errors import UserError, nearest
from skillnet_platform.needs import needs, split
from skillnet_platform.versions import pinned_here

NEWEST = "newest"
MARK = "skillnet"
ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
OPEN_A_TUNNEL = (
    "open a tunnel with `ray dashboard ray_cluster.yaml`, then: "
    "export RAY_ADDRESS=http://127.0.0.1:8265"
)
#: How long a lost connection to the job server is tried again.
PATIENCE_S = 120.0


@dataclass
class SubmitConfig:
    """Options of ``skillnet submit``; they stand before the command.

    Args:
        entry: a command of skillnet with its options, as it would run here.
        address: the job server; by default RAY_ADDRESS.
        attach: follow a job that was sent before: its id, or the newest without one.
        detach: send the job and return at once.
        check: look at the cluster first (`skillnet doctor`); errors keep the job from running.
        env: environment variables of the job, such as ``--env.SKILLNET_HOME s3://bucket/runs``.
        exclude: names of files and folders that are not uploaded, beside the usual ones.
    """

    entry: list[str] = positional([])
    address: Optional[str] = None  # noqa: UP045 - jsonargparse words this form better
    attach: Optional[str] = None  # noqa: UP045
    detach: bool = False
    check: bool = True
    env: dict[str, str] = field(default_factory=dict)
    exclude: list[str] = field(default_factory=list)


@command
def main(argv: list[str] | None = None) -> int:
    """Send a command, or attach to one; the exit code is the job's."""
    own, words = split(_attach_newest(argv or []))
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
    try:
        # The first request of the constructor is the version of the cluster's Ray.
        return JobSubmissionClient(url)
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
    from skillnet_platform.cli import commands

    known = commands()
    if options.entry[0] not in known:
        raise UserError(f"unknown command {options.entry[0]!r}{nearest(options.entry[0], known)}")
    here = Path.cwd()
    if not (here / "platform" / "skillnet_platform").is_dir():
        raise UserError(f"{here}: not the root of the repository, whose code is sent with a job")
    if options.check:
        needs(options.entry)  # a missing preset shows before anything is sent
    with tempfile.TemporaryDirectory() as folder:
        package = upload.pack(here, Path(folder) / "code.zip", options.exclude)
        console.note(f"upload: {package.words()}")
        if package.size > upload.UNUSUAL:
            console.warn(upload.heaviest(package))
        job = client.submit_job(
            entrypoint=entrypoint(options.entry, options.check),
            submission_id=_new_id(options.entry[0]),
            runtime_env={
                "working_dir": str(package.path),
                "env_vars": {**job_environment(), **options.env},
            },
            metadata={MARK: shlex.join(options.entry), "user": getpass.getuser()},
        )
    console.note(f"job {job}: {shlex.join(options.entry)}")
    return str(job), package


def ask(words: Sequence[str]) -> dict[str, Any]:
    """Run a command as a job and give the JSON document that it prints.

    Raises:
        UserError: as :func:`connect` and :func:`send`.
        RuntimeError: the job printed no document; with the end of its log.
    """
    client = connect()
    job, _ = send(client, SubmitConfig(list(words), check=False))
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.5)
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


def find_job(client: Any, wanted: str) -> str:
    """The id of a job that was sent: as given, or the newest.

    Raises:
        UserError: there is no such job, or none at all.
    """
    jobs = {each.submission_id: each for each in client.list_jobs() if each.submission_id}
    if wanted != NEWEST:
        if wanted not in jobs:
            raise UserError(f"--attach {wanted}: no such job on the cluster{nearest(wanted, jobs)}")
        return wanted
    ours = [each for each in jobs.values() if MARK in (each.metadata or {})]
    if not ours:
        raise UserError("--attach: no job was sent to this cluster with `skillnet submit`")
    return str(max(ours, key=lambda each: each.start_time or 0).submission_id)


def follow(client: Any, job: str) -> tuple[str, int]:
    """Print the log of a job until it ends; its status and its exit code.

    A lost connection is tried again. An interrupt ends the following, not the job.
    """
    stream = sys.stderr if console.json_wanted() else sys.stdout
    try:
        with _quiet():
            asyncio.run(_print_log(client, job, stream))
    except KeyboardInterrupt:
        console.note(
            f"\nthe job goes on; follow it with `skillnet submit --attach {job}`, end it with "
            f"`ray job stop {job}`"
        )
        return "RUNNING", 130
    info = client.get_job_info(job)
    status = str(info.status.value)
    code = info.driver_exit_code
    if status == "SUCCEEDED":
        console.note(f"{job} succeeded")
        return status, 0
    reason = f": {info.message}" if info.message and code is None else ""
    console.error(f"{job} {status.lower()}{reason}")
    return status, code if code in (1, 2) else 1


async def _print_log(client: Any, job: str, stream: Any) -> None:
    """The log from its beginning; after a lost connection from where it was cut."""
    printed, deadline = 0, time.monotonic() + PATIENCE_S
    while True:
        position, problem = 0, ""
        try:
            async for text in client.tail_job_logs(job):
                fresh = text[max(printed - position, 0) :]
                position += len(text)
                printed = max(printed, position)
                stream.write(fresh)
                stream.flush()
                deadline = time.monotonic() + PATIENCE_S
        except Exception as lost:
            problem = f"{type(lost).__name__}: {lost}"
        with contextlib.suppress(Exception):
            if client.get_job_status(job).is_terminal():
                if problem:  # cut off before the last words
                    stream.write(client.get_job_logs(job)[printed:])
                return
        if time.monotonic() > deadline:
            raise UserError(
                f"the connection to the cluster is lost ({problem or 'closed'}); the job {job} "
                f"goes on: skillnet submit --attach {job}"
            )
        await asyncio.sleep(1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray from reporting each closed connection between the lines of the job."""
    logger = logging.getLogger("ray.dashboard.modules.job.sdk")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


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
