"""Program ``skillnet``: starts commands, and turns their exceptions into messages and exit codes.

Commands are entry points of the group ``skillnet.commands``. Most are made by :func:`command`; a
plain ``main(argv)`` also works. A command is imported only when it is called.
Exit codes: 0 success, 2 user error, 130 interrupted, 129 and 143 ended by SIGHUP and SIGTERM, 1 any
other error.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from importlib.metadata import EntryPoint
from typing import Any, Generic, TypeVar

from skillnet_files.entry_points import find_entries
from skillnet_platform import __version__, console, signals
from skillnet_platform.errors import (
    TerminatedError,
    UserError,
    find_raising_package,
    first_line,
    suggest_name,
)
from skillnet_platform.package_version import describe_missing_extra
from skillnet_platform.secret_uri import SecretUri

GROUP = "skillnet.commands"

#: One line per command: ``skillnet --help`` imports no command.
SUMMARIES = {
    "quickstart": "fetch, prepare, train, evaluate and register a small model",
    "fetch": "download the corpora, or list what to download by hand",
    "inspect": "report the content of a directory or URI before it is prepared",
    "init-task": "write the configuration that trains a corpus' task",
    "prepare": "convert downloads or your own data into Arrow shards",
    "pretrain": "train the skills on unlabelled data",
    "finetune": "train the tasks jointly",
    "plan": "check whether a run fits GPUs, and bound its time, without a GPU",
    "evaluate": "measure a model on every test row, with intervals",
    "register": "register a trained model; promote it if it is better",
    "export": "write a model for the Hub, as dense weights, or as a graph",
    "predict": "predict from a file or a text with a registered model",
    "search": "rank images, videos or functions for a text",
    "serve": "answer predictions and searches over HTTP",
    "grow": "add a skill to a trained model",
    "merge": "join models that grew from one base, with equal outputs",
    "pack": "write a task of a grown model, with its skills, as one file",
    "add": "join packages of skills to a model, with equal outputs of its tasks",
    "remove": "remove packages of skills, to the former bytes",
    "skills": "list the skills of a model, with their origin and size",
    "verify": "check every hash from the downloads to the weights",
    "sweep": "train many configurations and rank them",
    "compare": "compare systems, with statistics",
    "interpret": "measure what each skill of a trained model contributes",
    "submit": "send a command to a Ray cluster",
    "pin-nodes": "pin the packages that cluster nodes install",
    "doctor": "check this machine or a cluster before a run",
    "tracker": "show runs in MLflow's pages, here or for several machines",
}

#: Usual names of our commands in other tools -> ours, for the suggestion.
OTHER_NAMES = {
    "train": "finetune",
    "fit": "finetune",
    "tune": "sweep",
    "download": "fetch",
    "ui": "tracker",
}

#: A plain ValueError of these packages is a user error; a ValueError of a library is a defect.
OUR_PACKAGES = ("skillnet", "pipelines", "sweeps")

#: Waiting compute threads spin for about 0.1 ms: libgomp's default, milliseconds, takes the core
#: from the thread that loads the batches. Without spinning the threads sleep between operations.
SPIN_VARIABLE, SPIN_COUNT = "GOMP_SPINCOUNT", "10000"

#: Characters of the message of an unexpected error.
LONGEST_CAUSE = 1000

PlainMain = Callable[[list[str] | None], int | None]
ConfigT = TypeVar("ConfigT")


def run_program() -> int:
    """Run ``skillnet`` as the program of this process, for the script and ``python -m``."""
    return _run_as_program(main)


def main(argv: list[str] | None = None) -> int:
    """Run ``skillnet COMMAND …`` and return the exit code.

    Args:
        argv: command and its arguments. ``None`` means ``sys.argv[1:]``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        # A call without a command is a usage error, so that scripts notice it.
        return _print_text(_help(find_commands())) or (0 if arguments else 2)
    if arguments[0] in ("-V", "--version"):
        return _print_text(f"skillnet {__version__}")
    known = find_commands()
    name, rest = arguments[0], arguments[1:]
    if name not in known:
        what = "option" if name.startswith("-") else "command"
        meant = OTHER_NAMES.get(name, name)
        console.print_error(f"unknown {what} {name!r}{suggest_name(meant, known)}")
        return 2
    return _load_and_run(known[name], rest)


