"""Parts of figures: palette, canvas, axes, curves and files, also for training runs and sweeps.

Colours (source: Okabe & Ito 2008) are distinguishable with colour vision deficiency. Markers differ
too, for prints in grey.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from skillnet_evidence.format import format_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Colour-blind safe palette (source: Okabe & Ito 2008).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#8C564B")
#: One marker per family of systems, for prints in grey.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")

#: Metric -> (step, value) pairs.
MetricHistory = Mapping[str, Sequence[tuple[int, float]]]


def make_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of some inches, which needs no display."""
    from matplotlib.figure import Figure

    # A Figure without pyplot has no global state.
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def style_axes(axes: Any) -> None:
    """Remove the top and right border of axes, and draw a light grid.

    Args:
        axes: panel of a matplotlib figure.
    """
    axes.tick_params(labelsize=8, color="#999999")
    axes.grid(True, color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def smooth_series(values: np.ndarray, fraction: float = 0.05) -> np.ndarray:
    """Return the centred running mean of a series; the window is shorter at both ends.

    Args:
        values: (N,)
        fraction: window length as a fraction of N.
    """
    half = max(int(len(values) * fraction / 2), 1)
    # Prefix sums: the work does not grow with the window.
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def mark_cost_axis(panel: Any) -> None:
    """Set the ticks of a logarithmic axis of costs: a few round numbers with units.

    Args:
        panel: axes of matplotlib, whose limits are set.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    low, high = panel.get_xlim()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    # The coarsest set of round numbers with at least three ticks.
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [step * 10.0**power for power in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) > 2:
            break
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    panel.xaxis.set_minor_formatter(NullFormatter())


def show_dollars() -> AbstractContextManager[None]:
    """Return a context in which dollar signs in names of systems are not parsed as formulas."""
    import matplotlib

    return matplotlib.rc_context({"text.parse_math": False})


def encode_svg(figure: "Figure") -> str:
    """Return a figure as SVG; text is drawn as outlines, without external fonts.

    Args:
        figure: drawn by matplotlib.
    """
    import matplotlib

    buffer = io.StringIO()
    # Dates and versions would make equal figures differ.
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "skillnet"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata=metadata)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def encode_svg_uri(figure: "Figure") -> str:
    """Return a figure as SVG in a data URI; text is drawn as outlines, without external fonts."""
    body = encode_svg(figure).encode()
    return "data:image/svg+xml;base64," + base64.b64encode(body).decode()


def encode_png_uri(figure: "Figure") -> str:
    """Return a figure as PNG in a data URI."""
    return "data:image/png;base64," + base64.b64encode(encode_png(figure)).decode()


def encode_png(figure: "Figure") -> bytes:
    """Return a figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
