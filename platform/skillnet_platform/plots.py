"""Kit of all plots: colours, markers, axes, and the encodings of a figure.

Colours (source: Okabe & Ito 2008) are distinguishable with colour vision deficiency. Markers differ
too, for prints in grey.
"""

import base64
import io
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#8C564B")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")


def make_figure(width: float, height: float) -> "Figure":
    """Return an empty figure.

    Args:
        width: in inches.
        height: in inches.
    """
    from matplotlib.figure import Figure

    # A Figure without pyplot has no global state and needs no display in a training process.
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def style_axes(axes: Any) -> None:
    """Remove the top and right border of axes, and draw a light grid.

    Args:
        axes: of matplotlib.
    """
    axes.tick_params(labelsize=8, color="#999999")
    axes.grid(True, color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def show_dollars() -> AbstractContextManager[None]:
    """Return a context in which dollar signs in names are not parsed as formulas."""
    import matplotlib

    return matplotlib.rc_context({"text.parse_math": False})


def encode_svg(figure: "Figure") -> str:
    """Return a figure as SVG; text is drawn as outlines, without external fonts.

    Args:
        figure: of matplotlib.
    """
    import matplotlib

    buffer = io.StringIO()
    # Dates and versions would make equal figures differ.
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "skillnet"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata=metadata)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def encode_png(figure: "Figure") -> bytes:
    """Return a figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def encode_svg_uri(figure: "Figure") -> str:
    """Return a figure as SVG in a data URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(encode_svg(figure).encode()).decode()


def encode_png_uri(figure: "Figure") -> str:
    """Return a figure as PNG in a data URI."""
    return "data:image/png;base64," + base64.b64encode(encode_png(figure)).decode()
