"""``skillnet submit``: send a command to a cluster as a job, follow its log, attach to it again.

Built on Ray's ``JobSubmissionClient``. The job server is in Ray's dashboard, which listens on the
head's loopback. ``ray dashboard CLUSTER.yaml`` opens an ssh tunnel to it. A job belongs to the
cluster: it continues when the client ends.

A job gets the checkout without generated, private and large files, as a zip file with equal bytes
for equal content. Ray names packages by their digest, so a second job with unchanged code uploads
nothing.
"""

import contextlib
import fnmatch
import json
import logging
import math
import os
import re
import secrets
import shlex
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skillnet_cluster.checked_command import (
    request_resources,
    split_own_options,
    version_variable,
)
from skillnet_platform import cli, cluster, console, storage
from skillnet_platform.cli import command
from skillnet_platform.config import positional_field
from skillnet_platform.errors import UserError
from skillnet_platform.secret_uri import SecretUri
from skillnet_platform.tracking.backend import URI_VARIABLE
from skillnet_platform.tracking.source_commit import commit_variable

#: Names of generated files and folders.
GENERATED = (
    *(".git", ".hg", ".svn", ".venv", "venv", ".tox", ".nox", "node_modules", "__pycache__"),
    *(".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", ".import_linter_cache"),
    *("*.egg-info", "*.pyc", "dist", "build", ".DS_Store"),
)
#: Names of runs and secrets. The upload message lists the ones that stay on this machine.
PRIVATE = (
    *("runs", "mlruns", "mlartifacts", "*.db"),
    *(".env", "*.env", ".env.*", ".envrc", "*.pem", "*.key", "*.p12", "*.pfx", "*.keytab"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "auth_token", "admin-password"),
    *(".ssh", ".gnupg", ".aws", ".azure", ".gcloud", ".kube", ".docker", ".mlflow", ".ray"),
    *(".netrc", "_netrc", ".pgpass", ".pypirc", ".npmrc", ".git-credentials", ".htpasswd"),
    *("credentials", "credentials.json", "credentials.csv"),
    *("client_secret*.json", "service-account*.json"),
)
#: Number of private names in the message.
MAX_LISTED = 6
#: Limit of Ray for a package.
MAX_BYTES = 500 * 2**20
#: A larger package probably holds a file by mistake.
UNUSUAL = 50 * 2**20


