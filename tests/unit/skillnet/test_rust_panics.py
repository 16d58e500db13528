"""A panic of a Rust library is an ordinary error with the name of the file.

A process that runs several trials returns the memory of each to the system.
"""

import sys

import pytest

from skillnet.rust_panics import panics_as_errors
from tests.helpers.processes import run_python


class PanicException(BaseException):
    """Like that of pyo3, which no module exports."""


def test_panic_becomes_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"^x\.bin is damaged \(the library failed: index 9\)$"):  # noqa: SIM117
        with panics_as_errors("x.bin is damaged"):
            raise PanicException("index 9\nnote: run with RUST_BACKTRACE=1")


def test_panic_of_a_real_library_becomes_a_value_error() -> None:
    from tokenizers import Regex, Tokenizer, models, normalizers

    # A pattern of exponential cost: the library unwraps the error of its engine.
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Replace(Regex("(a+)+b"), "")
    with pytest.raises(ValueError, match=r"cannot be used .*retry-limit"):  # noqa: SIM117
        with panics_as_errors("cannot be used"):
            made.encode("a" * 40)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, MemoryError])
def test_other_exceptions_pass(error: type[BaseException]) -> None:
    with pytest.raises(error), panics_as_errors("x"):
        raise error


#: In MB what two threads, one after the other, have left with the process, before and after.
LEAVES = """
import threading, psutil
from skillnet.precision import give_back_freed_memory, keep_freed_memory

assert keep_freed_memory()
held = lambda: psutil.Process().memory_info().rss >> 20

def work():
    rows = [bytearray(b"x" * 2**18) for _ in range(800)]
    keeps.append(rows[-1])  # the top of its arena is in use, so none of it goes back by itself

keeps, before = [], held()
for _ in range(2):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
kept = held()
assert give_back_freed_memory()
print(kept - before, held() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_what_threads_freed_goes_back_to_the_system() -> None:
    done = run_python("-c", LEAVES, check=True)
    kept, left = map(int, done.stdout.split())
    assert kept > 150
    assert left < 50
