"""Lanes of tests: CI tests each seam, and no test is in no lane."""

import ast
import re
import shlex
import subprocess
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from _pytest.mark.expression import Expression

ROOT = Path(__file__).parents[3]
OPTIONS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
LANES = ("test", "test-long", "test-all", "test-cluster", "test-cluster-all", "test-node")

#: Lanes that CI runs over a change.
CI = {"test", "test-long", "test-cluster"}

#: Seam -> file and name of a test that CI runs.
SEAMS = {
    "prepare into a store": (
        "test_cloud_stores.py",
        "test_a_users_corpus_goes_from_the_store_into_the_store",
    ),
    "a run in a store that resumes": ("test_mirror.py", "test_an_empty_disk_resumes_to_the_bit"),
    "a store that goes away": ("test_mirror.py", "test_training_outlives_the_store"),
    "two workers of Ray": ("test_finetune.py", "test_two_ray_workers_reach_the_same_weights"),
    "a killed worker, and a killed driver": (
        "test_faults.py",
        "test_a_worker_and_then_the_driver_killed",
    ),
    "a number of workers that changes": (
        "test_faults.py",
        "test_an_elastic_run_continues_with_the_nodes_that_are_left",
    ),
    "a killed prepare": (
        "test_killed_commands.py",
        "test_a_command_killed_at_a_file_event_leaves_complete_files_and_resumes",
    ),
    "SIGTERM": ("test_prepare.py", "test_a_prepare_that_is_asked_to_leave_says_so_in_one_line"),
    "a sweep": ("test_sweeps.py", "test_asha_a_failure_and_a_resumed_sweep"),
    "a study": ("test_compare.py", "test_a_study_runs_and_resumes"),
    "growths as jobs": (
        "test_grow.py",
        "test_growths_of_one_command_are_the_bits_of_growths_one_by_one",
    ),
    "a server of a model": (
        "test_serve.py",
        "test_one_replica_needs_no_ray_and_ends_with_its_decoders",
    ),
    "a killed registration": (
        "test_registration.py",
        "test_a_registration_killed_after_any_write_is_completed_once",
    ),
    "a tracker that goes away": ("test_tracker_away.py", "test_away_for_a_while"),
    "a tracker with a password": (
        "test_tracking_server.py",
        "test_a_call_without_credentials_is_rejected",
    ),
    "a cluster": ("test_walk.py", "test_ray_up_and_status"),
    "a job on a cluster": ("test_walk.py", "test_training_on_two_hosts"),
    "the tutorial": ("test_tutorial.py", "test_the_tutorial_runs_as_printed"),
}


class CollectedTest(NamedTuple):
    """Test function with the marks of all its cases, and those of one case or more."""

    marks: frozenset[str]
    case_marks: frozenset[str]


def marks_in(nodes: list[ast.expr]) -> frozenset[str]:
    return frozenset(
        node.attr
        for given in nodes
        for node in ast.walk(given)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pytest.mark"
    )


def functions_in(body: list[ast.stmt], inherited: frozenset[str]) -> dict[str, CollectedTest]:
    found: dict[str, CollectedTest] = {}
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            inherited |= marks_in([node.value])
    for node in body:
        if isinstance(node, ast.ClassDef):
            found |= functions_in(node.body, inherited | marks_in(node.decorator_list))
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            cases = [each for each in node.decorator_list if "parametrize" in ast.unparse(each)]
            own = [each for each in node.decorator_list if each not in cases]
            found[node.name] = CollectedTest(inherited | marks_in(own), marks_in(cases))
    return found


@pytest.fixture(scope="module")
def sources() -> dict[Path, str]:
    paths = [path for root in OPTIONS["testpaths"] for path in (ROOT / root).rglob("test_*.py")]
    return {path: path.read_text(encoding="utf-8") for path in paths}


@pytest.fixture(scope="module")
def tests(sources: dict[Path, str]) -> dict[str, CollectedTest]:
    """``file.py::test`` -> its marks."""
    return {
        f"{path.name}::{name}": test
        for path, text in sources.items()
        for name, test in functions_in(ast.parse(text).body, frozenset()).items()
    }