@dataclass(frozen=True)
class JobPackage:
    """Zip file of a job's code.

    Args:
        path: location of the zip file.
        files: number of files in it.
        size: bytes of the zip file.
        largest: (path, bytes) of the largest files before compression, largest first.
        kept: private paths that are not uploaded.
    """

    path: Path
    files: int
    size: int
    largest: list[tuple[str, int]]
    kept: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Return a summary: ``312 files, 1.1 MiB; not uploaded: .env, runs``."""
        text = f"{self.files} files, {storage.human_bytes(self.size)}"
        if not self.kept:
            return text
        more = f" and {len(self.kept) - MAX_LISTED} more" if len(self.kept) > MAX_LISTED else ""
        return f"{text}; not uploaded: {', '.join(self.kept[:MAX_LISTED])}{more}"


def pack_working_dir(root: Path, target: Path, excluded: Sequence[str] = ()) -> JobPackage:
    """Write the package of a checkout.

    Args:
        root: working directory of jobs.
        target: zip file to write.
        excluded: further names, or paths relative to ``root``, to leave out; ``*`` is a wildcard.

    Raises:
        UserError: the package is larger than Ray accepts; names the largest files.
    """
    sizes: dict[str, int] = {}
    kept: list[str] = []
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as package:
        for path in _chosen(root, [*GENERATED, *excluded], kept):
            name = path.relative_to(root).as_posix()
            content = path.read_bytes()
            entry = zipfile.ZipInfo(name)  # dated 1980: the same content gives the same bytes
            # Scripts must stay executable on the nodes.
            entry.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            package.writestr(entry, content)
            sizes[name] = len(content)
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:3]
    done = JobPackage(target, len(sizes), target.stat().st_size, largest, sorted(kept))
    if done.size > MAX_BYTES:
        raise UserError(
            f"{root}: the upload would be {done.summary()}, the limit of Ray is "
            f"{storage.human_bytes(MAX_BYTES)}; {describe_largest_files(done)}"
        )
    return done


def describe_largest_files(package: JobPackage) -> str:
    """Return the names of the largest files, and how to exclude them."""
    named = ", ".join(f"{name} ({storage.human_bytes(size)})" for name, size in package.largest)
    return f"the largest are {named}; exclude some with --exclude NAME,NAME"


def _chosen(root: Path, patterns: Sequence[str], kept: list[str]) -> Iterator[Path]:
    """Yield the files to upload in a fixed order, and collect private paths in ``kept``.

    Symbolic links are skipped: they may lead out of the folder.
    """
    own = storage.run_root()

    def stays(path: Path) -> bool:
        if path.is_symlink() or _matches(path, root, patterns):
            return True
        # A package of code may have the name of a private folder, as pipelines/training/runs has.
        # A hidden folder can be no package, so folders of secrets stay in any case.
        if path != own and path.name.isidentifier() and (path / "__init__.py").is_file():
            return False
        if path != own and not _matches(path, root, PRIVATE):
            return False
        kept.append(path.relative_to(root).as_posix())
        return True

    for folder, folders, names in os.walk(root):
        here = Path(folder)
        # In place, so that os.walk skips the others; sorted, so that the zip file is reproducible.
        folders[:] = sorted(
            name
            for name in folders
            # A virtual environment can have any name; this file marks it.
            if not (here / name / "pyvenv.cfg").is_file() and not stays(here / name)
        )
        for name in sorted(names):
            path = here / name
            if path.is_file() and not stays(path):
                yield path


def _matches(path: Path, root: Path, patterns: Sequence[str]) -> bool:
    relative = path.relative_to(root).as_posix()
    return any(
        fnmatch.fnmatchcase(path.name, pattern) or fnmatch.fnmatchcase(relative, pattern)
        for pattern in patterns
    )


#: Folders of a checkout that hold its packages; a job has no installation of them.
SOURCE_FOLDERS = (
    "platform",
    *(
        f"plugins/{name}"
        for name in (
            "cluster",
            "corpora",
            "evidence",
            "hf",
            "loggers",
            "planning",
            "serving",
            "studies",
        )
    ),
)
#: How long :func:`run_job` waits for its answer: as doctor for its slowest node, and a start.
ANSWER_S = 900.0
#: Seconds in which a job server that does not answer is asked again.
PATIENCE_S = 120.0
#: Seconds between two requests for a log, and bytes of it that add another second: Ray sends the
#: complete log each time.
AGAIN_S, BYTES_PER_S = 1.0, 2**20
SECRET = re.compile("PASSWORD|SECRET|TOKEN|CREDENTIAL|_KEY$")
ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
OPEN_A_TUNNEL = (
    "open a tunnel with `ray dashboard ray_cluster.yaml`, then: "
    "export RAY_ADDRESS=http://127.0.0.1:8265"
)


@dataclass
class SubmitConfig:
    """Options of ``skillnet submit``; they precede the command.

    Args:
        entry: command of skillnet with its options, as it would run here.
        attach: follow an earlier job by its id; `ray job list` shows the ids.
        detach: send the job and return immediately.
        check: check the cluster first (`skillnet doctor`); errors stop the job.
        env: environment variables of the job, such as ``--env.SKILLNET_HOME s3://bucket/runs``.
        env_from: names of variables whose local values the job gets; for passwords, which a
            command line would expose.
        exclude: names of files and folders to leave out of the upload, beside the usual ones.
    """

    entry: list[str] = positional_field([])
    attach: str | None = None
    detach: bool = False
    check: bool = True
    env: dict[str, str] = field(default_factory=dict)
    env_from: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)


def split_submit_arguments(argv: Sequence[str]) -> list[str]:
    """Separate own options from the command to send by ``--``."""
    own, words = split_own_options(argv)
    if {"--help", "-h"} & set(words):
        raise SystemExit(cli.main(words))  # the help of the command needs no cluster
    return [*own, "--", *words]


def resolve_job_server_url() -> SecretUri:
    """Return the URL of the job server, which the environment names.

    Raises:
        UserError: there is no address, or it is not a URL.
    """
    given = (os.environ[name] for name in ADDRESSES if os.environ.get(name))
    found = SecretUri(next(given, ""))
    if not found:
        raise UserError(f"RAY_ADDRESS is not set: no cluster to send the job to; {OPEN_A_TUNNEL}")
    if not found.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS={found}: a job is sent to the http:// address of the dashboard; "
            f"{OPEN_A_TUNNEL}"
        )
    return SecretUri(found.reveal().rstrip("/"))


def connect_job_server() -> Any:
    """Return a ``JobSubmissionClient`` whose server answered.

    Raises:
        UserError: no address, no token, a refused token, or no answer.
    """
    url = resolve_job_server_url()
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
    look = ["python", "-m", "skillnet_cluster.doctor", "--only", "problems", *words]
    return f"{shlex.join(look)} && {run}"


def job_environment(given: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a job: import path of its code, versions here, and the given ones.

    Args:
        given: variables by name; folders of ``PYTHONPATH`` follow those of our code.
    """
    path = os.pathsep.join([*SOURCE_FOLDERS, *filter(None, [given.get("PYTHONPATH")])])
    return {"PYTHONUNBUFFERED": "1", **version_variable(), **given, "PYTHONPATH": path}


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


