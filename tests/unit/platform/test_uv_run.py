"""Workers keep the driver's interpreter under a real ``uv run``, and nothing is uploaded."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray._private import ray_constants

from skillnet_platform.cluster import connect

ROOT = Path(__file__).parents[3]

#: Ray is imported before the settings are made, as a notebook may do it.
DRIVER = """
import json, ray, sys
from skillnet_platform import cluster
with cluster.ray_session(cpus=1) as ray:
    from ray._private.runtime_env.uv_runtime_env_hook import hook
    worker = ray.get(ray.remote(lambda: sys.executable).remote(), timeout=120)
    environment = dict(ray.get_runtime_context().runtime_env)
    print(json.dumps([sys.executable, worker, environment, hook({})]))
"""


def find_uv() -> str | None:
    """Return the uv beside this interpreter, or on PATH."""
    beside = Path(sys.executable).with_name("uv")
    return str(beside) if beside.is_file() else shutil.which("uv")


def test_a_process_that_imported_ray_first_ignores_uv_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object, **options: object) -> None:
        raise InterruptedError

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV", True)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(connect, "start_embedded_ray", start)
    with pytest.raises(InterruptedError):
        connect.ensure_ray(cpus=1)
    assert not ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV


@pytest.mark.integration
@pytest.mark.slow("test_uv_run.py::test_a_process_that_imported_ray_first_ignores_uv_run")
def test_workers_keep_their_interpreter_under_uv_run(tmp_path: Path) -> None:
    uv = find_uv()
    if uv is None:
        pytest.skip("uv is not installed: pip install -e '.[dev]'")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = {
        **inherited,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}",
        "SKILLNET_HOME": str(tmp_path / "runs"),
        "UV_CACHE_DIR": str(tmp_path / "cache"),
        "UV_OFFLINE": "1",
    }
    done = subprocess.run(
        [uv, "run", "--no-project", "--python", sys.executable, "python", "-c", DRIVER],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    driver, worker, runtime_env, hooked = json.loads(done.stdout.splitlines()[-1])
    assert worker == driver
    assert not {"py_executable", "working_dir"} & set(runtime_env)
    # Without the setting Ray would have changed both: it did detect `uv run`.
    assert "uv run" in hooked["py_executable"]
    assert hooked["working_dir"] == str(tmp_path)
