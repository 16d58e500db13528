"""Only a modality's own modules know its name: others ask the object."""

import ast
from collections.abc import Iterator
from pathlib import Path

from skillnet.modality import BUILT_IN_MODALITIES

ROOT = Path(__file__).parents[3]
PACKAGES = ("skillnet", "pipelines", "sweeps", "platform", "plugins")
#: Comparisons with a name, or mappings from names, in the whole source. Columns and elements of
#: other files can have a name of a modality.
MOST = 8


def find_uses(tree: ast.AST) -> Iterator[int]:
    """Yield the lines that compare a value with a modality's name, or map such names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            is_use = any(_names(each) for each in (node.left, *node.comparators))
        elif isinstance(node, ast.Dict):
            # A row of a corpus has columns such as "text" among others.
            is_use = len(node.keys) > 1 and all(key and _names(key) for key in node.keys)
        else:
            is_use = isinstance(node, ast.MatchValue) and _names(node.value)
        if is_use:
            yield node.lineno


def _names(node: ast.AST) -> bool:
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return any(map(_names, node.elts))
    return isinstance(node, ast.Constant) and node.value in BUILT_IN_MODALITIES


def test_few_lines_outside_of_the_modalities_name_one() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if not {"modalities", "tests"} & set(path.parts)
        for line in find_uses(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert len(found) <= MOST, found


def test_each_kind_of_use_is_found() -> None:
    source = (
        "a == 'text'\nb != 'image'\nc in ('sound', 'other')\nd = {'text': 1, 'code': 2}\n"
        "match e:\n    case 'video':\n        pass\nf = {'text': 1, 'label': 2}\ng = ['text']\n"
    )
    assert sorted(find_uses(ast.parse(source))) == [1, 2, 3, 4, 6]
