"""Two workers without Ray: forked in milliseconds, joined by gloo, started again as Ray does it.

For the many runs of the chaos lane: driver, workers, checkpoints and records are the real ones, and
only what starts the workers is replaced. What Ray itself does is tried in fewer runs, and slower.
"""

import multiprocessing
import multiprocessing.connection
import os
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop import preemption
from pipelines.training.loop.reporter import LoopCallback
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.worker import FinalEvaluation, run_worker
from skillnet_platform import console
from skillnet_platform.errors import UserError
from tests.helpers.stop_files import FILE, FileStopSignal

#: Seconds for the others to end after one has; gloo tells them at once.
PATIENCE_S = 20.0


def fit_on_ranks(
    run: ResolvedRun,
    tracked: tuple[str, str] | None,
    on_evaluation: Any = None,
    nested: Any = None,
    callbacks: Sequence[LoopCallback] = (),
    final: FinalEvaluation | None = None,
) -> None:
    """What ``loop.ray_train.fit.fit_on_ray`` does, with processes of this machine.

    Raises:
        UserError: a worker met a user error, such as a full disk.
        RuntimeError: workers died more often than ``training.max_failures``.
    """
    config = run.config
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "mlflow.tracking"])
    with (
        preemption.listen_in_driver(FileStopSignal(run.folder / FILE)),
        tempfile.TemporaryDirectory() as place,
    ):
        for attempt in range(config.training.max_failures + 1):
            words = Path(place) / f"words-{attempt}"
            args = (
                config,
                run.folder,
                tracked,
                f"{place}/store-{attempt}",
                words,
                callbacks,
                final,
            )
            group = [
                context.Process(target=_worker, args=(rank, *args))
                for rank in range(config.training.workers)
            ]
            for process in group:
                process.start()
            codes = _ended(group)
            if not any(codes):
                return
            if words.is_file():
                raise UserError(words.read_text(encoding="utf-8"))
            console.print_warning(f"workers ended with {codes}; starting them again")
    raise RuntimeError(f"the workers died {config.training.max_failures + 1} times")


def _ended(group: list[Any]) -> list[int]:
    """Exit codes, once all have ended; the death of one is the end of all."""
    multiprocessing.connection.wait([process.sentinel for process in group])
    for process in group:
        process.join(PATIENCE_S if not any(other.exitcode for other in group) else 1.0)
    while any(process.is_alive() for process in group):
        if any(process.exitcode for process in group):
            for process in group:
                process.kill()
        for process in group:
            process.join(1.0)
    return [int(process.exitcode) for process in group]


def _worker(
    rank: int,
    config: FinetuneConfig,
    run: Path,
    tracked: tuple[str, str] | None,
    store: str,
    words: Path,
    callbacks: Sequence[LoopCallback],
    final: FinalEvaluation | None,
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    world = config.training.workers
    torch.set_num_threads(1)
    preemption.listen_in_worker()
    timeout = timedelta(seconds=config.training.collective_timeout_s)
    dist.init_process_group("gloo", f"file://{store}", timeout=timeout, rank=rank, world_size=world)
    try:
        resolved = ResolvedRun(config, run)
        if rank:
            run_worker(resolved, rank, world, tracked, callbacks=callbacks, final=final)
        else:
            with preemption.watch_stop_signal(FileStopSignal(run / FILE)):
                run_worker(resolved, rank, world, tracked, callbacks=callbacks, final=final)
    except UserError as error:
        words.write_text(str(error), encoding="utf-8")
        os._exit(2)
    except BaseException as error:
        console.print_warning(f"rank {rank}: {type(error).__name__}: {error}"[:200])
        # Not in order: what is left of the group would wait for this rank.
        os._exit(1)
    dist.destroy_process_group()
