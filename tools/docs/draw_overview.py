"""Draw the two diagrams of the README: ``python -m tools.docs.draw_overview``.

``overview.svg`` shows five inputs, one encoder, and the skills that each task activates, read from
the default tasks of ``skillnet.skills``. ``pipeline.svg`` shows the commands from corpus to search.
"""

import sys
from pathlib import Path

from skillnet.skills import DEFAULT_SKILLS, Task, default_tasks
from tools.docs.svg import SvgCanvas

ASSETS = Path(__file__).resolve().parents[2] / "docs" / "assets"

#: From top to bottom, so that few connections cross.
MODALITIES = ("sound", "text", "code", "image", "video")
ROWS = (
    ("speech_recognition", "audio to characters"),
    ("text_classification", "text to class"),
    ("text_to_code", "text finds code"),
    ("text_to_image", "text finds images"),
    ("text_to_video", "text finds videos"),
)
INPUT_LABELS = {"sound": "audio"}
#: Command -> (line below it, column, row of the pipeline).
STAGES = (
    ("fetch", "download", 0, 0),
    ("prepare", "Ray Data", 1, 0),
    ("pretrain", "Ray Train", 2, -0.5),
    ("finetune", "Ray Train", 2, 0.5),
    ("evaluate", "intervals", 3, 0),
    ("register", "MLflow", 4, 0),
    ("predict", "label, text", 5, -0.5),
    ("search", "ranked page", 5, 0.5),
)
EDGES = (
    ("fetch", "prepare"),
    ("prepare", "pretrain"),
    ("prepare", "finetune"),
    ("finetune", "evaluate"),
    ("evaluate", "register"),
    ("register", "predict"),
    ("register", "search"),
)


def draw_overview() -> SvgCanvas:
    """Return the diagram of inputs, encoder and tasks."""
    tasks = default_tasks()
    top, step, left, cell = 96, 46, 236, 62
    right = left + cell * len(DEFAULT_SKILLS)
    canvas = SvgCanvas(
        right + 206, top + step * len(ROWS) + 52, "Five inputs, one encoder, active skills per task"
    )
    canvas.draw_text(30, 40, "inputs", "muted", bold=True)
    canvas.draw_text(
        (left + right) / 2,
        34,
        "one encoder, split into skills",
        bold=True,
        size=15,
        anchor="middle",
    )
    canvas.draw_text(right + 30, 40, "tasks", "muted", bold=True)
    bottom = top + step * len(ROWS)
    canvas.draw_box(left - 10, 46, right - left + 20, bottom - 40, "panel", radius=10)
    for column, skill in enumerate(DEFAULT_SKILLS):
        canvas.draw_text(
            left + cell * (column + 0.5), top - 22, skill, skill, 12.5, "middle", bold=True
        )
    center = {name: top + step * (row + 0.5) - 4 for row, name in enumerate(MODALITIES)}
    for row, (name, _) in enumerate(ROWS):
        for modality in _modalities(tasks[name]):
            offset = {"text": -5, modality: 5}[modality] if len(_modalities(tasks[name])) > 1 else 0
            y = top + step * (row + 0.5) - 4
            canvas.draw_curve((112, center[modality]), (left - 12, y + offset), modality)
    for name, y in center.items():
        canvas.draw_box(28, y - 15, 84, 30, name, radius=15)
        canvas.draw_text(70, y + 4.5, INPUT_LABELS.get(name, name), "page", 13, "middle", bold=True)
    for row, (name, caption) in enumerate(ROWS):
        y = top + step * row
        for column, skill in enumerate(DEFAULT_SKILLS):
            active = skill in tasks[name].skills
            canvas.draw_box(
                left + cell * column + 5, y + 2, cell - 10, step - 12, skill if active else "empty"
            )
        canvas.draw_arrow((right + 12, y + step / 2 - 4), (right + 26, y + step / 2 - 4))
        canvas.draw_text(right + 32, y + step / 2 - 7, name, bold=True, size=12.5)
        canvas.draw_text(right + 32, y + step / 2 + 9, caption, "muted", 12)
    canvas.draw_text(
        (left + right) / 2,
        bottom + 30,
        "grey: inactive, not loaded, not updated, not communicated",
        "muted",
        12.5,
        "middle",
    )
    return canvas


def draw_pipeline() -> SvgCanvas:
    """Return the diagram of the commands from corpus to prediction."""
    width, height, gap, middle = 104, 46, 32, 84
    canvas = SvgCanvas(6 * (width + gap) + 16, 168, "Commands from corpus to search")
    place = {
        name: (24 + column * (width + gap), middle + row * 76 - height / 2)
        for name, _, column, row in STAGES
    }
    for name, caption, _, _ in STAGES:
        x, y = place[name]
        canvas.draw_box(x, y, width, height, "panel", radius=8, outlined=True)
        canvas.draw_text(x + width / 2, y + 20, name, anchor="middle", bold=True, size=14)
        canvas.draw_text(x + width / 2, y + 36, caption, "muted", 11.5, "middle")
    for source, target in EDGES:
        x0, y0 = place[source][0] + width, place[source][1] + height / 2
        x1, y1 = place[target][0], place[target][1] + height / 2
        turn = (x0 + x1) / 2
        canvas.draw_line([(x0, y0), (turn, y0), (turn, y1)], "muted")
        canvas.draw_arrow((turn, y1), (x1 - 2, y1))
    x, y = place["pretrain"]
    canvas.draw_arrow((x + width / 2, y + height), (x + width / 2, place["finetune"][1] - 2))
    return canvas


def _modalities(task: Task) -> list[str]:
    return list(dict.fromkeys(plan.modality for plan in task.towers.values()))


def main() -> int:
    """Write both diagrams."""
    draw_overview().save(ASSETS / "overview.svg")
    draw_pipeline().save(ASSETS / "pipeline.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
