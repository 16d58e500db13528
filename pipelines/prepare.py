"""``skillnet prepare``: turn downloaded archives into verified Arrow shards."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import tokenizer as tokenizers
from pipelines.corpora import BUILT_IN, Corpus, find_corpus
from pipelines.corpora.archives import check_archive
from pipelines.prepared_store import staged
from pipelines.shards import verify_corpus
from skillnet_platform import cluster, config, console, storage
from skillnet_platform.cli import command, users_mistake
from skillnet_platform.config import positional
from skillnet_platform.errors import UserError
from skillnet_platform.places import local_folder, place

#: Count it up when the engine (not one corpus) changes what is prepared.
VERSION = 1
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_MANIFEST = "tokenizer.manifest.json"


@dataclass
class PrepareConfig:
    """What to prepare, from where, to where.

    Args:
        corpora: names of corpora; none means all built-in ones.
        data: directory or URI of the prepared corpora; by default ``corpora`` under the run root.
        archives: directory of the downloads; by default ``archives`` under the run root.
        cpus: CPUs of the embedded Ray; by default all. The result does not depend on it.
    """

    corpora: list[str] = positional([])
    data: str | None = None
    archives: str | None = None
    cpus: int | None = None


@command
def main(argv: list[str] | None = None) -> int:
    """Prepare corpora; see ``--help``."""
    settings = config.parse(
        PrepareConfig,
        argv or [],
        prog="skillnet prepare",
        description="Turn the downloaded archives into Arrow shards, each corpus with a manifest. "
        "A corpus that is there and unchanged is left as it is.",
        example="skillnet prepare headings syllables",
    )
    start = time.monotonic()
    with staged(place(settings.data, storage.data_root())) as data:
        done = prepare(
            settings.corpora or list(BUILT_IN),
            data,
            local_folder(settings.archives, storage.archive_root(), "archives"),
            settings.cpus,
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


def prepare(
    names: list[str], data: Path, archives: Path, cpus: int | None = None
) -> dict[str, dict[str, Any]]:
    """Prepare those corpora under ``data``, and the tokenizer if one of them needs it.

    Args:
        names: corpora, each once.
        data: directory to write to.
        archives: directory with the downloads.
        cpus: CPUs of the embedded Ray.

    Returns:
        Name -> state ("prepared" or "unchanged"), rows, splits, set aside, bytes, digest.

    Raises:
        UserError: an unknown corpus, a missing or damaged archive, a full disk.
    """
    corpora = [find_corpus(name) for name in dict.fromkeys(names)]
    try:
        return _prepare(corpora, data.absolute(), archives.absolute(), cpus)
    except Exception as problem:
        message = users_mistake(problem)
        if message is None or isinstance(problem, UserError):
            raise
        raise UserError(message) from problem


def _prepare(
    corpora: list[Corpus], data: Path, archives: Path, cpus: int | None
) -> dict[str, dict[str, Any]]:
    known = {corpus.name: _sources(corpus, archives) for corpus in corpora}
    tokenizer = data / TOKENIZER_FILE
    teachers = _teachers(corpora, tokenizer, archives)
    lesson = _lesson(teachers, archives, known)
    learnt = not teachers or _is_learnt(tokenizer, lesson)
    done: dict[str, dict[str, Any]] = {}
    for corpus in corpora:
        if learnt or not corpus.text_columns:
            _note_unchanged(corpus, data, known[corpus.name], done)
    if len(done) == len(corpora):
        return {corpus.name: done[corpus.name] for corpus in corpora}
    cluster.ensure_ray(cpus)
    from pipelines import preparation  # imports Ray Data: not for --help, nor if nothing is to do

    blocks: dict[str, preparation.Blocks] = {}
    if not learnt:
        started = {c.name: preparation.start_reading(c, archives) for c in teachers}
        blocks = {name: preparation.finish_reading(task) for name, task in started.items()}
        preparation.train_tokenizer([(c, blocks[c.name]) for c in teachers], tokenizer)
        storage.write_json(
            data / TOKENIZER_MANIFEST,
            {"lesson": config.digest(lesson), "sha256": storage.sha256_file(tokenizer)},
        )
        for corpus in corpora:  # a new lesson may have given the same tokenizer
            if corpus.name not in done:
                _note_unchanged(corpus, data, known[corpus.name], done)
    waiting = [corpus for corpus in corpora if corpus.name not in done]
    reading = {
        c.name: preparation.start_reading(c, archives) for c in waiting if c.name not in blocks
    }
    for corpus in waiting:
        read = blocks.pop(corpus.name, None)
        read = read or preparation.finish_reading(reading[corpus.name])
        identity = identity_of(corpus, known[corpus.name], data)
        text = tokenizer if corpus.text_columns else None
        manifest = preparation.write_corpus(corpus, read, data / corpus.name, identity, text)
        done[corpus.name] = _summary(manifest, "prepared")
        console.note(f"{corpus.name}: {manifest['rows_out']} rows prepared")
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
        "tokenizer": _tokenizer_entry(data / TOKENIZER_FILE) if corpus.text_columns else None,
    }


def _teachers(corpora: list[Corpus], tokenizer: Path, archives: Path) -> list[Corpus]:
    """Corpora that the tokenizer learns from: the same whichever of them are asked for, so that
    preparing one now and another later gives what preparing both at once gives.

    None if no corpus needs a tokenizer, or if one is there and what it was learnt from is not:
    a corpus of the user's own is prepared with the tokenizer that a model may know already.
    """
    if not any(corpus.text_columns for corpus in corpora):
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


def _is_learnt(tokenizer: Path, lesson: dict[str, Any]) -> bool:
    try:
        entry = storage.read_json(tokenizer.with_name(TOKENIZER_MANIFEST))
        same = entry["lesson"] == config.digest(lesson)
        return bool(same and entry["sha256"] == storage.sha256_file(tokenizer))
    except (UserError, OSError, KeyError, TypeError):
        return False


def _note_unchanged(
    corpus: Corpus, data: Path, sources: list[dict[str, str]], done: dict[str, dict[str, Any]]
) -> None:
    """Add the corpus to ``done`` if it is there, whole, and what would be prepared now."""
    try:
        manifest = verify_corpus(data / corpus.name)
    except UserError:
        return
    identity = identity_of(corpus, sources, data) | corpus.facts()
    if all(manifest.get(key) == value for key, value in identity.items()):
        done[corpus.name] = _summary(manifest, "unchanged")


def _tokenizer_entry(path: Path) -> dict[str, Any]:
    return {
        "file": path.name,
        "sha256": storage.sha256_file(path),
        "vocab_size": tokenizers.load(path).get_vocab_size(),
    }


def _summary(manifest: dict[str, Any], state: str) -> dict[str, Any]:
    shards = [s for entry in manifest["splits"].values() for s in entry["shards"]]
    return {
        "state": state,
        "rows_in": manifest["rows_in"],
        "rows_out": manifest["rows_out"],
        "splits": {name: entry["rows"] for name, entry in manifest["splits"].items()},
        "quarantine": manifest["quarantine"],
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
