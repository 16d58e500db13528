"""The shell: quick help, entry points, nearest names, exit codes."""

import errno
import re
import resource
import signal
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors import SafetensorError

from skillnet_corpora.demo.syllables import split_pinyin
from skillnet_platform import cli, console
from skillnet_platform.errors import UserError
from tests.helpers.installed_entries import forget_entries
from tests.helpers.processes import child_environment, run_python, start_python

COMMAND = f"{sys.executable} -m skillnet_platform.cli"


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from skillnet_platform.cli import main\n"
        "code = main(['--help']); took = time.perf_counter() - start\n"
        "slow = {'torch', 'ray', 'mlflow', 'numpy', 'pyarrow', 'rich', 'yaml', 'pydantic'}\n"
        "heavy = slow & set(sys.modules)\n"
        "print(f'took {took} heavy {heavy}', file=sys.stderr); sys.exit(code)"
    )
    best = 99.0
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run_python("-c", code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0
        assert "heavy set()" in done.stderr
        # CPU seconds: on a busy machine the wall clock measures the others.
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        best = min(best, spent)
    assert "quickstart" in done.stdout
    assert best < 0.3, f"skillnet --help took {best:.2f} s"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "GOMP_SPINCOUNT = '10000'"),
        ({"GOMP_SPINCOUNT": "77"}, "GOMP_SPINCOUNT = '77'"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "GOMP_SPINCOUNT = '0'"),
    ],
)
def test_compute_threads_of_a_command_spin_briefly(given: dict[str, str], expected: str) -> None:
    """A command sets the variable before libgomp reads it; a choice of the user holds."""
    runtime = next((Path(find_spec("torch").origin).parent / "lib").glob("libgomp*"), None)
    if runtime is None:
        pytest.skip("this build of torch brings no libgomp")
    code = (
        "import ctypes; from skillnet_platform import cli\n"
        f"cli._run_as_program(lambda: ctypes.CDLL({str(runtime)!r}) is None)"
    )
    variables = {"OMP_DISPLAY_ENV": "VERBOSE", "OMP_NUM_THREADS": "2", **given}
    done = run_python("-c", code, variables=variables)
    assert expected in done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("skillnet 0.")


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["finetun"]) == 2
    captured = capsys.readouterr()
    assert "unknown command 'finetun'; did you mean 'finetune'?" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("words", "files", "rest"),
    [
        ("run --tasks a.yaml b.yaml --name x", "a.yaml b.yaml", "run --name x"),
        ("run --tasks=a.yaml,b.yaml c", "a.yaml b.yaml c", "run"),
        ("run --tasks a.yaml, --name x --tasks b.yaml", "a.yaml b.yaml", "run --name x"),
        ("run --name x", "", "run --name x"),
        ("run --tasksx a", "", "run --tasksx a"),
    ],
)
def test_files_of_an_option_end_with_the_next_option(words: str, files: str, rest: str) -> None:
    assert cli.split_files(words.split(), "tasks") == (files.split(), rest.split())


@pytest.mark.parametrize("words", ["run --tasks", "run --tasks --name x", "--tasks="])
def test_an_option_of_files_without_files(words: str) -> None:
    with pytest.raises(UserError, match="--tasks needs files"):
        cli.split_files(words.split(), "tasks")


def test_no_command_prints_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: skillnet COMMAND" in capsys.readouterr().out