def submit_job(client: Any, options: SubmitConfig) -> tuple[str, JobPackage]:
    """Upload the code of the working directory and start a job.

    Returns:
        Id of the job, and its package.

    Raises:
        UserError: an unknown command, invalid arguments, a folder without our code, or too large an
            upload.
    """
    for word in options.entry:
        if SecretUri(word).has_secret:
            raise UserError(
                f"{SecretUri(word)}: Ray's list of jobs would show the hidden part, which may be a "
                "password. Set the complete "
                f"URI as {URI_VARIABLE} and add --env_from {URI_VARIABLE}"
            )
    here = Path.cwd()
    if not (here / "platform" / "skillnet_platform").is_dir():
        raise UserError(f"{here}: not the root of the repository, whose code a job needs")
    if options.check:
        request_resources(options.entry)  # invalid arguments fail before the upload
    given = {**options.env, **read_variables(options.env_from)}
    variables = {**commit_variable(), **job_environment(given)}
    for name in options.env:
        if SECRET.search(name.upper()):
            console.print_warning(
                f"--env.{name}: other users of this machine see command lines; export {name} and "
                f"give --env_from {name}"
            )
    with tempfile.TemporaryDirectory() as folder:
        package = pack_working_dir(here, Path(folder) / "code.zip", options.exclude)
        console.print_note(f"upload: {package.summary()}")
        if package.size > UNUSUAL:
            console.print_warning(describe_largest_files(package))
        job = client.submit_job(
            entrypoint=job_entrypoint(options.entry, options.check),
            # The random part separates jobs that are sent within one second.
            submission_id=f"{options.entry[0]}-{time.strftime('%Y%m%d-%H%M%S')}-"
            f"{secrets.token_hex(2)}",
            runtime_env={"working_dir": str(package.path), "env_vars": variables},
        )
    console.print_note(f"job {job}: {shlex.join(options.entry)}")
    return str(job), package


def wait_for_job(
    client: Any, job: str, show: Callable[[str], None], limit_s: float = math.inf
) -> None:
    """Pass the log of a job on until the job ends. Requests that fail are repeated.

    Args:
        client: ``JobSubmissionClient``.
        job: id of the job.
        show: takes the next part of the log.
        limit_s: seconds for the job.

    Raises:
        UserError: the server does not answer any more.
        RuntimeError: the job took longer than ``limit_s``.
    """
    import requests

    size, start = 0, time.monotonic()
    answered = start
    while True:
        try:
            # The status comes first: the log of an ended job is complete.
            status = client.get_job_status(job)
            log = client.get_job_logs(job)
        except (requests.RequestException, ConnectionError, RuntimeError) as error:
            if time.monotonic() > answered + PATIENCE_S:
                raise UserError(
                    f"the connection to the cluster is lost ({type(error).__name__}: {error}); the "
                    f"job {job} continues: skillnet submit --attach {job}"
                ) from None
        else:
            answered = time.monotonic()
            show(log[size:])
            size = max(size, len(log))
            if status.is_terminal():
                return
            if answered > start + limit_s:
                raise RuntimeError(
                    f"the job {job} is {status.value} after {limit_s:.0f} s and was stopped; see "
                    "`ray status` for a node with free CPUs"
                )
        time.sleep(AGAIN_S + size / BYTES_PER_S)


