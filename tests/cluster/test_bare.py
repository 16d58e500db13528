"""A bare Debian becomes a node: ``setup_node.sh`` installs there all that a job needs.

The walk's hosts borrow an environment that is there already. Here a host begins as debootstrap
leaves it, without pip, venv or a package of ours: it installs what is pinned, is set up a second
time without a network, and trains. That takes ten gigabytes and the network's time, so it is no
part of the walk.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.utils import canonicalize_name
from packaging.version import Version

from skillnet_cluster import pin_nodes
from skillnet_cluster.submit import SOURCE_FOLDERS
from skillnet_platform import config as configuration
from tests.chaos.namespaces import ROOT, SEARCH, missing
from tests.helpers.small_corpora import small_config, write_corpora

pytestmark = pytest.mark.bare
#: What docs/cluster.md asks of a machine, and the certificates of its package servers. Its ssh
#: server and rsync are left out: nobody logs in here.
PACKAGES = "python3,iproute2,ca-certificates"
SUITE = "trixie"
#: How this machine reaches its package servers, as far as it has such files.
NETWORK = ("/etc/resolv.conf", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")
VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
RUNS = "/mnt/skillnet"
INSTALL = f"SKILLNET_HOME={RUNS} bash ~/.skillnet/deploy/setup_node.sh install"
#: The lines of on_prem.yaml that start a head, and a job by plain Ray.
TRAIN = f"""
. ~/.skillnet/env.sh
export SKILLNET_INTERFACE=lo RAY_ADDRESS=http://127.0.0.1:8265
settings="$(bash ~/.skillnet/deploy/setup_node.sh settings)" && eval "$settings"
ray start --head --port=6379 --node-ip-address=$SKILLNET_NODE_IP --dashboard-host=127.0.0.1 \\
    --num-cpus=2
cd /code
ray job submit --working-dir . --runtime-env-json \\
    '{{"env_vars": {{"PYTHONPATH": "{os.pathsep.join(SOURCE_FOLDERS)}"}}}}' \\
    -- python -m skillnet_platform.cli finetune --config /mnt/skillnet/run.yaml
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The root of a file system as debootstrap leaves it, with what `ray up` copies there."""
    if reason := missing("debootstrap"):
        pytest.skip(reason.partition(" (")[0])
    root = tmp_path_factory.mktemp("bare") / "root"
    try:
        made = subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, root, *mirror()],
            env={**os.environ, "PATH": SEARCH},
            capture_output=True,
            text=True,
        )
        if made.returncode:
            pytest.skip(f"no Debian to be had: {made.stdout[-500:]}{made.stderr[-500:]}")
        copy_network(root)
        shutil.copytree(ROOT / "platform/deploy", root / "root/.skillnet/deploy")
        pins = root / "root/.skillnet/deploy/requirements.txt"
        pins.write_text(pin_nodes.format_requirements())
        (root / "root/.ray").mkdir()
        (root / "root/.ray/auth_token").write_text("0123456789abcdef" * 4)
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def mirror() -> list[str]:
    """The package server that this machine uses, if it is a Debian."""
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    if shutil.which(asked[0]) is None:
        return []
    said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    return [uri for uri in said if uri.rstrip("/").endswith("/debian")][:1]


def copy_network(root: Path) -> None:
    for path in (*NETWORK, f"{Path.home()}/.config/pip"):
        source = Path(path)
        there = root / ("root/.config/pip" if source.name == "pip" else path.lstrip("/"))
        if source.is_dir():
            shutil.copytree(source, there, dirs_exist_ok=True)
        elif source.is_file():
            shutil.copy(source, there)
    if shutil.which("apt-config"):
        dumped = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True)
        reported = [line for line in dumped.stdout.splitlines() if line.startswith("Acquire::")]
        (root / "etc/apt/apt.conf.d/99-as-here").write_text("\n".join(reported) + "\n")


def inside(root: Path, script: str, network: bool = True) -> str:
    """What a script says that runs there as root, and sees no other process."""
    kept = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    kept |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    mounts = "mount -t proc none proc; mount --rbind /dev dev; mount -t tmpfs none dev/shm"
    wheels = [path for path in kept.get("PIP_FIND_LINKS", "").split() if Path(path).is_dir()]
    for path in wheels:
        (root / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
        mounts += f"; mount --bind {path} .{path}"
    if not network:
        mounts += "; ip link set lo up"
    done = subprocess.run(
        [
            *("unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"),
            *([] if network else ["--net"]),
            *("bash", "-euc", f'{mounts}; exec chroot . "$@"', "chroot"),
            *("/usr/bin/env", "-i", *(f"{name}={value}" for name, value in kept.items())),
            *("HOME=/root", "LANG=C.UTF-8", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"),
            *("bash", "-euc", script),
        ],
        cwd=root,
        env={**os.environ, "PATH": SEARCH},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def test_a_bare_machine_installs_what_is_pinned(machine: Path) -> None:
    inside(machine, INSTALL)
    pinned = pin_nodes.pin_packages(pin_nodes.read_dependencies())
    listed = json.loads(inside(machine, "~/.skillnet/venv/bin/python -m pip list --format json"))
    there: dict[str, str] = {
        canonicalize_name(each["name"]): Version(each["version"]).public for each in listed
    }
    assert {name: there.get(name) for name in pinned} == pinned
    assert not any(name.startswith("skillnet") for name in there), "our code comes with each job"


def test_a_second_set_up_needs_no_network(machine: Path) -> None:
    inside(machine, INSTALL, network=False)


def test_a_job_trains_there(machine: Path) -> None:
    for name in ("platform", "skillnet", "pipelines", "sweeps", "configs"):
        shutil.copytree(ROOT / name, machine / "code" / name)
    shutil.copy(ROOT / "pyproject.toml", machine / "code")
    runs = machine / RUNS.lstrip("/")
    write_corpora(runs / "corpora")
    config = small_config(Path(RUNS) / "corpora", workers=2, steps=6)
    config.name, config.run_dir, config.tracking.register = "bare", f"{RUNS}/runs", False
    (runs / "run.yaml").write_text(yaml.safe_dump(configuration.to_dict(config)))
    said = inside(machine, TRAIN, network=False)
    assert "6/6 steps" in said
    trained = json.loads((runs / "runs/bare/trained.json").read_text())
    assert (trained["world"], trained["step"]) == (2, 6)
