"""``--help`` fits on one screen for every command, and ``--help all`` shows every option."""

import contextlib
import io
import re
from dataclasses import dataclass

import pytest

from skillnet_platform import cli
from skillnet_platform.config.parser import MAX_ESSENTIAL, WIDTH, display_width, render_help
from skillnet_platform.config.schema import all_keys

#: Lines of options on one screen, with --config, --json and --help.
SCREEN = 24
#: Of docstrings.
MARKUP = re.compile(r":[a-z]+:`|``")


def help_lines(*arguments: str) -> list[str]:
    """Return the lines that a command prints on standard output."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        assert cli.main(list(arguments)) == 0
    return stream.getvalue().splitlines()


def option_lines(lines: list[str]) -> list[str]:
    """Return the lines between ``options:`` and the next empty line."""
    start = lines.index("options:") + 1
    return lines[start : lines.index("", start)]


@pytest.mark.parametrize("name", sorted(cli.SUMMARIES))
def test_help_fits_on_one_screen(name: str) -> None:
    lines = help_lines(name, "--help")
    options = option_lines(lines)
    assert len(options) <= SCREEN
    assert all(line.startswith("  --") for line in options), "one line per option"
    assert f"All options: skillnet {name} --help all" in lines
    assert max(map(display_width, lines)) <= WIDTH
    assert not MARKUP.search("\n".join(lines))
    command = cli.find_commands()[name].load()
    assert len(command.essential) <= MAX_ESSENTIAL
    assert {key.partition(".NAME")[0] for key in command.essential} <= set(
        all_keys(command.config_class)
    )


@pytest.mark.parametrize("name", sorted(cli.SUMMARIES))
def test_help_all_shows_every_option_in_full(name: str) -> None:
    lines = help_lines(name, "--help", "all")
    assert lines == help_lines(name, "--help=all")
    assert max(map(display_width, lines)) <= WIDTH
    text = "\n".join(lines)
    assert not MARKUP.search(text)
    command = cli.find_commands()[name].load()
    referred = tuple(re.findall(r"--([\w.]+\.)KEY ", text))
    assert referred == {"compare": ("run.", "pretraining."), "sweep": ("run.",)}.get(name, ())
    for key in all_keys(command.config_class):
        assert key in text or key.startswith(referred)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("finetune", 95),
        ("pretrain", 97),
        ("compare", 60),
        ("sweep", 45),
        ("grow", 65),
        ("merge", 40),
    ],
)
def test_a_command_has_few_options(name: str, most: int) -> None:
    """A new option needs a preset, a sweep, a study or a guide that sets it."""
    lines = help_lines(name, "--help", "all")
    assert len([line for line in lines if line.startswith("  --")]) <= most


def test_markup_of_notes_is_shown_as_plain_text() -> None:
    @dataclass
    class Noted:
        """Options.

        Args:
            size: as :class:`~a.b.Size` or :py:func:`a.size`; ``none`` for no size.
        """

        size: int = 1

    text = " ".join(render_help(Noted, "x").split())
    assert "as Size or a.size; none for no size" in text


def test_a_long_example_is_continued_on_the_next_line() -> None:
    line = "skillnet predict " + " ".join(f"--option{n} value" for n in range(9))
    text = render_help(cli.find_commands()["fetch"].load().config_class, "x", example=line)
    example = text.splitlines()[text.splitlines().index("example:") + 1 :]
    assert example[0].endswith(" \\")
    joined = " ".join(each.removesuffix(" \\").strip() for each in example)
    assert joined == line
