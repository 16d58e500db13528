"""The notebooks of examples/ run, and their saved outputs are those of their cells."""

import tarfile
from pathlib import Path

import pytest
import torch

nbformat = pytest.importorskip("nbformat", reason="needs the extra docs")
pytest.importorskip("nbclient", reason="needs the extra docs")

from pipelines.serving.bundle import build_bundle  # noqa: E402
from pipelines.training.runs.model_source import resolve_model  # noqa: E402
from skillnet.model import SkillNet  # noqa: E402
from tests.helpers.readable_corpora import config, write_corpora  # noqa: E402
from tests.helpers.sound_files import encode_tone  # noqa: E402
from tools.docs.run_notebook import EXAMPLES, NEEDED_FOLDERS, execute_notebook  # noqa: E402

NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
#: The other ones read the model of a demo, which takes minutes to train.
COMPLETE = [path for path in NOTEBOOKS if path.stem not in NEEDED_FOLDERS]
#: Stem of a notebook -> the lane of its test.
LANES = {
    "train": pytest.mark.slow("test_notebook.py::test_notebook_runs_and_prints_its_saved_outputs")
}
API_NOTEBOOK = EXAMPLES / "python-api.ipynb"


def printed_lines(notebook: "nbformat.NotebookNode") -> list[str]:
    """Return the printed text of each code cell."""
    return [
        "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.integration
@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=LANES.get(path.stem, ()), id=path.stem) for path in COMPLETE]
)
def test_notebook_runs_and_prints_its_saved_outputs(path: Path) -> None:
    saved = nbformat.read(path, as_version=4)
    assert printed_lines(execute_notebook(path)) == printed_lines(saved)


def test_notebooks_are_executed_and_contain_no_path_of_a_machine() -> None:
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        assert "/home/" not in text
        assert "/tmp/" not in text
        assert str(EXAMPLES.parent) not in text
        assert all(printed_lines(nbformat.read(path, as_version=4)))


def test_the_notebook_of_the_python_api_runs_on_a_small_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its cells run without the demo; its last one, a training, is the test of a command."""
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path / "examples")
    monkeypatch.setenv("SKILLNET_HOME", "../runs")
    torch.manual_seed(0)
    SkillNet(config()).save_pretrained(tmp_path / "saved")
    data = write_corpora(tmp_path / "runs" / "corpora")
    build_bundle(resolve_model(str(tmp_path / "saved")), data, tmp_path / "my-model")
    archives = tmp_path / "runs" / "archives"
    archives.mkdir()
    (tmp_path / "tone.mp3").write_bytes(encode_tone())
    with tarfile.open(archives / "cnchar-data-1.1.0.tgz", "w:gz") as archive:
        for name in ("hong2", "hua1", "niao3"):
            archive.add(tmp_path / "tone.mp3", f"package/voice/{name}.mp3")
    run = tmp_path / "runs" / "quickstart-1"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0\nmodel: {dim: 16}\n", encoding="utf-8")
    losses = ", ".join(f'"{task}/loss": 1.0' for task in config().tasks)
    (run / "progress.jsonl").write_text(f'{{"time": 1, "step": 5, "metrics": {{{losses}}}}}\n')
    (run / "evaluation.csv").write_text(
        "task,split,metric,value,low,high\ntext_to_code,test,recall,0.5,0.4,0.6\n"
    )
    *cells, training = [
        cell.source
        for cell in nbformat.read(API_NOTEBOOK, as_version=4).cells
        if cell.cell_type == "code"
    ]
    assert "finetune(" in training
    threads, names = torch.get_num_threads(), {}
    for source in cells:
        exec(compile(source, API_NOTEBOOK.name, "exec"), names)  # noqa: S102
        assert capsys.readouterr().out
    torch.set_num_threads(threads)
