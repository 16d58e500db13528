"""Execute the notebooks of ``examples/`` in place: ``python -m tools.docs.run_notebook``.

The saved notebook contains its outputs, without times and machine data, so that a second execution
on the same processor changes nothing. A notebook of :data:`NEEDED_FOLDERS` is executed only where
its folder exists.
"""

import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CELL_TIMEOUT_S = 600
#: Name of a notebook -> folder of the repository that it reads; its first cell says who writes it.
NEEDED_FOLDERS = {"python-api": "my-model"}


def execute_notebook(path: Path) -> Any:
    """Return the notebook with the outputs of a fresh execution.

    Args:
        path: location of the notebook, which stays as it is.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=CELL_TIMEOUT_S, kernel_name="python3", record_timing=False
    )
    client.execute(cwd=str(path.parent))
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            # Progress and warnings hold times and paths.
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    return notebook


def main() -> int:
    """Execute every notebook and write it with its outputs."""
    for path in sorted(EXAMPLES.glob("*.ipynb")):
        needed = NEEDED_FOLDERS.get(path.stem)
        if needed is not None and not (EXAMPLES.parent / needed).is_dir():
            print(f"{path.name}: {needed} is missing, so it keeps its outputs")
            continue
        nbformat.write(execute_notebook(path), path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
