"""SVG drawings that are legible on a light and on a dark page.

Each drawing has its own opaque background, so it stays legible where a page's theme and the colour
scheme of the browser differ. Colours are CSS classes with a second value for the dark scheme.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

FONT = "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif"
#: Class -> (light, dark) colour of fills.
FILLS: dict[str, tuple[str, str]] = {
    "page": ("#ffffff", "#161b22"),
    "panel": ("#f3f5f8", "#21262d"),
    "empty": ("#e3e7ec", "#30363d"),
    "ink": ("#1f2933", "#e6edf3"),
    "muted": ("#52606d", "#a3adb8"),
    "general": ("#5b6b7f", "#8b9bb0"),
    "text": ("#2f6fb3", "#58a6ff"),
    "image": ("#b3541e", "#f0883e"),
    "code": ("#6d4aa8", "#b392f0"),
    "video": ("#b02a5b", "#f778ba"),
    "sound": ("#227a4b", "#56d364"),
    "alignment": ("#8a6d00", "#e3b341"),
}


class SvgCanvas:
    """An SVG drawing that collects shapes.

    Args:
        width: in pixels.
        height: in pixels.
        title: text alternative for screen readers.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.shapes: list[str] = []
        self.draw_box(0.5, 0.5, width - 1, height - 1, "page", radius=8, outlined=True)

    def draw_box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        radius: float = 4,
        outlined: bool = False,
    ) -> None:
        """Draw a rectangle with round corners; ``fill`` is a key of ``FILLS``."""
        outline = " edge" if outlined else ""
        self.shapes.append(
            f'<rect class="{fill}{outline}" x="{x:g}" y="{y:g}" width="{width:g}" '
            f'height="{height:g}" rx="{radius:g}"/>'
        )

    def draw_text(
        self,
        x: float,
        y: float,
        text: str,
        fill: str = "ink",
        size: float = 13,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        """Draw one line of text; ``anchor`` is start, middle or end of it."""
        weight = ' font-weight="600"' if bold else ""
        self.shapes.append(
            f'<text class="{fill}" x="{x:g}" y="{y:g}" font-size="{size:g}" '
            f'text-anchor="{anchor}"{weight}>{escape(text)}</text>'
        )

    def draw_line(
        self, points: Sequence[tuple[float, float]], stroke: str, width: float = 1.5
    ) -> None:
        """Draw straight segments; ``stroke`` is a key of ``FILLS``."""
        path = " ".join(f"{'L' if i else 'M'}{x:g} {y:g}" for i, (x, y) in enumerate(points))
        self.shapes.append(f'<path class="line-{stroke}" stroke-width="{width:g}" d="{path}"/>')

    def draw_curve(
        self, start: tuple[float, float], end: tuple[float, float], stroke: str, width: float = 2
    ) -> None:
        """Draw an S-shaped connection from left to right."""
        middle = (start[0] + end[0]) / 2
        self.shapes.append(
            f'<path class="line-{stroke}" stroke-width="{width:g}" d="M{start[0]:g} {start[1]:g} '
            f'C{middle:g} {start[1]:g} {middle:g} {end[1]:g} {end[0]:g} {end[1]:g}"/>'
        )

    def draw_arrow(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Draw a horizontal or vertical arrow."""
        (x0, y0), (x1, y1) = start, end
        self.draw_line([start, end], "muted")
        if y0 == y1:
            back = x1 - 6 if x1 > x0 else x1 + 6
            corners = f"{x1:g},{y1:g} {back:g},{y1 - 4:g} {back:g},{y1 + 4:g}"
        else:
            back = y1 - 6 if y1 > y0 else y1 + 6
            corners = f"{x1:g},{y1:g} {x1 - 4:g},{back:g} {x1 + 4:g},{back:g}"
        self.shapes.append(f'<polygon class="muted" points="{corners}"/>')

    def to_svg(self) -> str:
        """Return the drawing as SVG text."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" font-family="{FONT}" role="img">'
        )
        style = f"{_css(0, FILLS)}@media (prefers-color-scheme: dark){{{_css(1, FILLS)}}}"
        lines = [head, f"<title>{escape(self.title)}</title>", f"<style>{style}</style>"]
        return "\n".join([*lines, *self.shapes, "</svg>", ""])

    def save(self, path: Path) -> None:
        """Write the drawing to a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_svg(), encoding="utf-8")


def _css(scheme: int, fills: Mapping[str, tuple[str, str]]) -> str:
    rules = [f".{name}{{fill:{pair[scheme]}}}" for name, pair in fills.items()]
    # Strokes come last: a ring is both, filled with the page's colour.
    rules += [f".line-{name}{{stroke:{pair[scheme]}}}" for name, pair in fills.items()]
    rules += ["path{fill:none}", f".edge{{stroke:{fills['empty'][scheme]}}}"]
    return "".join(rules)
