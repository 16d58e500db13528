"""The notebook of examples/ runs, and its saved outputs are those of its cells."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra docs")
pytest.importorskip("nbclient", reason="needs the extra docs")

from tools.docs.run_notebook import EXAMPLES, execute_notebook  # noqa: E402

NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def printed_lines(notebook: "nbformat.NotebookNode") -> list[str]:
    """Return the printed text of each code cell."""
    return [
        "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.integration
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_prints_its_saved_outputs(path: Path) -> None:
    saved = nbformat.read(path, as_version=4)
    assert printed_lines(execute_notebook(path)) == printed_lines(saved)


def test_notebooks_contain_no_path_of_a_machine() -> None:
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        assert "/home/" not in text
        assert str(EXAMPLES.parent) not in text
