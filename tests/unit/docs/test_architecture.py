"""The architecture page names files that exist."""

import re
from pathlib import Path

from skillnet.skills import default_tasks, find_task

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_files_that_the_page_names_exist() -> None:
    names = set(re.findall(r"`([\w./-]+/[\w./-]*)`", PAGE))
    assert len(names) > 20
    assert sorted(name for name in names if not (ROOT / name).exists()) == []


#: Title of a flow -> most stations; a reader visits one file at each of them.
FLOWS = {"corpus row to shard": 16, "batch to loss": 13, "skill name to product": 10}


def read_flow(title: str) -> str:
    return PAGE.partition(f": {title}\n")[2].partition("\n## ")[0]


def test_each_flow_lists_few_files_in_order() -> None:
    for title, most in FLOWS.items():
        steps = [int(n) for n in re.findall(r"^\| (\d+) \|", read_flow(title), re.MULTILINE)]
        assert steps == list(range(1, len(steps) + 1))
        assert 1 < len(steps) <= most, title


def test_the_page_leads_from_a_task_to_the_file_of_its_loss() -> None:
    objective = find_task("text_to_image", default_tasks()).objective
    file = f"skillnet/objectives/{objective}.py"
    assert f"`{file}`" in read_flow("batch to loss")
    assert "def compute_loss" in (ROOT / file).read_text(encoding="utf-8")
