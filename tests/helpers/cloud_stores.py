"""Google's and Azure's object stores as their emulators play them, on loopback, for tests.

gcp-storage-emulator comes with the development tools. Azurite, Azure's own, is a package of npm:
``make`` puts it into the environment where there is npm, else it may be on the PATH.
"""

import base64
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.ports import free_port
from tests.helpers.waiting import wait_for_answer

PLACE = "skillnet-test"
#: The account of every Azurite, from its documentation, and a key that this one alone takes.
ACCOUNT = "devstoreaccount1"
KEY = base64.b64encode(b"a key of the tests, on loopback alone").decode()


class CloudStore:
    """A server that is up, with one empty bucket or container.

    Args:
        uri: address of the bucket or container.
        environment: with which clients find it and are let in.
    """

    def __init__(self, uri: str, environment: dict[str, str], process: subprocess.Popen[bytes]):
        self.uri, self.environment, self._process = uri, environment, process

    def close(self) -> None:
        """End the server; what it held is gone."""
        self._process.kill()
        self._process.wait()


def google(folder: Path) -> CloudStore:
    """Google's, by gcp-storage-emulator, whose command stands beside Python's."""
    pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    command = shutil.which("gcp-storage-emulator", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("gcp-storage-emulator is not installed: pip install -e .[dev]")
    port = free_port()
    words = [command, "start", "--host", "127.0.0.1", "--port", str(port)]
    process = _started([*words, "--in-memory", "--default-bucket", PLACE], port, folder)
    return CloudStore(
        f"gs://{PLACE}",
        {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
            # Else it asks Google itself, over another way, what kind of bucket this is.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            # Nor asks whether this machine is one of Google's.
            "NO_GCE_CHECK": "true",
        },
        process,
    )


def azure(folder: Path) -> CloudStore:
    """Azure's, by Azurite."""
    pytest.importorskip("adlfs", reason="adlfs is not installed")
    from azure.storage.blob import BlobServiceClient

    own = Path(sys.prefix) / "azurite" / "node_modules" / ".bin"
    command = shutil.which("azurite-blob", path=f"{own}{os.pathsep}{os.environ.get('PATH', '')}")
    if command is None:
        pytest.skip("Azurite is not there: npm install --prefix .venv/azurite azurite")
    port = free_port()
    words = [command, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence"]
    # Clients are ahead of it: each month's asks for a version of the interface it does not know.
    words += ["--silent", "--disableTelemetry", "--skipApiVersionCheck"]
    process = _started(words, port, folder, AZURITE_ACCOUNTS=f"{ACCOUNT}:{KEY}")
    endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
    reported = f"AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={endpoint};"
    with BlobServiceClient.from_connection_string(reported) as client:
        client.create_container(PLACE)
    return CloudStore(f"abfs://{PLACE}", {"AZURE_STORAGE_CONNECTION_STRING": reported}, process)


def _started(
    words: list[str], port: int, folder: Path, **environment: str
) -> "subprocess.Popen[bytes]":
    """A server that answers on that port."""
    process = subprocess.Popen(
        words,
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}/"
    wait_for_answer(address, 600, lambda: words[0], process=process, accepts_refusal=True)
    return process


@contextlib.contextmanager
def reached(store: CloudStore) -> Iterator[None]:
    """That store alone, for clients of this process and of those that it starts."""
    import adlfs
    import gcsfs

    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("AZURE_", "GOOGLE_", "GCSFS_", "NO_GCE", "STORAGE_EMULATOR")):
                patch.delenv(name)
        for name, value in {**store.environment, "SKILLNET_STORE_PATIENCE": "60"}.items():
            patch.setenv(name, value)
        for system in (adlfs.AzureBlobFileSystem, gcsfs.GCSFileSystem):
            system.clear_instance_cache()
        yield
    for system in (adlfs.AzureBlobFileSystem, gcsfs.GCSFileSystem):
        system.clear_instance_cache()
