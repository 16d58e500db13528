"""Text that is made, between two marks of a page that is written by hand."""

from pathlib import Path


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- name:begin -->`` and ``<!-- name:end -->``.

    Raises:
        ValueError: the page lacks a mark.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, also, after = rest.partition(end)
    if not (found and also):
        raise ValueError(f"{page} has no {begin} followed by {end}")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def between(page: Path, name: str) -> str:
    """What stands there."""
    _, _, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name}:begin -->")
    return rest.partition(f"<!-- {name}:end -->")[0].strip()
