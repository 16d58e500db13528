"""Log of a cluster's job, printed until the job ends."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from skillnet_platform import console
from skillnet_platform.errors import UserError

#: Seconds in which a job server that does not answer is asked again.
PATIENCE_S = 120.0
#: Seconds without output after which the log is opened again. A quiet job and a dead connection
#: look the same.
QUIET_S = 120.0
AGAIN_S = 1.0


def follow_job(client: Any, job: str) -> tuple[str, int]:
    """Print the log of a job until the job ends.

    A lost connection is opened again. An interrupt ends this function, not the job.

    Args:
        client: ``JobSubmissionClient``.
        job: id of the job.

    Returns:
        Status and exit code of the job.
    """
    try:
        with _silent_ray():
            asyncio.run(_print_log(client, job))
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
    return status, _exit_code(code)


def _exit_code(code: int | None) -> int:
    """Return the exit code of a failed job as a shell reports it; 1 if the cluster has none.

    A stopped job, and a job whose head was lost, have no code. A signal has a negative code.
    """
    if not code:
        return 1
    # A multiple of 256 would look like success to the shell.
    return 128 - code if code < 0 else code & 0xFF or 1


async def _print_log(client: Any, job: str) -> None:
    """Print the log; after a lost connection continue at the cut."""
    printed, deadline = 0, time.monotonic() + PATIENCE_S
    while True:
        position, error = 0, ""
        try:
            async for text in _while_it_speaks(client.tail_job_logs(job)):
                # Each new connection sends the log from its start.
                fresh = text[max(printed - position, 0) :]
                position += len(text)
                printed = max(printed, position)
                console.print_log(fresh)
        except Exception as lost:
            error = f"{type(lost).__name__}: {lost}"
        with contextlib.suppress(Exception):
            ended = client.get_job_status(job).is_terminal()
            deadline = time.monotonic() + PATIENCE_S  # it answers, even if the job is quiet
            if ended:
                if error:  # the connection broke before the end of the log
                    console.print_log(client.get_job_logs(job)[printed:])
                return
        if time.monotonic() > deadline:
            raise UserError(
                f"the connection to the cluster is lost ({error or 'closed'}); the job {job} "
                f"continues: skillnet submit --attach {job}"
            )
        await asyncio.sleep(AGAIN_S)


async def _while_it_speaks(texts: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield the texts of a log.

    Raises:
        TimeoutError: no text for ``QUIET_S`` seconds.
    """
    while True:
        try:
            # A dead connection raises nothing, and the client would wait forever.
            yield await asyncio.wait_for(anext(texts), QUIET_S)
        except StopAsyncIteration:
            return


@contextlib.contextmanager
def _silent_ray() -> Iterator[None]:
    """Keep Ray from reporting each closed connection between the lines of the job."""
    logger = logging.getLogger("ray.dashboard.modules.job.sdk")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
