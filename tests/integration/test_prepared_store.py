"""``skillnet prepare --data s3://…``: the corpus as on the disk, shard by shard, through faults."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipelines import prepare as preparing
from pipelines.data.preprocessing.remote_staging import local_staging_dir
from pipelines.data.shards.dataset import open_corpus
from skillnet_platform.storage import directories
from tests.helpers.object_store import ObjectStore
from tests.helpers.processes import kill_family, start_python
from tests.helpers.synthetic_corpora import ENTRY_POINTS, SLOW, put_archive
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
MADE = "made"


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up corpora have names."""
    monkeypatch.syspath_prepend(ENTRY_POINTS)


def start(words: list[str], **environment: str) -> "subprocess.Popen[str]":
    """A prepare with a Ray of its own, whose processes know the store."""
    path = f"{ROOT}:{ROOT / 'platform'}:{ENTRY_POINTS}"
    return start_python(
        *("-m", "pipelines.prepare", *words, "--cpus", "1"),
        variables={"PYTHONPATH": path, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def end(process: "subprocess.Popen[str]", code: int) -> str:
    """What it said; it must end with that exit code."""
    _, said = process.communicate(timeout=300)
    assert process.returncode == code, said
    return said


def staged_shards(uri: str) -> list[str]:
    """Names of finished shards' entries in the store."""
    found = [entry.name for entry in directories.list_files(uri)]
    return [name for name in found if ".made.partial-" in name and name.endswith(".json")]


@pytest.mark.slow("test_cloud_stores.py::test_a_users_corpus_goes_from_the_store_into_the_store")
def test_a_corpus_goes_to_the_store_shard_by_shard(
    object_store: ObjectStore,
    run_root: Path,
    tmp_path: Path,
    ray_session: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    archives = put_archive(tmp_path / "archives")
    uri = object_store.uri
    directories.write_bytes(f"{uri}/marker", b"")
    words = [MADE, "--data", uri, "--archives", str(archives)]
    here = tmp_path / "here"
    assert preparing.main([MADE, "--data", str(here), "--archives", str(archives)]) == 0

    # Killed with all its processes, and the disk is lost.
    process = start(words, **{SLOW: "400"})
    wait_until(lambda: len(staged_shards(uri)) >= 3, 240, process=process, pause=0.25)
    kill_family(process)
    assert not directories.is_committed(f"{uri}/made")
    before = len(staged_shards(uri))
    shutil.rmtree(local_staging_dir(uri))

    # The store goes away: what has arrived stays.
    process = start(words, **{SLOW: "400", "SKILLNET_STORE_PATIENCE": "1"})
    wait_until(lambda: len(staged_shards(uri)) > before, 240, process=process, pause=0.25)
    object_store.door.shut()
    said = end(process, 1)
    object_store.door.unshut()
    assert f"resumes with {before} finished shards" in said
    assert "did not answer for 1 s" in said
    assert "Traceback" not in said
    assert not directories.is_committed(f"{uri}/made")

    kept = len(staged_shards(uri))
    assert f"resumes with {kept} finished shards" in end(start(words), 0)
    local, there = open_corpus(here / "made"), open_corpus(f"{uri}/made", verify=True)
    assert there.manifest == local.manifest
    names = {path.name for path in (here / "made").iterdir()}
    assert {entry.name for entry in directories.list_files(f"{uri}/made")} == names
    assert not staged_shards(uri), "nothing is left of its making"
    assert not list(local_staging_dir(uri).rglob("*.arrow")), "no shard is left on this disk"

    # Nothing changed, so nothing is prepared. Staging files of another state are removed.
    directories.write_bytes(f"{uri}/.made.partial-0123456789abcdef/train-00000.json", b"{}")
    capsys.readouterr()
    assert preparing.main([*words, "--json"]) == 0
    assert '"state": "cached"' in capsys.readouterr().out
    assert not staged_shards(uri)

    # Another state of it takes its place; until then the old one is whole.
    process = start(["made_settings", *words[1:]], **{SLOW: "200"})
    wait_until(lambda: staged_shards(uri), 240, process=process, pause=0.25)
    assert open_corpus(f"{uri}/made", verify=True).manifest == local.manifest
    end(process, 0)
    assert open_corpus(f"{uri}/made", verify=True).manifest["digest"] != local.manifest["digest"]


def test_a_missing_bucket_is_found_before_the_work(
    object_store: ObjectStore, run_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert preparing.main([MADE, "--data", "s3://nowhere/corpora"]) == 2
    assert "no bucket 'nowhere'" in capsys.readouterr().err
    assert preparing.main([MADE, "--archives", "s3://nowhere/archives"]) == 2
    assert "archives takes a folder on this machine" in capsys.readouterr().err
