"""Corpora by name: the built-in ones, formats of the user's own, and those that other packages
add by entry point."""

import re
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from pipelines.corpora.base import Corpus
from pipelines.corpora.readers.base import ExternalCorpus
from pipelines.io.directory import SourceDirectory
from pipelines.io.source_file import SourceReadError, make_read_error
from skillnet_platform import config
from skillnet_platform.config.schema import checked
from skillnet_platform.errors import UserError, nearest

GROUP = "skillnet.corpora"

#: The built-in corpora, in the order of the paper's tasks. Also entry points; named here too
#: so that a checkout works before it is installed.
BUILT_IN = {
    "headings": "pipelines.corpora.builtin.headings:HeadingsCorpus",
    "syllables": "pipelines.corpora.builtin.syllables:SyllablesCorpus",
    "drawings": "pipelines.corpora.builtin.drawings:DrawingsCorpus",
    "strokes": "pipelines.corpora.builtin.strokes:StrokesCorpus",
    "functions": "pipelines.corpora.builtin.functions:FunctionsCorpus",
}

#: Made of the same archives for tasks that a model is grown by: fetched and prepared by name only.
EXTRA_BUILT_IN = {
    "stroke_counts": "pipelines.corpora.builtin.stroke_counts:StrokeCountsCorpus",
}


#: Formats of corpora that the user has: ``skillnet prepare --corpus tnews=PATH``. In the order in
#: which a folder's format is guessed: the particular ones first.
READERS = {
    "tnews": "pipelines.corpora.readers.tnews:TnewsCorpus",
    "aishell1": "pipelines.corpora.readers.aishell1:AishellCorpus",
    "aic_icc": "pipelines.corpora.readers.aic_icc:AicIccCorpus",
    "vatex": "pipelines.corpora.readers.vatex:VatexCorpus",
    "pytorrent": "pipelines.corpora.readers.pytorrent:PyTorrentCorpus",
    "codesearchnet": "pipelines.corpora.readers.codesearchnet:CodeSearchNetCorpus",
    "hf_dataset": "pipelines.corpora.readers.hf_dataset:HfDatasetCorpus",
    "webdataset": "pipelines.corpora.readers.webdataset:WebDatasetCorpus",
    "folder": "pipelines.corpora.readers.folder:FolderCorpus",
}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
#: ``reader:path``, but not ``s3://path``.
_READER = re.compile(r"([A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_.]+:[A-Za-z0-9_]+)?):(?!//)(.+)")


def find_corpus(name: str) -> Corpus:
    """The corpus of that name, or the class that "package.module:Class" names.

    Raises:
        UserError: nobody provides it; with the nearest name. Or it needs to be given a place.
    """
    found = _find_class(name)
    if issubclass(found, ExternalCorpus):
        raise UserError(f"corpus {name} is read from your disk: give --corpus {name}=PATH")
    return found()


def open_external_corpus(
    name: str, place: str, options: Mapping[str, Any] | None = None
) -> ExternalCorpus:
    """A corpus of the user's: ``place_corpus("tnews", "/data/tnews")``.

    Args:
        name: what to call it; names the format too, unless ``place`` does.
        place: path or URI, or ``reader:path`` where the name is the user's own.
        options: of the reader, by name.

    Raises:
        UserError: an unknown reader or option, or a place that does not hold the format.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"--corpus {name}: a name has letters, digits, - and _, at most 64 of them")
    if name in BUILT_IN or name in EXTRA_BUILT_IN:
        raise UserError(f"--corpus {name}: that is a built-in corpus; choose another name")
    named = parse_reader_prefix(place)
    reader, place = named or (name, place)
    try:
        found = _find_class(reader, READERS)
    except UserError as problem:
        if named is not None:
            raise
        raise UserError(
            f"{problem}. A name of your own needs its format: --corpus {name}=FORMAT:{place}; "
            f"skillnet prepare --describe {place} says which it is"
        ) from None
    if not issubclass(found, ExternalCorpus):
        raise UserError(f"corpus {reader} is not read from a place: name it alone")
    where = f"options.{name}"
    try:
        tree = checked(found.Options, dict(options or {}), where)
        whole = config.merge(config.defaults(found.Options), tree)
        chosen: Any = config.build(found.Options, whole, dict.fromkeys(whole, where))
        return found(place, chosen, name)
    except UserError:
        raise
    except ValueError as problem:
        raise UserError(f"{where}: {problem}") from None


def parse_reader_prefix(place: str) -> tuple[str, str] | None:
    """(Reader, path) of ``reader:path``; none where a place stands alone."""
    given = _READER.fullmatch(place)
    return (given.group(1), given.group(2)) if given else None


def detect_reader(place: SourceDirectory) -> tuple[str, str] | None:
    """(Reader, what shows it) of a place that holds a known format.

    Raises:
        UserError, StoreUnavailable: its disk or its store fails, so that nothing is known of it.
    """
    others = {entry.name: entry.value for entry in entry_points(group=GROUP)}
    for name in {**READERS, **others}:
        try:
            found = _find_class(name)
            evidence = found.detect(place) if issubclass(found, ExternalCorpus) else None
        except SourceReadError:
            raise
        except OSError as problem:
            raise make_read_error(problem.filename or place.uri, problem) from None
        except ValueError:
            continue  # not that one: a reader may stumble over another's files
        if evidence is not None:
            return name, evidence
    return None


def _find_class(name: str, first: Mapping[str, str] | None = None) -> type[Corpus]:
    others = {entry.name: entry.value for entry in entry_points(group=GROUP)}
    known = others | EXTRA_BUILT_IN | READERS | BUILT_IN
    place = known.get(name) or (name if ":" in name else None)
    if place is None:
        listed = [*(first or {**BUILT_IN, **EXTRA_BUILT_IN, **READERS}), *others]
        raise UserError(f"unknown corpus {name!r}{nearest(name, listed)}")
    module, _, attribute = place.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as problem:
        raise UserError(f"corpus {name!r}: {place} cannot be loaded: {problem}") from problem
    if not (isinstance(found, type) and issubclass(found, Corpus)):
        raise UserError(f"corpus {name!r}: {place} is not a subclass of pipelines.corpora.Corpus")
    return found


__all__ = [
    "BUILT_IN",
    "EXTRA_BUILT_IN",
    "READERS",
    "Corpus",
    "ExternalCorpus",
    "detect_reader",
    "find_corpus",
    "open_external_corpus",
    "parse_reader_prefix",
]
