"""TODO: skillnet_platform.cluster.job_client."""

import getpass
import logging
import os
import secrets
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skillnet_platform import cluster
from skillnet_platform.cluster.versions import version_variable
from skillnet_platform.errors import UserError, suggest_name

NEWEST = "newest"
MARK = "skillnet"
ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
OPEN_A_TUNNEL = (
    "open a tunnel with `ray dashboard ray_cluster.yaml`, then: "
    "export RAY_ADDRESS=http://127.0.0.1:8265"
)
#: Commands that serve or only look: ``--attach`` without an id does not mean them.
SERVICES = ("doctor", "tracker", "ui")


def resolve_job_server_url(address: str | None = None) -> str:
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


def connect_job_server(address: str | None = None) -> Any:
    """A ``JobSubmissionClient`` that was answered.

    Raises:
        UserError: no address, no token, a token that the cluster refuses, nothing that answers.
    """
    url = resolve_job_server_url(address)
    # A cluster of ours always asks for the token; the embedded Ray never does.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    cluster.prepare_ray_environment()
    place = (
        find_token_source() if os.environ["RAY_AUTH_MODE"] == "token" else "RAY_AUTH_MODE=disabled"
    )
    import requests

    logging.getLogger("ray").setLevel(logging.ERROR)
    from ray.exceptions import AuthenticationError

    from skillnet_platform.ray_internals.job_server import JobServerClient

    logging.getLogger("ray.dashboard").setLevel(logging.ERROR)
    try:
        # The first request of the constructor is the version of the cluster's Ray.
        return JobServerClient(url)
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


def find_token_source() -> str:
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


def job_entrypoint(words: Sequence[str], check: bool = True) -> str:
    """The shell command of a job."""
    run = shlex.join(["python", "-m", "skillnet_platform.cli", *words])
    if not check:
        return run
    look = ["python", "-m", "skillnet_platform.doctor", "--only", "problems", *words]
    return f"{shlex.join(look)} && {run}"


def job_environment() -> dict[str, str]:
    """Variables of every job: our code comes with it, and the versions it was tried with."""
    return {"PYTHONPATH": "platform", "PYTHONUNBUFFERED": "1", **version_variable()}


def read_variables(names: Sequence[str]) -> dict[str, str]:
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
            raise UserError(
                f"--attach {wanted}: no such job on the cluster{suggest_name(wanted, jobs)}"
            )
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


def make_job_id(name: str) -> str:
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
