"""Options of every command: one snapshot of the schema, and one table of wrong inputs.

``python -m tests.unit.platform.test_command_options`` writes the snapshot after an intended change.
"""

import dataclasses
import json
import re
import typing
from collections.abc import Iterator
from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from annotated_types import Interval

from pipelines.data import corpora
from pipelines.data.corpora.readers.base import ExternalCorpus
from pipelines.training.config.run import TrainingConfig
from skillnet import systems
from skillnet_platform import config
from skillnet_platform.cli import CliCommand, find_commands
from skillnet_platform.config.fields import COMMAND
from skillnet_platform.config.schema import (
    FIXED,
    bounds_of,
    child_types,
    describe_type,
    field_types,
    without_none,
)
from skillnet_platform.errors import UserError

SNAPSHOT = Path(__file__).parents[2] / "golden" / "options.txt"
HOSTILE = ("nan", "inf", "-inf", "1e300", "-1e300", str(10**30), str(-(10**30)))


def _commands() -> dict[str, Any]:
    loaded = {name: each.load() for name, each in find_commands().items()}
    return {name: each for name, each in loaded.items() if isinstance(each, CliCommand)}


COMMANDS = _commands()
READERS = {name: corpora._find_class(name) for name in sorted(corpora.list_formats())}


# -- snapshot ----------------------------------------------------------------------


def describe_options(cls: Any, prefix: str = "") -> Iterator[str]:
    """Yield a line per option below a type: key, type with bounds, default."""
    cls = without_none(cls)
    if "*" in (child_types(cls) or {}):
        below = typing.get_args(cls)[1]
        if child_types(below) is None:
            yield f"{prefix}.NAME: {describe_type(below)}"
        else:
            yield from describe_options(below, f"{prefix}.NAME")
        return
    for each in dataclasses.fields(cls):
        hint = field_types(cls, with_bounds=True)[each.name]
        key = f"{prefix}.{each.name}".removeprefix(".")
        if COMMAND in each.metadata:
            yield f"{key}.KEY: as skillnet {each.metadata[COMMAND]}"
        elif child_types(hint) is not None:
            mark = " (files only)" if FIXED in each.metadata else ""
            yield from (f"{line}{mark}" for line in describe_options(hint, key))
        else:
            value = config.default_values(cls).get(each.name, "required")
            mark = " (files only)" if FIXED in each.metadata else ""
            yield f"{key}: {describe_type(hint)}; {json.dumps(value, ensure_ascii=False)}{mark}"


def take_snapshot() -> str:
    """Return the options of all commands; equal ones of ``finetune`` are left out elsewhere."""
    common = set(describe_options(COMMANDS["finetune"].config_class))
    lines = []
    for name, command in sorted(COMMANDS.items()):
        own = list(describe_options(command.config_class))
        shown = own if name == "finetune" else [line for line in own if line not in common]
        shared = len(own) - len(shown)
        lines += [f"[{name}]", *shown, *([f"and {shared} of finetune"] if shared else []), ""]
    return "\n".join(lines)


def test_options_are_those_of_the_snapshot() -> None:
    assert take_snapshot() == SNAPSHOT.read_text(encoding="utf-8")


# -- wrong inputs ------------------------------------------------------------------