def test_commands_of_other_packages_are_listed_and_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = tmp_path / "other-1.0.dist-info"
    info.mkdir()
    about = "Metadata-Version: 2.1\nName: other\nVersion: 1.0\nSummary: Do more with runs.\n"
    (info / "METADATA").write_text(about)
    (info / "entry_points.txt").write_text(
        "[skillnet.commands]\nextra = other_module:main\nbroken = absent_module:main\n"
    )
    (tmp_path / "other_module.py").write_text(
        "def main(argv=None):\n    print(argv)\n    return 7\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    forget_entries()
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^  extra +Do more with runs\. \(other\)$", shown, re.MULTILINE)
    assert "other_module" not in shown
    assert "other_module" not in sys.modules, "the help imports no command"
    assert cli.main(["extra", "--x"]) == 7
    assert "['--x']" in capsys.readouterr().out
    assert cli.main(["broken"]) == 1
    assert "absent_module" in capsys.readouterr().err
    forget_entries()


@pytest.mark.parametrize(
    ("problem", "code", "text"),
    [
        (UserError("file x, row 3: no label"), 2, "error: file x, row 3: no label\n"),
        (ValueError("model.dim must be at least 1"), 2, "error: model.dim must be at least 1\n"),
        (KeyError("k"), 1, "error: KeyError: 'k'\n"),
        (RuntimeError("first\nlast"), 1, "error: RuntimeError: first\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_exit_codes(
    problem: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str] | None = None) -> int:
        raise problem

    assert cli.run_command(main, []) == code
    shown = capsys.readouterr().err
    assert shown.startswith(text)
    assert "Traceback" not in shown
    assert ("SKILLNET_DEBUG=1" in shown) == (code == 1)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/d/x"), "/d/x: the disk is full ("),
        (OSError(errno.ENOSPC, "No space", "/d/from", None, "/d/to"), "/d/to: the disk is full ("),
        (OSError(errno.ENOSPC, "No space left on device"), "{root}: the disk is full ("),
        (OSError(errno.EDQUOT, "Disk quota exceeded", b"/d/x"), "/d/x: the disk is full (Disk quo"),
        (OSError(errno.EFBIG, "File too large", "/d/x"), "/d/x: the disk is full (File too large"),
        (OSError(errno.EROFS, "Read-only file system", "/d/x"), "/d/x: cannot be used (Read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "/d"), "/d: cannot be used (Permiss"),
        (PermissionError(errno.EPERM, "not permitted", "/d/x"), "/d/x: cannot be used (Operation"),
        # safetensors, sqlite below MLflow, and the tokenizers library.
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            "{root}: the disk is",
        ),
        (
            RuntimeError("(sqlite3.OperationalError) database or disk is full"),
            "{root}: the disk is",
        ),
        (
            sqlite3.OperationalError("attempt to write a readonly database"),
            "{root}: cannot be used",
        ),
        (Exception("Read-only file system (os error 30)"), "{root}: cannot be used (Read-only"),
        (Exception("Disk quota exceeded (os error 122)"), "{root}: the disk is full (Disk quota"),
    ],
)
@pytest.mark.parametrize("is_inner", [False, True])
def test_a_disk_that_takes_nothing_is_a_user_error_of_every_command(
    problem: Exception,
    message: str,
    is_inner: bool,
    run_root: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main(argv: list[str] | None = None) -> int:
        if is_inner:
            raise RuntimeError("a library failed") from problem
        raise problem

    assert cli.run_command(main, []) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message.format(root=run_root)}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "problem", [PermissionError(errno.EACCES, "Permission denied"), FileNotFoundError(2, "no", "x")]
)
def test_an_error_of_the_system_that_is_none_of_the_disk_stays_a_defect(problem: OSError) -> None:
    def main(argv: list[str] | None = None) -> int:
        raise problem

    assert cli.run_command(main, []) == 1


def test_a_value_error_of_a_library_is_a_defect(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str] | None = None) -> int:
        import fractions

        fractions.Fraction("not a number")
        return 0

    assert cli.run_command(main, []) == 1
    assert "ValueError" in capsys.readouterr().err


def test_a_value_error_of_a_plug_in_is_a_message() -> None:
    with pytest.raises(ValueError, match="pinyin") as raised:
        split_pinyin("x")
    assert cli.user_error_message(raised.value) == "'x' is not pinyin with a tone from 1 to 4"


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SKILLNET_DEBUG", "1")

    def main(argv: list[str] | None = None) -> int:
        raise UserError("wrong")

    assert cli.run_command(main, []) == 2
    assert "Traceback" in capsys.readouterr().err


def test_json_output_ends_with_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str] | None = None) -> None:
        console.begin_json()
        print("noise")
        console.emit_json({"rows": 3})

    assert cli.run_command(main, []) == 0
    assert not console.json_wanted()
    captured = capsys.readouterr()
    assert captured.out == '{\n  "rows": 3\n}\n'
    assert "noise" in captured.err


def test_json_output_holds_back_child_processes_too() -> None:
    code = (
        "import os; from skillnet_platform import console\n"
        "console.begin_json(); os.system('echo child'); print('noise')\n"
        "console.emit_json([1]); console.end_json(); print('after')"
    )
    done = run_python("-c", code)
    assert done.stdout == "[\n  1\n]\nafter\n"
    assert "child" in done.stderr
    assert "noise" in done.stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    assert "Traceback" not in run_in_shell(f"{COMMAND} --help | true").stderr


