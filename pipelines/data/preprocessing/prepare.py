"""Prepare corpora and the tokenizer that they share: the library of ``skillnet prepare``.

:func:`prepare` finds corpora that are current, trains the tokenizer if necessary, and passes the
other corpora to :mod:`pipelines.data.preprocessing.pipeline`.

A preparation that must fail fails in seconds, before its tasks start: :func:`check_preparable`
reads a small corpus completely, as ``skillnet inspect`` does. A corpus that is too large for that
is checked while it is prepared.
"""

import contextlib
import copy
import hashlib
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.data.corpora import DEMO, Corpus, ExternalCorpus, find_corpus, is_built_in
from pipelines.data.corpora.base import (
    JOINED_ROW,
    RejectedRow,
    Row,
    SourceArchives,
    check_archive,
    unpack_hint,
)
from pipelines.data.corpora.readers.base import LABEL_COLUMNS
from pipelines.data.io.media import MediaReadError, read_media
from pipelines.data.preprocessing import pipeline
from pipelines.data.preprocessing.blocks import (
    ReadSummary,
    RowBlock,
    read_blocks,
    read_spool_summary,
    read_spooled_rows,
)
from pipelines.data.preprocessing.jobs import CorpusJob
from pipelines.data.preprocessing.local_tasks import LocalTasks, are_texts, needs_no_ray
from pipelines.data.preprocessing.media_sample import measure_media, run_within
from pipelines.data.preprocessing.progress import (
    MAX_ADVISED_RATE,
    MOSTLY_BAD_ADVICE,
    check_first_rows,
)
from pipelines.data.preprocessing.remote_staging import clear_staging, upload_shared_files
from pipelines.data.preprocessing.staging import finish_commit, staging_path
from pipelines.data.shards.dataset import open_corpus, verify_corpus
from pipelines.data.shards.format import QUARANTINE
from pipelines.data.shards.row_checks import ROW_CHECKS, describe_row_checks
from pipelines.data.tokenizer import selection
from pipelines.data.tokenizer import training as tokenizers
from pipelines.data.tokenizer.training import TOKENIZER, TOKENIZER_MANIFEST
from skillnet_files.commit import remove_leftovers
from skillnet_platform import cluster, config, console, signals, storage
from skillnet_platform.cli import user_error_message
from skillnet_platform.errors import UserError
from skillnet_platform.storage import atomic_write, directories

#: Increase it when the engine (not one corpus) changes the prepared bytes.
ENGINE_VERSION = 2
#: Fraction of the rows.
MAX_ERROR_RATE = 0.1


def prepare(
    names: list[str],
    data: Path,
    archives: Path,
    cpus: int | None = None,
    max_error_rate: float = MAX_ERROR_RATE,
    external: Sequence[ExternalCorpus] = (),
    tokenizer: str | None = None,
    vocabulary: int = tokenizers.VOCABULARY_SIZE,
    store: str | None = None,
    uses_ray: bool = True,
) -> dict[str, dict[str, Any]]:
    """Prepare corpora, and the tokenizer if one of them needs it.

    Args:
        names: names of built-in or installed corpora.
        data: directory to write to; with an object store, the local staging directory.
        archives: directory of the downloads.
        cpus: CPUs of the embedded Ray, or processes of texts.
        max_error_rate: allowed fraction of a corpus' rows that are bad.
        external: external corpora, already opened.
        tokenizer: see ``PrepareConfig``.
        vocabulary: number of tokens of a tokenizer that is trained on ``external``.
        store: URI of the folder that the corpora are uploaded to, shard by shard. Other nodes of
            the cluster do not see ``data`` then: they transform what does not need the disk of
            this node.
        uses_ray: media are decoded by workers of Ray, otherwise by processes of this machine.

    Returns:
        Name -> state ("prepared" or "cached"), rows, splits, rejected rows, bytes, digest.

    Raises:
        UserError: an unknown corpus, a missing or damaged archive, a full disk, or too many bad
            rows. Finished shards stay, and the next run resumes with them.
    """
    if not 0 <= max_error_rate <= 1:
        raise UserError(
            f"max_error_rate is {max_error_rate}; expected a fraction of the rows, from 0 to 1"
        )
    corpora: list[Corpus] = [find_corpus(name) for name in dict.fromkeys(names)]
    if twice := {corpus.name for corpus in corpora} & {corpus.name for corpus in external}:
        raise UserError(f"the corpus {min(twice)} is named twice")
    data = data.absolute()
    if data.exists() and not data.is_dir():
        raise UserError(f"{data}: a file; expected the directory of the prepared corpora (data)")
    corpora += external
    try:
        has_text = tokenizer is not None or any(corpus.text_columns for corpus in corpora)
        with selection.lock_tokenizer(data) if has_text else contextlib.nullcontext() as lock:
            if lock is not None and tokenizer not in (None, selection.LEARN):
                lock.exclusive()
                requested = {corpus.name for corpus in corpora}
                manifest = data / TOKENIZER_MANIFEST
                selection.install_tokenizer(
                    tokenizer, data / TOKENIZER, manifest, requested, store or data
                )
            retrain, archives = tokenizer == selection.LEARN, archives.absolute()
            return _prepare(
                corpora,
                data,
                archives,
                cpus,
                max_error_rate,
                store,
                retrain,
                vocabulary,
                lock,
                uses_ray,
            )
    except Exception as error:
        message = user_error_message(error)
        if message is None or isinstance(error, UserError):
            raise
        raise UserError(message) from error


