"""Folders as users have them: format, schema, splits, rows and messages are those of the cases.

``tests/golden/readers`` has a file per subject. The name of a case is the sentence that it proves.
``python -m tests.helpers.golden_layouts`` writes the expected outcomes again.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.corpora import open_external_corpus
from pipelines.data.preprocessing import inspection
from skillnet_platform.errors import UserError
from tests.helpers.golden_layouts import SUBJECTS, describe_layout, read_cases, write_files

CASES = {
    f"{file.stem}: {name}": case for file in SUBJECTS for name, case in read_cases(file).items()
}


@pytest.mark.parametrize("name", CASES)
def test_a_layout_is_read_as_stated(tmp_path: Path, name: str) -> None:
    case: dict[str, Any] = CASES[name]
    write_files(tmp_path, case["files"])
    found = describe_layout(tmp_path, case["place"], case["options"])
    assert json.loads(json.dumps(found)) == case["expected"]


def test_lists_are_shown_and_hashed(tmp_path: Path) -> None:
    name = "split_lists: lists of published corpora name the splits[food]"
    write_files(tmp_path, CASES[name]["files"])
    report = inspection.inspect_corpus(str(tmp_path))
    assert report["named_splits"] == ["test", "train"]
    assert "meta/train.txt" not in report["unread"]
    before = open_external_corpus("mine", f"folder:{tmp_path}").extra_sources()
    (tmp_path / "meta/test.txt").write_text("pie/100\n", encoding="utf-8")
    assert open_external_corpus("mine", f"folder:{tmp_path}").extra_sources() != before


def test_a_card_of_a_flood_of_text_is_a_user_error(tmp_path: Path) -> None:
    card = f"---\ndataset_info: {'x' * 600_000}\n---\n"
    write_files(tmp_path, {"README.md": card, "a.csv": "text,label\na,x\nb,y\n"})
    with pytest.raises(UserError, match=r"README\.md.*cannot be read"):
        open_external_corpus("mine", f"folder:{tmp_path}")
