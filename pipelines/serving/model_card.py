"""Model card of an exported model: data, licences, figures with intervals, and cost per task."""

from collections.abc import Mapping
from typing import Any

import yaml

from pipelines.training.evaluation.tables import result_cells, sort_rows
from skillnet.multitask_model import TaskModel
from skillnet_evidence.cells import markdown_table

CARD_FILE = "README.md"


def render_card(manifest: Mapping[str, Any], model: TaskModel, name: str) -> str:
    """Return the card as Markdown with a YAML header, as the Hugging Face Hub reads it.

    Args:
        manifest: content of the model's ``serving.json``.
        model: network whose weights are read.
        name: title of the card.
    """
    tasks = {task: manifest["tasks"][task] for task in sort_rows(model.config.tasks)}
    header = {
        "library_name": "skillnet-platform",
        "tags": ["skillnet", *sorted({spec.objective for spec in model.config.tasks.values()})],
    }
    total = sum(parameter.numel() for parameter in model.parameters())
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {_one_line(name)}",
        f"A model of the system {model.system} with {total / 1e6:.1f} M parameters and the tasks "
        f"{', '.join(tasks)}.",
        "```python\nfrom skillnet import SkillNet\n\n"
        'model = SkillNet.from_pretrained("PATH or owner/name")\n```',
        "## Data",
        markdown_table(
            ["task", "corpus", "digest of the corpus", "licences of its sources"],
            [
                [
                    task,
                    _one_line(entry["corpus"]),
                    f"`{_one_line(entry['corpus_digest'])[:16]}`",
                    _one_line("; ".join(entry["licences"])) or "not recorded",
                ]
                for task, entry in tasks.items()
            ],
        ),
        "## Figures",
    ]
    rows = [row for row in manifest["evaluation"] if row["task"] in tasks]
    rows = [row for row in rows if row["value"] is not None]
    parts.append(markdown_table(*result_cells(rows)) if rows else "This model was not evaluated.")
    if rows:
        parts.append("Intervals of 95 % over held-out units of the test.")
    parts += ["## Cost", markdown_table(*_cost_cells(model, list(tasks), total))]
    steps = "an unknown number of" if manifest["steps"] is None else f"{manifest['steps']}"
    parts += [
        "## Training",
        f"Trained for {steps} steps. Written by skillnet-platform "
        f"{_one_line(manifest['package'])}; `serving.json` has all settings and hashes.",
    ]
    return "\n\n".join(parts) + "\n"


def _cost_cells(
    model: TaskModel, tasks: list[str], total: int
) -> tuple[list[str], list[list[str]]]:
    """Return columns and cells of what one example of a task reads and computes."""
    cells = []
    for task in tasks:
        active = model.activated_parameters(task)
        flops, tokens = model.flops(task)
        share = f"{active / 1e6:.1f} M ({100 * active / total:.0f} %)"
        cells.append([task, share, f"{flops / 1e9:.3g}", str(tokens)])
    return ["task", "activated parameters", "GFLOPs of the longest example", "tokens"], cells


def _one_line(text: str) -> str:
    # A name with a line break or markup could write other parts of the card.
    return " ".join(text.replace("<", "‹").replace("`", "'").split())