def _prepare(
    corpora: list[Corpus],
    data: Path,
    archives: Path,
    cpus: int | None = None,
    max_error_rate: float = MAX_ERROR_RATE,
    store: str | None = None,
    retrain: bool = False,
    vocabulary: int = tokenizers.VOCABULARY_SIZE,
    lock: selection.TokenizerLock | None = None,
    uses_ray: bool = True,
) -> dict[str, dict[str, Any]]:
    sources = {corpus.name: _check_sources(corpus, archives) for corpus in corpora}
    for corpus in corpora:
        if isinstance(corpus, ExternalCorpus) and (unread := corpus.describe_unread()):
            console.print_warning(
                f"{corpus.source.uri}: annotation files that are not read: "
                f"{unread}. To read one of them, give the file itself"
            )
    tokenizer = data / TOKENIZER
    absent = not tokenizer.is_file() or selection.is_leftover_tokenizer(tokenizer, store or data)
    training_corpora = tokenizer_training_corpora(corpora, tokenizer, archives, retrain, absent)
    is_external = any(isinstance(corpus, ExternalCorpus) for corpus in training_corpora)
    size = vocabulary if is_external else None
    fingerprint = tokenizer_fingerprint(training_corpora, archives, sources)
    fingerprint |= {"vocabulary": size} if size else {}
    is_trained = not training_corpora or selection.matches_fingerprint(tokenizer, fingerprint)
    done: dict[str, dict[str, Any]] = {}
    for corpus in corpora:
        if is_trained or not corpus.text_columns:
            reuse_if_current(corpus, data, sources[corpus.name], done, store)
    parts = {corpus.name: corpus.divide() for corpus in corpora if corpus.name not in done}
    unlabelled = list[ExternalCorpus]()
    # The size of other corpora is unknown.
    are_small = all(isinstance(corpus, ExternalCorpus) for corpus in corpora)
    for corpus in corpora:
        if corpus.name not in done and isinstance(corpus, ExternalCorpus):
            # The labels of a large corpus are collected while its parts are read.
            if len(parts[corpus.name]) > 1 and corpus.lacks_labels():
                unlabelled.append(corpus)
            else:
                corpus.scan_labels()
            rejected = data / f"{corpus.name}.rejected.jsonl"
            are_small &= check_preparable(corpus, rejected, max_error_rate)
    if not is_trained and lock is not None:
        lock.exclusive()
    if not is_trained and size is not None:
        requested = {corpus.name for corpus in corpora}
        selection.check_replaceable(tokenizer, requested, store or data)
    if len(done) == len(corpora):
        remove_leftovers(data)
        if store is not None:
            # All corpora are current, but the manifest of the tokenizer may have changed.
            upload_shared_files(data, store)
        return {corpus.name: done[corpus.name] for corpus in corpora}
    with (
        signals.terminate_as_interrupt(),
        storage.scratch_directory(data / "reading") as spool_dir,
        contextlib.ExitStack() as stack,
    ):
        spooled = list(dict.fromkeys([*unlabelled, *([] if is_trained else training_corpora)]))
        to_do = [*spooled, *(corpus for corpus in corpora if corpus.name not in done)]
        tasks = _start_tasks(to_do, store, cpus, 1 if are_small else None, stack, uses_ray)
        spools = pipeline.spool_corpora(spooled, archives, spool_dir, parts, tasks)
        for corpus in unlabelled:
            spool, annotations = spools[corpus.name], corpus.annotations_present
            columns = [LABEL_COLUMNS[each] for each in annotations if each in LABEL_COLUMNS]
            corpus.collect_labels(
                read_spooled_rows(spool, columns), read_spool_summary(spool).errors
            )
        if not is_trained:
            num_tokens = size or tokenizers.VOCABULARY_SIZE
            text = pipeline.train_shared_tokenizer(training_corpora, spools, num_tokens, tasks)
            recorded = {
                selection.FINGERPRINT: config.digest_config(fingerprint),
                "sha256": hashlib.sha256(text.encode()).hexdigest(),
            }
            names = [corpus.name for corpus in training_corpora]
            trained_on = {selection.TRAINED_ON: names} if size else {}
            # The manifest comes first. After a kill between the two, a tokenizer that does not
            # match its manifest is trained again; one without a manifest would be the user's own.
            storage.write_json(data / TOKENIZER_MANIFEST, trained_on | recorded)
            with storage.atomic_write(tokenizer, "w") as stream:
                stream.write(text)
            for corpus in corpora:
                # Other training texts can give an equal tokenizer: these corpora are current.
                if corpus.name not in done:
                    reuse_if_current(corpus, data, sources[corpus.name], done, store)
        if store is not None:
            upload_shared_files(data, store)  # before the manifests, which name its hash
        jobs = [
            CorpusJob(
                corpus,
                SourceArchives(archives, corpus.archives),
                data / corpus.name,
                build_corpus_identity(corpus, sources[corpus.name], data),
                tokenizer if corpus.text_columns else None,
                spools.get(corpus.name),
                parts[corpus.name],
            )
            for corpus in corpora
            if corpus.name not in done
        ]
        manifests = pipeline.write_corpora(jobs, max_error_rate, tasks, store)
        for manifest in stack.enter_context(contextlib.closing(manifests)):
            done[manifest["corpus"]] = summarize_manifest(manifest, "prepared")
            console.print_note(f"{manifest['corpus']}: {manifest['rows_out']} rows prepared")
    return {corpus.name: done[corpus.name] for corpus in corpora}


