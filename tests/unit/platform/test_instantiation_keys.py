"""A configuration creates no object by name, from any source."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.data.corpora import open_external_corpus
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.ray_train.fit import run_ray_worker
from pipelines.training.loop.resolved_run import resolve_run
from pipelines.training.loop.run import find_finished_result
from pipelines.training.runs.mirror import RunMirror
from skillnet import systems
from skillnet.serialization import write_manifest, write_parts
from skillnet_platform import config
from skillnet_platform.cli import CliCommand, find_commands
from skillnet_platform.config.schema import child_types
from skillnet_platform.errors import UserError
from skillnet_studies.config.study import StudyConfig
from skillnet_studies.study.system_runs import override_run
from sweeps.trials.trial import TRIAL, read_trial
from tests.helpers.small_models import small_model

REJECTED = r"(?s)class_path.*(creates|unknown key)|is no option"


def _loaded(name: str) -> CliCommand[Any]:
    command: CliCommand[Any] = find_commands()[name].load()
    return command


def _free_keys(cls: Any, prefix: str = "") -> list[str]:
    """Return the keys of a configuration that take any value."""
    found = []
    for name, hint in (child_types(cls) or {}).items():
        key = prefix + name.replace("*", "x")
        found += [key] if hint is Any else _free_keys(hint, f"{key}.")
    return found


COMMANDS = sorted(find_commands())
FREE = [
    (name, key)
    for name in COMMANDS
    if isinstance(_loaded(name), CliCommand)
    for key in _free_keys(_loaded(name).config_class)
]


@pytest.fixture
def payload(tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """Return a mapping that jsonargparse would turn into a process, and the file it writes."""
    mark = tmp_path / "mark"
    arguments = {"args": f"id > {mark}", "shell": True}
    return {"class_path": "subprocess.Popen", "init_args": arguments}, mark


def _below(key: str, value: Any) -> dict[str, Any]:
    tree = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return tree  # type: ignore[no-any-return]


def test_five_commands_have_free_keys() -> None:
    names = {name for name, _ in FREE}
    assert names >= {"finetune", "pretrain", "quickstart", "prepare", "sweep", "compare"}


@pytest.mark.parametrize(("name", "key"), FREE)
def test_a_file_runs_nothing(
    name: str, key: str, payload: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    tree, mark = payload
    file = tmp_path / "hostile.yaml"
    file.write_text(yaml.safe_dump(_below(key, tree)))
    with pytest.raises(UserError, match=rf"hostile\.yaml: {key}\.class_path: .*creates"):
        _loaded(name).parse_arguments(["--config", str(file)])
    assert not mark.exists()


@pytest.mark.parametrize(("name", "key"), FREE)
def test_an_override_runs_nothing(
    name: str, key: str, payload: tuple[dict[str, Any], Path]
) -> None:
    tree, mark = payload
    for words in (
        [f"--{key}", json.dumps(tree)],
        [f"--{key}.class_path", "subprocess.Popen"],
        [f"--{key.rpartition('.')[0]}", json.dumps({key.rpartition(".")[2]: tree})],
    ):
        with pytest.raises(UserError, match=REJECTED):
            _loaded(name).parse_arguments(words)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["class_path", "init_args", "dict_kwargs", "__path__", "_target_"])
@pytest.mark.parametrize("where", ["", "model.", "options.", "tasks.", "model.tasks.x.towers."])
def test_each_key_is_rejected_at_any_depth(name: str, where: str) -> None:
    from skillnet_platform.config.schema import INSTANTIATION_KEYS

    assert name in INSTANTIATION_KEYS
    with pytest.raises(UserError, match=name):
        config.build_config(FinetuneConfig, _below(where + name, "os.system"))


def test_lists_are_searched(payload: tuple[dict[str, Any], Path]) -> None:
    tree, mark = payload
    space = {"training.lr": {"choice": [1, [tree]]}}
    with pytest.raises(UserError, match=r"space\.training\.lr\.choice\[1\]\[0\]\.class_path"):
        _loaded("sweep").parse_arguments(["--space", json.dumps(space)])
    assert not mark.exists()


def _resume_by_name(tree: dict[str, Any], root: Path) -> None:
    own = FinetuneConfig(name="mine", run_dir=str(root), init_from=None)
    (root / "mine").mkdir()
    (root / "mine" / "config.yaml").write_text(yaml.safe_dump(tree))
    find_finished_result(resolve_run(own))


def _restore_from_a_store(tree: dict[str, Any], root: Path) -> None:
    stored = root / "config.yaml"
    stored.write_text(yaml.safe_dump(tree))
    mirror = RunMirror((root / "store").as_uri(), root / "mine")
    mirror.relocate_config(FinetuneConfig(), stored)


def _start_a_worker(tree: dict[str, Any], root: Path) -> None:
    run_ray_worker({"config": tree})


def _read_a_trial(tree: dict[str, Any], root: Path) -> None:
    record = {"name": "x", "config": tree, "splits": None, "group": "x", "settings": {}}
    (root / TRIAL).write_text(json.dumps(record | {"brief": "", "score": None}))
    read_trial(root)


def _set_by_a_study(tree: dict[str, Any], root: Path) -> None:
    override_run(FinetuneConfig(), {"options.x": tree["options"]["x"]}, "systems.a.set")


def _options_of_a_corpus(tree: dict[str, Any], root: Path) -> None:
    open_external_corpus("mine", f"folder:{root}", {"size": tree["options"]["x"]})


@pytest.mark.parametrize(
    "read",
    [
        _resume_by_name,
        _restore_from_a_store,
        _start_a_worker,
        _read_a_trial,
        _set_by_a_study,
        _options_of_a_corpus,
    ],
)
def test_a_stored_configuration_runs_nothing(
    read: Callable[[dict[str, Any], Path], None],
    payload: tuple[dict[str, Any], Path],
    tmp_path: Path,
) -> None:
    hostile, mark = payload
    tree = config.to_dict(FinetuneConfig()) | {"options": {"x": hostile}}
    with pytest.raises(UserError, match=REJECTED):
        read(tree, tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("system", ["skillnet", "moe", "specialist"])
def test_a_registered_model_runs_nothing(
    system: str, payload: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """A version of the registry and a run's model are folders of this format."""
    hostile, mark = payload
    model = small_model()
    files = write_parts(model, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    for options in ({"x": hostile}, hostile, {"shapes": {"text": hostile}}, {"top_k": hostile}):
        (tmp_path / "config.json").write_text(
            json.dumps(stored | {"system": system, "options": options})
        )
        write_manifest(tmp_path, files)
        with pytest.raises(ValueError, match=r"config\.json"):
            systems.load_model(tmp_path)
    assert not mark.exists()


def test_a_study_of_systems_runs_nothing(payload: tuple[dict[str, Any], Path]) -> None:
    hostile, mark = payload
    study = {"a": {"system": "skillnet", "options": {"x": hostile}, "set": {"y": hostile}}}
    with pytest.raises(UserError, match=r"systems\.a\.options\.x\.class_path"):
        config.build_config(StudyConfig, {"systems": study})
    assert not mark.exists()


def test_free_values_stay_as_they_are_written() -> None:
    free = {"a": "5", "b": [1, {"c": None}], "d": 1.5, "e": "true"}
    assert config.build_config(FinetuneConfig, {"options": free}).options == free
    file = {"options": {"day": yaml.safe_load("2026-01-02")}}
    with pytest.raises(UserError, match=r"options\.day: expected plain values, got .*date"):
        config.build_config(FinetuneConfig, file)
