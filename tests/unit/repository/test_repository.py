"""Guards of the house: floors, sizes, names, presets, and that it installs both ways."""

import ast
import json
import os
import re
import subprocess
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from skillnet_platform import cli, config
from tests.helpers.processes import run_python
from tools.release import build_wheels

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = (
    "skillnet",
    "pipelines",
    "platform/skillnet_platform",
    "platform/skillnet_files",
    "sweeps",
)
COMMANDS = PROJECT["project"]["entry-points"]["skillnet.commands"]
PRESETS = sorted((ROOT / "configs").rglob("*.yaml"))
LONGEST_FILE = 700


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_nothing_shadows_the_standard_librarys_platform() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert not (ROOT / "platform.py").exists()
    code = "import sys; sys.path.insert(0, '.'); import platform; print(platform.system())"
    assert run_python("-c", code, cwd=ROOT).stdout.strip() == "Linux"


def test_tests_live_in_tests_only() -> None:
    strays = [
        path
        for path in sources(*PACKAGES, "benchmarks", "lab")
        if path.name.startswith("test_") or path.name == "conftest.py"
    ]
    assert strays == []


def test_a_file_holds_one_idea() -> None:
    lengths = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n")
        for path in sources(*PACKAGES, "benchmarks", "lab")
    }
    too_long = {name: count for name, count in lengths.items() if count > LONGEST_FILE}
    assert too_long == {}


def test_every_module_and_public_name_is_described() -> None:
    bare = []
    for path in sources(*PACKAGES):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(tree) and path.read_text().strip():
            bare.append(str(path.relative_to(ROOT)))
        for node in tree.body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"
            if public and not ast.get_docstring(node):
                bare.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert bare == []


def test_nothing_is_unpickled() -> None:
    forbidden = re.compile(r"\btorch\.load\(|\bpickle\b\.|import pickle|\byaml\.load\(|cloudpickle")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sources(*PACKAGES, "benchmarks", "lab")
        for line in path.read_text(encoding="utf-8").splitlines()
        if forbidden.search(line)
    ]
    assert found == []


def test_the_help_lists_exactly_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    listed = re.findall(r"^  ([\w-]+)  +\S", capsys.readouterr().out, re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)


#: Runs command lines in one process; the first that loads a heavy library is named.
RUN_LINES = """
import json, sys
from skillnet_platform import cli
expected, lines = json.loads(sys.argv[1])
for line in lines:
    print('>', line, file=sys.stderr, flush=True)
    code = cli.main(line.split())
    heavy = {'torch', 'ray', 'mlflow'} & set(sys.modules)
    if code != expected or heavy:
        sys.exit(f'{line}: exit code {code}, imports {heavy}')
"""


def run_lines(code: int, lines: list[str], home: Path) -> "subprocess.CompletedProcess[str]":
    given = json.dumps([code, lines])
    done = run_python("-c", RUN_LINES, given, cwd=home, variables={"SKILLNET_HOME": str(home)})
    assert done.returncode == 0, done.stderr
    return done


def test_no_help_of_a_command_imports_anything_heavy(tmp_path: Path) -> None:
    shown = run_lines(0, [f"{name} --help" for name in sorted(COMMANDS)], tmp_path).stdout
    assert re.findall(r"^usage: skillnet ([\w-]+)", shown, re.MULTILINE) == sorted(COMMANDS)
    assert shown.count("example:") == len(COMMANDS)


#: Command lines with a mistake, and words of its message.
MISTAKES = {
    "predict": "no input",
    "predict missing.png": "missing.png: no such file",
    "predict --input missing.jsonl": "missing.jsonl: no such file",
    "predict --input {folder} --output {folder}/out --model missing": "missing: no folder",
    "predict --text a --model missing": "missing: no folder",
    "predict --text a --model {folder}": "holds no complete model",
    "predict --text a --precision fp8": "precision",
    "search": "the query is empty",
    "search --file missing.png": "missing.png: no such file",
    "search a --model missing": "missing: no folder",
    "evaluate missing": "missing: no folder",
    "export --model missing": "missing: no folder",
    "register missing": "missing: no folder",
    "interpret missing": "missing: no folder",
    "verify missing": "missing: no folder",
    "merge missing other": "missing: no folder",
    "grow --from missing --config {folder}/grow.yaml": "missing: no folder",
    "serve --model missing": "missing: no folder",
    "pack missing": "missing: no folder",
    "add missing.skill --to missing": "missing: no saved model",
    "remove a --from missing": "missing: no saved model",
    "skills missing": "missing: no saved model",
    "plan": "give --gpus",
    "plan --gpus 4xNONE": "NONE",
    "plan --gpus 4xL4 finetune --config missing": "missing",
    "sweep": "the space is empty",
    "compare": "nothing to compare",
    "finetune --data {folder}": "missing. Run `skillnet prepare",
    "finetune --config missing": "missing",
    "pretrain --data {folder}": "missing. Run `skillnet prepare",
    "prepare --corpus tnews=missing": "no such file or folder",
    "inspect missing": "no such file or folder",
    "init-task missing": "no such file or folder",
}


