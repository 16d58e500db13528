"""Checks of ``skillnet verify`` that need no registry."""

import json
from pathlib import Path

import pytest
import torch

from pipelines import verify
from pipelines.data.corpora import open_external_corpus
from skillnet.model import SkillNet
from skillnet.model_merging import remove_task
from skillnet_platform.errors import UserError
from tests.helpers import user_corpora
from tests.helpers.prepared_corpora import write_empty_corpus
from tests.helpers.small_models import small_model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the folder of a run whose only task is on a corpus of the user."""
    folder = tmp_path / "run"
    small_model().save_pretrained(folder / "model")
    tasks = {"text_to_image": {"corpus": "mine"}}
    (folder / "config.yaml").write_text(json.dumps({"tasks": tasks}), encoding="utf-8")
    given = user_corpora.media_folder(tmp_path / "given")
    write_empty_corpus(tmp_path / "data", open_external_corpus("mine", f"folder:{given}"))
    return folder


def states(run: Path, **options: object) -> dict[str, str]:
    config = verify.VerifyConfig(str(run), str(run.parent / "data"), **options)
    return {check.subject: check.state for check in verify.verify(config)}


def test_a_registered_model_with_fewer_tasks_equals_that_of_its_run(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "run")
    fewer = remove_task(SkillNet.from_pretrained(tmp_path / "run"), "text_to_code")
    fewer.save_pretrained(tmp_path / "registered")
    assert "equal" in verify.compare_with_run(tmp_path / "registered", tmp_path / "run")
    with torch.no_grad():
        next(fewer.heads.parameters()).mul_(2)
    fewer.save_pretrained(tmp_path / "registered")
    with pytest.raises(UserError, match=r"head-\w+.safetensors of the run was altered"):
        verify.compare_with_run(tmp_path / "registered", tmp_path / "run")


def test_another_configuration_than_that_of_the_run_is_named(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "run")
    small_model().save_pretrained(tmp_path / "registered")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["max_tokens"] += 1
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"max_tokens of the run was altered"):
        verify.compare_with_run(tmp_path / "registered", tmp_path / "run")


def test_files_of_a_user_are_not_looked_for_among_the_downloads(run: Path) -> None:
    assert states(run) == {"weights": "ok", "corpus mine": "ok", "files of mine": "absent"}


def test_files_of_a_user_are_compared_where_they_are(run: Path) -> None:
    given = run.parent / "given"
    corpus = {"mine": f"folder:{given}"}
    found = states(run, corpus=corpus)
    assert set(found.values()) == {"ok"}
    (named,) = [subject for subject in found if subject.startswith("mine: metadata")]
    (given / "new.jpg").write_bytes(b"other")
    metadata = next(given.glob("metadata*"))
    metadata.write_bytes(metadata.read_bytes() + b"\n")
    found = states(run, corpus=corpus)
    altered = [subject for subject, state in found.items() if state == "altered"]
    assert named in altered
    assert sum(" files, " in subject for subject in altered) == 2, "the old and the new listing"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corpus": {"mini": "folder:."}}, "corpus.mini: no such corpus; did you mean 'mine'"),
        ({"options": {"mine": {}}}, "options.mine: no such corpus"),
        ({"max_seconds": 4.0}, "max_seconds is 4.0, and was"),
    ],
)
def test_other_corpora_and_options_are_rejected(run: Path, options: dict, message: str) -> None:
    if "max_seconds" in options:
        given = {"mine": f"folder:{run.parent / 'given'}"}
        options = {"corpus": given, "options": {"mine": options}}
    with pytest.raises(UserError, match=message):
        states(run, **options)