@dataclass(eq=False, repr=False)
class CliCommand(Generic[ConfigT]):
    """Command of ``skillnet`` that is called with the arguments of its command line.

    ``python -m MODULE`` and the entry point call the same object.

    Args:
        function: takes a configuration and returns a result. A result that is an integer or
            ``None`` is the exit code.
        config_class: dataclass of the options.
        description: one paragraph for ``--help``.
        example: command lines that work, one per line, for ``--help``.
        name: what follows ``skillnet``. By default the name of the module.
        show: prints the result for people.
        to_json: returns the JSON document of a result. By default the result itself.
        exit_code: returns the exit code of a result. By default 0.
        rewrite_arguments: changes the arguments before they are parsed.
        resources: returns the ``ResourceRequest`` of a configuration, for ``skillnet doctor`` and
            ``skillnet submit``. By default one worker with one CPU.
        essential: dotted keys that ``--help`` shows; ``--help all`` shows every key. By default
            all keys without keys of their own.
        each: option that lists files, such as ``tasks`` for ``--tasks a.yaml b.yaml``. The function
            and the hooks get a list with a configuration for each: the file as of ``--config``,
            with all other options.
    """

    function: Callable[[ConfigT], Any]
    config_class: type[ConfigT]
    _: KW_ONLY
    description: str
    example: str = ""
    name: str = ""
    show: Callable[[Any], None] | None = None
    to_json: Callable[[Any], Any] | None = None
    exit_code: Callable[[Any], int] | None = None
    rewrite_arguments: Callable[[Sequence[str]], list[str]] | None = None
    resources: Callable[[ConfigT], Any] | None = None
    essential: Sequence[str] = ()
    each: str = ""

    def __post_init__(self) -> None:
        self.name = self.name or _command_name(self.function.__module__)
        functools.update_wrapper(self, self.function)

    def __call__(self, argv: list[str] | None = None) -> int:
        """Run the command and return its exit code.

        Args:
            argv: arguments after the command's name. ``None`` means ``sys.argv[1:]``.
        """
        run = functools.partial(run_command, self._run, argv, self.__module__)
        return _run_as_program(run) if self.__module__ == "__main__" else run()

    def parse_arguments(self, argv: Sequence[str]) -> ConfigT:
        """Build the configuration of the command from its arguments.

        Raises:
            UserError: an unknown key, a wrong type, or a file that is missing or not YAML.
            SystemExit: with 0 after ``--help``.
        """
        # Imported here because `skillnet --help` and `--version` need no parser.
        from skillnet_platform.config import parse_config

        words = self.rewrite_arguments(argv) if self.rewrite_arguments else list(argv)
        for word in words:
            if SecretUri(word).has_secret:
                console.print_warning(
                    f"{SecretUri(word)}: other users of this machine can read command lines, where "
                    "the hidden part may be a password. Give such a URI in the environment, or in "
                    "a file of --config"
                )
        return parse_config(
            self.config_class,
            words,
            f"skillnet {self.name}",
            self.description,
            self.example,
            self.essential,
        )

    def _parse_each(self, argv: Sequence[str]) -> Any:
        """Return the configuration; a list of them if the option ``each`` is given."""
        files, rest = split_files(argv, self.each) if self.each else ([], [])
        if not files:
            return self.parse_arguments(argv)
        # The other options have the last word, as with --config. One --json is enough.
        later = [word for word in rest if word != "--json"]
        return [
            self.parse_arguments(["--config", file, *(later if number else rest)])
            for number, file in enumerate(files)
        ]

    def request_resources(self, argv: Sequence[str]) -> Any:
        """Return what the command needs of a cluster; ``None`` for a command without a hook.

        Args:
            argv: arguments after the command's name. ``--json`` has no effect.

        Raises:
            UserError: arguments that the command rejects.
        """
        if self.resources is None:
            return None
        return self.resources(self._parse_each([word for word in argv if word != "--json"]))

    def _run(self, argv: list[str] | None) -> int:
        config = self._parse_each(argv or [])
        result = self.function(config)
        if result is None or isinstance(result, int):
            return int(result or 0)
        if console.json_wanted():
            console.emit_json(self.to_json(result) if self.to_json else result)
        elif self.show is not None:
            self.show(result)
        return self.exit_code(result) if self.exit_code else 0


