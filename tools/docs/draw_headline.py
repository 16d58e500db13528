"""Draw the figure of the headline study: ``python -m tools.docs.draw_headline [FOLDER]``.

Reads ``summary.csv`` of the committed study and draws the mean score of each system with its 95 %
interval, without and with pretraining, beside the system's cost.
"""

import csv
import sys
from pathlib import Path

from tools.docs.svg import SvgCanvas

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "benchmarks" / "results" / "2026-11-26-headline-five-seeds"
FIGURE = ROOT / "docs" / "assets" / "headline.svg"
PRETRAINED = "-pretrained"
#: Colour of SkillNet and of the other systems.
OWN, OTHER = "text", "general"


def read_means(folder: Path) -> dict[str, dict[str, float]]:
    """Return the mean score of each system, in points.

    Returns:
        System -> value, low, high (points), activated_params, flops_per_example.
    """
    with (folder / "summary.csv").open(encoding="utf-8", newline="") as stream:
        rows = [
            row
            for row in csv.DictReader(stream)
            if row["task"] == "mean" and not row["metric"].startswith("relative")
        ]
    return {
        row["system"]: {
            **{key: 100 * float(row[key]) for key in ("value", "low", "high")},
            **{key: float(row[key]) for key in ("activated_params", "flops_per_example")},
        }
        for row in rows
    }


def draw_headline(means: dict[str, dict[str, float]]) -> SvgCanvas:
    """Return the figure: one row per system, a ring without and a disc with pretraining."""
    names = [name for name in means if not name.endswith(PRETRAINED)]
    names.sort(key=lambda name: -means[name]["value"])
    first, last, left, right, top, step = 46, 62, 130, 560, 78, 44
    canvas = SvgCanvas(
        760, top + step * len(names) + 76, "Mean score of each system with its interval"
    )

    def to_x(value: float) -> float:
        return left + (value - first) / (last - first) * (right - left)

    bottom = top + step * len(names)
    canvas.draw_text(24, 32, "Mean score over five tasks, points", bold=True, size=15)
    canvas.draw_text(736, 32, "under revision: intervals too short", "image", 13, "end", bold=True)
    canvas.draw_text(left, 56, "95 % interval over seeds and test rows", "muted", 12)
    canvas.draw_text(660, 56, "active", "muted", 12, "end")
    canvas.draw_text(736, 56, "MFLOPs", "muted", 12, "end")
    for tick in range(first, last + 1, 4):
        canvas.draw_line([(to_x(tick), top - 8), (to_x(tick), bottom)], "empty", 1)
        canvas.draw_text(to_x(tick), bottom + 18, str(tick), "muted", 12, "middle")
    for row, name in enumerate(names):
        y = top + step * row + 14
        color = OWN if name == "skillnet" else OTHER
        canvas.draw_text(24, y + 9, name, color if name == "skillnet" else "ink", 13, bold=True)
        for shift, key in ((0, name), (14, name + PRETRAINED)):
            if key in means:
                each = means[key]
                canvas.draw_line(
                    [(to_x(each["low"]), y + shift), (to_x(each["high"]), y + shift)], color, 2.5
                )
                canvas.draw_dot(to_x(each["value"]), y + shift, 5, color, hollow=key == name)
        millions = means[name]["activated_params"] / 1e6
        canvas.draw_text(660, y + 9, f"{millions:.2f} M", "ink", 13, "end")
        canvas.draw_text(
            736, y + 9, f"{means[name]['flops_per_example'] / 1e6:.0f}", "ink", 13, "end"
        )
    legend = bottom + 50
    canvas.draw_dot(left + 8, legend, 5, OTHER, hollow=True)
    canvas.draw_text(left + 20, legend + 4.5, "without pretraining", "muted", 12)
    canvas.draw_dot(left + 178, legend, 5, OTHER)
    canvas.draw_text(left + 190, legend + 4.5, "with pretraining", "muted", 12)
    return canvas


def main(argv: list[str] | None = None) -> int:
    """Write the figure."""
    arguments = sys.argv[1:] if argv is None else argv
    draw_headline(read_means(Path(arguments[0]) if arguments else STUDY)).save(FIGURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
