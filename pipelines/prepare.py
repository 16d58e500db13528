"""``skillnet prepare``: turn downloads, and corpora that the user has, into Arrow shards."""

import contextlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines import lessons
from pipelines import tokenizer as tokenizers
from pipelines.corpora import BUILT_IN, Corpus, PlacedCorpus, find_corpus, place_corpus
from pipelines.corpora.archives import check_archive
from pipelines.delivery import TOKENIZER, TOKENIZER_MANIFEST, clear_making
from pipelines.making import Order
from pipelines.prepared_store import send_shared, staged
from pipelines.shards import open_corpus, verify_corpus
from skillnet_platform import cluster, config, console, signals, storage
from skillnet_platform.cli import command, users_mistake
from skillnet_platform.config import positional
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories
from skillnet_platform.storage.location import local_folder, place

#: Count it up when the engine (not one corpus) changes what is prepared.
VERSION = 1
MAX_BAD = 0.1


@dataclass
class PrepareConfig:
    """What to prepare, from where, to where.

    Args:
        corpora: names of corpora; none means all built-in ones, or only those of ``corpus``.
        corpus: name=path of a corpus that you have, a folder or a URI; may be given again. The
            name is that of its format, or your own with the format before the path:
            ``--corpus mine=folder:/data/mine``. Formats: tnews, aishell1, aic_icc, vatex,
            pytorrent, codesearchnet, folder, webdataset, hf_dataset.
        options: name of a corpus -> options of its format, listed in docs/own-corpora.md.
        tokenizer: tokenizer.json, or the folder of a saved transformers tokenizer, for your
            corpora; ``learn`` learns one from them anew. By default the one that is there, else
            a learnt one.
        vocabulary: tokens of a tokenizer that is learnt from your corpora.
        describe: say what a folder or URI holds, and prepare nothing.
        data: directory or URI of the prepared corpora; by default ``corpora`` under the run root.
        archives: directory of the downloads; by default ``archives`` under the run root.
        cpus: CPUs of the embedded Ray; by default all. The result does not depend on it.
        max_bad: share of a corpus' rows that may be bad, that is damaged, too large or
            contradictory. More of them stop the run with a summary. Bad rows never get through.
    """

    corpora: list[str] = positional([])
    corpus: dict[str, str] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokenizer: str | None = None
    vocabulary: int = tokenizers.VOCABULARY
    describe: str | None = None
    data: str | None = None
    archives: str | None = None
    cpus: int | None = None
    max_bad: float = MAX_BAD


@command
def main(argv: list[str] | None = None) -> int:
    """Prepare corpora; see ``--help``."""
    settings = config.parse(
        PrepareConfig,
        named_corpora(argv or []),
        prog="skillnet prepare",
        description="Turn downloaded archives, or corpora that you have, into Arrow shards, each "
        "with a manifest. A corpus that is there and unchanged is left as it is.",
        example="skillnet prepare headings syllables\n"
        "skillnet prepare --corpus tnews=/data/tnews_public --corpus vatex=s3://bucket/vatex\n"
        "skillnet prepare --corpus mine=folder:/data/mine --options.mine.max_seconds 12\n"
        "skillnet prepare --describe /data/unknown",
    )
    if settings.describe is not None:
        from pipelines.describe import describe, show

        found = describe(settings.describe, settings.options)
        if console.json_wanted():
            console.emit_json(found)
        else:
            show(found)
        return 0
    start = time.monotonic()
    if unknown := sorted(set(settings.options) - set(settings.corpus)):
        raise UserError(f"options.{unknown[0]}: no such corpus is given with --corpus")
    placed = [
        place_corpus(name, place, settings.options.get(name))
        for name, place in settings.corpus.items()
    ]
    where = place(settings.data, storage.data_root())
    with staged(where) as data:
        done = prepare(
            settings.corpora or ([] if placed else list(BUILT_IN)),
            data,
            local_folder(settings.archives, storage.archive_root(), "archives"),
            settings.cpus,
            settings.max_bad,
            placed,
            settings.tokenizer,
            settings.vocabulary,
            store=where if isinstance(where, str) else None,
        )
    seconds = time.monotonic() - start
    if console.json_wanted():
        console.emit_json({"seconds": round(seconds, 2), "corpora": done})
    else:
        console.table(
            "Corpora",
            ["corpus", "state", "rows in", "rows out", "set aside", "splits", "size"],
            [_table_row(name, entry) for name, entry in done.items()],
            caption=f"{seconds:.1f} s",
        )
    return 0


