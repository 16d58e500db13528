"""One-off measurements that quality claims of the documents rest on, and their results."""

from pathlib import Path

#: Kept studies, and tables that the modules here, sweeps, growths and the chaos lane wrote.
RESULTS = Path(__file__).parent / "results"
