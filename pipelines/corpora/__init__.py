"""Corpora by name: built-in ones, formats for data of the user, and those of other packages.

:func:`find_corpus` returns a built-in corpus, and :func:`open_external_corpus` opens data by path.
Other packages add corpora through the entry point group ``skillnet.corpora``.
"""

import re
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pipelines.config.corpus_options import check_corpus_name
from pipelines.corpora.base import Corpus
from pipelines.corpora.readers.base import ExternalCorpus
from pipelines.io.directory import SourceDirectory
from pipelines.io.source_file import SourceReadError, make_read_error
from skillnet_platform import config
from skillnet_platform.config.schema import check_keys
from skillnet_platform.errors import UserError, suggest_name

ENTRY_POINT_GROUP = "skillnet.corpora"

#: The built-in corpora, in the order of the paper's tasks. They are entry points too; the copy here
#: serves a checkout that is not installed.
BUILT_IN = {
    "headings": "pipelines.corpora.builtin.headings:HeadingsCorpus",
    "syllables": "pipelines.corpora.builtin.syllables:SyllablesCorpus",
    "drawings": "pipelines.corpora.builtin.drawings:DrawingsCorpus",
    "strokes": "pipelines.corpora.builtin.strokes:StrokesCorpus",
    "functions": "pipelines.corpora.builtin.functions:FunctionsCorpus",
}

#: Built-in corpora that are fetched and prepared by name only: tasks that a trained model is
#: extended by, and further rows for the tasks above. The tokenizer is not trained on them.
EXTRA_BUILT_IN = {
    "stroke_counts": "pipelines.corpora.builtin.stroke_counts:StrokeCountsCorpus",
    "radicals": "pipelines.corpora.builtin.radicals:RadicalsCorpus",
    "headings_unused": "pipelines.corpora.builtin.headings_unused:UnusedHeadingsCorpus",
    "functions_packages": "pipelines.corpora.builtin.functions_packages:FunctionPackagesCorpus",
    "drawings_artists": "pipelines.corpora.builtin.drawings_artists:DrawingArtistsCorpus",
    "syllables_voices": "pipelines.corpora.builtin.syllables_voices:SyllableVoicesCorpus",
}


#: Formats for data of the user: ``skillnet prepare --corpus tnews=PATH``. Detection tries them in
#: this order, the most specific ones first.
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

_OWN_NAMES = {**BUILT_IN, **EXTRA_BUILT_IN, **READERS}

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
    if name in BUILT_IN or name in EXTRA_BUILT_IN:
        raise UserError(f"--corpus {name}: this is a built-in corpus; choose another name")
    prefixed = parse_reader_prefix(place)
    reader, path = prefixed or (name, place)
    try:
        found = _find_class(reader, READERS)
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
    for name in {**READERS, **_other_entries()}:
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


def _other_entries() -> dict[str, EntryPoint]:
    """Return name -> entry point of other packages. They replace no name of this package."""
    found = entry_points(group=ENTRY_POINT_GROUP)
    return {entry.name: entry for entry in found if entry.name not in _OWN_NAMES}


def _find_class(name: str, candidates: Mapping[str, str] | None = None) -> type[Corpus]:
    """Return the class of a corpus or format; ``candidates`` are suggested for a wrong name.

    A name comes from a configuration, so it only selects: it is never imported.
    """
    others = _other_entries()
    if name in _OWN_NAMES:
        entry = EntryPoint(name, _OWN_NAMES[name], ENTRY_POINT_GROUP)
    elif name in others:
        entry = others[name]
    else:
        is_class = ":" in name
        hint = f": a class is named by its entry point, in the group {ENTRY_POINT_GROUP}"
        listed = suggest_name(name, [*(candidates or _OWN_NAMES), *others])
        raise UserError(f"unknown corpus {name!r}{hint if is_class else ''}{listed}")
    try:
        found = entry.load()
    except (ImportError, AttributeError) as error:
        raise UserError(f"corpus {name!r}: {entry.value} cannot be loaded: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Corpus)):
        raise UserError(
            f"corpus {name!r}: {entry.value} is not a subclass of pipelines.corpora.Corpus"
        )
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