def named_corpora(words: Sequence[str]) -> list[str]:
    """``--corpus tnews=PATH`` as ``--corpus.tnews PATH``, which the configuration reads."""
    out: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--corpus" and rest:
            word = f"--corpus={rest.pop(0)}"
        if word.startswith("--corpus="):
            name, equals, place = word.removeprefix("--corpus=").partition("=")
            if not equals or not place or not re.fullmatch(r"[\w-]+", name):
                raise UserError(
                    f"command line: --corpus {name}: expected NAME=PATH, for example "
                    "--corpus tnews=/data/tnews_public"
                )
            if f"--corpus.{name}" in out:
                raise UserError(
                    f"command line: --corpus {name} is given twice; name one of them otherwise: "
                    f"--corpus NAME=FORMAT:{place}"
                )
            out += [f"--corpus.{name}", place]
        else:
            out.append(word)
    return out


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
        with lessons.claimed(data) if reads else contextlib.nullcontext() as claim:
            if claim is not None and tokenizer not in (None, lessons.LEARN):
                claim.alone()
                asked = {corpus.name for corpus in corpora}
                manifest = data / TOKENIZER_MANIFEST
                lessons.take(tokenizer, data / TOKENIZER, manifest, asked, store or data)
            lesson = lessons.Lesson(tokenizer == lessons.LEARN, vocabulary, claim)
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
    own: lessons.Lesson | None = None,
    store: str | None = None,
) -> dict[str, dict[str, Any]]:
    own = own or lessons.Lesson()
    known = {corpus.name: _sources(corpus, archives) for corpus in corpora}
    tokenizer = data / TOKENIZER
    absent = not tokenizer.is_file() or lessons.is_left_over(tokenizer, store or data)
    teachers = _teachers(corpora, tokenizer, archives, own.anew, absent)
    size = own.vocabulary if any(isinstance(c, PlacedCorpus) for c in teachers) else None
    lesson = _lesson(teachers, archives, known) | ({"vocabulary": size} if size else {})
    learnt = not teachers or lessons.is_learnt(tokenizer, lesson)
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
        lessons.keep_spelling(tokenizer, {corpus.name for corpus in corpora}, store or data)
    if len(done) == len(corpora):
        if store is not None:
            send_shared(data, store)  # whose tokenizer it is may have been said anew
        return {corpus.name: done[corpus.name] for corpus in corpora}
    cluster.ensure_ray(cpus)
    from pipelines import preparation  # imports Ray Data: not for --help, nor if nothing is to do

    hosts = preparation.hosts_for(corpora, store)
    # After Ray's start, whose own handler would print a stack of C++.
    with signals.terminate_as_interrupt(), storage.scratch(data / "reading") as aside:
        spools: dict[str, Path] = {}
        if not learnt:
            spools = preparation.spool(teachers, archives, aside, hosts)
            words = size or tokenizers.VOCABULARY
            preparation.train_tokenizer(teachers, spools, tokenizer, words, hosts)
            told = {lessons.LESSON: config.digest(lesson), "sha256": storage.sha256_file(tokenizer)}
            whose = {lessons.OF: [corpus.name for corpus in teachers]} if size else {}
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
        for manifest in preparation.write_corpora(orders, archives, max_bad, hosts, store):
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
    if not readers or lessons.is_the_users(tokenizer.with_name(TOKENIZER_MANIFEST)):
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


def _table_row(name: str, entry: dict[str, Any]) -> list[Any]:
    splits = ", ".join(f"{split} {rows}" for split, rows in entry["splits"].items())
    aside = entry["rows_in"] - entry["rows_out"]
    size = storage.human_bytes(entry["bytes"])
    return [name, entry["state"], entry["rows_in"], entry["rows_out"], aside, splits, size]


if __name__ == "__main__":
    raise SystemExit(main())