def follow_job(client: Any, job: str) -> tuple[str, int]:
    """Print the log of a job until the job ends. An interrupt ends this function, not the job.

    Args:
        client: ``JobSubmissionClient``.
        job: id of the job.

    Returns:
        Status and exit code of the job.
    """
    try:
        wait_for_job(client, job, console.print_log)
    except KeyboardInterrupt:
        console.print_note(
            f"\nthe job continues; follow it with `skillnet submit --attach {job}`, end it with "
            f"`ray job stop {job}`"
        )
        return "RUNNING", 130
    info = client.get_job_info(job)
    status = str(info.status.value)
    code = info.driver_exit_code
    if status == "SUCCEEDED":
        console.print_note(f"{job} succeeded")
        return status, 0
    reason = f": {info.message}" if info.message and code is None else ""
    console.print_error(f"{job} {status.lower()}{reason}")
    # A stopped job, and a job whose head was lost, have no code. A signal has a negative one.
    if not code:
        return status, 1
    # A multiple of 256 would look like success to the shell.
    return status, 128 - code if code < 0 else code & 0xFF or 1


def run_job(arguments: Sequence[str], env_from: Sequence[str] = ()) -> dict[str, Any]:
    """Run a command as a job and return the JSON document that it prints.

    The job is stopped when this function ends early.

    Raises:
        UserError: as :func:`connect_job_server` and :func:`submit_job`.
        RuntimeError: the job printed no document, or took longer than :data:`ANSWER_S`.
    """
    client = connect_job_server()
    job, _ = submit_job(client, SubmitConfig(list(arguments), check=False, env_from=[*env_from]))
    parts: list[str] = []
    try:
        wait_for_job(client, job, parts.append, ANSWER_S)
    except BaseException:
        with contextlib.suppress(Exception):
            # Nobody reads its answer any more, and it would keep its CPUs.
            client.stop_job(job)
        raise
    log = "".join(parts)
    # The log also contains lines of Ray before and after the document.
    begin, end = log.find("{\n"), log.rfind("\n}")
    if begin < 0 or end < 0:
        raise RuntimeError(f"the job {job} printed no answer: {log[-500:].strip()}")
    document: dict[str, Any] = json.loads(log[begin : end + 2])
    return document


@command(
    SubmitConfig,
    description="Send a command with this checkout's code to the cluster of RAY_ADDRESS and "
    "follow its log. The job continues when this command ends.",
    example="skillnet submit finetune --config small --training.workers 4\n"
    "skillnet submit --attach JOB",
    exit_code=lambda result: int(result["exit_code"]),
    rewrite_arguments=split_submit_arguments,
)
def main(config: SubmitConfig) -> dict[str, Any]:
    """Run ``skillnet submit``; the exit code is that of the job."""
    if bool(config.entry) == bool(config.attach):
        raise UserError(
            "skillnet submit: give a command, such as `skillnet submit finetune --config small`, "
            "or --attach to follow an earlier job"
        )
    start = time.monotonic()
    client = connect_job_server()
    result: dict[str, Any] = {"address": SecretUri(client.get_address())}
    if config.attach:
        job = config.attach
        try:
            client.get_job_info(job)
        except RuntimeError:
            raise UserError(
                f"--attach {job}: no such job on the cluster. `ray job list` shows the ids"
            ) from None
    else:
        job, package = submit_job(client, config)
        result |= {"upload_bytes": package.size, "upload_files": package.files}
    result["job_id"] = job
    if config.detach:
        console.print_note(f"{job} was sent; follow it with: skillnet submit --attach {job}")
        result["status"], code = str(client.get_job_status(job).value), 0
    else:
        result["status"], code = follow_job(client, job)
    return result | {"exit_code": code, "seconds": time.monotonic() - start}


if __name__ == "__main__":
    raise SystemExit(main())
