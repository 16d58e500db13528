"""One row's decoder fails, is too slow, or has ended workers before: the others go on."""

import ast
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipelines import guard
from pipelines.guard import DEADLY, TOO_LARGE, Attempts, read_each


def refuse(value: int) -> int:
    if value == 1:
        raise ValueError("a damaged one")
    if value == 2:
        raise MemoryError
    if value == 3:
        while True:
            time.sleep(0.01)
    return value


def test_each_row_gets_its_result_or_its_reason() -> None:
    found = list(read_each(range(5), refuse, seconds=0.2))
    assert found == [
        (0, None),
        (None, "a damaged one"),
        (None, TOO_LARGE),
        (None, "longer than 0.2 s"),
        (4, None),
    ]


def test_a_defect_is_no_bad_row() -> None:
    with pytest.raises(ZeroDivisionError):
        list(read_each([0], lambda value: 1 / value))


def test_signals_are_as_before_and_no_alarm_is_left() -> None:
    before = signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGPROF)
    list(read_each(range(3), refuse, seconds=0.2))
    assert before == (signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGPROF))
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)


def test_a_thread_without_signals_reads_too() -> None:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.extend(read_each(range(2), refuse)))
    thread.start()
    thread.join()
    assert found == [(0, None), (None, "a damaged one")]


CRASH = """
import os, sys
from pipelines.guard import read_each, watched
def read(value):
    if value == 3:
        os._exit(9)
    return value
with watched("test-" + sys.argv[1], "train-00000"):
    print(list(read_each(range(5), read)))
"""


def test_a_row_that_ended_two_processes_is_not_tried_again(tmp_path: Path) -> None:
    name = tmp_path.name
    run = [subprocess.run([sys.executable, "-c", CRASH, name], capture_output=True, text=True,
                          check=False) for _ in range(3)]  # fmt: skip
    assert [done.returncode for done in run] == [9, 9, 0], run[-1].stderr
    assert ast.literal_eval(run[-1].stdout) == [
        (0, None),
        (1, None),
        (2, None),
        (None, DEADLY),
        (4, None),
    ]
    assert list(guard.folder(f"test-{name}").iterdir()) == []  # the block is done
    guard.forget(f"test-{name}")
    assert not guard.folder(f"test-{name}").exists()


def test_a_worker_that_ends_between_rows_blames_none() -> None:
    first = Attempts("between", "block")
    assert not first.is_deadly()
    first.rest()
    second = Attempts("between", "block")
    assert not second.is_deadly()
    assert second._strikes == {}
    second.close()
    guard.forget("between")