def test_a_mistake_is_reported_without_torch(tmp_path: Path) -> None:
    folder = tmp_path / "no-model"
    folder.mkdir()
    tower = "{modality: text, skills: [general]}"
    task = f"{{name: a, towers: {{input: {tower}}}, training: {{corpus: a}}}}"
    (folder / "grow.yaml").write_text(f"task: {task}")
    done = run_lines(2, [line.format(folder=folder) for line in MISTAKES], tmp_path)
    for said, expected in zip(done.stderr.split("> ")[1:], MISTAKES.values(), strict=True):
        assert expected in " ".join(said.split()), said


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_presets_parse(path: Path) -> None:
    """The folder of a preset says which command reads it, except for the stream of tasks."""
    from lab.task_stream import StreamConfig
    from pipelines.prepare import PrepareConfig
    from pipelines.training.config.growth import GrowConfig
    from pipelines.training.config.run import FinetuneConfig, PretrainConfig
    from skillnet_studies.config.study import StudyConfig
    from sweeps.config.sweep import SweepConfig

    kinds: dict[str, type] = {
        "claims": StudyConfig,
        "grow": GrowConfig,
        "prepare": PrepareConfig,
        "pretrain": PretrainConfig,
        "studies": StudyConfig,
        "sweeps": SweepConfig,
    }
    place = path.relative_to(ROOT / "configs")
    kind = kinds.get(place.parts[0].removesuffix(".yaml"), FinetuneConfig)
    kind = StreamConfig if place == Path("studies/stream.yaml") else kind
    made = config.parse_config(kind, ["--config", str(path)], prog="skillnet")
    if isinstance(made, FinetuneConfig):
        assert set(made.tasks) <= set(made.model.tasks)


def test_upper_bounds_are_set() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    needed = [*PROJECT["project"]["dependencies"], *extras["train"], *extras["export"]]
    by_date = ("fsspec", "packaging")  # versioned by date: no bound would say anything
    open_ended = [each for each in needed if "<" not in each and not each.startswith(by_date)]
    assert open_ended == []


def test_the_version_is_said_once_and_the_same() -> None:
    from skillnet_platform import __version__

    assert PROJECT["project"]["version"] == __version__


def bare_environment(place: Path) -> Path:
    venv.EnvBuilder(with_pip=False, symlinks=True).create(place)
    return place / "bin" / "python"


def install(python: Path, *wheels: str | Path) -> None:
    words = ("--python", python, "install", "--no-deps", "--no-index", "--quiet", *wheels)
    done = run_python("-m", "pip", *words)
    assert done.returncode == 0, done.stderr


def run(python: Path, *words: str, cwd: Path) -> str:
    environment = {key: v for key, v in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


WHERE = (
    "import platform, skillnet_files.commit, skillnet_platform.errors, pipelines, sweeps\n"
    "import skillnet_evidence\n"
    "platform.system()\n"
    "for each in (skillnet_files.commit, skillnet_platform.errors, pipelines, skillnet_evidence):\n"
    "    print(each.__file__)"
)


def names_in(wheel: str) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.mark.integration
def test_the_wheel_installs_alone(tmp_path: Path) -> None:
    evidence, wheel = map(str, build_wheels(tmp_path))
    of_platform, of_evidence = names_in(wheel), names_in(evidence)
    assert not [name for name in of_platform if name.startswith("skillnet_evidence")]
    for names in (of_platform, of_evidence):
        modules = {name.partition("/")[0] for name in names if name.endswith(".py")}
        typed = {name.partition("/")[0] for name in names if name.endswith("/py.typed")}
        assert typed == modules, "a type checker skips a package without py.typed"
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    python = bare_environment(tmp_path / "environment")
    install(python, evidence, wheel)
    places = run(python, "-c", WHERE, cwd=tmp_path).split()
    assert all(place.startswith(str(tmp_path / "environment")) for place in places), places
    shell = run(python.with_name("skillnet"), "--help", cwd=tmp_path)
    assert "quickstart" in shell
    package = Path(places[1]).parent
    assert (package / "configs" / "tiny.yaml").is_file(), "presets travel with the wheel"
    assert not (package.parent / "tests").exists()
    assert not (package.parent / "platform").exists()


@pytest.mark.integration
def test_the_editable_install_follows_the_checkout(tmp_path: Path) -> None:
    python = bare_environment(tmp_path / "environment")
    # What `pip install --editable` asks of the build backend, which the bare environment lacks.
    code = f"import hatchling.build; print(hatchling.build.build_editable({str(tmp_path)!r}))"
    projects = (ROOT, ROOT / "plugins" / "evidence")
    built = [run_python("-c", code, cwd=each, check=True).stdout for each in projects]
    wheels = [tmp_path / each.split()[-1] for each in built]
    install(python, *wheels)
    places = run(python, "-c", WHERE, cwd=tmp_path).split()
    assert places[0] == str(ROOT / "platform" / "skillnet_files" / "commit.py")
    assert places[1] == str(ROOT / "platform" / "skillnet_platform" / "errors.py")
    assert places[3].startswith(str(ROOT / "plugins" / "evidence"))
    assert "finetune" in run(python.with_name("skillnet"), "--help", cwd=tmp_path)
