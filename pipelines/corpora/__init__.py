"""Corpora by name: the built-in ones, and those that other packages add by entry point."""

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


def find_corpus(name: str) -> Corpus:
    """The corpus of that name.

    Raises:
        UserError: nobody provides it; with the nearest name.
    """
    from importlib import import_module

    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return getattr(import_module(module), attribute)()
    others = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in others:
        raise UserError(f"unknown corpus {name!r}{nearest(name, [*BUILT_IN, *others])}")
    return others[name].load()()


__all__ = ["BUILT_IN", "Corpus", "find_corpus"]
