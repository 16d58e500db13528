"""Data sets of the Hub by name: streamed from one commit, which the manifest names."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfFileSystem, close_session, constants

from pipelines.data.corpora import open_external_corpus
from pipelines.data.corpora.base import SourceArchives
from pipelines.data.io import source_file
from skillnet_platform.errors import UserError
from skillnet_platform.storage.retry import StoreUnavailableError
from tests.helpers.file_forms import draw_png
from tests.helpers.hub_server import HubServer, serve_hub
from tests.helpers.processes import run_python

NAME = "owner/name"


def encode_rows(count: int, start: int = 0, width: int = 0) -> bytes:
    """Return a Parquet file of texts of two classes, in groups of 100 rows."""
    rows = {
        "text": [f"第{n}行的文字{'x' * width}" for n in range(start, start + count)],
        "label": ["red", "blue"] * (count // 2),
    }
    stream = io.BytesIO()
    pq.write_table(pa.table(rows), stream, row_group_size=100, compression="none")
    return stream.getvalue()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serve_hub() as server:
        for name, value in server.variables(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        # The client reads the address when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        source_file._open_filesystem.cache_clear()
        HfFileSystem.clear_instance_cache()
        server.repositories[f"datasets/{NAME}"] = {
            "README.md": b"---\nlicense: mit\n---\n",
            "data/train-00000-of-00001.parquet": encode_rows(40),
            "data/test-00000-of-00001.parquet": encode_rows(20, 40),
        }
        yield server
    source_file._open_filesystem.cache_clear()
    HfFileSystem.clear_instance_cache()


def read_rows(place: str, **options: Any) -> list[Any]:
    corpus = open_external_corpus("mine", place, options)
    return list(corpus.rows(SourceArchives.none()))


def test_the_rows_are_those_of_the_downloaded_data_set(hub: HubServer, tmp_path: Path) -> None:
    for name, data in hub.repositories[f"datasets/{NAME}"].items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(data)
    rows = read_rows(f"hf:{NAME}")
    assert rows == read_rows(f"folder:{tmp_path / 'copy'}")
    assert [row["split"] for row in rows].count("test") == 20


def test_a_revision_is_pinned_while_its_branch_moves(hub: HubServer, tmp_path: Path) -> None:
    known = hub.repositories
    known[f"datasets/{NAME}@v1"] = {"train.csv": b"text,label\n" + b"a,x\nb,y\n" * 20}
    words = ["--corpus", f"mine=hf:{NAME}@v1", "--data", str(tmp_path / "corpora")]
    # Workers of a Ray that an earlier test started know another Hub.
    ended = run_python("-m", "pipelines.prepare", *words, variables=hub.variables(tmp_path))
    assert ended.returncode == 0, ended.stderr
    manifest = json.loads((tmp_path / "corpora" / "mine" / "manifest.json").read_text("utf-8"))
    (source,) = manifest["sources"]
    commit = source["revision"]
    assert len(commit) == 40
    assert source["file"].startswith(f"hf:{NAME}@v1: 1 files, ")
    assert sum(split["rows"] for split in manifest["splits"].values()) == 40
    # All files come from the commit, so a branch that moves meanwhile changes no row.
    asked = [line for line in hub.requests if "/resolve/" in line]
    assert asked
    assert all(f"/resolve/{commit}/" in line for line in asked)
    known[f"datasets/{NAME}@v2"] = {"train.csv": b"text,label\n" + b"c,x\nd,y\n" * 20}
    other = open_external_corpus("mine", f"hf:{NAME}@v2")
    assert other.extra_sources()[0]["revision"] != commit


def test_files_are_read_in_ranges_and_none_is_kept(hub: HubServer, tmp_path: Path) -> None:
    data = encode_rows(4000, width=10_000)
    hub.repositories[f"datasets/{NAME}"]["data/train-00000-of-00001.parquet"] = data
    hub.sent.clear()
    corpus = open_external_corpus("mine", f"hf:{NAME}")
    rows = corpus.rows(SourceArchives.none())
    assert next(rows)
    # The sample for the schema and the first row need a part of the 40 MB.
    assert 0 < sum(hub.sent) < len(data)
    assert max(hub.sent) < len(data) // 2
    kept = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) < 10_000


def test_media_are_read_from_the_hub(hub: HubServer) -> None:
    files = hub.repositories[f"datasets/{NAME}"]
    files.clear()
    files |= {f"train/{label}/{n}.png": draw_png() for label in ("a", "b") for n in range(2)}
    rows = read_rows(f"hf:{NAME}")
    assert [row["label"] for row in rows] == ["a", "a", "b", "b"]
    from pipelines.data.io.media import read_media

    assert [*read_media([row["media"] for row in rows])] == [draw_png()] * 4


def test_a_private_data_set_needs_the_token(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.private.add(f"datasets/{NAME}")
    assert len(read_rows(f"hf:{NAME}")) == 60
    monkeypatch.delenv("HF_TOKEN")
    HfFileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"hf:owner/name: no such data set\. If it is private, set"):
        read_rows(f"hf:{NAME}")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("hf:owner", r"hf:owner: expected hf:OWNER/NAME, or hf:OWNER/NAME@REVISION"),
        ("hf:owner/name@", r"expected hf:OWNER/NAME"),
        ("hf:../name@v1/../x", r"expected hf:OWNER/NAME"),
        ("hf:owner/none", r"hf:owner/none: no such data set"),
        (f"hf:{NAME}@v9", r"hf:owner/name@v9: no such branch, tag or commit"),
    ],
)
def test_a_wrong_name_is_one_sentence(hub: HubServer, place: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_rows(place)


def test_a_hub_that_is_lost_later_is_waited_for(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKILLNET_STORE_PATIENCE", "0.2")
    corpus = open_external_corpus("mine", f"hf:{NAME}")
    hub.shutdown()
    hub.server_close()
    close_session()  # else open connections are still answered
    # The client makes pauses of its own, of 23 s together.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with pytest.raises(StoreUnavailableError, match=r"hf://.*: the store did not answer for"):
        list(corpus.rows(SourceArchives.none()))


def test_a_hub_that_does_not_answer_is_one_sentence(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match="the Hub does not answer"):
        read_rows(f"hf:{NAME}")