def list_rejections(corpora: Mapping[str, Mapping[str, Any]]) -> None:
    """Print why rows of corpora were rejected.

    Args:
        corpora: name -> entry of :func:`prepare`.
    """
    for name, entry in corpora.items():
        reasons = {why: rows for why, rows in entry["quarantine"].items() if why != JOINED_ROW}
        if reasons and entry["state"] != "cached":
            listed = ", ".join(f"{rows} {why}" for why, rows in reasons.items())
            console.print_note(f"{name}: rejected rows: {listed}. {name}/{QUARANTINE} names them")


def _start_tasks(
    corpora: Sequence[Corpus],
    store: str | None,
    cpus: int | None,
    processes: int | None,
    stack: contextlib.ExitStack,
    uses_ray: bool,
) -> pipeline.PreparationTasks:
    """Return where the tasks run. The stack ends them before their directory is removed."""
    if not uses_ray or needs_no_ray(corpora, store):
        count = processes or cpus or len(os.sched_getaffinity(0))
        return stack.enter_context(LocalTasks(count, not are_texts(corpora)))
    cluster.ensure_ray(cpus)
    stack.callback(cluster.halt_if_asked)
    # Ray Data is imported only if there is work for it: not for --help.
    from pipelines.data.preprocessing.ray_tasks import choose_scheduling

    return choose_scheduling(corpora, store)


def build_corpus_identity(
    corpus: Corpus, sources: list[dict[str, str]], data: Path
) -> dict[str, Any]:
    """Return the part of a manifest that is known before the work. Equal parts mean equal bytes.

    Args:
        corpus: corpus to prepare.
        sources: file and SHA-256 of each source.
        data: directory of the tokenizer.
    """
    preprocessing = {
        "engine": ENGINE_VERSION,
        "version": corpus.version,
        "shard_rows": corpus.shard_rows,
        **corpus.preprocessing(),
    }
    return {
        "sources": sources,
        "preprocessing": preprocessing,
        "preprocessing_digest": config.digest_config(preprocessing),
        "tokenizer": _describe_tokenizer(data / TOKENIZER) if corpus.text_columns else None,
    }


