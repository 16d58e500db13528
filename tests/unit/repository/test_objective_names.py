"""Code asks an objective; it does not compare its name."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from skillnet.objectives.base import BUILT_IN_OBJECTIVES

ROOT = Path(__file__).parents[3]
NAMES = frozenset(BUILT_IN_OBJECTIVES)
#: Comparisons that may remain outside of the objectives themselves.
LIMIT = 8


def holds_name(node: ast.AST | None) -> bool:
    """Whether an expression is the name of an objective, or a display with one."""
    return any(
        isinstance(each, ast.Constant) and each.value in NAMES
        for each in (ast.walk(node) if node else ())
        if isinstance(getattr(each, "value", None), str)
    )


def find_comparisons(source: str) -> Iterator[int]:
    """Yield the lines of comparisons and of lookups by the name of an objective."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Compare():
                if any(holds_name(each) for each in (node.left, *node.comparators)):
                    yield node.lineno
            case ast.match_case():
                if holds_name(node.pattern):
                    yield node.pattern.lineno
            case ast.Dict():
                # One key alone is the name of a tensor, such as ``masked``.
                if sum(holds_name(key) for key in node.keys) > 1:
                    yield node.lineno
            case ast.Call(func=ast.Attribute(attr="startswith" | "endswith")):
                if any(holds_name(each) for each in node.args):
                    yield node.lineno


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
    assert len(list(find_comparisons(source))) == count


def test_few_places_compare_the_name_of_an_objective() -> None:
    found = []
    for folder in ("skillnet", "pipelines", "plugins", "sweeps", "platform", "benchmarks", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not re.search(r"skillnet/objectives/|/tests/", name):
                found += [f"{name}:{line}" for line in find_comparisons(path.read_text("utf-8"))]
    assert len(found) <= LIMIT, "\n".join(found)
