"""Interpret the skills of a trained model: three tables, their figures, and an HTML page.

<folder>/
  interpretation.html     the figures with captions
  ablation.csv            score drop by plan change (see skillnet_studies.interpretation.ablation)
  similarity.csv          similarity of skills by layer (see
  skillnet_studies.interpretation.similarity)
  gradient_share.csv      gradient share by part (see
  skillnet_studies.interpretation.gradient_share)
  *.png                   the figures

The entry point is :func:`interpret_model`, called by ``skillnet interpret``.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillnet.model import SkillNet
from skillnet_platform.storage import atomic_write
from skillnet_studies.interpretation import ablation, gradient_share, similarity
from skillnet_studies.interpretation.ablation import measure_ablations
from skillnet_studies.interpretation.figures import draw_figures
from skillnet_studies.interpretation.gradient_share import measure_gradient_share
from skillnet_studies.interpretation.similarity import measure_skill_similarity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "interpretation.html"

#: Prefix of a figure's file name -> caption.
CAPTIONS = {
    "ablation": "The same weights with one skill added to or removed from the task's plan. "
    "Positive values are a score drop. Bold: the interval over held-out units, paired by row, "
    "excludes 0. The figure shows the skills that this model uses, not the score of a model that "
    "was trained without a skill.",
    "swaps": "An active skill of the task is replaced by another skill, with the same weights. "
    "Empty: the other skill is active already.",
    "gradient_share": "Squared gradient of training batches, without dropout and augmentation. "
    "Larger parts have larger shares.",
    "similarity_weights": "Skills are initialized independently, so cosines start at 0. Higher "
    "values come from training, or from growth by copying.",
    "similarity": "Each skill alone, on the input of the module when the task runs with its own "
    "plan. Equal inputs make outputs similar even without training: compare with the last row, an "
    "untrained skill.",
}


@dataclass(frozen=True)
class SkillInterpretation:
    """Tables of a model's interpretation.

    Args:
        model: name of the model, for titles.
        skills: skills of the model, in order.
        ablations: rows of :func:`skillnet_studies.interpretation.ablation.measure_ablations`.
        similarity: rows of
            :func:`skillnet_studies.interpretation.similarity.measure_skill_similarity`.
        gradients: rows of
            :func:`skillnet_studies.interpretation.gradient_share.measure_gradient_share`.
        facts: name -> value of the provenance.
    """

    model: str
    skills: tuple[str, ...]
    ablations: list[dict[str, Any]]
    similarity: list[dict[str, Any]]
    gradients: list[dict[str, Any]]
    facts: dict[str, str] = field(default_factory=dict)

    def figures(self) -> "dict[str, Figure]":
        """Draw the figures; return file name -> figure."""
        return draw_figures(self.ablations, self.similarity, self.gradients, self.skills)

    def tables(self) -> dict[str, tuple[Sequence[str], list[dict[str, Any]]]]:
        """Return file name -> (columns, rows) of the CSV files."""
        return {
            "ablation.csv": (ablation.COLUMNS, self.ablations),
            "similarity.csv": (similarity.COLUMNS, self.similarity),
            "gradient_share.csv": (gradient_share.COLUMNS, self.gradients),
        }

    def write(self, folder: Path) -> list[Path]:
        """Write all files to a directory; return their paths, the HTML page first."""
        from skillnet_evidence.plot_kit import encode_png
        from skillnet_platform.tables import write_csv
        from skillnet_studies.report.report import render_template

        # PNG, because the thousands of numbers of a deep model make SVG outlines too large.
        drawn = {name: encode_png(figure) for name, figure in self.figures().items()}
        encoded = [
            {
                "name": _title(name),
                "uri": "data:image/png;base64," + base64.b64encode(data).decode(),
                "caption": find_caption(name),
            }
            for name, data in drawn.items()
        ]
        # Images are embedded, so that the page can be moved without its directory.
        page = render_template("interpretation.html", {"interpretation": self, "figures": encoded})
        with atomic_write(folder / PAGE, "w") as stream:
            stream.write(page)
        for name, (columns, rows) in self.tables().items():
            write_csv(folder / name, rows, columns, digits="")
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
    metrics: Mapping[str, str | None] | None = None,
    swaps: bool = True,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> SkillInterpretation:
    """Interpret a trained model by ablations, similarity of skills and gradient shares.

    Args:
        model: a trained SkillNet; it is not changed.
        data: directory of prepared corpora.
        tasks: task names; None takes all tasks with a headline metric.
        split: split for ablations and output similarity; gradients use ``train``.
        name: name of the model, for titles.
        corpora: task -> corpus, if it is not the built-in corpus.
        limits: task -> maximum sequence length, as in training.
        metrics: task -> metric that ranks its models; others have the primary one.
        swaps: also replace each active skill by each other skill.
        on_progress: see ``on_change`` of :func:`measure_ablations`.

    Raises:
        UserError: an unknown task, or a corpus that does not fit.
    """
    common: dict[str, Any] = {"corpora": corpora, "limits": limits}
    ablations = measure_ablations(
        model, data, tasks, split, metrics=metrics, swaps=swaps, on_change=on_progress, **common
    )
    similarities = measure_skill_similarity(model, data, tasks, split, **common)
    gradients = measure_gradient_share(model, data, tasks, **common)
    skills = tuple(model.config.skills)
    facts = {"split": split}
    return SkillInterpretation(name, skills, ablations, similarities, gradients, facts)


def find_caption(name: str) -> str:
    """Return the caption of a figure.

    Args:
        name: file name of the figure.
    """
    return next(text for prefix, text in CAPTIONS.items() if name.startswith(prefix))


def _title(name: str) -> str:
    return name.removesuffix(".png").replace("_", " ").capitalize()