def tokenizer_training_corpora(
    corpora: list[Corpus], tokenizer: Path, archives: Path, retrain: bool, absent: bool
) -> list[Corpus]:
    """Return the corpora that the tokenizer is trained on; an empty list keeps the existing one.

    Built-in corpora always train on the same corpora, independent of the requested ones. So
    preparing one now and another later gives the same tokenizer as preparing both at once.
    External corpora train a tokenizer if none exists, if no finished corpus uses it, or on
    request.

    The list is empty if no corpus has text, if the existing tokenizer is custom, or if its training
    corpora were not downloaded: later corpora then use the tokenizer that a model may know already.

    Args:
        corpora: corpora to prepare.
        tokenizer: existing or future tokenizer file.
        archives: directory of the downloads.
        retrain: train on the external corpora, even if a tokenizer exists.
        absent: no tokenizer exists, or no finished corpus uses it.
    """
    readers = [corpus for corpus in corpora if corpus.text_columns]
    external: list[Corpus] = [corpus for corpus in readers if isinstance(corpus, ExternalCorpus)]
    if retrain or (external and len(external) == len(readers)):
        return external if retrain or absent else []
    manifest = tokenizer.with_name(TOKENIZER_MANIFEST)
    if not readers or (tokenizer.is_file() and selection.is_custom_tokenizer(manifest)):
        return []
    installed = [find_corpus(name) for name in DEMO if is_built_in(name)]
    built_in = [corpus for corpus in installed if corpus.text_columns]
    files = [archives / archive.file for corpus in built_in for archive in corpus.archives]
    if tokenizer.is_file() and not all(file.is_file() for file in files):
        return []
    return built_in


def tokenizer_fingerprint(
    training_corpora: list[Corpus], archives: Path, sources: dict[str, list[dict[str, str]]]
) -> dict[str, Any]:
    """Return all values that decide a trained tokenizer.

    Args:
        training_corpora: see :func:`tokenizer_training_corpora`.
        archives: directory of the downloads.
        sources: corpus name -> sources that were checked before.
    """
    return {
        "version": tokenizers.VERSION,
        "engine": ENGINE_VERSION,
        "trained_on": {
            c.name: [
                sources.get(c.name) or _check_sources(c, archives),
                c.version,
                c.preprocessing(),
            ]
            for c in training_corpora
        },
    }


def _check_sources(corpus: Corpus, archives: Path) -> list[dict[str, str]]:
    """Check the downloads of a corpus, and return file and SHA-256 of each source."""
    for archive in corpus.archives:
        check_archive(archive, archives)
    pinned = [{"file": a.file, "sha256": a.sha256} for a in corpus.archives]
    return pinned + corpus.extra_sources()


def reuse_if_current(
    corpus: Corpus,
    data: Path,
    sources: list[dict[str, str]],
    done: dict[str, dict[str, Any]],
    store: str | None,
) -> None:
    """Add a corpus to ``done`` if it exists, is verified, and would be prepared identically.

    Args:
        corpus: corpus to look for.
        data: directory of prepared corpora.
        sources: file and SHA-256 of each source.
        done: corpus name -> summary; extended in place.
        store: URI of the folder of prepared corpora, if they are in an object store.
    """
    try:
        if store is None:
            manifest = verify_corpus(data / corpus.name)
        else:
            manifest = open_corpus(directories.join_uri(store, corpus.name)).manifest
    except UserError:
        return

    if ROW_CHECKS not in manifest:
        return

    def contains(entries: dict[str, Any]) -> bool:
        return all(manifest.get(key) == value for key, value in entries.items())

    identity = build_corpus_identity(corpus, sources, data)
    if not contains(identity):
        return
    if isinstance(corpus, ExternalCorpus):
        # A scan of equal sources would find the labels of the manifest, in a pass over all rows.
        corpus.set_labels(manifest.get("labels") or (), (manifest.get("symbols") or ())[1:])
        if not contains(corpus.facts()):
            corpus.scan_labels()
    if contains(corpus.facts()):
        done[corpus.name] = summarize_manifest(manifest, "cached")
        if store is not None:
            clear_staging(store, corpus.name)
        else:
            finish_commit(data / corpus.name, staging_path(data / corpus.name, identity))


def _describe_tokenizer(path: Path) -> dict[str, Any]:
    return {
        "file": path.name,
        "sha256": storage.sha256_file(path),
        "vocab_size": tokenizers.load_tokenizer(path).get_vocab_size(),
    }


