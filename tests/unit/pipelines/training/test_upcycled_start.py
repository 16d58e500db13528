"""``--from`` with a dense model or a library's checkpoint gives every skill a copy."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config.run import FinetuneConfig
from pipelines.shards.format import manifest_digest
from pipelines.tokenizer.conversion import map_token_ids
from pipelines.training.init_from import InitReport, resolve_init_weights
from pipelines.training.resolved_run import resolve_run
from pipelines.training.setup import build_model, dry_run_init
from skillnet.systems import build_system, load_model
from skillnet_platform.errors import UserError
from tests.helpers.small_corpora import small_config, write_corpora


@pytest.fixture
def config(tmp_path: Path, run_root: Path) -> FinetuneConfig:
    """A run of one task on text, whose skills ``general`` and ``text`` are always together."""
    run = small_config(write_corpora(tmp_path / "data", rows=8, test_rows=4))
    return replace(run, tasks={"text_classification": run.tasks["text_classification"]})


def start(config: FinetuneConfig, source: Path, **changes: Any) -> tuple[Any, InitReport]:
    run = resolve_run(replace(config, init_from=str(source), **changes))
    report = dry_run_init(run.config)
    assert report is not None
    return build_model(run.config), report


def test_a_run_starts_from_a_dense_run(config: FinetuneConfig, tmp_path: Path) -> None:
    dense = build_system("dense", config.joint().model, {"ffn_dim": 24})
    dense.save_pretrained(tmp_path / "dense")
    model, report = start(config, tmp_path / "dense", init_noise=0.0)
    assert report.fresh == []
    assert {"skill-general", "skill-text", "skill-video"} <= set(report.taken)
    batch = {"input": {"tokens": torch.randint(4, 60, (3, 9))}}
    with torch.no_grad():
        found = model.eval().double()("text_classification", batch)["logits"]
        expected = dense.eval().double()("text_classification", batch)["logits"]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    noisy, report = start(config, tmp_path / "dense")
    assert report.noise == [
        "text: copied with noise of 0.01, because it is always active together with general"
    ]
    assert report.noise[0] in report.describe()
    assert set(report.taken) == set(noisy.files_of())


def test_all_settings_of_a_source_are_in_one_message(
    config: FinetuneConfig, tmp_path: Path
) -> None:
    other = replace(config.model, bias=True, norm_position="post", dim=32)
    build_system("dense", other, {"ffn_dim": 40}).save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError) as error:
        start(config, tmp_path / "dense")
    assert (
        "(dim 16, ffn_dim 24, bias false, norm_position pre); "
        "give --model.dim 32 --model.ffn_dim 40 --model.bias true --model.norm_position post"
    ) in str(error.value)
    per_modality = build_system("dense", config.model, {"ffn_dim": 24, "feedforward": "modality"})
    per_modality.save_pretrained(tmp_path / "per-modality")
    with pytest.raises(UserError, match="a feed-forward network per modality"):
        start(config, tmp_path / "per-modality")
    with pytest.raises(UserError, match="holds a model of the system 'dense'"):
        start(config, tmp_path / "dense", system="moe")


def save_bert(folder: Path) -> Any:
    """Write a tiny BERT and a tokenizer whose ids differ from those of converted tokenizers."""
    import transformers
    from tokenizers import Tokenizer, models

    words = ["[UNK]", "一", "二", "a", "[PAD]", "[CLS]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=9, max_position_embeddings=30, intermediate_size=24, **sizes
        )
    ).eval()
    model.save_pretrained(folder)
    return model


def test_a_run_starts_from_a_checkpoint_of_a_library(
    config: FinetuneConfig, tmp_path: Path
) -> None:
    bert = save_bert(tmp_path / "bert")
    with pytest.raises(UserError, match="so its token ids mean other tokens") as error:
        start(config, tmp_path / "bert")
    assert f"the model {tmp_path / 'bert'} was trained with" in str(error.value)
    assert ".starts" not in str(error.value), "the folder of the copy means nothing to the user"
    text, rows = map_token_ids(tmp_path / "bert")
    manifest = tmp_path / "data" / "headings" / "manifest.json"
    values = json.loads(manifest.read_text())
    values["tokenizer"]["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    manifest.write_text(json.dumps(values | {"digest": manifest_digest(values)}))
    with pytest.raises(UserError) as error:
        start(config, tmp_path / "bert")
    assert str(error.value).startswith(f"--from {tmp_path / 'bert'} has other layers")
    options = str(error.value).partition("; give ")[2].split(" ")
    given = dict(
        zip((k.removeprefix("--model.") for k in options[::2]), options[1::2], strict=True)
    )
    assert given == {
        "bias": "true",
        "norm_position": "post",
        "norm_eps": "1e-12",
        "vocab_size": str(len(rows)),
    }
    sizes: dict[str, Any] = {
        "bias": True,
        "norm_position": "post",
        "norm_eps": 1e-12,
        "vocab_size": len(rows),
    }
    model, report = start(
        replace(config, model=replace(config.model, **sizes)), tmp_path / "bert", init_noise=0.0
    )
    assert report.fresh == ["head-text_classification"]
    assert report.describe()[0].startswith(f"started from {tmp_path / 'bert'} with")
    saved = load_model(Path(report.source))
    assert saved.vocabulary.tokenizer is not None
    ours = {token: i for i, token in enumerate(_tokens(json.loads(text)))}
    ids = torch.tensor([[ours[token] for token in ("一", "a", "[UNK]", "二")]])
    plan = config.model.tasks["text_classification"].towers["input"]
    with torch.no_grad():
        found, _ = model.eval().tokens({"tokens": ids}, plan)
        expected = bert(torch.tensor([[1, 3, 0, 2]])).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # Converted once: a run resumes from the same folder.
    assert resolve_init_weights(str(tmp_path / "bert"), None, str(tmp_path / "runs")) == (
        resolve_init_weights(str(tmp_path / "bert"), None, str(tmp_path / "runs"))
    )


def _tokens(tree: dict[str, Any]) -> list[str]:
    vocabulary = tree["model"]["vocab"]
    return sorted(vocabulary, key=vocabulary.__getitem__)


def test_pickled_weights_are_not_read(config: FinetuneConfig, tmp_path: Path) -> None:
    save_bert(tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").rename(tmp_path / "bert" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no \*\.safetensors file"):
        start(config, tmp_path / "bert")


def test_a_stem_for_another_input_stays_random(config: FinetuneConfig, tmp_path: Path) -> None:
    """wav2vec 2.0 reads waveforms: its layers start the run, its stem does not."""
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    waves: dict[str, Any] = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,),
             "num_feat_extract_layers": 1, "num_conv_pos_embeddings": 4,
             "num_conv_pos_embedding_groups": 2, "intermediate_size": 24}  # fmt: skip
    transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**sizes, **waves)).save_pretrained(
        tmp_path / "waves"
    )
    everything = small_config(tmp_path / "data")
    config = replace(config, tasks={"speech_recognition": everything.tasks["speech_recognition"]})
    with pytest.raises(UserError, match=r"give --model\.bias true --model\.norm_pos\w+ post$"):
        start(config, tmp_path / "waves")
    model = replace(config.model, bias=True, norm_position="post")
    built, report = start(replace(config, model=model), tmp_path / "waves")
    assert report.fresh == ["head-speech_recognition", "stem-log_mel"]
    assert {"skill-general", "skill-sound"} <= set(report.taken)
    assert float(built.get_parameter("stems.log_mel.second.weight").std()) > 0
