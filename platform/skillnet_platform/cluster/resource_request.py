"""Resource request of a command: what ``skillnet doctor`` and ``skillnet submit`` check.

A command states its request by the ``resources`` hook of :func:`skillnet_platform.cli.command`.
The hook gets the configuration that the command itself would run with. This package therefore
knows no configuration of ``pipelines`` or ``sweeps``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from skillnet_platform.storage.directories import is_uri
from skillnet_platform.terminal_text import format_plural


@dataclass(frozen=True)
class ResourceRequest:
    """Workers, CPUs, GPUs and storage that one run needs.

    Args:
        workers: processes that train at the same time.
        gpus: GPUs of all workers together.
        cpus: CPUs of each worker.
        min_workers: fewest workers of an elastic run. 0 if the run needs all workers.
        spread: whether each worker needs a node of its own.
        locations: paths and URIs of results and corpora. An empty string stands for the run root,
            and so does an empty tuple.
        models: paths and URIs of models that the run reads.
        next_stage: request of a second stage that starts when the first stage ends.
        run_dir: directory of runs, if it is a path. Empty for the run root.
        run_name: name of the run.
        keep_checkpoints: number of checkpoints that the run keeps.
        uses_tracker: whether the run writes to the tracker or reads the registry.
        list_runs: returns the training runs of the command. Planners of the entry point group
            ``skillnet.planners`` say whether they fit the GPUs of the cluster.
    """

    workers: int = 1
    gpus: float = 0
    cpus: float = 1.0
    min_workers: int = 0
    spread: bool = False
    locations: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    next_stage: "ResourceRequest | None" = None
    run_dir: str = ""
    run_name: str = ""
    keep_checkpoints: int = 2
    uses_tracker: bool = field(default=False, compare=False)
    list_runs: Callable[[], Sequence[Any]] | None = field(default=None, compare=False)

    def format(self) -> str:
        """Return the request in words: ``2 workers with a GPU each on 2 nodes``."""
        single = self.workers == 1
        parts = [format_plural(self.workers, "worker")]
        if self.min_workers:
            parts[0] = f"{self.min_workers} to {parts[0]}"
        each = "" if single else " each"
        if self.cpus != 1:
            parts.append(f"with {self.cpus:g} CPUs{each}")
        if self.gpus:
            gpus = self.gpus / self.workers
            parts.append(f"with {'a GPU' if gpus == 1 else f'{gpus:g} GPUs'}{each}")
        if self.spread and not single:
            parts.append(f"on {self.workers} nodes")
        return " ".join(parts)


def collect_locations(data: str | None, *results: str | None) -> tuple[str, ...]:
    """Return the locations of a training run, with the run root where one is not named.

    Args:
        data: path or URI of the corpora.
        results: paths and URIs of the results.
    """
    named = [each for each in results if each]
    if not data and not named:
        return ()
    return tuple(dict.fromkeys([*(named or [""]), data or ""]))


def select_model_paths(*models: str | None) -> tuple[str, ...]:
    """Return the models that are named by a path or URI, not by a run's name or in the registry."""
    registered = ("models:", "runs:")
    return tuple(
        each for each in models if each and "/" in each and not each.startswith(registered)
    )


def local_run_dir(run_dir: str | None) -> str:
    """Return ``run_dir`` if it is a path, else "": a mirrored run writes to the run root."""
    return "" if not run_dir or is_uri(run_dir) else run_dir
