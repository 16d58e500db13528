"""Corpora and runs in Google's and Azure's stores, as their emulators play them."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pipelines import finetune
from pipelines import prepare as preparing
from pipelines.data.shards.dataset import open_corpus
from skillnet_platform.storage import directories
from tests.helpers.cloud_stores import CloudStore, reached
from tests.helpers.prepared_corpora import prepare_in_process
from tests.helpers.processes import run_python
from tests.helpers.small_corpora import write_corpora
from tests.helpers.user_corpora import webdataset
from tests.integration.test_mirror import config_of

pytestmark = [pytest.mark.integration, pytest.mark.long]
ROOT = Path(__file__).parents[2]


AZURE = pytest.mark.slow("test_stores.py::test_a_folder_goes_up_and_comes_down")


@pytest.fixture(params=["google", pytest.param("azure", marks=AZURE)])
def store(request: pytest.FixtureRequest) -> Iterator[CloudStore]:
    server = request.getfixturevalue(f"{request.param}_server")
    with reached(server):
        yield server


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A user's corpus on this disk, and the manifest of its shards."""
    root = tmp_path_factory.mktemp("prepared")
    mine = webdataset(root / "mine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKILLNET_HOME", str(root))
        # This machine alone needs no Ray; test_prepare.py compares the bytes.
        prepare_in_process(patch)
        words = ["--corpus", f"mine=webdataset:{mine}", "--data", str(root / "here")]
        assert preparing.main([*words, "--tokenizer", "learn"]) == 0
    return mine, open_corpus(root / "here" / "mine").manifest


def test_a_users_corpus_goes_from_the_store_into_the_store(
    store: CloudStore, run_root: Path, prepared: tuple[Path, dict[str, Any]]
) -> None:
    mine, here = prepared
    for path in mine.rglob("*"):
        if path.is_file():
            directories.put_file(path, f"{store.uri}/mine/{path.relative_to(mine)}")
    # A Ray of its own, whose processes know the store.
    words = ["--corpus", f"mine=webdataset:{store.uri}/mine", "--data", f"{store.uri}/corpora"]
    done = run_python("-m", "pipelines.prepare", *words, "--cpus", "2", "--tokenizer", "learn")
    assert done.returncode == 0, done.stderr
    there = open_corpus(f"{store.uri}/corpora/mine", verify=True).manifest
    assert there["rows_out"] == here["rows_out"] > 0
    assert there["splits"] == here["splits"]


@pytest.mark.slow("test_mirror.py::test_an_empty_disk_resumes_to_the_bit")
def test_a_run_lies_in_the_store_and_reads_from_it(
    store: CloudStore, run_root: Path, tmp_path: Path, ray_session: Any
) -> None:
    data = write_corpora(tmp_path / "data")
    for name in ("headings", "drawings"):
        directories.put_directory(data / name, f"{store.uri}/corpora/{name}")
    config = config_of(data, store)  # type: ignore[arg-type]  # its ``uri`` is all that is asked for
    config.data = f"{store.uri}/corpora"
    result = finetune.finetune(config)
    assert result["mirror"] == f"{store.uri}/a"
    model = load_file(Path(result["model"]) / "shared.safetensors")
    shutil.rmtree(run_root)
    again = finetune.finetune(config)
    assert again["step"] == 12
    other = load_file(Path(again["model"]) / "shared.safetensors")
    assert all((other[name] == value).all() for name, value in model.items())