@pytest.mark.integration
def test_mistakes_inside_ray_are_still_mistakes(
    ray_session: object, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    @ray.remote
    def fails() -> None:
        raise UserError("recording 7: no symbols")

    def main(argv: list[str] | None = None) -> int:
        ray.get(fails.remote())
        return 0

    assert cli.run_command(main, []) == 2
    assert capsys.readouterr().err == "error: recording 7: no symbols\n"


#: A program whose Ray is connected, and aborts the process in its teardown.
PROGRAM = """
import atexit, os, sys, time, types
from skillnet_platform import cli
from skillnet_platform.cluster import connect
from skillnet_platform.errors import UserError

def abort():
    print("Check failed: submitted_task_ref_count > 0", file=sys.stderr, flush=True)
    os._exit(1)

class Ray(types.ModuleType):
    shutdown = staticmethod(abort)
    is_initialized = staticmethod(lambda: True)

def main(argv=None):
    sys.modules["ray"] = Ray("ray")
    connect.halt_own_node = lambda: None
    atexit.register(abort)
    connect.ensure_ray = lambda cpus: None
    Ray.is_initialized = staticmethod(lambda: False)  # the session starts it
    with connect.ray_session():
        Ray.is_initialized = staticmethod(lambda: True)
        print("ready", flush=True)
        if sys.argv[1] == "fail":
            Ray.shutdown = staticmethod(lambda: None)
            raise UserError("a.csv: too many bad rows")
        while True:  # a signal that comes just before a sleep is handled after it
            time.sleep(0.1)

raise SystemExit(cli._run_as_program(lambda: cli.run_command(main, [])))
"""


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (signal.SIGTERM, 143, "ended by SIGTERM; run the same command again"),
        (signal.SIGHUP, 129, "ended by SIGHUP; run the same command again"),
        (signal.SIGINT, 130, "interrupted"),
        (0, 2, "a.csv: too many bad rows"),
    ],
)
def test_no_teardown_of_ray_decides_the_end_of_a_program(
    number: int, code: int, message: str
) -> None:
    handlers = (
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    )
    words = ("-c", handlers + PROGRAM, "wait" if number else "fail")
    process = start_python(*words, until="ready", stderr=subprocess.PIPE)
    if number:
        process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (code, f"error: {message}\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("words", "stdout"),
    [
        ("--help", ">/dev/full"),
        ("--help", ">&-"),
        ("finetune --help", ">&-"),
        ("pin-nodes /dev/null --json", ">/dev/full"),
    ],
)
def test_a_standard_output_that_takes_nothing_is_one_message(words: str, stdout: str) -> None:
    done = run_in_shell(f"{COMMAND} {words} {stdout}")
    assert done.returncode == 1
    cause = "No space left on device" if "full" in stdout else "Bad file descriptor"
    assert f"error: standard output: cannot be written ({cause})" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_standard_output_that_takes_a_part_is_one_message(
    unbuffered: str, tmp_path: Path
) -> None:
    target = tmp_path / "help"
    done = run_in_shell(
        f"ulimit -f 2; PYTHONUNBUFFERED={unbuffered} {COMMAND} finetune --help all > {target}"
    )
    assert done.returncode == 1
    assert "standard output: cannot be written (File too large)" in done.stderr
    assert target.stat().st_size == 2048


def test_a_command_without_standard_streams_succeeds(tmp_path: Path) -> None:
    done = run_in_shell(f"{COMMAND} pin-nodes {tmp_path}/pins <&- >&- 2>&-")
    assert done.returncode == 0
    assert "ray==" in (tmp_path / "pins").read_text()


def run_in_shell(words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "-c", words], capture_output=True, text=True, env=child_environment(), timeout=120
    )


def test_a_broken_connection_is_not_a_reader_that_left(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str] | None = None) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    assert cli.run_command(main, []) == 1
    assert "BrokenPipeError" in capsys.readouterr().err


DATABASE = (
    "(sqlite3.OperationalError) unable to open database file\n"
    "[SQL: SELECT 1]\n(Background on this error at: https://sqlalche.me/e/20/e3q8)"
)


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        (DATABASE, "(sqlite3.OperationalError) unable to open database file"),
        (f"\n\n{DATABASE}", "(sqlite3.OperationalError) unable to open database file"),
        ("The actor died.\n\tpid: 3\n\tnamespace: x", "The actor died."),
        (
            "\x1b[36mray::f()\x1b[39m (pid=3)\n"
            '  File "a.py", line 3, in f\n    g()\n  File "b.py", line 1, in g\n    raise x\n'
            f"OperationalError: {DATABASE}",
            "OperationalError: (sqlite3.OperationalError) unable to open database file",
        ),
        ("", "RuntimeError"),
    ],
)
def test_an_error_of_many_lines_shows_the_line_that_states_the_cause(
    text: str, stated: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str] | None = None) -> int:
        raise RuntimeError(text)

    assert cli.run_command(main, []) == 1
    shown = capsys.readouterr().err.splitlines()[0]
    assert shown == f"error: RuntimeError: {stated}".replace(": RuntimeError: Run", ": Run")
