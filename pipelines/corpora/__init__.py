"""Corpora by name: the built-in ones, and those that other packages add by entry point."""

from importlib import import_module
from importlib.metadata import entry_points

from pipelines.corpora.base import Corpus
from skillnet_platform.errors import UserError, nearest

GROUP = "skillnet.corpora"

#: The built-in corpora, in the order of the paper's tasks. Also entry points; named here too
#: so that a checkout works before it is installed.
BUILT_IN = {
    "headings": "pipelines.corpora.headings:Headings",
    "syllables": "pipelines.corpora.syllables:Syllables",
    "drawings": "pipelines.corpora.drawings:Drawings",
    "strokes": "pipelines.corpora.strokes:Strokes",
    "functions": "pipelines.corpora.functions:Functions",
}

#: Made of the same archives for tasks that a model is grown by: fetched and prepared by name only.
FURTHER = {
    "stroke_counts": "pipelines.corpora.stroke_counts:StrokeCounts",
}


def find_corpus(name: str) -> Corpus:
    """The corpus of that name, or the class that "package.module:Class" names.

    Raises:
        UserError: nobody provides it; with the nearest name.
    """
    others = {entry.name: entry.value for entry in entry_points(group=GROUP)}
    known = others | FURTHER | BUILT_IN
    place = known.get(name) or (name if ":" in name else None)
    if place is None:
        raise UserError(f"unknown corpus {name!r}{nearest(name, [*BUILT_IN, *FURTHER, *others])}")
    module, _, attribute = place.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as problem:
        raise UserError(f"corpus {name!r}: {place} cannot be loaded: {problem}") from problem
    if not (isinstance(found, type) and issubclass(found, Corpus)):
        raise UserError(f"corpus {name!r}: {place} is not a subclass of pipelines.corpora.Corpus")
    return found()


__all__ = ["BUILT_IN", "FURTHER", "Corpus", "find_corpus"]
