"""Bad rows end in the quarantine with file, row and reason; good ones arrive; no worker dies."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipelines.blocks import TWICE
from pipelines.guard import DEADLY
from pipelines.prepare import prepare
from pipelines.shards import open_corpus
from skillnet_platform.errors import UserError
from tests import hostile

pytestmark = pytest.mark.integration


def quarantine(corpus: Path) -> dict[tuple[str, int], str]:
    """(File, row) -> reason."""
    lines = (corpus / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    return {(row["file"], row["row"]): row["reason"] for row in map(json.loads, lines)}


@pytest.mark.parametrize("kind", ["pictures", "sounds", "clips"])
def test_every_hostile_file_is_set_aside_and_its_neighbours_arrive(
    tmp_path: Path, ray_session: Any, kind: str
) -> None:
    folder = hostile.write_files(tmp_path / "files", kind)
    name = f"tests.hostile:{kind.capitalize()}"
    told = prepare([name], tmp_path / "data", folder, max_bad=1.0)[kind]
    corpus = open_corpus(tmp_path / "data" / kind, verify=True)
    found = quarantine(corpus.path)
    files = sorted(hostile.FILES[kind])
    for row, file in enumerate(files, start=1):
        wanted = hostile.FILES[kind][file][1]
        assert bool(wanted) == ((str(folder / file), row) in found), file
        assert re.search(wanted, found.get((str(folder / file), row), "")), file
    first, count = str(folder / files[0]), len(files)
    assert found[first, count + 1] == TWICE
    assert "longer than 1000000 characters" in found[first, count + 2]
    assert found[first, count + 3] == "key is not Unicode text"
    assert found[first, count + 4] == "caption is of type float, expected string"
    good = [file for file in files if not hostile.FILES[kind][file][1]]
    table = corpus.splits["train"].table()
    assert table["key"].to_pylist() == good
    assert min(table["sum"].to_numpy().tolist()) != 0
    assert (told["rows_in"], told["rows_out"]) == (count + 4, len(good))
    assert sum(told["quarantine"].values()) == len(found) == count + 4 - len(good)


def test_a_share_of_bad_rows_above_the_limit_stops_with_a_summary(
    tmp_path: Path, ray_session: Any
) -> None:
    folder = hostile.write_files(tmp_path / "files", "clips")
    with pytest.raises(UserError, match=r"clips: \d+ of 14 rows cannot be used.*not a video"):
        prepare(["tests.hostile:Clips"], tmp_path / "data", folder)
    (listed,) = (tmp_path / "data").glob("*.jsonl")
    rows = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()]
    assert {"file", "row", "key", "reason"} == set(rows[0])


def test_a_row_that_hangs_or_ends_its_worker_is_set_aside(tmp_path: Path, ray_session: Any) -> None:
    """Twice it takes its worker along; then it is known. The rows beside it arrive."""
    prepare(["tests.hostile:Deadly"], tmp_path / "data", tmp_path, max_bad=1.0)
    corpus = open_corpus(tmp_path / "data" / "deadly")
    assert {row: reason for (_, row), reason in quarantine(corpus.path).items()} == {
        5: DEADLY,
        10: DEADLY,
        14: "longer than 0.5 s",
    }
    kept = corpus.splits["train"].table()["key"].to_pylist()
    assert kept == [str(n) for n in range(20) if n not in (4, 9, 13)]
