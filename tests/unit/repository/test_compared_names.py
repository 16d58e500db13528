"""Code asks a modality or an objective; it does not compare its name."""

import ast
import re
from collections.abc import Iterable, Iterator, Set
from functools import cache
from pathlib import Path

import pytest

from skillnet.modality import BUILT_IN_MODALITIES
from skillnet.objectives.base import BUILT_IN_OBJECTIVES

ROOT = Path(__file__).parents[3]
PACKAGES = ("skillnet", "pipelines", "plugins", "sweeps", "platform")
MODALITIES, OBJECTIVES = frozenset(BUILT_IN_MODALITIES), frozenset(BUILT_IN_OBJECTIVES)


def holds_name(node: ast.AST | None, names: Set[str]) -> bool:
    """Whether an expression is a name, or a display with one."""
    return any(
        isinstance(each, ast.Constant) and isinstance(each.value, str) and each.value in names
        for each in (ast.walk(node) if node else ())
    )


def find_comparisons(nodes: Iterable[ast.AST], names: Set[str]) -> Iterator[int]:
    """Yield the lines of comparisons and of lookups by a name."""
    for node in nodes:
        match node:
            case ast.Compare():
                if any(holds_name(each, names) for each in (node.left, *node.comparators)):
                    yield node.lineno
            case ast.match_case():
                if holds_name(node.pattern, names):
                    yield node.pattern.lineno
            case ast.Dict():
                # One key alone is the name of a tensor or a column, such as ``masked``.
                if sum(holds_name(key, names) for key in node.keys) > 1:
                    yield node.lineno
            case ast.Call(func=ast.Attribute(attr="startswith" | "endswith")):
                if any(holds_name(each, names) for each in node.args):
                    yield node.lineno


@cache
def read_comparisons(path: Path) -> dict[Set[str], list[int]]:
    """Return names -> lines of a file."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    return {names: list(find_comparisons(nodes, names)) for names in (MODALITIES, OBJECTIVES)}


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('task.objective == "ctc"', 1),
        ('"masked" != task.objective', 1),
        ('name in ("masked", "retrieval")', 1),
        ('name in {"masked"} or name == "other"', 1),
        ('match name:\n    case "ctc" | "masked":\n        pass\n    case _:\n        pass', 1),
        ('{"ctc": 1, "retrieval": 2}[name]', 1),
        ('name.startswith("multi_label")', 1),
        ('targets["masked"]', 0),
        ('{"masked": 1}', 0),
        ('Task("retrieval", towers)', 0),
        ("find_objective(name).pairs_towers", 0),
    ],
)
def test_comparisons_are_found(source: str, count: int) -> None:
    assert len(list(find_comparisons(ast.walk(ast.parse(source)), OBJECTIVES))) == count


@pytest.mark.parametrize(
    ("names", "folders", "owners", "limit"),
    [
        (MODALITIES, PACKAGES, r"/modalities/|/tests/", 9),
        (OBJECTIVES, (*PACKAGES, "benchmarks", "tools"), r"skillnet/objectives/|/tests/", 8),
    ],
    ids=["modalities", "objectives"],
)
def test_few_places_compare_a_name(
    names: Set[str], folders: tuple[str, ...], owners: str, limit: int
) -> None:
    """Few comparisons remain outside of the modules that own the names."""
    found = []
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not re.search(owners, name):
                found += [f"{name}:{line}" for line in read_comparisons(path)[names]]
    assert len(found) <= limit, "\n".join(found)
