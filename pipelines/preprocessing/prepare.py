"""TODO: pipelines.preprocessing.prepare."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.corpora import BUILT_IN, Corpus, PlacedCorpus, find_corpus
from pipelines.corpora.archives import check_archive
from pipelines.preprocessing.datasource import Order
from pipelines.preprocessing.remote_staging import clear_making, send_shared
from pipelines.shards.dataset import open_corpus, verify_corpus
from pipelines.tokenizer import selection
from pipelines.tokenizer import training as tokenizers
from pipelines.tokenizer.training import TOKENIZER, TOKENIZER_MANIFEST
from skillnet_platform import cluster, config, console, signals, storage
from skillnet_platform.cli import users_mistake
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories

#: Count it up when the engine (not one corpus) changes what is prepared.
VERSION = 1
MAX_BAD = 0.1


def prepare(
    names: list[str],
    data: Path,
    archives: Path,
    cpus: int | None = None,
    max_bad: float = MAX_BAD,
    placed: Sequence[PlacedCorpus] = (),
    tokenizer: str | None = None,
    vocabulary: int = tokenizers.VOCABULARY,
    store: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Prepare those corpora under ``data``, and the tokenizer if one of them needs it.

    Args:
        names: corpora, each once.
        data: directory to write to; with a store, for what it is made from.
        archives: directory with the downloads.
        cpus: CPUs of the embedded Ray.
        max_bad: share of a corpus' rows that may be bad.
        placed: corpora that the user has.
        tokenizer: see ``PrepareConfig``.
        vocabulary: tokens of a tokenizer that is learnt from ``placed``.
        store: URI of the folder that the corpora go to, shard by shard. Other hosts of the cluster
            do not see ``data`` then: they transform what needs no disk of this one.

    Returns:
        Name -> state ("prepared" or "unchanged"), rows, splits, set aside, bytes, digest.

    Raises:
        UserError: an unknown corpus, a missing or damaged archive, a full disk, too many bad
            rows. What is finished is kept, and the next run goes on from there.
    """
    if not 0 <= max_bad <= 1:
        raise UserError(f"max_bad is {max_bad}; expected a share of the rows, from 0 to 1")
    corpora: list[Corpus] = [find_corpus(name) for name in dict.fromkeys(names)]
    if twice := {corpus.name for corpus in corpora} & {corpus.name for corpus in placed}:
        raise UserError(f"the corpus {min(twice)} is named twice")
    data = data.absolute()
    if data.exists() and not data.is_dir():
        raise UserError(f"{data}: a file; data takes the folder of the prepared corpora")
    corpora += placed
    try:
        reads = tokenizer is not None or any(corpus.text_columns for corpus in corpora)
        with selection.claimed(data) if reads else contextlib.nullcontext() as claim:
            if claim is not None and tokenizer not in (None, selection.LEARN):
                claim.alone()
                asked = {corpus.name for corpus in corpora}
                manifest = data / TOKENIZER_MANIFEST
                selection.take(tokenizer, data / TOKENIZER, manifest, asked, store or data)
            lesson = selection.Lesson(tokenizer == selection.LEARN, vocabulary, claim)
            return _prepare(corpora, data, archives.absolute(), cpus, max_bad, lesson, store)
    except Exception as problem:
        message = users_mistake(problem)
        if message is None or isinstance(problem, UserError):
            raise
        raise UserError(message) from problem


def _prepare(
    corpora: list[Corpus],
    data: Path,
    archives: Path,
    cpus: int | None = None,
    max_bad: float = MAX_BAD,
    own: selection.Lesson | None = None,
    store: str | None = None,
) -> dict[str, dict[str, Any]]:
    own = own or selection.Lesson()
    known = {corpus.name: _sources(corpus, archives) for corpus in corpora}
    tokenizer = data / TOKENIZER
    absent = not tokenizer.is_file() or selection.is_left_over(tokenizer, store or data)
    teachers = _teachers(corpora, tokenizer, archives, own.anew, absent)
    size = own.vocabulary if any(isinstance(c, PlacedCorpus) for c in teachers) else None
    lesson = _lesson(teachers, archives, known) | ({"vocabulary": size} if size else {})
    learnt = not teachers or selection.is_learnt(tokenizer, lesson)
    done: dict[str, dict[str, Any]] = {}
    for corpus in corpora:
        if learnt or not corpus.text_columns:
            _note_unchanged(corpus, data, known[corpus.name], done, store)
    for corpus in corpora:
        if corpus.name not in done and isinstance(corpus, PlacedCorpus):
            corpus.survey()
    if not learnt and own.claim is not None:
        own.claim.alone()
    if not learnt and size is not None:
        selection.keep_spelling(tokenizer, {corpus.name for corpus in corpora}, store or data)
    if len(done) == len(corpora):
        if store is not None:
            send_shared(data, store)  # whose tokenizer it is may have been said anew
        return {corpus.name: done[corpus.name] for corpus in corpora}
    cluster.ensure_ray(cpus)
    from pipelines.preprocessing import (
        pipeline,  # imports Ray Data: not for --help, nor if nothing is to do
    )

    hosts = pipeline.hosts_for(corpora, store)
    # After Ray's start, whose own handler would print a stack of C++.
    with signals.terminate_as_interrupt(), storage.scratch(data / "reading") as aside:
        spools: dict[str, Path] = {}
        if not learnt:
            spools = pipeline.spool(teachers, archives, aside, hosts)
            words = size or tokenizers.VOCABULARY
            pipeline.train_tokenizer(teachers, spools, tokenizer, words, hosts)
            told = {
                selection.LESSON: config.digest(lesson),
                "sha256": storage.sha256_file(tokenizer),
            }
            whose = {selection.OF: [corpus.name for corpus in teachers]} if size else {}
            storage.write_json(data / TOKENIZER_MANIFEST, whose | told)
            for corpus in corpora:  # a new lesson may have given the same tokenizer
                if corpus.name not in done:
                    _note_unchanged(corpus, data, known[corpus.name], done, store)
        if store is not None:
            send_shared(data, store)  # the manifests name its hash
        orders = [
            Order(
                corpus,
                data / corpus.name,
                identity_of(corpus, known[corpus.name], data),
                tokenizer if corpus.text_columns else None,
                spools.get(corpus.name),
            )
            for corpus in corpora
            if corpus.name not in done
        ]
        for manifest in pipeline.write_corpora(orders, archives, max_bad, hosts, store):
            done[manifest["corpus"]] = _summary(manifest, "prepared")
            console.note(f"{manifest['corpus']}: {manifest['rows_out']} rows prepared")
    return {corpus.name: done[corpus.name] for corpus in corpora}


