"""``skillnet prepare`` on folders as bad as users' get: bad rows end in the quarantine with file,
row and reason, good ones arrive, no worker dies, too many bad ones stop it with a summary."""

import io
import json
import multiprocessing
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import prepare
from pipelines.data.preprocessing import prepare as preparation
from pipelines.data.preprocessing.blocks import DUPLICATE_KEY
from pipelines.data.shards.dataset import open_corpus
from pipelines.data.transforms.decode_guard import CRASHES_WORKER
from tests.helpers import hostile_corpora as hostile
from tests.helpers import user_corpora
from tests.helpers.processes import fork_context
from tests.helpers.synthetic_corpora import ENTRY_POINTS

pytestmark = pytest.mark.integration
KINDS = ("pictures", "sounds", "clips", "texts")
#: The column that a good row fills with something.
MADE = {"pictures": "pixels", "sounds": "log_mel", "clips": "frames", "texts": "tokens"}


def quarantine(corpus: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """(File, row) -> what the quarantine tells of it."""
    lines = (corpus / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    return {(row["file"], row.get("row", 0)): row for row in map(json.loads, lines)}


def words(kind: str, folder: Path, data: Path, max_error_rate: float | None) -> list[str]:
    """The command line of a prepare of a folder."""
    given = ["--corpus", f"{kind}=folder:{folder}", "--data", str(data), "--vocabulary", "400"]
    given += [f"--options.{kind}.validation", "0", f"--options.{kind}.test", "0"]
    return [*given, *([] if max_error_rate is None else ["--max_error_rate", str(max_error_rate)])]


@pytest.mark.parametrize("kind", KINDS)
def test_every_hostile_row_is_rejected_and_its_neighbours_arrive(
    tmp_path: Path, one_process: None, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """A file that ends its worker would be rejected for that, which hides the tested reason."""
    folder, data = tmp_path / "given" / kind, tmp_path / "data"
    wanted = dict(enumerate(hostile.write_corpus(folder, kind), start=1))
    capsys.readouterr()
    assert prepare.main(words(kind, folder, data, 1.0)) == 0
    said = capsys.readouterr()

    found = quarantine(data / kind)
    for row, why in wanted.items():
        reported = found.pop(("metadata.jsonl", row), {"reason": ""})
        assert re.search(why, reported["reason"]), (row, why, reported)
        assert bool(reported["reason"]) == bool(why), (row, reported)
        if "media" in reported:
            assert reported["media"].startswith(f"{folder}")
    assert not found

    good = [row for row, why in wanted.items() if not why]
    corpus = open_corpus(data / kind, verify=True)
    table = corpus.splits["train"].table()
    assert table["key"].to_pylist() == [f"metadata.jsonl:{row}" for row in good]
    for cell in table[MADE[kind]].to_pylist():
        assert np.abs(np.asarray(cell, float)).sum() > 0

    aside = len(wanted) - len(good)
    (line,) = [line for line in said.out.splitlines() if "prepared" in line]
    assert re.findall(r"\d+", line)[:4] == [
        str(n) for n in (len(wanted), len(good), aside, len(good))
    ]
    assert f"metadata.jsonl is truncated after {len(wanted) - 1} rows" in " ".join(said.err.split())
    assert sum(corpus.manifest["quarantine"].values()) == aside


@pytest.mark.parametrize("kind", ["pictures", "texts"])  # more than half, and less, are bad
def test_a_share_of_bad_rows_above_the_limit_stops_with_a_summary(
    tmp_path: Path, one_process: None, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    folder, data = tmp_path / "given" / kind, tmp_path / "data"
    wanted = hostile.write_corpus(folder, kind, cut=False)
    capsys.readouterr()
    assert prepare.main(words(kind, folder, data, None)) == 2
    said = " ".join(capsys.readouterr().err.split())
    bad = sum(map(bool, wanted))
    assert re.search(rf"{kind}: {bad} of {len(wanted)} rows \([\d.]+%\) were rejected", said)
    assert re.search(r"the limit is 10\.0% \(max_error_rate\).* \d+ × ", said)
    assert ("raise the limit: --max_error_rate 0." in said) == (2 * bad <= len(wanted))
    listed = data / f"{kind}.rejected.jsonl"
    assert listed.name in said
    rows = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()]
    assert {row["row"] for row in rows} == {n for n, why in enumerate(wanted, start=1) if why}
    assert not (data / kind).exists()


def test_a_key_that_comes_twice_costs_its_second_row(tmp_path: Path, one_process: None) -> None:
    """One picture twice in the annotations, one sample twice in a tar."""
    aic = user_corpora.aic_icc(tmp_path / "aic_icc")
    (file,) = aic.rglob("caption_train_annotations*.json")
    records = json.loads(file.read_text(encoding="utf-8"))
    records.insert(9, records[4])
    file.write_text(json.dumps(records), encoding="utf-8")
    tars = user_corpora.webdataset(tmp_path / "webdataset", rows=6)
    with tarfile.open(tars / "train-000000.tar", "a") as out:
        for ending, content in (("jpg", user_corpora.jpg(3)), ("txt", "再来".encode())):
            entry = tarfile.TarInfo(f"000002.{ending}")
            entry.size = len(content)
            out.addfile(entry, io.BytesIO(content))
    given = [f"--corpus={name}={tmp_path / name}" for name in ("aic_icc", "webdataset")]
    data = tmp_path / "data"
    given += ["--data", str(data), "--max_error_rate", "0.2", "--vocabulary", "400"]
    assert prepare.main(given) == 0
    found = quarantine(data / "aic_icc")
    assert found[str(file.relative_to(aic)), 10]["reason"] == DUPLICATE_KEY
    assert open_corpus(data / "aic_icc").splits["train"].rows == 11
    assert quarantine(data / "webdataset")["train-000000.tar", 7]["reason"] == DUPLICATE_KEY
    assert open_corpus(data / "webdataset").rows == 18


def test_workers_import_nothing_from_the_working_directory(ray_session: Any) -> None:
    """A corpus that is prepared in its own directory may hold a file named as a library."""
    worker = ray_session._private.worker.global_worker.core_worker
    assert list(worker.get_job_config().py_driver_sys_path) == []


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(
            "ray",
            marks=pytest.mark.slow(
                "test_rubbish.py::test_a_row_that_hangs_or_ends_its_worker_is_rejected"
            ),
        ),
        "machine",
    ],
)
def test_a_row_that_hangs_or_ends_its_worker_is_rejected(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Twice it takes its worker along; then it is known. The rows beside it arrive."""
    if place == "ray":
        request.getfixturevalue("ray_session")
    else:
        monkeypatch.setattr(preparation, "needs_no_ray", lambda corpora, store: True)
        # Each end takes a process, which loads its libraries for seconds unless it is a fork.
        forks = fork_context()
        monkeypatch.setattr(multiprocessing, "get_context", lambda kind: forks)
    monkeypatch.syspath_prepend(ENTRY_POINTS)
    given = ["deadly", "--data", str(tmp_path / "data"), "--max_error_rate", "1.0"]
    assert prepare.main(given) == 0
    corpus = open_corpus(tmp_path / "data" / "deadly")
    assert {row: reported["reason"] for (_, row), reported in quarantine(corpus.path).items()} == {
        5: CRASHES_WORKER,
        10: CRASHES_WORKER,
        14: "longer than 0.5 s",
    }
    kept = corpus.splits["train"].table()["key"].to_pylist()
    assert kept == [str(n) for n in range(20) if n not in (4, 9, 13)]
