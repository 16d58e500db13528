"""What the skills of a trained model do: three tables, their pictures, and a page of both.

<folder>/
  interpretation.html     the pictures with words
  knockout.csv            points lost by change of plan (see sweeps.interpretation.ablation)
  similarity.csv          likeness of skills by layer (see sweeps.interpretation.similarity)
  gradient_share.csv      where the gradient goes (see sweeps.interpretation.gradient_share)
  *.png                   the pictures
"""

import base64
import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillnet.model import SkillNet
from skillnet_platform.storage import atomic_write
from sweeps.interpretation import ablation as knockout_module
from sweeps.interpretation import gradient_share as gradients_module
from sweeps.interpretation import similarity as similarity_module
from sweeps.interpretation.ablation import measure_ablations
from sweeps.interpretation.figures import draw_figures
from sweeps.interpretation.gradient_share import measure_gradient_share
from sweeps.interpretation.similarity import measure_skill_similarity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "interpretation.html"

#: Words below the figures, by the beginning of their names.
CAPTIONS = {
    "knockout": "The same weights with one skill more or less in the task's plan. Positive: the "
    "task is worse off. Bold: the interval over test rows, paired by row, excludes 0. It says what "
    "this model uses, not what a model trained without the skill would reach.",
    "swaps": "Another skill in the place of one that the task activates, on the same weights. "
    "Empty: the other is active there already.",
    "gradient_share": "Squared gradient of training batches, without dropout and augmentation. "
    "Large parts count by their size.",
    "similarity_weights": "Skills are drawn apart, so cosines start at 0: what is above it was "
    "learnt alike, or comes from growth by copying.",
    "similarity": "Each skill alone on what the module gets when the task runs with its own plan. "
    "The same input makes outputs alike even if nothing was learnt: compare with the last line, a "
    "skill of fresh weights.",
}


@dataclass(frozen=True)
class SkillInterpretation:
    """Tidy rows of a model's interpretation.

    Args:
        model: what was interpreted, for titles.
        skills: of the model, in order.
        knockout: of :func:`sweeps.interpretation.ablation.measure_ablations`.
        similarity: of :func:`sweeps.interpretation.similarity.measure_skill_similarity`.
        gradients: of :func:`sweeps.interpretation.gradient_share.measure_gradient_share`.
        facts: name -> value, how it was made.
    """

    model: str
    skills: tuple[str, ...]
    ablations: list[dict[str, Any]]
    similarity: list[dict[str, Any]]
    gradients: list[dict[str, Any]]
    facts: dict[str, str] = field(default_factory=dict)

    def figures(self) -> "dict[str, Figure]":
        """File name -> figure; drawn at each call."""
        return draw_figures(self.ablations, self.similarity, self.gradients, self.skills)

    def tables(self) -> dict[str, tuple[Sequence[str], list[dict[str, Any]]]]:
        """File name -> (columns, rows)."""
        return {
            "knockout.csv": (knockout_module.COLUMNS, self.ablations),
            "similarity.csv": (similarity_module.COLUMNS, self.similarity),
            "measure_gradient_share.csv": (gradients_module.COLUMNS, self.gradients),
        }

    def write(self, folder: Path) -> list[Path]:
        """Write all of it into a folder; the paths, the page first."""
        from sweeps.report.html import render_template
        from sweeps.report.plots import encode_png

        # As pixels: as outlines, the thousands of numbers of a deep model make a page too heavy.
        drawn = {name: encode_png(figure) for name, figure in self.figures().items()}
        encoded = [
            {
                "name": _title(name),
                "uri": "data:image/png;base64," + base64.b64encode(data).decode(),
                "caption": find_caption(name),
            }
            for name, data in drawn.items()
        ]
        page = render_template("interpretation.html", {"interpretation": self, "figures": encoded})
        with atomic_write(folder / PAGE, "w") as stream:
            stream.write(page)
        for name, (columns, rows) in self.tables().items():
            with atomic_write(folder / name, "w") as stream:
                writer = csv.DictWriter(stream, columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
        for name, data in drawn.items():
            with atomic_write(folder / name) as stream:
                stream.write(data)
        return [folder / name for name in (PAGE, *self.tables(), *drawn)]


def interpret_model(
    model: SkillNet,
    data: str | Path,
    tasks: Sequence[str] | None = None,
    split: str = "test",
    *,
    name: str = "a model",
    corpora: Mapping[str, str] | None = None,
    limits: Mapping[str, int | None] | None = None,
    swaps: bool = True,
    tokens: int = 2048,
    batches: int = 8,
    seed: int = 0,
    bootstrap_samples: int = 1000,
    precision: str = "auto",
    on_progress: Callable[[str, int], None] | None = None,
) -> SkillInterpretation:
    """Interpret a trained model: knock-outs, likeness of skills, shares of the gradient.

    Args:
        model: a trained SkillNet; nothing of it changes.
        data: directory of prepared corpora.
        tasks: names; none takes all that are measured by a headline figure.
        split: that knock-outs are measured and outputs compared on; gradients are of ``train``.
        name: of the model, for titles.
        corpora: task -> corpus, where it is not the built-in one.
        limits: task -> longest sequence, as in training.
        swaps: also put each other skill in the place of each active one.
        tokens: see :func:`sweeps.interpretation.similarity.measure_skill_similarity`.
        batches: training batches of each task for the gradient.
        seed: of the choice of rows and of resampling.
        bootstrap_samples: resamplings of each interval.
        precision: see :class:`pipelines.evaluation.inference.Runner`.
        on_progress: called with words and the rows before each measurement.

    Raises:
        UserError: an unknown task, or corpora that do not fit.
    """
    common: dict[str, Any] = {"corpora": corpora, "limits": limits, "seed": seed}
    lost = measure_ablations(
        model,
        data,
        tasks,
        split,
        swaps=swaps,
        bootstrap_samples=bootstrap_samples,
        precision=precision,
        on_change=on_progress,
        **common,
    )
    alike = measure_skill_similarity(model, data, tasks, split, tokens=tokens, **common)
    shares = measure_gradient_share(
        model,
        data,
        tasks,
        batches=batches,
        bootstrap_samples=bootstrap_samples,
        precision=precision,
        **common,
    )
    return SkillInterpretation(
        name, tuple(model.config.skills), lost, alike, shares, {"split": split}
    )


def find_caption(name: str) -> str:
    """Words below the figure of that file name."""
    return next(words for start, words in CAPTIONS.items() if name.startswith(start))


def _title(name: str) -> str:
    return name.removesuffix(".png").replace("_", " ").capitalize()


__all__ = [
    "Interpretation",
    "caption_of",
    "figures",
    "gradient_share",
    "interpret",
    "knockout_table",
    "skill_similarity",
]