def command(
    config_class: type[ConfigT], **options: Any
) -> Callable[[Callable[[ConfigT], Any]], CliCommand[ConfigT]]:
    """Make a command of a function that takes a configuration and returns a result.

    The command parses its arguments, runs the function, and prints the result as a table or,
    with ``--json``, as one JSON document.

    Args:
        config_class: dataclass of the options.
        options: further fields of :class:`CliCommand`.
    """
    return lambda function: CliCommand(function, config_class, **options)


def split_files(words: Sequence[str], option: str) -> tuple[list[str], list[str]]:
    """Split the files of an option from all other words of a command line.

    ``--tasks a.yaml b.yaml --name x`` gives ``[a.yaml, b.yaml]`` and ``[--name, x]``.

    Args:
        words: arguments of the command.
        option: name of the option. Its files end with the next option, and a shell may have
            expanded them from a pattern; commas separate them too.

    Raises:
        UserError: the option has no files.
    """
    files: list[str] = []
    rest: list[str] = []
    is_given = is_listing = False
    for word in words:
        name, equals, text = word.partition("=")
        if name == f"--{option}":
            is_given = is_listing = True
            files += text.split(",") if equals else []
        elif is_listing and not word.startswith("--"):
            files += word.split(",")
        else:
            is_listing = False
            rest.append(word)
    files = [file for file in files if file]
    if is_given and not files:
        raise UserError(f"command line: --{option} needs files: --{option} a.yaml b.yaml")
    return files, rest


def _command_name(module: str) -> str:
    """Return the name of the command in a module; ``python -m MODULE`` calls it ``__main__``."""
    spec = getattr(sys.modules.get(module), "__spec__", None)
    full = spec.name if module == "__main__" and spec is not None else module
    return full.rpartition(".")[2].replace("_", "-")


