"""Decoding of media files in child processes, for commands and servers that must outlive them.

``skillnet prepare`` decodes in Ray workers, which may die
(:mod:`pipelines.data.transforms.decode_guard`). A prediction has no such worker: a decoder in C or
Rust that hangs, holds Python's lock or exhausts memory would end the command, or the server with
all requests. :func:`decode_media` therefore sends the bytes to a child process with the same guard,
and ends the child if it does not answer.

Children are started at their first use and reused. Several threads may call it at the same time.
A message is the length of its header, the header as JSON, and the raw bytes of a file or an array.
"""

import atexit
import contextlib
import json
import os
import queue
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from pipelines.data.transforms import decode_guard
from pipelines.data.transforms.decode_guard import WorkBudget
from skillnet.modality import find_modality, modality_names

#: Memory that a child may take beyond what it needs to start.
MEMORY_BYTES = 4 * 2**30
#: Seconds that a child gets beyond the limit of a decoder, to reject the file by itself.
GRACE_S = 5.0
#: Seconds between looks at the budget of a request.
LOOK_S = 0.05
#: Kinds of a list of texts, which a tokenizer reads, or a regular expression.
TOKENS, MATCHES = "tokens", "matches"
#: Seconds until a child is ready; importing the decoders takes one on an idle machine.
START_S = 120.0
#: Children of this process.
MAX_CHILDREN = max(2, min(4, os.cpu_count() or 1))
ENDED = "decoding ended its process (too much memory, or a damaged file)"

#: A result: an array, or a list of plain values.
Decoded = Any
_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from pipelines.data.transforms.decoder_process import serve_requests; "
    "serve_requests(int(sys.argv[2]), int(sys.argv[3]))"
)


class DecoderEndedError(ValueError):
    """A file made its decoder hang or end; decoding it in this process would end this process."""


def decode_media(
    kind: str,
    data: bytes,
    *options: Any,
    seconds: float = decode_guard.DECODE_TIMEOUT_S,
    budget: WorkBudget | None = None,
) -> Decoded:
    """Decode a file in a child process.

    Args:
        kind: modality of the file; ``tokens`` tokenizes a list of texts, and ``matches`` searches
            a pattern in them.
        data: bytes of the file, or the texts as JSON.
        options: further arguments of the decoder, see :func:`find_decoder`.
        seconds: wall time for the file.
        budget: seconds and cancellation of the request that the file belongs to; it shortens the
            time, and ends the child when it is stopped.

    Returns:
        The result of the decoder; for ``code`` a dictionary per function, for ``tokens`` a list of
        ids per text, for ``matches`` a label or None per text.

    Raises:
        ValueError: the file is damaged, or takes too much time or memory; gives a short reason.
        DecoderEndedError: the decoder did not return by itself.
    """
    return _pool().decode(kind, data, options, seconds, budget)


def find_decoder(kind: str) -> Callable[..., Decoded]:
    """Return the function that decodes a kind of file: a modality, ``tokens`` or ``matches``."""
    from pipelines.data.transforms import text

    def tokenize(data: bytes, path: str, limit: int) -> list[list[int]]:
        tokenizer = text.load_checked_tokenizer(path)
        return text.list_ids(tokenizer, json.loads(data), limit)

    if kind == TOKENS:
        return tokenize
    if kind == MATCHES:
        return lambda data, *rule: text.find_labels(json.loads(data), *rule)
    decode: Callable[..., Decoded] = find_modality(kind).file_half.decode
    return decode


def serve_requests(descriptor: int, memory: int) -> None:
    """Answer the requests of a parent process until it closes the connection.

    Args:
        descriptor: file number of the socket.
        memory: bytes that decoders may take.
    """
    channel = socket.socket(fileno=descriptor)
    # Before the memory is limited, because importing a decoder can need more.
    decoders = {kind: find_decoder(kind) for kind in (*modality_names(), TOKENS, MATCHES)}
    _limit_memory(memory)
    _send(channel, {"ready": True})
    while True:
        try:
            request, data = _receive(channel)
        except ConnectionError:
            return
        read = partial(_decode, decoders[request["kind"]], request["options"])
        [(result, reason)] = decode_guard.decode_each([data], read, request["seconds"])
        if reason is not None:
            _send(channel, {"reason": reason})
        elif isinstance(result, np.ndarray):
            array = np.ascontiguousarray(result)
            _send(channel, {"shape": array.shape, "dtype": str(array.dtype)}, array.tobytes())
        else:
            _send(channel, {"value": result})


def _decode(decoder: Callable[..., Decoded], options: list[Any], data: bytes) -> Decoded:
    return decoder(data, *options)


