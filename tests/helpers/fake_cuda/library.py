"""Build and load the library of the fake device. Import this module before torch."""

import ctypes
import importlib.util
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")


def find_torch() -> Path:
    """Return the folder of torch, without an import of torch."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def build_library(folder: Path) -> Path:
    """Compile the library, in some seconds.

    Args:
        folder: receives it.
    """
    path = folder / "fake_cuda.so"
    includes = find_torch() / "include"
    subprocess.run(
        ["g++", "-shared", "-fPIC", "-O0", "-std=c++20", f"-I{includes}", SOURCE, "-o", path],
        check=True,
    )
    return path


def load_library(path: Path) -> None:
    """Load the library, import torch, and install the fake device.

    Args:
        path: location of the library.
    """
    # The library takes its symbols from these.
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(find_torch() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(path))
    import torch  # noqa: F401

    library.install_guard()
