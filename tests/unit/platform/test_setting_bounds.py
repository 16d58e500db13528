"""Every number of every configuration has bounds, which are checked in one place."""

import typing
from collections.abc import Iterator
from dataclasses import make_dataclass
from typing import Annotated, Any

import pytest
from annotated_types import Interval

from pipelines.data import corpora
from pipelines.data.corpora.readers.base import ExternalCorpus
from skillnet import systems
from skillnet_platform import config
from skillnet_platform.cli import CliCommand, find_commands
from skillnet_platform.config.schema import bounds_of, child_types
from skillnet_platform.errors import UserError

HOSTILE = ("nan", "inf", "-inf", "1e300", "-1e300", str(10**30), str(-(10**30)))


def _commands() -> dict[str, Any]:
    loaded = {name: each.load() for name, each in find_commands().items()}
    return {name: each for name, each in loaded.items() if isinstance(each, CliCommand)}


COMMANDS = _commands()
READERS = {name: corpora._find_class(name) for name in sorted(corpora.list_formats())}


def _numbers(hint: Any, key: str) -> Iterator[tuple[str, Any, dict[str, float]]]:
    """Yield (key, int or float, bounds) of every number below a type."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is Annotated:
        if args[0] in (int, float):
            yield key, args[0], bounds_of(args[1:])
        else:
            yield from _numbers(args[0], key)
    elif hint in (int, float):
        yield key, hint, {}
    elif child_types(hint) is not None and not args:
        hints = typing.get_type_hints(hint, include_extras=True)
        for name in child_types(hint) or {}:
            yield from _numbers(hints[name], f"{key}.{name}" if key else name)
    elif typing.get_origin(hint) is dict:
        yield from _numbers(args[1], f"{key}.NAME")
    elif typing.get_origin(hint) is not typing.Literal:
        for arg in args:
            yield from _numbers(arg, key)


def _all_numbers() -> list[tuple[str, str, Any, dict[str, float]]]:
    owners = {name: each.config_class for name, each in COMMANDS.items()}
    owners |= {f"reader {name}": each.Options for name, each in READERS.items()}
    owners |= {
        f"system {name}": systems.find_system(name).model.options_class for name in systems.BUILT_IN
    }
    return [(name, *each) for name, cls in sorted(owners.items()) for each in _numbers(cls, "")]


NUMBERS = _all_numbers()


def test_every_number_has_a_lower_and_an_upper_bound() -> None:
    unbounded = [
        f"{owner}: {key}"
        for owner, key, _, bounds in NUMBERS
        if not ({"ge", "gt"} & bounds.keys() and {"le", "lt"} & bounds.keys())
    ]
    assert not unbounded
    assert len({key for _, key, _, _ in NUMBERS}) > 150


def test_readers_and_systems_are_among_them() -> None:
    assert all(issubclass(each, ExternalCorpus) for each in READERS.values())
    owners = {owner for owner, _, _, _ in NUMBERS}
    assert {"reader folder", "system moe", "sweep", "compare", "tracker"} <= owners


@pytest.mark.parametrize("text", HOSTILE)
def test_absurd_numbers_are_rejected(text: str) -> None:
    """The builder meets each type of a number, with its bounds, as the type of one field."""
    types = {(kind, tuple(sorted(bounds.items()))) for _, _, kind, bounds in NUMBERS}
    accepted = []
    for kind, bounds in types:
        One = make_dataclass("One", [("x", Annotated[kind, Interval(**dict(bounds))])])
        value = kind(text) if kind is float else int(text) if text.isdigit() else float(text)
        try:
            config.build_config(One, {"x": value})
        except UserError as error:
            assert "x: expected a" in str(error)  # noqa: PT017 - the other case is the failure
        else:
            accepted.append((kind, bounds))
    assert not accepted


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.lr", "0", "training.lr: expected a number above 0 and at most 10, got 0"),
        ("training.lr", ".nan", "training.lr: expected a number above 0 .* got nan"),
        ("training.steps", "0", "training.steps: expected a whole number from 1 to 1000000000"),
        ("model.tubelet", "[2, 0, 8]", "model.tubelet: expected a list of 3: a whole number from"),
        ("tasks.text_to_code.weight", "-1", r"tasks\.text_to_code\.weight: .* above 0 .* or null"),
    ],
)
def test_a_message_has_key_range_and_value(key: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=f"command line: {message}"):
        COMMANDS["finetune"].parse_arguments([f"--{key}", value])