@pytest.fixture(scope="module")
def lanes() -> dict[str, Expression]:
    """Target of make -> the expression by which it selects tests."""
    found = {}
    for lane in LANES:
        shown = subprocess.run(
            ["make", "--dry-run", "--no-print-directory", lane],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.replace("\\\n", " ")  # fmt: skip
        (line,) = (each for each in shown.splitlines() if "-m pytest" in each)
        words = shlex.split(OPTIONS["addopts"]) + shlex.split(line.partition("-m pytest")[2])
        chosen = [word for option, word in pairwise(words) if option == "-m"]
        found[lane] = Expression.compile(chosen[-1])
    return found


def lanes_of(marks: frozenset[str], lanes: dict[str, Expression]) -> set[str]:
    return {lane for lane, chosen in lanes.items() if chosen.evaluate(lambda name: name in marks)}


@pytest.mark.parametrize("seam", SEAMS)
def test_each_seam_has_a_test_in_ci(
    seam: str, tests: dict[str, CollectedTest], lanes: dict[str, Expression]
) -> None:
    test = tests["::".join(SEAMS[seam])]
    assert lanes_of(test.marks, lanes) & CI


def test_no_test_is_in_no_lane(
    tests: dict[str, CollectedTest], lanes: dict[str, Expression]
) -> None:
    assert lanes_of(frozenset(), lanes) == {"test", "test-all"}
    assert lanes_of(frozenset({"slow", "integration"}), lanes) == {"test-all"}
    assert lanes_of(frozenset({"long", "integration"}), lanes) == {"test-long", "test-all"}
    assert lanes_of(frozenset({"long", "slow"}), lanes) == {"test-all"}
    assert lanes_of(frozenset({"cluster"}), lanes) == {"test-cluster", "test-cluster-all"}
    assert lanes_of(frozenset({"cluster", "slow"}), lanes) == {"test-cluster-all"}
    lost = [
        name
        for name, test in tests.items()
        for marks in (test.marks, test.marks | test.case_marks)
        if not lanes_of(marks, lanes)
    ]
    assert lost == []


def test_a_slow_test_names_a_cheaper_one_that_ci_runs(
    sources: dict[Path, str], tests: dict[str, CollectedTest], lanes: dict[str, Expression]
) -> None:
    siblings = []
    for path, text in sources.items():
        if "mark.slow(" not in text:
            continue
        calls = [
            node
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("mark.slow")
        ]
        siblings += [ast.literal_eval(node.args[0]) for node in calls]
        assert len(calls) == len(re.findall(r"[.]mark[.]slow\b", text)), path
    assert siblings
    lost = {each for each in siblings if each not in tests or "slow" in tests[each].marks}
    assert lost == set()
    assert all(lanes_of(tests[each].marks, lanes) & CI for each in siblings)


def test_ci_runs_its_lanes() -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert {lane for lane in CI if re.search(rf"step ({lane}\s|.*:-{lane}}})", script)} == CI


def test_ci_checks_names_words_and_imports() -> None:
    """No test repeats these checks of the whole repository."""
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert re.search(r"^ *step check$", script, re.M)
    rules = (ROOT / "Makefile").read_text(encoding="utf-8").split("\ncheck:")[1].split("\n\n")[0]
    assert {"$(BIN)/lint-imports", "$(BIN)/python -m tools.style.check"} <= {
        line.strip() for line in rules.splitlines()
    }


def test_ci_has_a_longer_way_every_night() -> None:
    """The installed wheels train, and the walk through a cluster is whole."""
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    way = script.partition('if [ "${1:-test}" = test-all ]; then')[2].partition("fi\n")[0]
    night, change = (part.split("\n") for part in way.split("else\n"))
    assert [line.strip() for line in night if line.strip()] == [
        "step release",
        "step test-cluster-all",
    ]
    assert "step wheels" in [line.strip() for line in change]


def test_the_workflow_runs_the_slow_tests_every_night() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    assert {"schedule", "workflow_dispatch"} <= workflow[True].keys()  # YAML 1.1 reads "on" so
    job = workflow["jobs"]["test-all"]
    assert "schedule" in job["if"]
    assert "bash .ci/run test-all" in [step.get("run") for step in job["steps"]]