#: Command and words -> part of the message.
WRONG: list[tuple[str, str]] = [
    # keys
    ("finetune --model.dmi 3", "unknown key 'model.dmi'; did you mean 'model.dim'?"),
    ("finetune --dim 3", "did you mean 'model.dim'"),
    ("finetune --tasks.text_to_code.batch 4", "did you mean 'tasks.text_to_code.batch_size'"),
    ("finetune --seed.x 1", "'seed.x'"),
    ("finetune --tasks 3", "tasks: expected keys and values, got 3"),
    ("finetune --seed", "--seed needs a value"),
    ("finetune one", "cannot use 'one'; options start with --"),
    ("finetune --config absent.yaml", "absent.yaml: neither a file nor a preset"),
    ("finetune --tasks.mine.batch_size 3", "tasks.mine.corpus is missing"),
    ("finetune --model.n_mels 3", "--model.n_mels is no option. A file sets it: --config FILE"),
    ("finetune --model.reference_tasks.a.outputs 3", "is no option"),
    ("finetune --tasks.text_to_code.eval_only true", "is no option"),
    ("grow --training.tasks_per_step 2", "is no option. A file sets it: --config FILE"),
    ('compare --claims.stated.a {"text":"x","parts":[{"sytem":"a"}]}',
     "'claims.stated.a.parts[0].sytem'; did you mean 'claims.stated.a.parts[0].system'"),
    ('compare --claims.stated.a {"text":"x","parts":[{"system":"a"}]}',
     "claims.stated.a.parts[0].against is missing"),
    # types
    ("finetune --model.dim a", "model.dim: expected a whole number from 1 to 16777216, got 'a'"),
    ("finetune --model.dim 2.5", "model.dim: expected a whole number from 1 to 16777216, got 2.5"),
    ("finetune --training.precision fp7", "training.precision: expected one of auto, bf16, fp32"),
    ("finetune --training.augment much", "one of none, light, default, strong, got 'much'"),
    ("finetune --training.masking few", "expected one of default, short_sound, small, got 'few'"),
    ("finetune --model.tubelet [1,2]", "model.tubelet: expected a list of 3: a whole number"),
    ("finetune --model.tubelet [2,0,8]", "model.tubelet: expected a list of 3: a whole number"),
    ("finetune --training.lr true", "lr: expected a number above 0 and at most 10, got true"),
    ("finetune --training.lr null", "lr: expected a number above 0 and at most 10, got null"),
    ("finetune --options.x {a:[1,.nan]}", "options.x.a[1]: expected a finite number, got nan"),
    ("finetune --options.x 2026-01-02", "options.x: expected plain values, got datetime.date("),
    ("sweep --space.seed.choice [[.inf]]", "space.seed.choice[0][0]: expected a finite number"),
    ("finetune --evaluate=1", "evaluate: expected true or false, got 1"),
    ("sweep --seeds [1,a]", "seeds: expected a list, each a whole number from 0"),
    ("sweep --resources 3", "resources: expected the keys of ResourceConfig, got 3"),
    # bounds
    ("finetune --training.lr 0", "training.lr: expected a number above 0 and at most 10, got 0"),
    ("finetune --training.lr .nan", "lr: expected a number above 0 and at most 10, got nan"),
    ("finetune --training.steps 0", "training.steps: expected a whole number from 1 to 1000000000"),
    ("finetune --tasks.text_to_code.weight -1", "text_to_code.weight: expected a number above 0"),
    ("finetune --training.warmup_fraction 10", "warmup_fraction: expected a number from 0 to 1"),
    ("finetune --training.min_workers 0", "expected a whole number from 1 to 10000 or null"),
    ("compare --tuning.trials -1", "tuning.trials: expected a whole number from 0"),
    ("compare --tuning.step_fraction 0.5", "tuning.step_fraction: expected a number from 0.6"),
    # together
    ("finetune --model.num_heads 5", "model.dim 192 must divide by model.num_heads 5"),
    ("finetune --training.workers 2 --training.min_workers 3", "and training.workers (2), got 3"),
    ("finetune --training.workers 0", "expected a whole number from 1 to 10000"),
    ("finetune --fold.count 1", "fold.count: 1 fold leaves no row"),
    ("finetune --fold.count 3 --fold.number 3", "fold.number: 3 is not one of 3 folds"),
    ("finetune --fold.number 1", "the other keys of fold need folds"),
    ("compare --tuning.trials 2", "tuning.trials needs a tuning.space"),
    ("compare --tuning.rates 0.1,0.1,0.2", "three or more different rates"),
    ("compare --tuning.rates 0.1,0.2,0.3 --tuning.space.training.lr.uniform 0.1,0.2", "remove one"),
    ("compare --tuning.seeds []", "tuning.seeds must be different numbers"),
    ("sweep --score.split test", "must not choose settings on a test split"),
    ("merge a", "give at least two models to merge"),
    ("merge a b --rename x", "rename 'x': write OLD=NEW"),
    ("predict --format clue --text x", "exactly one test file"),
    ("search", "the query is empty; give a text, or --file"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_a_wrong_input_is_named(words: str, message: str) -> None:
    name, *arguments = words.split()
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        COMMANDS[name].parse_arguments(arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {dmi: 3}", "unknown key 'model.dmi'; did you mean 'model.dim'"),
        ("lrate: 1", "unknown key 'lrate'"),
        ("model: {dim: wide}", "model.dim: expected a whole number"),
        ("model: {tasks: {text_to_code: {towers: {query: {skill: [general]}}}}}",
         "did you mean 'model.tasks.text_to_code.towers.query.skills'"),
        ("training: {trainable: !!set {a, b}}", "training.trainable: expected a list, each text"),
        ("model: [", "not valid YAML: while parsing"),
        ("[1, 2]", "expected keys and values, got a list"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        COMMANDS["finetune"].parse_arguments(["--config", str(file)])
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)


def test_python_code_cannot_set_them_either() -> None:
    for values, message in (
        ({"lr": 0.0}, "training.lr: expected a number above 0"),
        ({"workers": 2, "min_workers": 3}, "and training.workers (2), got 3"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            TrainingConfig(**values)  # type: ignore[arg-type]


# -- bounds --------------------------------------------------------------------------


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
        for name, below in (child_types(hint, with_bounds=True) or {}).items():
            yield from _numbers(below, f"{key}.{name}".removeprefix("."))
    elif typing.get_origin(hint) is dict:
        yield from _numbers(args[1], f"{key}.NAME")
    elif typing.get_origin(hint) is not typing.Literal:
        for arg in args:
            yield from _numbers(arg, key)


def _all_numbers() -> list[tuple[str, str, Any, dict[str, float]]]:
    owners = {name: each.config_class for name, each in COMMANDS.items()}
    owners |= {f"reader {name}": each.Options for name, each in READERS.items()}
    owners |= {
        f"system {name}": systems.find_system(name).model.options_class
        for name in systems.system_names()
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
    assert all(issubclass(each, ExternalCorpus) for each in READERS.values())
    owners = {owner for owner, _, _, _ in NUMBERS}
    assert {"reader folder", "system moe", "sweep", "compare", "tracker"} <= owners
    assert len({key for _, key, _, _ in NUMBERS}) > 130


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


if __name__ == "__main__":
    SNAPSHOT.write_text(take_snapshot(), encoding="utf-8")
