"""A preregistration states the settings and the claims of its study."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loading.samplers import TaskSampler
from skillnet.baselines.size_matching import executed_operations
from skillnet.systems import find_system
from skillnet_platform import config as configuration
from skillnet_studies.config.study import StudyConfig
from skillnet_studies.study.system_runs import build_base_run

PAGES = Path(__file__).parents[3] / "docs/study"


def load_study(name: str) -> StudyConfig:
    return configuration.parse_config(
        StudyConfig, ["--config", f"studies/{name}"], "skillnet compare"
    )


@pytest.mark.parametrize(("page", "name"), [("preregistration", "final"), ("scale", "scale")])
def test_the_settings_of_the_page_are_those_of_the_study(page: str, name: str) -> None:
    tree = configuration.flatten_tree(configuration.to_dict(load_study(name)))
    text = (PAGES / f"{page}.md").read_text("utf-8")
    stated = re.findall(r"^\| `([\w.-]+)` \| (.+?) \|$", text, re.MULTILINE)
    assert len(stated) >= 14
    for key, value in stated:
        assert tree[key] == yaml.safe_load(value), key


def test_the_claims_of_many_tasks_are_those_of_the_study() -> None:
    config = load_study("scale")
    rows: list[tuple[str, str, str]] = re.findall(
        r"^\| ([a-z ]+) \| ([A-Z].+) \| (\S+) \|$",
        (PAGES / "scale.md").read_text("utf-8"),
        re.MULTILINE,
    )
    stated = config.claims.stated
    assert [row[:2] for row in rows] == [(name, claim.text) for name, claim in stated.items()]
    limits = [
        "−2" if part.test == "not_lower" else "0"
        for claim in stated.values()
        for part in claim.parts
    ]
    assert [row[2] for row in rows] == limits
    assert not config.claims.order


def test_systems_of_many_tasks_differ_in_their_number_alone() -> None:
    config = load_study("scale")
    runs = {label: build_base_run(config, label, 0) for label in config.systems}
    weights = {name: task.weight for name, task in runs["skills-24"].tasks.items()}
    for label, run in runs.items():
        count = int(label.rpartition("-")[2])
        own = run.trained
        assert len(own) == count, label
        assert {name: task.weight for name, task in own.items()} == {n: weights[n] for n in own}
        # A weight is a number of steps beside any other tasks.
        total = sum(weights[name] for name in own)
        sampler = TaskSampler({name: weights[name] / total for name in own}, run.seed)
        assert sampler.count_steps(run.training.steps) == {n: weights[n] for n in own}, label
        assert set(run.model.skills) >= {s for n in own for s in run.model.tasks[n].skills}, label
    for count in (5, 10, 16, 24):
        ours = count_operations(runs[f"skills-{count}"])
        for label in (f"dense-{count}", f"moe-{count}", "modality-24"):
            if label.endswith(f"-{count}"):
                assert count_operations(runs[label]) == pytest.approx(ours, rel=0.01), label


def count_operations(run: FinetuneConfig) -> float:
    config = run.joint().model
    match = find_system(run.system).measure_size(config, run.options)
    return executed_operations(config) if match is None else match.reached


def test_the_claims_of_the_page_are_those_of_the_study_in_order() -> None:
    config = load_study("final")
    rows: list[tuple[str, str]] = re.findall(
        r"^\| \d \| ([\w ]+) \| (.+) \|$",
        (PAGES / "preregistration.md").read_text("utf-8"),
        re.MULTILINE,
    )
    stated: list[Any] = [(name, config.claims.stated[name].text) for name in config.claims.order]
    assert rows == stated
    assert sorted(config.claims.stated) == sorted(config.claims.order)
    named = {p.system for c in config.claims.stated.values() for p in c.parts}
    named |= {p.against for c in config.claims.stated.values() for p in c.parts}
    assert named <= config.systems.keys()
    assert config.run.fold.count * len(config.seeds) == 14
