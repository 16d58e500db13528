"""Preparation: rows are accounted for, bytes are stable, crashes leave nothing.

The session's Ray prepares the corpus that the other tests compare theirs with. They prepare in this
process. A process of its own needs no Ray for texts, and starts one for media.
"""

import json
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipelines import prepare as preparing
from pipelines.data.corpora import find_corpus, open_external_corpus
from pipelines.data.corpora.formats import record_reader
from pipelines.data.preprocessing import pipeline
from pipelines.data.preprocessing import prepare as preprocessing_prepare
from pipelines.data.preprocessing.prepare import prepare
from pipelines.data.shards import files
from pipelines.data.shards.dataset import open_corpus, verify_corpus
from pipelines.data.transforms.containers import UNSUPPORTED_FORMAT
from skillnet_corpora.demo.syllables import WEB_PAGE, SyllablesCorpus
from skillnet_platform.errors import UserError
from tests.helpers import user_corpora
from tests.helpers.archive_files import tarred
from tests.helpers.processes import start_python
from tests.helpers.synthetic_corpora import ENTRY_POINTS, SLOW, Made, put_archive
from tests.helpers.waiting import wait_until
from tests.unit.pipelines.data.transforms.test_transforms import mp3, tone

pytestmark = pytest.mark.integration
MADE = "made"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[None]:
    """The made-up corpora have names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ENTRY_POINTS)
        yield


def files_of(directory: Path) -> dict[str, bytes]:
    """Name -> content of a corpus directory, without the notes of who read it."""
    found = (path for path in sorted(directory.iterdir()) if path.name != files.VERIFIED_NOTES)
    return {path.name: path.read_bytes() for path in found}


def command(data: Path, archives: Path, *more: str, **environment: str) -> subprocess.Popen[str]:
    """Start ``python -m pipelines.prepare`` on the made-up corpus."""
    words = ["-m", "pipelines.prepare", MADE, "--data", data, "--archives", archives, "--json"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "platform"), ENTRY_POINTS])
    given = {"PYTHONPATH": path, **environment}
    return start_python(*words, *more, cwd=ROOT, variables=given, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, ray_session: Any) -> tuple[Path, Path]:
    """The made-up corpus, prepared once on Ray: (data, archives)."""
    root = tmp_path_factory.mktemp("made")
    archives = put_archive(root / "archives")
    prepare([MADE], root / "data", archives)
    return root / "data", archives


def test_every_row_is_in_a_split_or_in_the_quarantine(made: tuple[Path, Path]) -> None:
    corpus = open_corpus(made[0] / "made", verify=True)
    manifest = corpus.manifest
    assert manifest["quarantine"] == {"every tenth": 10, "unlucky": 1}
    assert (manifest["rows_in"], manifest["rows_out"], corpus.rows) == (100, 89, 89)
    lines = (made[0] / "made" / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    rejected = {row["key"]: row["reason"] for row in map(json.loads, lines)}
    kept = [key for s in corpus.splits.values() for key in s.column("key").to_pylist()]
    assert sorted([*kept, *rejected]) == sorted(f"line {n}" for n in range(100))
    assert rejected["line 33"] == "unlucky"
    assert Counter(rejected.values()) == manifest["quarantine"]


def test_rows_keep_their_order_and_shards_their_size(made: tuple[Path, Path]) -> None:
    corpus = open_corpus(made[0] / "made")
    for split in corpus.splits.values():
        groups = split.column("group").to_pylist()
        assert groups == sorted(groups)
        assert [shard["rows"] for shard in split.shards[:-1]].count(8) >= len(split.shards) - 2
    assert "length" not in corpus.splits["test"].table().column_names
    assert "length" in corpus.splits["train"].table().column_names


def test_a_second_run_does_nothing(made: tuple[Path, Path]) -> None:
    data, archives = made
    before = {p: p.stat().st_mtime_ns for p in (data / "made").iterdir()}
    assert prepare([MADE], data, archives)["made"]["state"] == "cached"
    assert before == {p: p.stat().st_mtime_ns for p in (data / "made").iterdir()}


def test_an_altered_shard_is_prepared_again(tmp_path: Path, one_process: None) -> None:
    archives = put_archive(tmp_path / "archives")
    prepare([MADE], tmp_path / "data", archives)
    shard = tmp_path / "data" / "made" / "train-00000.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"?")
    with pytest.raises(UserError, match=r"train-00000\.arrow: this shard was altered"):
        verify_corpus(tmp_path / "data" / "made")
    assert prepare([MADE], tmp_path / "data", archives)["made"]["state"] == "prepared"
    assert shard.read_bytes() == whole


@pytest.mark.parametrize("kind", ["made_settings", "made_code", "made_labels"])
def test_what_would_come_out_otherwise_is_prepared_again(
    tmp_path: Path, one_process: None, kind: str
) -> None:
    archives = put_archive(tmp_path / "archives")
    first = prepare([MADE], tmp_path / "data", archives)["made"]
    second = prepare([kind], tmp_path / "data", archives)["made"]
    assert second["state"] == "prepared"
    assert second["digest"] != first["digest"]


def test_a_missing_archive_stops_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"made-1\.0-py3-none-any\.whl: missing.*skillnet fetch"):
        prepare([MADE], tmp_path / "data", tmp_path)
    assert not (tmp_path / "data").exists()


def test_an_unknown_corpus_exits_with_two(tmp_path: Path, capsys: Any) -> None:
    assert preparing.main(["strokse", "--data", str(tmp_path)]) == 2
    assert "did you mean 'strokes'" in capsys.readouterr().err


def test_a_defect_in_a_transform_leaves_no_corpus(
    tmp_path: Path, ray_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    archives = put_archive(tmp_path / "archives")

    def broken(self: Made, block: Any, tokenizer: Any) -> Any:
        raise ZeroDivisionError("a defect")

    corpus = type("Broken", (Made,), {"transform": broken})()
    monkeypatch.setattr(preprocessing_prepare, "find_corpus", lambda name: corpus)
    with pytest.raises(Exception, match="a defect"):
        prepare(["broken"], tmp_path / "data", archives)
    assert list((tmp_path / "data").iterdir()) == []  # not even its folder: no shard was finished


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk_is_named_and_leaves_no_corpus(
    tmp_path: Path, ray_session: Any, monkeypatch: pytest.MonkeyPatch, foreseen: bool
) -> None:
    """Seen before the work where that is possible, else where a worker meets it."""
    if not foreseen:
        monkeypatch.setattr(pipeline, "MIN_FREE_BYTES", 0)
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(small)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        with pytest.raises(UserError, match=r"made.*the disk is full"):
            prepare([MADE], small, put_archive(tmp_path / "archives"))
        with pytest.raises(UserError, match="missing"):
            open_corpus(small / "made")
        assert [path.name.split("-")[0] for path in small.iterdir()] in ([], [".made.partial"])
    finally:
        subprocess.run(["umount", str(small)], check=True)


def wait_for_shards(data: Path, count: int, process: "subprocess.Popen[str]") -> None:
    def has_shards() -> bool:
        return len(list(data.glob(".made.partial-*/*-?????.json"))) >= count

    wait_until(has_shards, 300, process=process)


@pytest.mark.parametrize(
    "with_media",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.slow(
                "test_prepare.py::test_a_prepare_that_is_asked_to_leave_says_so_in_one_line"
            ),
        ),
    ],
)
def test_a_prepare_that_is_asked_to_leave_says_so_in_one_line(
    made: tuple[Path, Path], tmp_path: Path, with_media: bool
) -> None:
    data, more = tmp_path / "data", ["--cpus", "1"]
    if with_media:
        user_corpora.media_folder(tmp_path / "media")
        more += ["--corpus", f"media=folder:{tmp_path / 'media'}"]
    first = command(data, made[1], *more, **{SLOW: "700"})
    try:
        wait_for_shards(data, 1, first)
        first.send_signal(signal.SIGTERM)
        _, err = first.communicate(timeout=300)
    finally:
        first.kill()
        first.wait()
    assert first.returncode == 143, err
    assert "ended by SIGTERM; the same command resumes it" in err
    assert "received at" not in err, "Ray's stack of C++"
    left = {path.name.split("-")[0] for path in data.iterdir()}
    assert left - {"media", ".media.partial", "tokenizer.json", "tokenizer.manifest.json"} == {
        ".made.partial"
    }


def test_tasks_of_ray_read_the_parts_of_a_corpus(
    ray_session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"text": f"第{n}句 {n * n}", "label": f"c{n % 3}"} for n in range(200)]
    user_corpora.write_lines(tmp_path / "rows.jsonl", lines)
    contents = []
    for size in (2**23, 500):
        monkeypatch.setattr(record_reader, "PART_BYTES", size)
        corpus = open_external_corpus("mine", f"folder:{tmp_path / 'rows.jsonl'}")
        corpus.shard_rows = 30
        assert (len(corpus.divide()) > 5) == (size == 500)
        prepare([], tmp_path / str(size), tmp_path, external=[corpus], vocabulary=400)
        contents.append(files_of(tmp_path / str(size) / "mine"))
    assert contents[0] == contents[1]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", [MADE, "made_settings"])
def test_a_stopped_prepare_resumes_with_whole_shards_of_its_settings(
    name: str,
    made: tuple[Path, Path],
    tmp_path: Path,
    one_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of the shards was altered meanwhile: it is made again. Other settings make all again."""
    archives = made[1]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline.staging, "gather_entries", _interrupt)
        prepare([MADE], tmp_path, archives)
    (left,) = tmp_path.iterdir()
    kept = {path.name: path.stat().st_mtime_ns for path in left.glob("*.arrow")}
    assert len(kept) == 12
    altered = left / min(kept)
    altered.write_bytes(altered.read_bytes()[:-1] + b"?")
    prepare([name], tmp_path, archives)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]  # nothing else is left
    if name == MADE:
        assert files_of(tmp_path / "made") == files_of(made[0] / "made")
        times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "made").iterdir()}
        same = {each for each in kept if times[each] == kept[each]}
        assert same == kept.keys() - {altered.name}
    else:
        assert open_corpus(tmp_path / "made").manifest["preprocessing"]["every"] == 11


