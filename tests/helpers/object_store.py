"""An S3-compatible server on loopback for tests: moto's, behind a door that can be shut.

The server keeps objects in its memory. A shut door is a store that is away for a while (its
connections are refused or cut); a killed server, started again, is one that lost everything.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.helpers.ports import free_port
from tests.helpers.waiting import wait_for_answer

BUCKET = "skillnet-test"
KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Door:
    """A way to a port on loopback that can be shut and opened again."""

    def __init__(self, behind: int) -> None:
        self._behind, self.port = behind, free_port()
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.unshut()

    def unshut(self) -> None:
        """Let connections through."""
        listener = socket.create_server(("127.0.0.1", self.port), reuse_port=False)
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def shut(self) -> None:
        """Cut all connections and refuse new ones."""
        with self._lock:
            listener, self._listener = self._listener, None
            waiting, self._open = self._open, set()
        if listener is not None:
            # A thread that waits in accept() holds the socket open until it is woken.
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for one in waiting:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._behind), timeout=30)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            with self._lock:
                if self._listener is not listener:
                    client.close()
                    server.close()
                    return
                self._open |= {client, server}
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
            with self._lock:
                self._open.discard(one)


class ObjectStore:
    """The server and its door. ``uri`` is a place that tests may fill.

    Args:
        checks_keys: refuse keys that the server did not give out, once the bucket is there.
    """

    uri = f"s3://{BUCKET}"

    def __init__(self, checks_keys: bool = False) -> None:
        self._checks_keys = checks_keys
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()
        self.door = Door(self._port)

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to find the store and be let in."""
        return {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.door.port}"}

    def start(self) -> None:
        """Start the server, with an empty bucket."""
        command = shutil.which("moto_server", path=str(Path(sys.executable).parent))
        assert command is not None, "moto_server is not installed: pip install -e .[dev]"
        # The first request, which makes the bucket, is let through.
        checks = {"INITIAL_NO_AUTH_ACTION_COUNT": "1"} if self._checks_keys else {}
        self._process = subprocess.Popen(
            [command, "-H", "127.0.0.1", "-p", str(self._port)],
            env={**os.environ, **KEYS, **checks},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        address = f"http://127.0.0.1:{self._port}"
        wait_for_answer(f"{address}/moto-api/data.json", 600, process=self._process)
        self.create(BUCKET)

    def kill(self) -> None:
        """End the server; what it held is gone."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def close(self) -> None:
        """End everything."""
        self.door.shut()
        if self._process is not None:
            self.kill()

    def create(self, bucket: str) -> None:
        """Make a bucket."""
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self._port}",
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=bucket)


@contextlib.contextmanager
def in_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a while, and file systems that know only them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("AWS_"):
                patch.delenv(name)
        for name, value in values.items():
            patch.setenv(name, value)
        forget_clients()
        yield
    forget_clients()


def forget_clients() -> None:
    """Drop fsspec's cached S3 file systems, because they read the environment only once."""
    with contextlib.suppress(ImportError):
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
