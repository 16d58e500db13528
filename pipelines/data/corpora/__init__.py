"""Corpora by name: built-in ones, formats for data of the user, and those of other packages.

:func:`find_corpus` returns a built-in corpus, and :func:`open_external_corpus` opens data by path.
Other packages add corpora through the entry point group ``skillnet.corpora``.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.data.config.corpus_options import check_corpus_name
from pipelines.data.corpora.base import Corpus
from pipelines.data.corpora.readers.base import ExternalCorpus
from pipelines.data.io.directory import SourceDirectory
from pipelines.data.io.source_file import SourceReadError, make_read_error
from skillnet_files.entry_points import find_entries
from skillnet_platform import config
from skillnet_platform.config.schema import check_keys
from skillnet_platform.errors import UserError, suggest_name

ENTRY_POINT_GROUP = "skillnet.corpora"

#: The demo's corpora, in the order of the paper's tasks: `skillnet fetch` and `prepare` without a
#: name take them, and the tokenizer is trained on them. Others are taken by name only.
DEMO = ("headings", "syllables", "drawings", "strokes", "functions")

#: Formats that read nearly any folder. Detection tries them last.
GENERAL_FORMATS = ("hf_dataset", "webdataset", "folder")

#: ``reader:path``, but not ``s3://path``.
_READER_PREFIX = re.compile(r"([A-Za-z_][A-Za-z0-9_-]*):(?!//)(.+)")


def find_corpus(name: str) -> Corpus:
    """Return the corpus of a name: a built-in one, or the entry point of an installed package.

    Raises:
        UserError: the name is unknown (the message suggests the nearest one), or the corpus needs
            a path.
    """
    found = _find_class(name)
    if issubclass(found, ExternalCorpus):
        raise UserError(f"corpus {name} is read by path: give --corpus {name}=PATH")
    return found()


def open_external_corpus(
    name: str, place: str, options: Mapping[str, Any] | None = None
) -> ExternalCorpus:
    """Open data of the user: ``open_external_corpus("tnews", "/data/tnews")``.

    Args:
        name: name of the corpus; also the format, unless ``place`` names one.
        place: path or URI, or ``format:path`` for a corpus with a name of the user's choice.
        options: options of the format, by name.

    Raises:
        UserError: the format or an option is unknown, or the path does not hold the format.
    """
    check_corpus_name("--corpus", name)
    if is_built_in(name):
        raise UserError(f"--corpus {name}: this is a built-in corpus; choose another name")
    prefixed = parse_reader_prefix(place)
    reader, path = prefixed or (name, place)
    try:
        found = _find_class(reader, list_formats())
    except UserError as error:
        if prefixed is not None:
            raise
        end = "" if str(error).endswith("?") else "."
        raise UserError(
            f"{error}{end} If {name} is a name of your choice, write the format before the path: "
            f"--corpus {name}=FORMAT:{path}. skillnet inspect {path} detects the format"
        ) from None
    if not issubclass(found, ExternalCorpus):
        raise UserError(f"corpus {reader} is not read by path: give its name alone")
    prefix = f"options.{name}"
    try:
        tree = check_keys(found.Options, dict(options or {}), prefix)
        values = config.merge_trees(config.default_values(found.Options), tree)
        chosen: Any = config.build_config(found.Options, values, dict.fromkeys(values, prefix))
        return found(path, chosen, name)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{prefix}: {error}") from None


def parse_reader_prefix(place: str) -> tuple[str, str] | None:
    """Return (format, path) of ``format:path``, or None for a path alone."""
    found = _READER_PREFIX.fullmatch(place)
    return (found.group(1), found.group(2)) if found else None


def detect_reader(source: SourceDirectory) -> tuple[str, str] | None:
    """Return (format, evidence) of a directory that holds a known format, or None.

    Raises:
        UserError, StoreUnavailableError: the disk or the store fails, so the format is unknown.
    """
    for name in list_formats():
        try:
            found = _find_class(name)
            evidence = found.detect(source) if issubclass(found, ExternalCorpus) else None
        except SourceReadError:
            raise
        except OSError as error:
            raise make_read_error(error.filename or source.uri, error) from None
        except ValueError:
            continue  # files of another format can make a reader fail
        if evidence is not None:
            return name, evidence
    return None


def explain_unread(source: SourceDirectory) -> str:
    """Return why no format reads a path, and the remedy; "" if none of them knows."""
    formats = (_find_class(name) for name in list_formats())
    said = (each.explain(source) for each in formats if issubclass(each, ExternalCorpus))
    return next(filter(None, said), "")


def list_formats() -> list[str]:
    """Return the names of the formats for data of the user, the most specific ones first."""
    found = {
        name: corpus
        for name in find_entries(ENTRY_POINT_GROUP)
        if (corpus := _try_class(name)) is not None and issubclass(corpus, ExternalCorpus)
    }

    def by_detail(name: str) -> tuple[int, int, str]:
        place = GENERAL_FORMATS.index(name) if name in GENERAL_FORMATS else -1
        # A subclass reads a special case of its base.
        return place, -len(found[name].__mro__), name

    return sorted(found, key=by_detail)


def is_built_in(name: str) -> bool:
    """Return whether a corpus has this name that is taken by name alone, without a path."""
    found = _try_class(name) if name in find_entries(ENTRY_POINT_GROUP) else None
    return found is not None and not issubclass(found, ExternalCorpus)


def _try_class(name: str) -> type[Corpus] | None:
    """Return the class of an entry; None if a package of another party cannot be loaded."""
    try:
        return _find_class(name)
    except UserError:
        return None


def _find_class(name: str, candidates: Sequence[str] = ()) -> type[Corpus]:
    """Return the class of a corpus or format; ``candidates`` are suggested for a wrong name.

    A name comes from a configuration, so it only selects: it is never imported.
    """
    entries = find_entries(ENTRY_POINT_GROUP)
    entry = entries.get(name)
    if entry is None:
        is_class = ":" in name
        hint = f": a class is named by its entry point, in the group {ENTRY_POINT_GROUP}"
        listed = suggest_name(name, candidates or list(entries))
        raise UserError(f"unknown corpus {name!r}{hint if is_class else ''}{listed}")
    try:
        found = entry.load()
    except (ImportError, AttributeError) as error:
        raise UserError(f"corpus {name!r}: {entry.value} cannot be loaded: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Corpus)):
        raise UserError(
            f"corpus {name!r}: {entry.value} is not a subclass of pipelines.data.corpora.Corpus"
        )
    return found


__all__ = [
    "DEMO",
    "Corpus",
    "ExternalCorpus",
    "detect_reader",
    "explain_unread",
    "find_corpus",
    "is_built_in",
    "list_formats",
    "open_external_corpus",
    "parse_reader_prefix",
]
