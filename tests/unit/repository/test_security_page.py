"""Every protection that docs/security.md claims names a test, and the test exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)))


@pytest.mark.parametrize(("file", "test"), NAMED, ids=[f"{f}::{t}" for f, t in NAMED])
def test_a_test_of_the_threat_model_exists(file: str, test: str) -> None:
    found = list((ROOT / "tests").rglob(file))
    assert len(found) == 1, f"{file} must be one file below tests, found {found}"
    source = found[0].read_text(encoding="utf-8")
    assert re.search(rf"^\s*def {test}\(", source, re.MULTILINE), f"{found[0]} has no {test}"


def test_every_row_of_the_threat_model_names_a_test() -> None:
    rows = re.findall(r"^\| must not \| test \|\n\|---\|---\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    lines = [line for table in rows for line in table.splitlines()]
    assert len(lines) > 60
    assert [line for line in lines if not re.search(r"\| `test_\w+\.py::test_\w+` \|$", line)] == []
