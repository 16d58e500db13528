"""Client of a cluster's job server: address, token, entry point and jobs."""

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
from skillnet_platform.secret_uri import SecretUri

NEWEST = "newest"
MARK = "skillnet"
ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
OPEN_A_TUNNEL = (
    "open a tunnel with `ray dashboard ray_cluster.yaml`, then: "
    "export RAY_ADDRESS=http://127.0.0.1:8265"
)
#: Folders of a checkout that hold its packages; a job has no installation of them.
SOURCE_FOLDERS = (
    ".",
    "platform",
    *(f"plugins/{name}" for name in ("corpora", "hf", "planning", "studies")),
)
#: Commands that serve or only check: ``--attach`` without an id ignores them.
SERVICES = ("doctor", "serve", "tracker")


def resolve_job_server_url(address: str | None = None) -> SecretUri:
    """Return the URL of the job server: ``address``, or that of the environment.

    Raises:
        UserError: there is no address, or it is not a URL.
    """
    given = (os.environ[name] for name in ADDRESSES if os.environ.get(name))
    found = SecretUri(address or next(given, ""))
    if not found:
        raise UserError(f"RAY_ADDRESS is not set: no cluster to send the job to; {OPEN_A_TUNNEL}")
    if not found.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS={found}: a job is sent to the http:// address of the dashboard; "
            f"{OPEN_A_TUNNEL}"
        )
    return SecretUri(found.reveal().rstrip("/"))


def connect_job_server(address: str | None = None) -> Any:
    """Return a ``JobSubmissionClient`` whose server answered.

    Args:
        address: URL of the job server; by default that of the environment.

    Raises:
        UserError: no address, no token, a refused token, or no answer.
    """
    url = resolve_job_server_url(address)
    # Our clusters always require the token; the embedded Ray never does.
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
        return JobServerClient(url.reveal())
    except AuthenticationError:
        raise UserError(
            f"{url}: the cluster refuses the token ({place}); take the cluster's own, which "
            "`ray up` copied to ~/.ray/auth_token of its head"
        ) from None
    except (ConnectionError, requests.RequestException) as error:
        raise UserError(
            f"{url}: no cluster answers there ({type(error).__name__}). Start it, or open the "
            f"tunnel: `ray dashboard CLUSTER.yaml`"
        ) from None


def find_token_source() -> str:
    """Return the source of the token: a variable or a file.

    Raises:
        UserError: there is no token.
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
        f"no token in {path}: a cluster accepts jobs only with its token. Copy it from "
        "~/.ray/auth_token of the head, or generate one before `ray up` with: "
        "ray get-auth-token --generate"
    )


def job_entrypoint(words: Sequence[str], check: bool = True) -> str:
    """Return the shell command of a job, with a check of the cluster before it."""
    # Without -P: the working directory of a job is the uploaded checkout, whose code is to run. Ray
    # puts it on the import path in any case, and no other copy of the code is on the nodes.
    run = shlex.join(["python", "-m", "skillnet_platform.cli", *words])
    if not check:
        return run
    # In the same job: a separate one would need a second upload and check an earlier state.
    look = ["python", "-m", "skillnet_platform.doctor", "--only", "problems", *words]
    return f"{shlex.join(look)} && {run}"


def job_environment() -> dict[str, str]:
    """Return the variables of every job: the import path of its code, and the versions here."""
    path = os.pathsep.join(SOURCE_FOLDERS)
    return {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **version_variable()}


def read_variables(names: Sequence[str]) -> dict[str, str]:
    """Return environment variables of this process by name.

    Raises:
        UserError: a variable is not set.
    """
    for name in names:
        # Reported here: on the cluster the missing value would cause another error.
        if name not in os.environ:
            raise UserError(f"--env_from {name}: {name} is not set here; export it first")
    return {name: os.environ[name] for name in names}


def find_job(client: Any, wanted: str) -> str:
    """Return the id of a job: ``wanted``, or this user's newest run.

    Args:
        client: ``JobSubmissionClient``.
        wanted: id of a job, or :data:`NEWEST`.

    Raises:
        UserError: the job does not exist.
    """
    # Ray also lists drivers that nobody submitted; they have no id.
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
    """Return the skillnet command that a job runs; empty for other jobs."""
    return next(iter(shlex.split((job.metadata or {}).get(MARK, ""))), "")


def make_job_id(name: str) -> str:
    """Return a new job id: name of the command, time, and a random part."""
    # The random part separates jobs that are sent within one second.
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
