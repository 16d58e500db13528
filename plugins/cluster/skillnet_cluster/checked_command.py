"""The command that ``doctor`` and ``submit`` are about: its options, resources and versions.

``doctor.py``, ``submit.py`` and the checks call these functions.
"""

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

from skillnet_platform import cli, storage
from skillnet_platform.cluster.resource_request import ResourceRequest
from skillnet_platform.errors import UserError, suggest_name
from skillnet_platform.package_version import find_version

#: Options of ``doctor`` and ``submit`` that take no value.
VALUELESS_OPTIONS = ("json", "help", "detach")
PACKAGES = ("torch", "ray", "mlflow", "pyarrow", "tokenizers", "safetensors", "numpy")
#: Environment variable with the versions of the job's sender, for the checks inside the job.
VARIABLE = "SKILLNET_VERSIONS"


def split_own_options(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into own options and the command that they are about.

    ``--detach finetune --config tiny`` gives ``[--detach]`` and ``[finetune, --config, tiny]``.

    Args:
        argv: arguments of ``doctor`` or ``submit``.

    Returns:
        The options before the first bare word, and the rest.
    """
    own: list[str] = []
    rest = list(argv)
    while rest and rest[0].startswith("--") and rest[0] != "--":
        word = rest.pop(0)
        own.append(word)
        if word == "--help" and rest[:1] == ["all"]:
            own.append(rest.pop(0))
        if "=" not in word and word[2:] not in VALUELESS_OPTIONS and rest:
            own.append(rest.pop(0))
    return own, rest[1:] if rest[:1] == ["--"] else rest


def request_resources(arguments: Sequence[str]) -> ResourceRequest:
    """Return the resource request of a command line such as ``finetune --training.workers 2``.

    Args:
        arguments: name of a command and its arguments. Empty for no command.

    Raises:
        UserError: an unknown command, or arguments that the command rejects.
    """
    if not arguments:
        return ResourceRequest()
    name, *rest = arguments
    known = cli.find_commands()
    if name not in known:
        raise UserError(f"unknown command {name!r}{suggest_name(name, known)}")
    loaded = known[name].load()
    request = loaded.request_resources(rest) if isinstance(loaded, cli.CliCommand) else None
    return request if isinstance(request, ResourceRequest) else ResourceRequest()


def runs_directory(run_dir: str) -> Path:
    """Return the directory of runs. An empty ``run_dir`` means the run root."""
    return Path(run_dir).expanduser() if run_dir else storage.run_root()


def estimate_checkpoint_bytes(request: ResourceRequest) -> int:
    """Return the bytes that the checkpoints of a run still need, with one checkpoint to spare.

    The estimate uses the checkpoints of a run that resumes, or three times the bytes of a local
    model that the run starts from: the optimizer keeps two values per weight.

    Returns:
        Bytes. 0 if neither is known.
    """
    run = runs_directory(request.run_dir) / request.run_name if request.run_name else None
    folder = run / "checkpoints" if run is not None else None
    written = (
        [_directory_bytes(each) for each in folder.glob("step-*")]
        if folder is not None and folder.is_dir()
        else []
    )
    models = [Path(model) for model in request.models if not written]
    expected = [3 * _directory_bytes(model) for model in models if model.is_dir()]
    largest = max([*written, *expected], default=0)
    # The oldest checkpoint leaves only when a newer one is complete, hence one more.
    return largest * max(request.keep_checkpoints + 1 - len(written), 1) if largest else 0


def _directory_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and the packages in this process; "" if not installed.

    A local part such as +cpu is dropped: it marks the same code for another device.
    """
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        found[name] = find_version(name).partition("+")[0]
    return found


def version_variable() -> dict[str, str]:
    """Return the environment variable with the versions installed here, for a job."""
    return {VARIABLE: json.dumps(installed_versions())}


def expected_versions() -> dict[str, str]:
    """Return the versions of the sender of this job; empty outside of a job."""
    sent = json.loads(os.environ.get(VARIABLE) or "{}")
    return {str(key): str(value) for key, value in sent.items()}
