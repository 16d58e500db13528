"""YAML made to do harm: refused with the file's name, within the memory of its text."""

import tracemalloc
from pathlib import Path

import pytest

from skillnet_platform import config
from skillnet_platform.config import safe_yaml
from skillnet_platform.errors import UserError

BOMB = "a: &a [x, x]\n" + "".join(
    f"{here}: &{here} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, here in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{here}: &{here} {{{here}{before}: 1, <<: [{', '.join([f'*{before}'] * 9)}]}}\n"
    for before, here in zip("abcdefghi", "bcdefghij", strict=True)
)

HOSTILE = {
    "runs a command": ("a: !!python/object/apply:os.system ['touch mark']", "python/object/apply"),
    "makes an object": ("!!python/object:pathlib.Path {}", "could not determine a constructor"),
    "names a function": ("a: !!python/name:os.system", "could not determine a constructor"),
    "imports": ("a: !!python/module:os", "could not determine a constructor"),
    "has a tag of its own": ("a: !secret x", "could not determine a constructor"),
    "a bomb of aliases": (BOMB, "more than 50000 values"),
    "holds itself": ("a: &a [*a]", "holds itself|values"),
    "nested lists": ("a: " + "[" * 10_000, "nested deeper than 50"),
    "nested mappings": ("{a: " * 10_000, "nested deeper than 50"),
    "nested blocks": ("\n".join(" " * n + "a:" for n in range(60)), "nested deeper than 50"),
    "nested block lists": ("- " * 200_000 + "a", "nested deeper than 50"),
    "a key twice": ("lr: 1\nname: x\nlr: 2", "key 'lr' occurs twice.*line 3"),
    "a key twice below": ("model: {dim: 1, dim: 2}", "key 'dim' occurs twice"),
    "a key that is a number": ("parts: {1: {corpus: x}}", "key 1 is not text"),
    "a key that is a truth": ("on: 1", "key on is not text"),
    "a key that is a list": ("? [a, b]\n: 1", "is not text"),
    "far too long": ("a: " + "x" * 600_000, "600003 characters, more than"),
    "a number of too many digits": ("a: " + "1" * 5000, "digits"),
    "a day that is none": ("a: 2026-13-45", "month"),
    "two documents": ("a: 1\n---\nb: 2", "expected a single document"),
    "no text": ("\x00", "special characters"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_by_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, words = HOSTILE[name]
    path = tmp_path / "hostile.yaml"
    path.write_text(text)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=rf"(?s)hostile\.yaml: not valid YAML: .*({words})"):
            config.load_yaml(path)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()
    assert not (tmp_path / "mark").exists()


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(UserError, match=r"x\.yaml: not valid YAML"):
        config.load_yaml(tmp_path / "x.yaml")


def test_merges_of_merges_hold_each_key_once() -> None:
    """Some versions of PyYAML write out all repetitions: those are refused."""
    try:
        loaded = safe_yaml.load_plain_yaml(MERGES)
    except ValueError as error:
        assert "merged" in str(error)  # noqa: PT017 - either is right
    else:
        assert len(loaded["j"]) == 10


@pytest.mark.parametrize("has_libyaml", [True, False])
def test_aliases_and_merges_of_honest_files_work(
    has_libyaml: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_libyaml:
        monkeypatch.setattr(safe_yaml, "_FastLoader", safe_yaml._Loader)
    text = "base: &base {a: 1, b: [1, 2]}\nother: {<<: *base, a: 2}\nagain: *base\n"
    loaded = safe_yaml.load_plain_yaml(text)
    assert loaded["other"] == {"a": 2, "b": [1, 2]}
    assert loaded["again"] == loaded["base"]
    # libyaml alone takes the second for an error.
    assert safe_yaml.load_plain_yaml("{a: [1e-4], b: 1_0}") == {"a": [1e-4], "b": 10}
    assert safe_yaml.load_plain_yaml("{a:[1,{b:[2]}]}") == {"a": [1, {"b": [2]}]}


def test_values_of_the_command_line_are_read_alike() -> None:
    from pipelines.training.config.run import FinetuneConfig

    for key, value in (
        ("--seed", "!!python/object/apply:os.system ['x']"),
        ("--tasks", "[" * 1000),
        ("--tasks", "{a: 1, a: 2}"),
        ("--seed", "2026-13-45"),
    ):
        with pytest.raises(UserError, match=f"command line: {key}: cannot read"):
            config.parse_config(FinetuneConfig, [key, value], prog="x")
