"""The ``skillnet`` command: a thin shell over entry points, and the error handling of commands.

Commands are entry points of the group ``skillnet.commands`` and are imported only when called.
Exit codes: 0 done, 2 the user's mistake, 130 interrupted, 143 ended by SIGTERM, 1 anything else.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from skillnet_platform import __version__, console
from skillnet_platform.errors import Terminated, UserError, nearest

GROUP = "skillnet.commands"

#: One line each, so that ``skillnet --help`` need not import a command to describe it.
SUMMARIES = {
    "quickstart": "fetch, prepare, train, evaluate and register, with a table at the end",
    "fetch": "download the corpora, or say what to put where by hand",
    "prepare": "turn the downloads into verified Arrow shards",
    "pretrain": "train the skills on unlabelled data",
    "finetune": "train the tasks jointly",
    "evaluate": "measure a model on every test row, with intervals",
    "register": "put a trained model into the registry, behind the gate",
    "predict": "use a registered model on a file or a text",
    "search": "rank pictures, clips or functions for a text",
    "grow": "add a skill to a trained model",
    "verify": "re-hash everything from shard to weights",
    "sweep": "compare many runs of a space of settings",
    "compare": "compare systems, with statistics",
    "interpret": "show what the skills of a trained model do",
    "submit": "send a command to a Ray cluster",
    "doctor": "check this machine before a run",
    "tracker": "run an MLflow server for several machines",
    "ui": "open the MLflow pages of the runs here",
}

#: A plain ValueError raised by these packages is a message to the user; elsewhere it is a defect.
OUR_PACKAGES = ("skillnet", "skillnet_platform", "pipelines", "sweeps")

Main = Callable[[list[str] | None], int | None]


def main(argv: list[str] | None = None) -> int:
    """Run ``skillnet <command> …``; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _say(_help(commands()))
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        _say(f"skillnet {__version__}")
        return 0
    known = commands()
    name, rest = arguments[0], arguments[1:]
    if name not in known:
        what = "option" if name.startswith("-") else "command"
        console.error(f"unknown {what} {name!r}{nearest(name, known)}")
        return 2
    return _load_and_run(known[name], rest)


def command(function: Main) -> Callable[..., int]:
    """Decorate a command's ``main(argv)``: one line for an error, and the exit code returned."""

    @functools.wraps(function)
    def wrapper(argv: list[str] | None = None) -> int:
        return run_command(function, argv)

    return wrapper


def run_command(function: Main, argv: list[str] | None = None) -> int:
    """Call ``function(argv)`` and turn whatever it raises into a message and an exit code.

    ``argv`` None means ``sys.argv[1:]``. ``SKILLNET_DEBUG=1`` shows tracebacks.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    ours = (*OUR_PACKAGES, function.__module__.partition(".")[0])
    try:
        code = function(arguments) or 0
        sys.stdout.flush()
        return code
    except SystemExit as exit_request:
        wanted = exit_request.code
        return wanted if isinstance(wanted, int) else int(wanted is not None)
    except Terminated as notice:
        console.error(str(notice))
        return 143
    except KeyboardInterrupt:
        console.error("interrupted")
        return 130
    except BrokenPipeError:
        _reader_left()
        return 0
    except Exception as problem:
        _traceback_if_wanted()
        message = users_mistake(problem, ours)
        if message is not None:
            console.error(message)
            return 2
        text = str(problem).strip()
        lines = text.splitlines() or [""]
        console.error(
            f"{type(problem).__name__}: {lines[-1] if len(lines) > 1 else lines[0]}".rstrip(": ")
        )
        if not _debug():
            console.note("rerun with SKILLNET_DEBUG=1 for the traceback")
        return 1
    finally:
        console.end_json()


def users_mistake(problem: BaseException, ours: tuple[str, ...] = OUR_PACKAGES) -> str | None:
    """The message if this exception, or one it wraps, is a user's mistake; None otherwise.

    Looks through what Ray wraps around an exception of a remote task or of a training worker.
    """
    for inner in _unwrap(problem):
        if isinstance(inner, UserError) and not hasattr(inner, "cause"):
            return str(inner)
        if type(inner) is ValueError and _raised_in(inner) in ours:
            return str(inner)
    return None


def _unwrap(problem: BaseException) -> Iterator[BaseException]:
    waiting, seen = [problem], set()
    while waiting:
        inner = waiting.pop(0)
        if id(inner) in seen:
            continue
        seen.add(id(inner))
        yield inner
        failures: Any = getattr(inner, "worker_failures", None)
        wrapped = [getattr(inner, "cause", None), inner.__cause__]
        if isinstance(failures, dict):
            wrapped += failures.values()
        waiting += [each for each in wrapped if isinstance(each, BaseException)]


def _raised_in(problem: BaseException) -> str:
    """The top package of the frame that raised; "" if there is no traceback."""
    frame = problem.__traceback__
    if frame is None:
        return ""
    while frame.tb_next is not None:
        frame = frame.tb_next
    name = frame.tb_frame.f_globals.get("__name__", "")
    return str(name).partition(".")[0]


def commands() -> dict[str, EntryPoint]:
    """Commands by name: those of installed packages, and those of the checkout that this is.

    A job on a cluster has our code and none of our metadata: the checkout's own pyproject.toml,
    which comes with the code, names them there.
    """
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    project = Path(__file__).parents[2] / "pyproject.toml"
    if project.is_file():
        import tomllib

        told = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        named = told.get("entry-points", {}).get(GROUP, {})
        found |= {name: EntryPoint(name, value, GROUP) for name, value in named.items()}
    return found


def _load_and_run(entry: EntryPoint, arguments: list[str]) -> int:
    try:
        function = entry.load()
    except ModuleNotFoundError as missing:
        _traceback_if_wanted()
        console.error(f"the command {entry.name!r} ({entry.value}) cannot be loaded: {missing}")
        return 1
    return run_command(function, arguments)


def _help(commands: dict[str, EntryPoint]) -> str:
    known = [name for name in SUMMARIES if name in commands]
    others = sorted(set(commands) - set(SUMMARIES))
    width = max((len(name) for name in commands), default=0)
    lines = ["usage: skillnet COMMAND [OPTIONS]", "", "One sparse model, five modalities.", ""]
    lines += [f"  {name:<{width}}  {SUMMARIES[name]}" for name in known]
    if others:
        lines += ["", "From other packages:"]
        lines += [f"  {name:<{width}}  {commands[name].value}" for name in others]
    if not commands:
        lines += ["  (no command found: install the package with `pip install -e .`)"]
    lines += [
        "",
        "Every command takes --config FILE.yaml, overrides such as --model.dim 256, --json and",
        "--help. Start with `skillnet doctor`, then `skillnet quickstart`.",
    ]
    return "\n".join(lines)


def _say(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _reader_left()


def _reader_left() -> None:
    """Whoever read our output went away (``| head``): keep Python from complaining at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _debug() -> bool:
    return os.environ.get("SKILLNET_DEBUG", "") not in ("", "0")


def _traceback_if_wanted() -> None:
    if _debug():
        import traceback

        traceback.print_exc()


if __name__ == "__main__":
    raise SystemExit(main())
