"""The table of the corpora that a rule labels: ``python -m tools.docs.label_tables --write``.

Classes come from the manifests. Chance and the simple reference are those of
``skillnet evaluate --simple_baselines``, on the split ``test``. Without ``--write`` the table is
printed; with it, the table replaces the one in docs/corpora.md.
"""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.measure import machine
from pipelines.data.shards.dataset import open_corpus
from pipelines.training.evaluation.simple_baselines import evaluate_simple_baselines
from skillnet.skills import SkillPlan, Task
from skillnet_evidence.cells import markdown_table
from skillnet_platform.config import safe_yaml
from skillnet_platform.storage import data_root
from tools.docs.page_marks import put

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "corpora.md"
PRESET = ROOT / "configs" / "prepare" / "stream.yaml"
HEADER = ("task", "classes", "chance, %", "simple reference, %")


def main(argv: list[str] | None = None) -> int:
    """Measure the corpora of the preset, and print or write their table."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs.label_tables", description=__doc__)
    parser.add_argument("--data", type=Path, help="prepared corpora (default: the run root's)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/corpora.md")
    options = parser.parse_args(argv)
    preset = safe_yaml.load_plain_yaml(PRESET.read_text(encoding="utf-8"))
    rows = [build_row(options.data or data_root(), name) for name in preset["corpus"]]
    text = markdown_table(HEADER, rows)
    about = f"{len(rows)} tasks, seed 0; {machine()}, {datetime.now(UTC).date()}."
    if options.write:
        put(PAGE, "labels", f"{text}\n\n{about}")
    else:
        print(f"{text}\n\n{about}")
    return 0


def build_row(data: Path, name: str) -> list[str]:
    """Return the row of a task.

    Args:
        data: directory of prepared corpora.
        name: corpus and task.
    """
    corpus = open_corpus(data / name)
    classes = len(corpus.manifest["labels"])
    plan = SkillPlan(("general", corpus.modality), corpus.modality)
    task = Task("classification", {"input": plan}, outputs=classes)
    rows = evaluate_simple_baselines(
        data, {name: task}, ["test"], corpora={name: name}, bootstrap_samples=0, use_cache=False
    )
    accuracy = {
        row["system"]: f"{100 * row['value']:.1f}" for row in rows if row["metric"] == "accuracy"
    }
    return [f"`{name}`", str(classes), accuracy["chance"], accuracy["simple_baseline"]]


if __name__ == "__main__":
    sys.exit(main())
