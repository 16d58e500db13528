"""Random damage to everything that is read: it still works, or a named error says what is wrong.

A short lane by default; ``make fuzz`` is the long one. Runs that go on: ``test_fuzz_resume.py``.
"""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipelines.data.tokenizer.guarded_loader import check_pattern, parse_tokenizer
from pipelines.data.transforms.text import encode_texts
from pipelines.training.config.run import FinetuneConfig
from skillnet_platform import config
from tests.helpers.limited_child import run_limited
from tests.helpers.random_damage import PLACES, VALUES, WOUNDS, budget, damaged, named, replaced
from tests.helpers.stored_files import STORED, StoredFiles, read_trees, tokenizer_text, write_trees

pytestmark = pytest.mark.fuzz

#: What a round of ``make fuzz`` found, or its authors thought of.
KNOWN_DAMAGE = {"archives": [[("swap", 0.5, 4), ("swap", 0.5, 28)]]}
SLOW_PATTERN = {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": ""}
KNOWN_VALUES: dict[str, list[tuple[Any, list[int]]]] = {
    "configuration": [([], [10])],
    "corpus": [([], [28, 0, 1])],
    "tokenizer": [(SLOW_PATTERN, [4]), ({"type": "Sequence", "normalizers": []}, [4])],
    "served tasks": [("\ud83d", [8, 0, 2])],
}
DAMAGED = [name for name, each in STORED.items() if each.budget]


def write_whole(name: str, folder: Path) -> StoredFiles:
    """Write the whole files of a kind; return the kind."""
    folder.mkdir()
    STORED[name].write(folder)
    return STORED[name]


def read_altered(
    stored: StoredFiles,
    whole: Path,
    globs: tuple[str, ...],
    number: int,
    alter: Callable[[Path], object],
    sealed: bool,
) -> None:
    """Alter the file of a number in a fresh copy, and read the copy."""
    folder = whole.with_name("altered")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    files = stored.list_files(folder, globs)
    path = files[number % len(files)]
    alter(path)
    if sealed and stored.seal:
        stored.seal(folder, path)

    def read() -> None:
        for each in stored.reads:
            named(partial(each, folder, path))

    run_limited(read) if stored.is_limited else read()


@pytest.mark.parametrize("name", STORED)
def test_whole_files_are_read(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    stored = write_whole(name, folder)
    for path in stored.list_files(folder, stored.files):
        values = [read(folder, path) for read in stored.reads]
        assert stored.whole in (None, values[0])


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    stored = write_whole(name, tmp_path / "whole")

    @given(st.integers(0, 40), WOUNDS, st.booleans())
    @budget(*stored.budget)
    def try_damage(number: int, wounds: Any, sealed: bool) -> None:
        def alter(path: Path) -> None:
            path.write_bytes(damaged(path.read_bytes(), wounds))

        read_altered(stored, tmp_path / "whole", stored.files, number, alter, sealed)

    for known in KNOWN_DAMAGE.get(name, []):
        try_damage = example(0, known, True)(try_damage)
    try_damage()


@pytest.mark.parametrize("name", [name for name in DAMAGED if STORED[name].trees])
def test_any_value_anywhere(name: str, tmp_path: Path) -> None:
    stored = write_whole(name, tmp_path / "whole")

    @given(st.integers(0, 40), VALUES, PLACES)
    @budget(*stored.budget)
    def try_value(number: int, value: Any, place: list[int]) -> None:
        def alter(path: Path) -> None:
            trees = [replaced(tree, place, value) for tree in read_trees(path)]
            write_trees(path, trees)

        read_altered(stored, tmp_path / "whole", stored.trees, number, alter, True)

    for known in KNOWN_VALUES.get(name, []):
        try_value = example(0, *known)(try_value)
    try_value()


@given(st.sampled_from(sorted(config.flatten_tree(config.to_dict(FinetuneConfig())))), st.text())
@example("seed", "!!python/name:os.system")
@example("tasks", "{a: 1, a: 2}")
@budget(8)
def test_any_word_for_any_key(key: str, word: str) -> None:
    named(lambda: config.parse_config(FinetuneConfig, [f"--{key}={word}"], prog="x"))


@given(st.text(alphabet="ab()[]{}|*+?.,^\\12", max_size=12))
@example("(a*)*b")
@budget(6)
def test_accepted_patterns_end_in_time(pattern: str) -> None:
    tree = json.loads(tokenizer_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}}
    tree["pre_tokenizer"] = split | {"behavior": "Isolated", "invert": False}

    def split_text() -> None:
        check_pattern("pattern", pattern)
        encode_texts(parse_tokenizer(tree), ["a" * 40 + "!"], 64)

    run_limited(lambda: named(split_text))