class DecoderProcess:
    """Child process that decodes one file after the other.

    Args:
        memory: bytes that decoders may take.

    Raises:
        RuntimeError: the child does not start.
    """

    def __init__(self, memory: int = MEMORY_BYTES) -> None:
        self._channel, other = socket.socketpair()
        words = [json.dumps(sys.path), str(other.fileno()), str(memory)]
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, *words],
                pass_fds=(other.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # Decoders print warnings about damaged files, which the reason replaces.
                stderr=subprocess.DEVNULL,
            )
        try:
            self._channel.settimeout(START_S)
            _receive(self._channel)
        except OSError as error:
            self.close()
            raise RuntimeError(f"the process that decodes media did not start ({error})") from None
        except BaseException:
            self.close()
            raise

    def decode(
        self,
        kind: str,
        data: bytes,
        options: tuple[Any, ...],
        seconds: float,
        budget: WorkBudget | None = None,
    ) -> Decoded:
        """Decode a file; see :func:`decode_media`.

        Raises:
            ValueError: the file is bad; the child is usable.
            ConnectionError, TimeoutError: the child is not usable any more; close it.
        """
        grace = GRACE_S if budget is None else min(GRACE_S, seconds)
        self._channel.settimeout(seconds + grace)
        _send(self._channel, {"kind": kind, "options": options, "seconds": seconds}, data)
        if budget is not None:
            self._wait_for_answer(seconds + grace, budget)
        answer, body = _receive(self._channel)
        if "reason" in answer:
            raise ValueError(answer["reason"])
        if "value" in answer:
            return answer["value"]
        return np.frombuffer(body, answer["dtype"]).reshape(answer["shape"]).copy()

    def _wait_for_answer(self, seconds: float, budget: WorkBudget) -> None:
        end = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        while not poll.poll(1000 * LOOK_S):
            if budget.is_stopped or time.monotonic() > end:
                raise TimeoutError

    def exceeded_cpu_time(self) -> bool:
        """Return whether the guard's limit of CPU time ended the child."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(GRACE_S) == -signal.SIGPROF
        return False

    def close(self) -> None:
        """End the child."""
        self._channel.close()
        self._process.kill()
        self._process.wait()


class DecoderPool:
    """Children that threads share; a thread waits if all of them are busy.

    Args:
        memory: bytes that decoders of a child may take.
    """

    def __init__(self, memory: int = MEMORY_BYTES) -> None:
        self._memory = memory
        self._slots = threading.BoundedSemaphore(MAX_CHILDREN)
        self._idle: queue.LifoQueue[DecoderProcess] = queue.LifoQueue()

    def decode(
        self,
        kind: str,
        data: bytes,
        options: tuple[Any, ...],
        seconds: float,
        budget: WorkBudget | None = None,
    ) -> Decoded:
        """Decode a file; see :func:`decode_media`."""
        with self._slots:
            for is_last in (False, True):
                if budget is not None:
                    seconds = min(seconds, budget.rest)
                    if not seconds:
                        raise ValueError(decode_guard.NO_TIME_LEFT)
                try:
                    return self._decode_once(kind, data, options, seconds, budget)
                # An idle child may have ended for another reason, such as a lack of memory.
                except ConnectionError:
                    if is_last:
                        raise DecoderEndedError(ENDED) from None
            raise AssertionError("unreachable")

    def _decode_once(
        self,
        kind: str,
        data: bytes,
        options: tuple[Any, ...],
        seconds: float,
        budget: WorkBudget | None,
    ) -> Decoded:
        try:
            child = self._idle.get_nowait()
        except queue.Empty:
            child = DecoderProcess(self._memory)
        try:
            result = child.decode(kind, data, options, seconds, budget)
        except ValueError:
            self._idle.put(child)
            raise
        except TimeoutError:
            child.close()
            raise DecoderEndedError(decode_guard.describe_timeout(seconds)) from None
        except ConnectionError:
            is_timeout = child.exceeded_cpu_time()
            child.close()
            if is_timeout:
                raise DecoderEndedError(decode_guard.describe_timeout(seconds)) from None
            raise
        # Also Ctrl-C: the child may still be decoding.
        except BaseException:
            child.close()
            raise
        self._idle.put(child)
        return result

    def close(self) -> None:
        """End the children that are idle."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()


_LOCK = threading.Lock()
_shared: DecoderPool | None = None


def _pool() -> DecoderPool:
    """Return the pool of this process."""
    global _shared
    with _LOCK:
        if _shared is None:
            _shared = DecoderPool()
            atexit.register(_shared.close)
        return _shared


def _forget_pool() -> None:
    """Forget the children of the parent, after a fork: two processes would mix their requests."""
    global _shared, _LOCK
    _shared, _LOCK = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_pool)


def _limit_memory(extra: int) -> None:
    """Limit the address space of this process to its present size and ``extra`` bytes."""
    try:
        import resource
        from pathlib import Path

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    # Only Linux has both.
    except (ImportError, OSError):
        return
    limit = pages * resource.getpagesize() + extra
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _send(channel: socket.socket, header: dict[str, Any], body: bytes = b"") -> None:
    text = json.dumps(header | {"bytes": len(body)}).encode()
    channel.sendall(struct.pack("<Q", len(text)) + text)
    channel.sendall(body)


def _receive(channel: socket.socket) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", _read(channel, 8))
    header = json.loads(_read(channel, length))
    return header, _read(channel, header["bytes"])


def _read(channel: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        received = channel.recv_into(view[done:])
        if not received:
            raise ConnectionError("the other process ended")
        done += received
    return bytes(data)
