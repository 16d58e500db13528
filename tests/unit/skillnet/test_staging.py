"""The saving of a model is killed at each of its file-system events."""

import os
from functools import partial
from pathlib import Path

import pytest

from skillnet.model import SkillNet
from skillnet.serialization import check_file, read_manifest
from skillnet_files import commit
from skillnet_files.commit import make_scratch_directory
from skillnet_platform import storage
from tests.helpers.killed_children import EventCounter, run_killed
from tests.helpers.small_models import small_model


def save(model: SkillNet, path: Path, counter: EventCounter) -> None:
    model.save_pretrained(path)


def digests_of(folder: Path) -> dict[str, str] | None:
    """Return the digests of a complete model; None if none is in place."""
    if not folder.exists():
        return None
    manifest = read_manifest(folder)
    for name in manifest["files"]:
        check_file(folder, name, manifest)
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


@pytest.mark.parametrize("replaces", [True, False], ids=["replaces", "is first"])
def test_saving_killed_at_any_event_loses_no_model_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaces: bool
) -> None:
    # The harder way, as on NFS; test_corpus_commit.py has both.
    monkeypatch.setattr(commit, "exchange_paths", lambda one, other: False)
    # A process that dies leaves its writes to the kernel, so the disk need not be waited for.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    old_model, new_model = small_model(), small_model(seed=1)
    expected = {}
    for name, model in (("old", old_model), ("new", new_model)):
        model.save_pretrained(tmp_path / name)
        expected[name] = digests_of(tmp_path / name)
    number, is_killed, was_restored = 0, True, False
    while is_killed:
        number += 1
        path = tmp_path / str(number) / "model[1]"
        path.parent.mkdir()
        if replaces:
            old_model.save_pretrained(path)
        is_killed = run_killed(partial(save, new_model, path), number)
        found = digests_of(path)
        assert found in (None, expected["new"], *([expected["old"]] if replaces else []))
        # Files of a run lie beside its model: their writer must not take it for a leftover.
        storage.write_json(path.parent / "run.json", {})
        with pytest.raises(RuntimeError), make_scratch_directory(path):
            raise RuntimeError
        if replaces and found is None:
            assert digests_of(path) == expected["old"], f"event {number}: the model is lost"
            was_restored = True
        new_model.save_pretrained(path)
        assert digests_of(path) == expected["new"]
        assert sorted(each.name for each in path.parent.iterdir()) == ["model[1]", "run.json"]
    assert number > 5
    assert was_restored == replaces


def test_a_second_writer_leaves_the_directory_of_the_first_alone(tmp_path: Path) -> None:
    with make_scratch_directory(tmp_path / "model") as first:
        (first / "part").write_text("half")
        small_model().save_pretrained(tmp_path / "model")
        assert (first / "part").read_text() == "half"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
