"""Records of JSON files: what says two things at once is set aside by itself."""

from pathlib import Path

import pytest

from pipelines.corpora.records import TWICE, records
from pipelines.places import Place

GOOD, DOUBLE = '{"a": 1, "b": {"a": 2}}', '{"a": 1, "b": [{"c": 1, "c": 2}]}'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", f"{GOOD}\n{DOUBLE}\n{GOOD}\n"),
        ("rows.json", f"[{GOOD},\n {DOUBLE}, {GOOD}]"),
    ],
)
def test_a_field_that_stands_twice_costs_its_record(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = list(records(Place(str(tmp_path)), name))
    good = {"a": 1, "b": {"a": 2}}
    assert found == [(1, good), (2, TWICE), (3, good)]
