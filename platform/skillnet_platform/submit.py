"""``skillnet submit``: send a command to a cluster, follow its log, find it again.

The client speaks with the job server in Ray's dashboard, which listens on the head's loopback:
``ray dashboard CLUSTER.yaml`` leads there through ssh. A job belongs to the cluster: it goes on
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

#: How long :func:`run_job` waits for its answer: as doctor for its slowest node, and a start.
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

    entry: list[str] = positional_field([])
    address: str | None = None
    attach: str | None = None
    detach: bool = False
    check: bool = True
    env: dict[str, str] = field(default_factory=dict)
    env_from: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)


def split_submit_arguments(argv: Sequence[str]) -> list[str]:
    """Separate the own options from the command that is sent, by ``--``."""
    own, words = split_own_options(_attach_newest(argv))
    if {"--help", "-h"} & set(words):
        raise SystemExit(cli.main(words))  # what the command can do is known here
    return [*own, "--", *words]


def submit_job(client: Any, options: SubmitConfig) -> tuple[str, working_dir.JobPackage]:
    """Upload the code in the working directory and start the job; its id.

    Raises:
        UserError: an unknown command or preset, a folder without our code, too large an upload.
    """
    known = cli.find_commands()
    if options.entry[0] not in known:
        raise UserError(
            f"unknown command {options.entry[0]!r}{suggest_name(options.entry[0], known)}"
        )
    here = Path.cwd()
    if not (here / "platform" / "skillnet_platform").is_dir():
        raise UserError(f"{here}: not the root of the repository, whose code is sent with a job")
    if options.check:
        request_resources(options.entry)  # a missing preset shows before anything is sent
    variables = {**job_environment(), **options.env, **read_variables(options.env_from)}
    for name in options.env:
        if SECRET.search(name.upper()):
            console.warn(
                f"--env.{name}: other users of this machine see command lines; export {name} and "
                f"give --env_from {name}"
            )
    with tempfile.TemporaryDirectory() as folder:
        package = working_dir.pack_working_dir(here, Path(folder) / "code.zip", options.exclude)
        console.note(f"upload: {package.words()}")
        if package.size > working_dir.UNUSUAL:
            console.warn(working_dir.describe_largest_files(package))
        job = client.submit_job(
            entrypoint=job_entrypoint(options.entry, options.check),
            submission_id=make_job_id(options.entry[0]),
            runtime_env={"working_dir": str(package.path), "env_vars": variables},
            metadata={MARK: shlex.join(options.entry), "user": getpass.getuser()},
        )
    console.note(f"job {job}: {shlex.join(options.entry)}")
    return str(job), package


def run_job(words: Sequence[str], env_from: Sequence[str] = ()) -> dict[str, Any]:
    """Run a command as a job and give the JSON document that it prints.

    The job does not outlive the question: it is stopped when nobody waits for it any more.

    Raises:
        UserError: as :func:`connect` and :func:`submit_job`.
        RuntimeError: the job printed no document, with the end of its log; or took too long.
    """
    client = connect_job_server()
    job, _ = submit_job(client, SubmitConfig(list(words), check=False, env_from=[*env_from]))
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


def _attach_newest(argv: Sequence[str]) -> list[str]:
    """``--attach`` without an id means the newest job."""
    words = list(argv)
    if "--attach" in words:
        place = words.index("--attach")
        if place + 1 == len(words) or words[place + 1].startswith("--"):
            words.insert(place + 1, NEWEST)
    return words


@command(
    SubmitConfig,
    description="Send a command with this checkout's code to the cluster of RAY_ADDRESS and "
    "follow its log. The job goes on when this command ends.",
    example="skillnet submit finetune --config small --training.workers 4\n"
    "skillnet submit --attach",
    exit_code=lambda result: int(result["exit_code"]),
    rewrite_arguments=split_submit_arguments,
)
def main(config: SubmitConfig) -> dict[str, Any]:
    """Send a command, or attach to one; the exit code is the job's."""
    if bool(config.entry) == bool(config.attach):
        raise UserError(
            "skillnet submit: give a command, such as `skillnet submit finetune --config small`, "
            "or --attach to follow a job that was sent before"
        )
    began = time.monotonic()
    client = connect_job_server(config.address)
    told: dict[str, Any] = {"address": client.get_address()}
    if config.attach:
        job = find_job(client, config.attach)
    else:
        job, package = submit_job(client, config)
        told |= {"upload_bytes": package.size, "upload_files": package.files}
    told["job_id"] = job
    if config.detach:
        console.note(f"{job} is on its way; follow it with: skillnet submit --attach {job}")
        told["status"], code = str(client.get_job_status(job).value), 0
    else:
        told["status"], code = follow_job(client, job)
    return told | {"exit_code": code, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    raise SystemExit(main())
