"""Presets of ``--config``: the files below ``configs``, and the commands that they belong to.

The comment on top of a preset has the command lines that use it. :func:`choose_preset` and
:func:`find_config` are called for each ``--config``, :func:`check_preset_command` after an error.
"""

import itertools
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from skillnet_platform import console
from skillnet_platform.errors import UserError, suggest_name

#: A command line in a comment: ``#   skillnet finetune --config tiny``.
_COMMAND_LINE = re.compile(r"#\s+skillnet ([\w-]+)(.*)")


def preset_directories() -> list[Path]:
    """Return the directories of the built-in presets: the installed package, the checkout."""
    here = Path(__file__).resolve().parents[1]
    return [place for place in (here / "configs", here.parents[1] / "configs") if place.is_dir()]


def names_file(name: str) -> bool:
    """Return whether a name of ``--config`` is a path, such as ``x.yaml`` or ``./x``."""
    return Path(name).suffix in (".yaml", ".yml", ".json") or name.startswith((".", "/", "~"))


def choose_preset(name: str, prog: str) -> str:
    """Return the preset that a command means by a name: its own of that name, if there is one.

    ``skillnet pretrain --config base`` means ``pretrain/base``, because the tasks of a preset
    belong to one command.

    Args:
        name: preset or file after ``--config``.
        prog: program and command, such as ``skillnet pretrain``.
    """
    own = f"{prog.rpartition(' ')[2]}/{name}"
    return own if not names_file(name) and own in list_presets() else name


def find_config(name: str) -> Path:
    """Return the file of ``--config``: a path, or a preset such as ``tiny`` or ``studies/tiny``.

    The name of a built-in preset always means that preset, in every working directory. Other names
    are looked for in the directory ``configs`` of the working directory.

    Raises:
        UserError: neither exists; suggests the nearest preset.
    """
    own = Path("configs").absolute()
    presets = (
        [] if names_file(name) else [folder / f"{name}.yaml" for folder in preset_directories()]
    )
    built_in = next((path for path in presets if path.is_file()), None)
    others = [Path(name).expanduser(), own / f"{name}.yaml"]
    other = next((path for path in others if path.is_file()), None)
    if built_in and other and not built_in.samefile(other):
        shown = f"./{other}" if other == Path(name) else other.relative_to(Path.cwd())
        console.print_note(
            f"--config {name}: takes the built-in preset, not the file {shown}; give "
            f"--config {shown} for the file"
        )
    found = built_in or other
    if found:
        return found
    known = {*_list_names(own), *list_presets()}
    wanted = name.removesuffix(".yaml")
    hint = _suggest_same_name(wanted, known) or suggest_name(wanted, known)
    raise UserError(f"--config {name}: neither a file nor a preset{hint}")


def list_presets() -> list[str]:
    """Return the names of the built-in presets."""
    return [name for folder in preset_directories() for name in _list_names(folder)]


def read_preset_commands(name: str) -> list[str]:
    """Return the commands that take a built-in preset, from the command lines in its comment."""
    lines = find_config(name).read_text(encoding="utf-8").splitlines()
    found = map(_COMMAND_LINE.match, itertools.takewhile(lambda line: line[:1] == "#", lines))
    used = [(match[1], match[2].split()) for match in found if match]
    # Other lines of the comment are steps before or after; `quickstart` needs no option.
    named = [command for command, words in used if name in words]
    return list(dict.fromkeys(named or [command for command, _ in used]))


def check_preset_command(name: str, prog: str, fits: Callable[[str], bool]) -> None:
    """Raise UserError if a preset belongs to other commands and does not fit this one.

    Args:
        name: preset or file after ``--config``.
        prog: program and command, such as ``skillnet compare``.
        fits: returns whether this command can use a preset.
    """
    own = prog.rpartition(" ")[2]
    if names_file(name) or name not in list_presets():
        return
    commands = read_preset_commands(name)
    if own in commands or fits(name):
        return
    others = [each for each in list_presets() if own in read_preset_commands(each)]
    known = f"; presets of {prog}: {', '.join(sorted(others))}" if others else ""
    raise UserError(
        f"--config {name}: this is a preset of skillnet {commands[0]}"
        f"{_suggest_same_name(name, others) or known}"
    ) from None


def _list_names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml")]


def _suggest_same_name(name: str, known: Iterable[str]) -> str:
    """Return a hint to the preset of this name in another folder; "" if there is none."""
    same = sorted(each for each in known if Path(each).name == Path(name).name)
    return f"; did you mean {same[0]!r}?" if same else ""