def summarize_manifest(manifest: dict[str, Any], state: str) -> dict[str, Any]:
    """Return the entry of a corpus in the command's result.

    Args:
        manifest: parsed ``manifest.json`` of the corpus.
        state: ``prepared``, ``cached``, ``paired`` or ``labelled``.
    """
    truncated = manifest.get("truncated_files", {})
    for file, where in truncated.items():
        console.print_warning(
            f"{manifest['corpus']}: {file} is truncated {where}; the rest is not in the corpus. "
            "Replace the file and prepare again"
        )
    for sentence in describe_row_checks(manifest):
        console.print_warning(f"{manifest['corpus']}: {sentence}")
    return {
        "state": state,
        "rows_in": manifest["rows_in"],
        "rows_out": manifest["rows_out"],
        "splits": {name: entry["rows"] for name, entry in manifest["splits"].items()},
        "quarantine": manifest["quarantine"],
        "truncated_files": truncated,
        ROW_CHECKS: manifest.get(ROW_CHECKS),
        "bytes": sum(entry["bytes"] for entry in manifest["splits"].values()),
        "digest": manifest["digest"],
    }


#: Seconds. A corpus that was not read by then is checked while it is prepared.
READ_TIMEOUT_S = 8.0
#: Rows, accepted and rejected. A corpus with more of them is checked while it is prepared.
MAX_FIRST_ROWS = 10_000
#: Media files that are tried until one can be decoded. If half of the files were damaged, all of
#: them would fail once in 65,000 corpora.
MAX_TRIED = 16


def check_preparable(corpus: ExternalCorpus, rejected: Path, max_error_rate: float) -> bool:
    """Stop if a corpus cannot be prepared; return whether it is small, so that all rows were read.

    Args:
        corpus: opened, with its labels.
        rejected: file for the rejected rows, written if the check fails.
        max_error_rate: allowed fraction of bad rows.

    Raises:
        UserError: most rows are bad, none is left to train on, or no media file can be decoded.
    """
    with tempfile.TemporaryDirectory(prefix="skillnet-preflight-") as folder:
        lines = Path(folder) / "rejected.jsonl"
        rows, summary = _read_first_rows(corpus, lines)
        if summary is None:
            return False
        try:
            check_first_rows(corpus, summary, max_error_rate, rejected)
        except UserError as error:
            with atomic_write(rejected, "w") as stream:
                stream.write(lines.read_text(encoding="utf-8"))
            raise UserError(f"{error}{unpack_hint(corpus.source)}") from None
        if max_error_rate <= MAX_ADVISED_RATE:
            _check_media(corpus, rows)
    return True


def _read_first_rows(corpus: ExternalCorpus, lines: Path) -> tuple[list[Row], ReadSummary | None]:
    """Return the rows with media, and the counts of all rows, or None if there are too many."""
    blocks: list[RowBlock] = []
    summaries: list[ReadSummary] = []
    first_rows = copy.copy(corpus)

    def work(is_late: threading.Event) -> None:
        def read(sources: SourceArchives) -> Iterator[Row | RejectedRow]:
            for number, row in enumerate(corpus.rows(sources)):
                # Rejected rows come in no block, so both limits are checked at every row.
                if is_late.is_set() or number >= MAX_FIRST_ROWS:
                    is_late.set()
                    return
                yield row

        first_rows.rows = read  # type: ignore[method-assign]
        for each in read_blocks(first_rows, SourceArchives.none(), lines):
            if isinstance(each, RowBlock):
                blocks.append(each)
            elif not is_late.is_set():
                summaries.append(each)

    run_within(READ_TIMEOUT_S, work)
    if not summaries:
        return [], None
    has_media = "media" in corpus.raw_schema.names
    rows = [row for block in blocks for row in block.table.to_pylist()] if has_media else []
    return rows, summaries[0]


def _check_media(corpus: ExternalCorpus, rows: list[Row]) -> None:
    """Stop if none of some media files, spread evenly over all rows, can be decoded."""
    chosen = rows[:: -(-len(rows) // MAX_TRIED) or 1]
    reasons = Counter[str]()
    for row, data in zip(chosen, read_media([row["media"] for row in chosen]), strict=True):
        if isinstance(data, MediaReadError):
            reason: str | None = data.reason
        else:
            _, reason = measure_media(corpus, data, row)
        if reason is None:
            return
        reasons[reason] += 1
    if reasons:
        frequent = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(5))
        raise UserError(
            f"{corpus.name}: no media file can be decoded; {len(chosen)} of {len(rows)} were "
            f"tried: {frequent}. {MOSTLY_BAD_ADVICE}{unpack_hint(corpus.source)}"
        )
