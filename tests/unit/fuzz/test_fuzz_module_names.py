"""A value that names a module imports nothing, for any key of any command and in stored files.

``test_instantiation_keys.py`` tries keys. The other tests of this lane try such names at random
places of stored files.
"""

import os
import sys
import tempfile
import typing
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from skillnet_platform import config
from skillnet_platform.cli import CliCommand, find_commands
from skillnet_platform.config.schema import child_types
from tests.helpers.limited_child import run_limited
from tests.helpers.module_names import NAMES, VALUES
from tests.helpers.random_damage import budget, named
from tests.helpers.stored_files import STORED, read_trees, write_trees

pytestmark = pytest.mark.fuzz

COMMANDS: dict[str, CliCommand[Any]] = {
    name: entry.load() for name, entry in sorted(find_commands().items())
}
#: A command that is about to leave this process has used its configuration.
STARTS = ("subprocess.Popen", "os.exec", "os.fork", "os.posix_spawn", "os.system")
CONNECTS = ("socket.bind", "socket.connect", "socket.getaddrinfo")


class LeavingProcessError(BaseException):
    """A command starts a program or opens a connection."""


def text_keys(cls: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys that take a text, a list of texts, or any value."""
    found = []
    for name, hint in (child_types(cls) or {}).items():
        key = prefix + name.replace("*", "a")
        below = text_keys(hint, f"{key}.")
        is_text = str in (hint, *typing.get_args(hint)) or hint in (Any, list[str])
        found += below or ([key] if is_text or "str" in str(hint) else [])
    return found


KEYS = [(name, key) for name, each in COMMANDS.items() for key in text_keys(each.config_class)]


def _tree(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _stop(event: str, arguments: Any) -> None:
    if event in STARTS + CONNECTS:
        raise LeavingProcessError(event)


def run_without_leaving(name: str, tree: dict[str, Any], words: list[str]) -> None:
    """Run a command in an empty directory until it would start a program or connect."""
    sys.addaudithook(_stop)  # cannot be removed, so this function runs in a child only
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["SKILLNET_HOME"] = folder
        path = Path(folder) / "hostile.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        try:
            assert COMMANDS[name](["--config", str(path), *words]) in (0, 2)
        except LeavingProcessError:
            return


@pytest.fixture(scope="module", autouse=True)
def _loaded_libraries() -> None:
    """Load what most commands load, so that each child need not."""
    for name in (
        "torch",
        "ray.data",
        "mlflow",
        "pipelines.training.loop.run",
        "skillnet_studies.study",
    ):
        import_module(name)


def test_every_command_has_text_keys() -> None:
    assert len(KEYS) > 250
    assert {name for name, _ in KEYS} == set(COMMANDS)
    assert {("prepare", "corpora"), ("prepare", "corpus.a"), ("finetune", "options.a")} < set(KEYS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_value_of_any_text_key_imports_nothing_when_it_is_read(name: str) -> None:
    """What a command asks of a cluster is part of reading."""
    cls = COMMANDS[name].config_class

    def read(key: str, value: Any) -> None:
        tree = _tree(key, value)
        built = config.build_config(cls, config.merge_trees(config.default_values(cls), tree))
        if COMMANDS[name].resources is not None:
            COMMANDS[name].resources(built)

    # The keys of a study's pretraining are those of its runs.
    keys = [key for each, key in KEYS if each == name and not key.startswith("pretraining.")]
    for key in keys:
        for value in (NAMES[0], NAMES[3], [NAMES[0]]):
            named(partial(read, key, value))


@given(st.sampled_from(KEYS), st.sampled_from(VALUES))
@example(("prepare", "corpora"), list(NAMES))
@example(("prepare", "corpus.a"), NAMES[3])
@example(("fetch", "corpora"), [NAMES[0]])
@example(("verify", "corpus.a"), NAMES[3])
@example(("inspect", "path"), NAMES[3])
@example(("finetune", "system"), NAMES[0])
@budget(5)
def test_a_value_of_any_text_key_imports_nothing_when_it_is_used(
    at: tuple[str, str], value: Any
) -> None:
    name, key = at
    run_limited(lambda: run_without_leaving(name, _tree(key, value), []))


@given(st.sampled_from(sorted(COMMANDS)), st.sampled_from(NAMES))
@example("prepare", NAMES[0])
@example("fetch", NAMES[0])
@budget(3)
def test_a_word_of_the_command_line_imports_nothing(name: str, word: str) -> None:
    run_limited(lambda: run_without_leaving(name, {}, [word]))


# -- stored files ----------------------------------


def _trees_with_names(tree: Any) -> Iterator[Any]:
    """Yield a copy of a tree for each of its texts, which is replaced by a name of the module."""
    if isinstance(tree, str):
        yield from (NAMES[0], NAMES[1])
    if isinstance(tree, (dict, list)):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            for below in _trees_with_names(tree[key]):
                copy: Any = tree.copy()
                copy[key] = below
                yield copy


@pytest.mark.parametrize("name", [name for name, each in STORED.items() if each.trees])
def test_a_stored_file_imports_nothing(name: str, tmp_path: Path) -> None:
    """Each text of a file that a command wrote earlier becomes a name of the module."""
    stored = STORED[name]
    folder = tmp_path / "mine"
    folder.mkdir()
    stored.write(folder)
    altered = 0
    for path in stored.list_files(folder, stored.trees):
        whole = read_trees(path)
        for trees in _trees_with_names(whole):
            altered += 1
            write_trees(path, trees)
            if stored.seal:
                stored.seal(folder, path)
            for read in stored.reads:
                named(partial(read, folder, path))
        write_trees(path, whole)
    assert altered