def test_two_prepares_of_one_corpus_do_not_meet(tmp_path: Path) -> None:
    def enter() -> None:
        with pipeline.staging.staging_dir(tmp_path / "made", {"a": 1}):
            raise AssertionError("two at once")

    refused = r"made: process \d+ on .* prepares this corpus now"
    with (
        pipeline.staging.staging_dir(tmp_path / "made", {"a": 1}),
        ThreadPoolExecutor() as other,
        pytest.raises(UserError, match=refused),
    ):
        other.submit(enter).result()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0.005, 0.2])
def test_too_many_bad_rows_stop_with_a_summary(
    made: tuple[Path, Path], tmp_path: Path, one_process: None, share: float
) -> None:
    """One of a hundred lines is an error; the ten that are excluded by choice are not."""
    if share > 0.01:
        assert prepare([MADE], tmp_path, made[1], max_error_rate=share)["made"]["rows_out"] == 89
        return
    with pytest.raises(
        UserError, match=r"made: 1 of 100 rows.*1 × unlucky.*--max_error_rate 0\.0"
    ) as reported:
        prepare([MADE], tmp_path, made[1], max_error_rate=share)
    listed = (tmp_path / "made.rejected.jsonl").read_text(encoding="utf-8")
    assert str(tmp_path / "made.rejected.jsonl") in str(reported.value)
    assert '{"key": "line 33", "reason": "unlucky"}' in listed
    assert not (tmp_path / "made").exists()
    prepare([MADE], tmp_path, made[1])  # resumes, and the list of rejected rows is removed
    assert files_of(tmp_path / "made") == files_of(made[0] / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_recordings_and_error_pages_end_where_they_belong(
    tmp_path: Path, one_process: None
) -> None:
    names = [f"{s}{t}" for s in ("ma", "shi", "lü") for t in "1234"]
    files = {
        f"package/voice/{name}.mp3": mp3(tone(0.2 + 0.02 * n, 32_000, 300 + 20 * n), 32_000)
        for n, name in enumerate(names)
    }
    page = b'<!DOCTYPE HTML PUBLIC "-//IETF//DTD HTML 2.0//EN">\n<title>404 Not Found</title>'
    files |= {f"package/voice/{name}.mp3": page for name in ("ao4", "xin3")}
    files["package/voice/shi3.mp3"] = files["package/voice/shi3.mp3"][:1] + b"\0" * 900
    corpus = _on_small_archive(SyllablesCorpus, tarred(files), tmp_path)
    done = prepare_one(corpus, tmp_path)
    assert done["quarantine"][WEB_PAGE] == 2
    lines = (tmp_path / "data" / "syllables" / "quarantine.jsonl").read_text(encoding="utf-8")
    reasons = {row["key"]: row["reason"] for row in map(json.loads, lines.splitlines())}
    assert reasons["ao4.mp3"] == reasons["xin3.mp3"] == WEB_PAGE
    # What FFmpeg takes zeros for is its own affair.
    assert reasons["shi3.mp3"].startswith(("not audio", "no sound", UNSUPPORTED_FORMAT))
    prepared = open_corpus(tmp_path / "data" / "syllables")
    for split in prepared.splits.values():
        for row in split.table().to_pylist():
            assert len(row["log_mel"]) == row["frames"] > 15
            assert len(row["symbols"]) == 3
    assert prepared.manifest["symbols"][row["symbols"][0] - 1] in ("m", "sh", "l")


def _on_small_archive(kind: Any, content: bytes, tmp_path: Path) -> Any:
    """The corpus with its pin moved to ``content``."""
    import hashlib
    from dataclasses import replace

    (archive,) = kind.archives
    small = replace(archive, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (tmp_path / archive.file).write_bytes(content)
    return type(kind.__name__, (kind,), {"archives": (small,)})()


def prepare_one(corpus: Any, directory: Path) -> dict[str, Any]:
    """Prepare a corpus object that no name leads to."""
    return preprocessing_prepare._prepare([corpus], directory / "data", directory, None)[
        corpus.name
    ]


def test_built_in_corpora_say_all_they_must() -> None:
    for name in ("headings", "syllables", "drawings", "strokes", "functions"):
        corpus = find_corpus(name)
        assert corpus.name == name
        json.dumps([corpus.preprocessing(), corpus.facts()])  # goes into a manifest as it is
        for split in ("train", "pretrain"):
            assert corpus.schema(split).names[:3] == ["key", "group", "unit"]
