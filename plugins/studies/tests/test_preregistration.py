"""The preregistration states the settings of its study and the claims in their order."""

import re
from pathlib import Path
from typing import Any

import yaml

from skillnet_platform import config as configuration
from skillnet_studies.config.study import StudyConfig

PAGE = Path(__file__).parents[3] / "docs/study/preregistration.md"


def load_study() -> StudyConfig:
    return configuration.parse_config(
        StudyConfig, ["--config", "studies/final"], "skillnet compare"
    )


def test_the_settings_of_the_page_are_those_of_the_study():
    tree = configuration.flatten_tree(configuration.to_dict(load_study()))
    stated = re.findall(r"^\| `([\w.-]+)` \| (.+?) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert len(stated) >= 14
    for key, text in stated:
        assert tree[key] == yaml.safe_load(text), key


def test_the_claims_of_the_page_are_those_of_the_study_in_order():
    config = load_study()
    rows: list[tuple[str, str]] = re.findall(
        r"^\| \d \| ([\w ]+) \| (.+) \|$", PAGE.read_text("utf-8"), re.MULTILINE
    )
    stated: list[Any] = [(name, config.claims.stated[name].text) for name in config.claims.order]
    assert rows == stated
    assert sorted(config.claims.stated) == sorted(config.claims.order)
    replicates = {
        label: config.run.fold.count * len(config.seeds_of(label)) for label in config.systems
    }
    named = {p.system for c in config.claims.stated.values() for p in c.parts}
    named |= {p.against for c in config.claims.stated.values() for p in c.parts}
    assert named <= replicates.keys()
    assert {replicates[label] for label in named} == {14}