def identity_of(corpus: Corpus, sources: list[dict[str, str]], data: Path) -> dict[str, Any]:
    """The part of a manifest that is known before the work: if it is equal, so are the bytes."""
    preprocessing = {
        "engine": VERSION,
        "version": corpus.version,
        "shard_rows": corpus.shard_rows,
        **corpus.preprocessing(),
    }
    return {
        "sources": sources,
        "preprocessing": preprocessing,
        "preprocessing_digest": config.digest(preprocessing),
        "tokenizer": _tokenizer_entry(data / TOKENIZER) if corpus.text_columns else None,
    }


def _teachers(
    corpora: list[Corpus], tokenizer: Path, archives: Path, anew: bool, absent: bool
) -> list[Corpus]:
    """Corpora that the tokenizer learns from. Built-in ones: the same whichever of them are asked
    for, so that preparing one now and another later gives what preparing both at once gives.

    None if no corpus needs a tokenizer, or if one is there and what it was learnt from is not, or
    it is the user's: corpora that come later are prepared with the tokenizer that a model may
    know already. The user's corpora teach one only where there is none, or none that a finished
    corpus is spelt with, or if they shall.
    """
    readers = [corpus for corpus in corpora if corpus.text_columns]
    placed: list[Corpus] = [corpus for corpus in readers if isinstance(corpus, PlacedCorpus)]
    if anew or (placed and len(placed) == len(readers)):
        return placed if anew or absent else []
    if not readers or selection.is_the_users(tokenizer.with_name(TOKENIZER_MANIFEST)):
        return []
    teachers = [c for name in BUILT_IN if (c := find_corpus(name)).text_columns]
    files = [archives / archive.file for corpus in teachers for archive in corpus.archives]
    if tokenizer.is_file() and not all(file.is_file() for file in files):
        return []
    return teachers


def _lesson(
    teachers: list[Corpus], archives: Path, known: dict[str, list[dict[str, str]]]
) -> dict[str, Any]:
    """All that decides the tokenizer."""
    return {
        "version": tokenizers.VERSION,
        "engine": VERSION,
        "learnt_from": {
            c.name: [known.get(c.name) or _sources(c, archives), c.version, c.preprocessing()]
            for c in teachers
        },
    }


def _sources(corpus: Corpus, archives: Path) -> list[dict[str, str]]:
    for archive in corpus.archives:
        check_archive(archive, archives)
    pinned = [{"file": a.file, "sha256": a.sha256} for a in corpus.archives]
    return pinned + corpus.other_sources()


def _note_unchanged(
    corpus: Corpus,
    data: Path,
    sources: list[dict[str, str]],
    done: dict[str, dict[str, Any]],
    store: str | None,
) -> None:
    """Add the corpus to ``done`` if it is there, whole, and what would be prepared now."""
    try:
        if store is None:
            manifest = verify_corpus(data / corpus.name)
        else:
            manifest = open_corpus(directories.join(store, corpus.name)).manifest
    except UserError:
        return

    def has(told: dict[str, Any]) -> bool:
        return all(manifest.get(key) == value for key, value in told.items())

    if not has(identity_of(corpus, sources, data)):
        return
    if isinstance(corpus, PlacedCorpus):
        # Of the same sources a survey would find the same, by a pass over all rows.
        corpus.keep(manifest.get("labels") or (), (manifest.get("symbols") or ())[1:])
        if not has(corpus.facts()):
            corpus.survey()
    if has(corpus.facts()):
        done[corpus.name] = _summary(manifest, "unchanged")
        if store is not None:
            clear_making(store, corpus.name)


def _tokenizer_entry(path: Path) -> dict[str, Any]:
    return {
        "file": path.name,
        "sha256": storage.sha256_file(path),
        "vocab_size": tokenizers.load(path).get_vocab_size(),
    }


def _summary(manifest: dict[str, Any], state: str) -> dict[str, Any]:
    shards = [s for entry in manifest["splits"].values() for s in entry["shards"]]
    broken = manifest.get("broken_off", {})
    for file, how in broken.items():
        console.warn(
            f"{manifest['corpus']}: {file} breaks off {how}; what stood behind is not in the "
            "corpus. Put the whole file in its place and prepare again"
        )
    return {
        "state": state,
        "rows_in": manifest["rows_in"],
        "rows_out": manifest["rows_out"],
        "splits": {name: entry["rows"] for name, entry in manifest["splits"].items()},
        "quarantine": manifest["quarantine"],
        "broken_off": broken,
        "bytes": sum(shard["bytes"] for shard in shards),
        "digest": manifest["digest"],
    }
