"""``skillnet submit``: send a command to a cluster as a job, follow its log, attach to it again.

The client talks to the job server in Ray's dashboard, which listens on the head's loopback.
``ray dashboard CLUSTER.yaml`` opens an ssh tunnel to it. A job belongs to the cluster: it continues
when the client ends.
"""

import contextlib
import getpass
import json
import re
import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skillnet_platform import cli, console
from skillnet_platform.cli import command
from skillnet_platform.cluster import working_dir
from skillnet_platform.cluster.job_client import (
    MARK,
    NEWEST,
    connect_job_server,
    find_job,
    job_entrypoint,
    job_environment,
    make_job_id,
    read_variables,
)
from skillnet_platform.cluster.job_logs import follow_job
from skillnet_platform.cluster.resource_request import request_resources, split_own_options
from skillnet_platform.config import positional_field
from skillnet_platform.errors import UserError, suggest_name
from skillnet_platform.secret_uri import SecretUri
from skillnet_platform.tracking.backend import URI_VARIABLE
from skillnet_platform.tracking.source_commit import commit_variable

#: How long :func:`run_job` waits for its answer: as doctor for its slowest node, and a start.
ANSWER_S = 900.0
SECRET = re.compile("PASSWORD|SECRET|TOKEN|CREDENTIAL|_KEY$")


@dataclass
class SubmitConfig:
    """Options of ``skillnet submit``; they precede the command.

    Args:
        entry: command of skillnet with its options, as it would run here.
        address: job server; by default RAY_ADDRESS.
        attach: follow an earlier job by its id, or your newest job without an id.
        detach: send the job and return immediately.
        check: check the cluster first (`skillnet doctor`); errors stop the job.
        env: environment variables of the job, such as ``--env.SKILLNET_HOME s3://bucket/runs``.
        env_from: names of variables whose local values the job gets; for passwords, which a
            command line would expose.
        exclude: names of files and folders to leave out of the upload, beside the usual ones.
    """

    entry: list[str] = positional_field([])
    address: str | None = None
    attach: str | None = None
    detach: bool = False
    check: bool = True
    env: dict[str, str] = field(default_factory=dict)
    env_from: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)


def split_submit_arguments(argv: Sequence[str]) -> list[str]:
    """Separate own options from the command to send by ``--``."""
    own, words = split_own_options(_attach_newest(argv))
    if {"--help", "-h"} & set(words):
        raise SystemExit(cli.main(words))  # the help of the command needs no cluster
    return [*own, "--", *words]


def submit_job(client: Any, options: SubmitConfig) -> tuple[str, working_dir.JobPackage]:
    """Upload the code of the working directory and start a job.

    Returns:
        Id of the job, and its package.

    Raises:
        UserError: an unknown command, invalid arguments, a folder without our code, or too large an
            upload.
    """
    known = cli.find_commands()
    if options.entry[0] not in known:
        raise UserError(
            f"unknown command {options.entry[0]!r}{suggest_name(options.entry[0], known)}"
        )
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
    variables = {**job_environment(), **commit_variable(), **given}
    for name in options.env:
        if SECRET.search(name.upper()):
            console.print_warning(
                f"--env.{name}: other users of this machine see command lines; export {name} and "
                f"give --env_from {name}"
            )
    with tempfile.TemporaryDirectory() as folder:
        package = working_dir.pack_working_dir(here, Path(folder) / "code.zip", options.exclude)
        console.print_note(f"upload: {package.summary()}")
        if package.size > working_dir.UNUSUAL:
            console.print_warning(working_dir.describe_largest_files(package))
        job = client.submit_job(
            entrypoint=job_entrypoint(options.entry, options.check),
            submission_id=make_job_id(options.entry[0]),
            runtime_env={"working_dir": str(package.path), "env_vars": variables},
            metadata={MARK: shlex.join(options.entry), "user": getpass.getuser()},
        )
    console.print_note(f"job {job}: {shlex.join(options.entry)}")
    return str(job), package


def run_job(arguments: Sequence[str], env_from: Sequence[str] = ()) -> dict[str, Any]:
    """Run a command as a job and return the JSON document that it prints.

    The job is stopped when this function ends early.

    Raises:
        UserError: as :func:`connect` and :func:`submit_job`.
        RuntimeError: the job printed no document, or took longer than :data:`ANSWER_S`.
    """
    client = connect_job_server()
    job, _ = submit_job(client, SubmitConfig(list(arguments), check=False, env_from=[*env_from]))
    deadline, ended = time.monotonic() + ANSWER_S, False
    try:
        while not ended:
            status = client.get_job_status(job)
            ended = status.is_terminal()
            if not ended and time.monotonic() > deadline:
                raise RuntimeError(
                    f"the job {job} is {status.value} after {ANSWER_S:.0f} s and was stopped; "
                    "see `ray status` for a node with free CPUs"
                )
            if not ended:
                time.sleep(0.5)
    finally:
        if not ended:
            with contextlib.suppress(Exception):
                # Nobody reads its answer any more, and it would keep its CPUs.
                client.stop_job(job)
    log = str(client.get_job_logs(job))
    # The log also contains lines of Ray before and after the document.
    begin, end = log.find("{\n"), log.rfind("\n}")
    if begin < 0 or end < 0:
        raise RuntimeError(f"the job {job} printed no answer: {log[-500:].strip()}")
    document: dict[str, Any] = json.loads(log[begin : end + 2])
    return document


def _attach_newest(argv: Sequence[str]) -> list[str]:
    """Return the arguments with the newest job for ``--attach`` without an id."""
    words = list(argv)
    if "--attach" in words:
        place = words.index("--attach")
        if place + 1 == len(words) or words[place + 1].startswith("--"):
            words.insert(place + 1, NEWEST)
    return words


@command(
    SubmitConfig,
    description="Send a command with this checkout's code to the cluster of RAY_ADDRESS and "
    "follow its log. The job continues when this command ends.",
    example="skillnet submit finetune --config small --training.workers 4\n"
    "skillnet submit --attach",
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
    client = connect_job_server(config.address)
    result: dict[str, Any] = {"address": SecretUri(client.get_address())}
    if config.attach:
        job = find_job(client, config.attach)
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
