"""The page of a comparison: one HTML file with the answer, the tiers and all tables.

:func:`build_page` is called by ``skillnet-evidence compare --output``. The file loads nothing.
"""

from collections.abc import Sequence
from html import escape

from skillnet_evidence.cells import ReportTable

STYLE = """
body {font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem}
table {border-collapse: collapse; font-size: 13px} caption, p {text-align: left; max-width: 46rem}
th, td {padding: .15rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top}
small {color: #555; white-space: nowrap; margin-left: .4em} .scroll {overflow-x: auto}
th[scope=row] {font-weight: normal} .best {font-weight: 600}
svg {max-width: 100%; height: auto}
summary {font-weight: 600; cursor: pointer; margin: .8rem 0}
"""


def build_page(
    answer: str, notes: Sequence[str], tables: Sequence[ReportTable], figure: str
) -> str:
    """Return an HTML page; tables that are collapsed elsewhere are folded.

    Args:
        answer: sentence with the result; "" without one.
        notes: sentences about the files that were read.
        tables: all tables, in their order.
        figure: SVG.
    """
    parts = [f"<h1>{escape(answer or 'Comparison')}</h1>", figure]
    parts += [f"<p>{escape(note)}</p>" for note in notes]
    parts += [_fold_table(table) for table in tables]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Comparison</title>'
        f"<style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _fold_table(table: ReportTable) -> str:
    return (
        f"<details{'' if table.collapsed else ' open'}><summary>{escape(table.title)}</summary>"
        f"{table.to_html()}</details>"
    )
