"""A process that runs several trials returns the memory of each to the system."""

import subprocess
import sys

import pytest

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
    done = subprocess.run(
        [sys.executable, "-c", LEAVES], capture_output=True, text=True, check=True
    )
    kept, left = map(int, done.stdout.split())
    assert kept > 150
    assert left < 50
