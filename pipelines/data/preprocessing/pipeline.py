"""Preparation of corpora in tasks: blocks of raw rows flow in, finished shards stay on disk.

    tasks: parts -> rows  ==>  one task per corpus: blocks  ==>  tasks: blocks -> shards ==> driver
                                 |                                          |               |
                                 +--> rejected rows               entry <---+   manifest <--+

Only a few blocks are in memory at any time. A shard is complete once its entry exists, and a killed
run resumes with the complete shards (:mod:`pipelines.data.preprocessing.staging`). The driver
counts rows, stops if too many are bad, and publishes each corpus, manifest last, as soon as all of
its blocks are done. With an object store, each shard is uploaded as soon as it is complete
(:mod:`pipelines.data.preprocessing.remote_staging`).
"""

import contextlib
import secrets
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from pipelines.data.corpora.base import Corpus, CorpusPart, SourceArchives
from pipelines.data.preprocessing import staging
from pipelines.data.preprocessing.blocks import TaskStarter, iter_texts, write_spool
from pipelines.data.preprocessing.jobs import CorpusJob
from pipelines.data.preprocessing.progress import CorpusProgress
from pipelines.data.preprocessing.remote_staging import RemoteStaging, clear_staging
from pipelines.data.tokenizer import training as tokenizers
from pipelines.data.transforms import decode_guard
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_platform.storage import require_space
from skillnet_platform.storage.location import join_location
from skillnet_platform.storage.locks import LEASE, hold_lease, is_shared_disk
from skillnet_platform.storage.retry import StoreUnavailableError

#: With fewer free bytes than this, no corpus is started.
MIN_FREE_BYTES = 2**20


class PreparationTasks(Protocol):
    """Place where the tasks of a preparation run: on Ray, or in processes of this machine."""

    def readers(self) -> TaskStarter:
        """Return the tasks that read the parts of a corpus."""

    def call(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Return the results of a function for several arguments."""

    def run(self, jobs: Sequence[CorpusJob], session: str) -> Generator[dict[str, Any], None, None]:
        """Yield the results of all blocks of some corpora, in any order."""


def spool_corpora(
    corpora: Sequence[Corpus],
    archives: Path,
    folder: Path,
    parts: Mapping[str, Sequence[CorpusPart]],
    tasks: PreparationTasks,
) -> dict[str, Path]:
    """Read corpora in parallel, each into a spool file.

    Args:
        corpora: corpora to read.
        archives: directory of the downloads.
        folder: directory of the spool files.
        parts: corpus name -> its parts; none for a corpus that is read whole.
        tasks: where they are read.

    Returns:
        Corpus name -> spool file.
    """
    files = {corpus.name: folder / f"{corpus.name}.arrows" for corpus in corpora}
    readers = tasks.readers()
    arguments = [
        (c, SourceArchives(archives, c.archives), files[c.name], parts.get(c.name, ()), readers)
        for c in corpora
    ]
    tasks.call(write_spool, arguments)
    return files


def train_shared_tokenizer(
    corpora: Sequence[Corpus], spools: Mapping[str, Path], size: int, tasks: PreparationTasks
) -> str:
    """Train the tokenizer on the spooled texts of corpora, and return its JSON.

    Args:
        corpora: training corpora.
        spools: corpus name -> spool file.
        size: number of tokens.
        tasks: where it is trained.
    """
    sources = [(corpus, spools[corpus.name]) for corpus in corpora]
    (text,) = tasks.call(_train_tokenizer, [(sources, size)])
    return str(text)


def write_corpora(
    jobs: Sequence[CorpusJob],
    max_error_rate: float,
    tasks: PreparationTasks,
    store: str | None = None,
) -> Generator[dict[str, Any], None, None]:
    """Prepare corpora at the same time; yield the manifest of each one when it is published.

    Args:
        jobs: corpora to prepare.
        max_error_rate: allowed fraction of a corpus' rows that are bad.
        tasks: where the rows are read and the shards are written.
        store: URI of the folder of prepared corpora; ``None`` leaves them on this disk.

    Raises:
        UserError: the disk is full, too many rows are bad, or another process prepares one of the
            corpora.
        StoreUnavailableError: the store does not answer. Uploaded shards stay there.
    """
    if not jobs:
        return
    session = secrets.token_hex(8)
    with contextlib.ExitStack() as stack:
        stack.callback(decode_guard.remove_attempts, session)
        states = [_start_job(job, store, stack) for job in jobs]
        running = [state.job for state in states]
        with (
            console.show_progress("preparing", unit="rows") as bar,
            contextlib.closing(tasks.run(running, session)) as results,
        ):
            bar.found(sum(state.rows for state in states))
            for result in results:
                if "user_error" in result:
                    raise UserError(result["user_error"])
                if "store_unavailable" in result:
                    raise StoreUnavailableError(result["store_unavailable"])
                state = states[result["corpus"]]
                bar.total = bar.total or _count_rows(states)
                bar.advance(state.add_result(result), state.job.corpus.name)
                state.check_error_rate(max_error_rate)
                if state.is_complete():
                    yield state.finish()


def _count_rows(states: Sequence[CorpusProgress]) -> int | None:
    """Return the rows of all corpora once they are read, which is long before they are decoded."""
    counts = [state.count_rows() for state in states]
    return None if None in counts else sum(count or 0 for count in counts)


def _start_job(job: CorpusJob, store: str | None, stack: contextlib.ExitStack) -> CorpusProgress:
    """Lock the staging directory of a job, and find the shards that an earlier run finished."""
    require_space(job.final_dir, MIN_FREE_BYTES)
    folder = stack.enter_context(staging.staging_dir(job.final_dir, job.identity))
    name, data = job.final_dir.name, store or job.final_dir.parent
    if isinstance(data, str) or is_shared_disk(data):

        def describe(holder: str) -> str:
            return f"{data}: {holder} prepares {name} now. Wait for it, or give another --data"

        # The lock of the staging directory holds on this host only.
        stack.enter_context(hold_lease(join_location(data, f".{name}{LEASE}"), describe))
    remote, tokenizer = None, job.identity["tokenizer"]
    if store is not None:
        clear_staging(store, job.final_dir.name, keep=folder.name)
        sha256 = tokenizer["sha256"] if tokenizer else None
        remote = RemoteStaging.create(store, job.final_dir.name, folder, sha256)
    finished = remote.finished_shards(folder) if remote else staging.finished_shards(folder)
    if finished:
        console.print_note(f"{job.corpus.name}: resumes with {len(finished)} finished shards")
    keys = {stem: entry["keys"] for stem, entry in finished.items()}
    job = replace(job, staging_dir=folder, finished_keys=keys, remote=remote)
    return CorpusProgress(job, finished)


def _train_tokenizer(parts: list[tuple[Corpus, Path]], size: int) -> str:
    terms = [term for corpus, _ in parts for term in corpus.terms]

    def texts_of(*splits: str) -> Iterator[str]:
        for corpus, path in parts:
            yield from iter_texts(corpus, path, splits)

    return tokenizers.train_tokenizer(texts_of("train"), texts_of("pretrain"), terms, size)
