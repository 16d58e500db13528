"""The architecture page names files that exist, and the layers of the import contracts."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_files_that_the_page_names_exist() -> None:
    names = set(re.findall(r"`([\w./-]+/[\w./-]*)`", PAGE))
    assert len(names) > 20
    assert sorted(name for name in names if not (ROOT / name).exists()) == []


def test_each_flow_lists_its_files_in_order() -> None:
    for title in ("corpus row to shard", "batch to loss", "skill name from YAML"):
        section = PAGE.partition(title)[2].partition("\n## ")[0]
        steps = [int(number) for number in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) > 5


def test_the_layers_are_those_of_the_import_contracts() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for contract in project["tool"]["importlinter"]["contracts"]:
        for package in contract.get("containers", []):
            section = PAGE.partition(f"| `{package}` |")[2].partition("\n\n")[0]
            for layer in contract["layers"]:
                for name in layer.split(" | "):
                    assert f"`{name}`" in section, f"{package}: {name}"
