"""Saved models: one file per skill, atomic writes, rejection of damaged files.

The saving of a model is killed at each of its file-system events.
"""

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from skillnet import serialization
from skillnet.config import SkillNetConfig
from skillnet.modality import modality_names
from skillnet.model import SkillNet
from skillnet.serialization import check_file, config_from_dict, config_to_dict, read_manifest
from skillnet.skills import DEFAULT_SKILLS, SkillPlan, Task
from skillnet_files import commit
from skillnet_files.commit import make_scratch_directory
from skillnet_platform import storage
from tests.helpers.killed_children import EventCounter, run_killed
from tests.helpers.small_models import small_config, small_model, towers_of

TASKS = tuple(small_config().tasks)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small_model(torch.float32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_model_comes_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small_model(dtype, skill_every=2, skill_modules="feedforward")
    model.save_pretrained(tmp_path / "model")
    back = SkillNet.from_pretrained(tmp_path / "model")
    assert back.config == model.config
    assert not back.training
    theirs = dict(back.named_parameters())
    for name, parameter in model.named_parameters():
        assert theirs[name].dtype == dtype
        assert torch.equal(parameter, theirs[name]), name


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        small_model().save_pretrained(tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_a_skills_file_holds_that_skill_only(saved: Path) -> None:
    tensors = load_file(saved / "skill-image.safetensors")
    assert tensors
    assert all(name.endswith(".weights.image") for name in tensors)
    assert {path.name for path in saved.glob("skill-*")} == {
        f"skill-{name}.safetensors" for name in DEFAULT_SKILLS
    }


# -- loading for one task ----------------------------------


@contextmanager
def read_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Names of the files whose bytes are hashed or loaded in a block."""
    names: set[str] = set()

    def record(read: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(path: Path, *args: Any, **kwargs: Any) -> Any:
            names.add(Path(path).name)
            return read(path, *args, **kwargs)

        return recorded

    with monkeypatch.context() as patch:
        for module, name in ((safetensors.torch, "load_file"), (serialization, "hash_file")):
            patch.setattr(module, name, record(getattr(module, name)))
        yield names


@pytest.mark.parametrize("task", TASKS)
def test_loading_for_a_task_reads_the_weights_of_its_files_only(
    saved: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = SkillNet.from_pretrained(saved)
    wanted = {f"{name}.safetensors" for name in whole.files_of(task)}
    with read_files(monkeypatch) as names:
        part = SkillNet.from_pretrained(saved, task=task)
    assert names == wanted | {"config.json"}

    for path in saved.glob("*.safetensors"):
        if path.name not in wanted:
            path.unlink()  # the proof that they are not read, by Python or by anyone
    part = SkillNet.from_pretrained(saved, task=task)
    towers = towers_of(task, whole.config)
    for batch in towers.values():
        if "log_mel" in batch:
            batch["log_mel"] = batch["log_mel"].float()
    with torch.no_grad():
        ours, theirs = part(task, towers), whole.eval()(task, towers)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (part, whole)]
    assert sizes[0] < 0.75 * sizes[1]
    assert set(part.config.skills) == set(whole.config.tasks[task].skills)


def test_a_part_can_be_saved_again(saved: Path, tmp_path: Path) -> None:
    SkillNet.from_pretrained(saved, task="text_to_image").save_pretrained(tmp_path / "part")
    again = SkillNet.from_pretrained(tmp_path / "part")
    assert list(again.config.tasks) == ["text_to_image"]
    for path in (tmp_path / "part").glob("*.safetensors"):
        assert path.read_bytes() == (saved / path.name).read_bytes()


def test_loading_for_an_unknown_task_names_the_nearest(saved: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'text_to_image'"):
        SkillNet.from_pretrained(saved, task="text_to_imag")


# -- what is wrong is named ----------------------------------


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("damage", [_flip, _cut, Path.unlink], ids=["flip", "cut", "remove"])
@pytest.mark.parametrize("file", ["config.json", "shared.safetensors", "skill-text.safetensors"])
def test_an_altered_file_is_refused_by_name(saved: Path, file: str, damage) -> None:
    damage(saved / file)
    with pytest.raises(ValueError, match=file.replace(".", r"\.")):
        SkillNet.from_pretrained(saved)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"files": 3}', '{"format": 1, "files": {"config.json": {}}}']
)
def test_a_damaged_manifest_is_refused_by_name(saved: Path, text: str) -> None:
    (saved / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        SkillNet.from_pretrained(saved)


def test_a_manifest_of_another_version_is_refused(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(ValueError, match="format 99, expected 3"):
        SkillNet.from_pretrained(saved)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        SkillNet.from_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        SkillNet.from_pretrained(tmp_path)


def test_unknown_configuration_keys_are_named() -> None:
    with pytest.raises(ValueError, match="unknown model configuration keys: width"):
        config_from_dict({**config_to_dict(small_config()), "width": 3})


# -- whole or not at all ----------------------------------


def test_a_disk_that_fills_up_leaves_the_older_model(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    written = []
    save_file = safetensors.torch.save_file

    def full(tensors, path) -> None:
        written.append(path)
        if len(written) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        small_model(seed=1).save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_a_new_model_that_cannot_take_its_place_leaves_the_older_one(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (saved / "manifest.json").read_bytes()
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".sn-" in self.name and ".old." not in self.name and target == saved:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    # As on file systems without an exchange of names.
    monkeypatch.setattr(commit, "exchange_paths", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        small_model(seed=1).save_pretrained(saved)
    assert (saved / "manifest.json").read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_other_peoples_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("thesis", "file"):
        with pytest.raises(ValueError, match="is not a saved model; choose another folder"):
            small_model().save_pretrained(tmp_path / name)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


# -- configurations ----------------------------------


@st.composite
def configs(draw: st.DrawFn) -> SkillNetConfig:
    skills = tuple(draw(st.lists(st.sampled_from(DEFAULT_SKILLS), min_size=1, unique=True)))
    plan = st.builds(
        SkillPlan,
        st.lists(st.sampled_from(skills), min_size=1, unique=True).map(tuple),
        st.sampled_from(modality_names()),
    )
    one = st.builds(
        Task,
        st.sampled_from(("classification", "ctc")),
        plan.map(lambda p: {"input": p}),
        st.integers(1, 9),
    )
    two = st.builds(
        Task,
        st.just("retrieval"),
        st.tuples(plan, plan).map(lambda p: {"query": p[0], "candidate": p[1]}),
    )
    names = st.sampled_from(("first", "second", "标题"))
    return small_config(
        skills=skills,
        tasks=draw(st.dictionaries(names, one | two, min_size=1)),
        skill_modules=draw(st.sampled_from(("both", "attention", "feedforward"))),
        skill_every=draw(st.integers(1, 3)),
        bigram_buckets=draw(st.sampled_from((0, 5))),
    )


@given(configs())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_configuration_survives_files(tmp_path_factory, config: SkillNetConfig) -> None:
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    folder = tmp_path_factory.mktemp("model")
    model = SkillNet(config)
    model.save_pretrained(folder)
    for task in config.tasks:
        part = SkillNet.from_pretrained(folder, task=task)
        whole = dict(model.named_parameters())
        assert all(torch.equal(p, whole[name]) for name, p in part.named_parameters())


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
    # Each file more is more events.
    parts: dict[str, Any] = {"tasks": {TASKS[0]: small_config().tasks[TASKS[0]]}, "num_layers": 1}
    parts["skills"] = ("general", "text")
    old_model, new_model = small_model(**parts), small_model(seed=1, **parts)
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