def run_command(
    function: PlainMain, argv: list[str] | None = None, module: str | None = None
) -> int:
    """Call ``function(argv)`` and turn an exception into a message and an exit code.

    ``SKILLNET_DEBUG=1`` shows tracebacks.

    Args:
        function: a plain ``main(argv)``, for example of a third-party command.
        argv: its arguments. ``None`` means ``sys.argv[1:]``.
        module: whose package's ValueErrors are user errors. By default the function's.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    ours = (*OUR_PACKAGES, (module or function.__module__).partition(".")[0])
    console.open_standard_streams()
    try:
        code = _call_function(function, arguments, ours)
        try:
            # Python flushes again at exit, where nothing could handle the error.
            with console.write_results():
                return code
        except console.OutputError as error:
            return _report_output_error(error, code)
    finally:
        # Also after an error: a later command of this process must print normally again.
        console.end_json()


def _call_function(function: PlainMain, arguments: list[str], ours: tuple[str, ...]) -> int:
    try:
        if not {"HOME", "LOGNAME"} <= os.environ.keys():
            # Imported here because `skillnet --help` is to be quick.
            from skillnet_platform.storage.local import prepare_user_environment

            prepare_user_environment()
        with signals.terminate_as_interrupt("run the same command again"):
            return function(arguments) or 0
    except SystemExit as exit_request:
        wanted = exit_request.code
        # SystemExit may hold None (success) or a message (failure) instead of a number.
        return wanted if isinstance(wanted, int) else int(wanted is not None)
    except TerminatedError as notice:
        # Handled before KeyboardInterrupt, its base class, because the exit codes differ.
        console.print_error(str(notice))
        return notice.exit_code
    except KeyboardInterrupt:
        console.print_error("interrupted")
        return 130
    except console.OutputError as error:
        return _report_output_error(error, 0)
    except Exception as error:
        _traceback_if_wanted()
        message = user_error_message(error, ours)
        if message is not None:
            console.print_error(message)
            return 2
        name, cause = type(error).__name__, first_line(error, LONGEST_CAUSE)
        console.print_error(name if cause == name else f"{name}: {cause}")
        if not _debug():
            console.print_note("rerun with SKILLNET_DEBUG=1 for the traceback")
        return 1


def _run_as_program(run: Callable[[], int]) -> int:
    signals.own_process()
    # libgomp reads it when torch is imported. It would override a policy of the user.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault(SPIN_VARIABLE, SPIN_COUNT)
    code = run()
    # Imported by commands that use Ray.
    connect: Any = sys.modules.get("skillnet_platform.cluster.connect")
    if connect is not None:
        connect.leave_process(code)
    return code


def _report_output_error(error: console.OutputError, code: int) -> int:
    """Return the exit code of a command whose results cannot be written, and say so.

    A reader that left (``| head``) is no error.
    """
    console.discard_output()
    cause = error.__cause__
    if isinstance(cause, BrokenPipeError):
        return code
    reason = cause.strerror if isinstance(cause, OSError) else str(error)
    console.print_error(
        f"standard output: cannot be written ({reason}). The results are incomplete. Give the "
        "command another standard output."
    )
    return code or 1


def user_error_message(error: BaseException, ours: tuple[str, ...] = OUR_PACKAGES) -> str | None:
    """Return the message of a user error in an exception or its causes, else ``None``.

    Ray wraps the exceptions of remote tasks and training workers.

    Args:
        error: the exception.
        ours: packages whose plain ValueErrors are user errors.
    """
    # Imported here because `skillnet --help` is to be quick.
    from skillnet_platform.storage.local import explain_disk_error

    for inner in _unwrap(error):
        # Ray's wrapper also inherits from the class of the cause, but its text has a traceback.
        if isinstance(inner, UserError) and not hasattr(inner, "cause"):
            return str(inner)
        # A subclass of a library, such as UnicodeDecodeError, is no message to the user.
        packages = {find_raising_package(inner)}
        if type(inner) is not ValueError:
            packages.add(type(inner).__module__.partition(".")[0])
        # Plug-ins of this repository begin with `skillnet_`.
        packages = {name for name in packages if not name.startswith("skillnet_")}
        if isinstance(inner, ValueError) and packages <= set(ours):
            return str(inner)
        if (message := describe_missing_extra(inner)) is not None:
            return message
        # The text of Ray's wrapper has the message of the cause, without its path.
        if not hasattr(inner, "cause") and (message := explain_disk_error(inner)) is not None:
            return message
    return None


def _unwrap(error: BaseException) -> Iterator[BaseException]:
    # `cause` and `__cause__` may lead to one exception twice, or in a circle.
    waiting, seen = [error], set()
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


def find_commands() -> dict[str, EntryPoint]:
    """Return name -> entry point of the commands of installed packages and of this checkout."""
    return find_entries(GROUP)


def _load_and_run(entry: EntryPoint, arguments: list[str]) -> int:
    try:
        function = entry.load()
    except ModuleNotFoundError as missing:
        # A command of another package may lack its own dependencies.
        _traceback_if_wanted()
        if (message := describe_missing_extra(missing)) is not None:
            console.print_error(message)
            return 2
        console.print_error(
            f"the command {entry.name!r} ({entry.value}) cannot be loaded: {missing}"
        )
        return 1
    return run_command(function, arguments)


def _help(commands: dict[str, EntryPoint]) -> str:
    known = [name for name in SUMMARIES if name in commands]
    others = sorted(set(commands) - set(SUMMARIES))
    width = max((len(name) for name in commands), default=0)
    lines = ["usage: skillnet COMMAND [OPTIONS]", "", "One sparse model for five modalities.", ""]
    lines += [f"  {name:<{width}}  {SUMMARIES[name]}" for name in known]
    if others:
        lines += ["", "From other packages:"]
        lines += [f"  {name:<{width}}  {_summarize(commands[name])}" for name in others]
    if not commands:
        lines += ["  (no command found: install the package with `pip install -e .`)"]
    lines += [
        "",
        "Every command takes --config FILE.yaml, overrides such as --model.dim 256, --json and",
        "--help. Start with `skillnet doctor`, then `skillnet quickstart`.",
    ]
    return "\n".join(lines)


def _summarize(entry: EntryPoint) -> str:
    """Return the summary of the package of a command, whose modules the help does not import."""
    if entry.dist is None:
        return ""
    about = entry.dist.metadata
    return f"{about['Summary'] or 'no summary'} ({about['Name']})"


def _print_text(text: str) -> int:
    def print_it(argv: list[str] | None) -> None:
        console.print_output(text)

    return run_command(print_it, [])


def _debug() -> bool:
    return os.environ.get("SKILLNET_DEBUG", "") not in ("", "0")


def _traceback_if_wanted() -> None:
    if _debug():
        import traceback

        console.print_note(traceback.format_exc().rstrip())


if __name__ == "__main__":
    raise SystemExit(run_program())
