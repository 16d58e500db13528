"""The log of a job of a cluster, printed until the job ends, and how it ended."""

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from skillnet_platform import console
from skillnet_platform.errors import UserError

#: How long a job server that does not answer is asked again.
PATIENCE_S = 120.0
#: A log that says nothing for so long is opened anew: nothing else tells a job that is quiet
#: from a connection whose other end is gone.
QUIET_S = 120.0
AGAIN_S = 1.0


def follow_job(client: Any, job: str) -> tuple[str, int]:
    """Print the log of a job until it ends; its status and its exit code.

    A lost connection is tried again. An interrupt ends the following, not the job.
    """
    stream = sys.stderr if console.json_wanted() else sys.stdout
    try:
        with _silent_ray():
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
    return status, _exit_code(code)


def _exit_code(code: int | None) -> int:
    """The code of a job that did not succeed, as a shell gives it; 1 where the cluster has none.

    It has none of a job that was stopped, or whose head was lost. A signal has a negative one.
    """
    if not code:
        return 1
    return 128 - code if code < 0 else code & 0xFF or 1


async def _print_log(client: Any, job: str, stream: Any) -> None:
    """The log from its beginning; after a lost connection from where it was cut."""
    printed, deadline = 0, time.monotonic() + PATIENCE_S
    while True:
        position, problem = 0, ""
        try:
            async for text in _while_it_speaks(client.tail_job_logs(job)):
                fresh = text[max(printed - position, 0) :]
                position += len(text)
                printed = max(printed, position)
                stream.write(fresh)
                stream.flush()
        except Exception as lost:
            problem = f"{type(lost).__name__}: {lost}"
        with contextlib.suppress(Exception):
            ended = client.get_job_status(job).is_terminal()
            deadline = time.monotonic() + PATIENCE_S  # it answers, however quiet the job is
            if ended:
                if problem:  # cut off before the last words
                    stream.write(client.get_job_logs(job)[printed:])
                return
        if time.monotonic() > deadline:
            raise UserError(
                f"the connection to the cluster is lost ({problem or 'closed'}); the job {job} "
                f"goes on: skillnet submit --attach {job}"
            )
        await asyncio.sleep(AGAIN_S)


async def _while_it_speaks(texts: AsyncIterator[str]) -> AsyncIterator[str]:
    """The texts of a log.

    Raises:
        TimeoutError: none came for ``QUIET_S``.
    """
    while True:
        try:
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
