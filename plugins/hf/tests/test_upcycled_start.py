"""``--from`` with a dense model or a library's checkpoint gives every skill a copy."""

import hashlib
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipelines import init_task, prepare
from pipelines.data.shards.format import manifest_digest
from pipelines.data.tokenizer.selection import map_token_ids
from pipelines.finetune import main as finetuning
from pipelines.pretrain import main as pretraining
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.init_from import InitReport, resolve_init_weights
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun, build_joint_run, resolve_run
from pipelines.training.loop.run import validate_run
from pipelines.training.loop.setup import build_model, dry_run_init
from plugins.hf.tests.tiny_checkpoints import save_checkpoint
from skillnet.systems import build_system, load_model
from skillnet_hf import dense_start
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from tests.helpers.small_corpora import small_config, small_pretraining, write_corpora
from tests.helpers.small_models import small_config as small_sizes
from tests.helpers.user_corpora import write_lines


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


def test_a_run_starts_from_a_dense_run(config, tmp_path, monkeypatch):
    dense = build_system("dense", config.joint().model, {"ffn_dim": 24})
    dense.save_pretrained(tmp_path / "dense")
    with monkeypatch.context() as exact:
        exact.setattr(dense_start, "INIT_NOISE", 0.0)
        model, report = start(config, tmp_path / "dense")
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


def save_source(name: str, folder: Path, config: FinetuneConfig) -> None:
    """Write a tiny dense run or checkpoint whose sizes are all other than those of the run."""
    import timm

    if name == "dense":
        model = replace(
            config.model, dim=32, num_heads=8, embedding_dim=12, image_size=96, patch_size=32,
            video_frames=6, tubelet=(3, 12, 12), video_size=24,
            mel_stack=2, max_frames=30, max_tokens=20, stem_norm=False,
        )  # fmt: skip
        build_system("dense", model, {"ffn_dim": 40}).save_pretrained(folder)
    elif name == "timm":
        arguments: dict[str, Any] = {"img_size": 56, "patch_size": 14, "embed_dim": 12, "depth": 1,
                                     "num_heads": 3}  # fmt: skip
        found = timm.create_model("vit_base_patch16_224", **arguments)
        timm.models.save_for_hf(found, str(folder), model_args=arguments, safe_serialization=True)
    else:
        save_checkpoint(name, folder, vocab_size=70, num_mel_bins=80)


@pytest.mark.parametrize(
    "name", ["dense", "bert", "roberta", "vit", "timm", "whisper", "wav2vec2", "wav2vec2-stable"]
)
def test_the_options_of_one_message_start_the_run(name, config, tmp_path):
    """Nothing but the words after "give" is added to the command."""
    config = small_config(tmp_path / "data", steps=1)
    save_source(name, tmp_path / "source", config)
    (tmp_path / "run.yaml").write_text(configuration.to_yaml(config))
    words = ["--config", str(tmp_path / "run.yaml"), "--from", str(tmp_path / "source")]
    with pytest.raises(UserError) as error:
        validate_run(resolve_run(finetuning.parse_arguments(words)))
    assert str(error.value).startswith(f"--from {tmp_path / 'source'} has other layers or inputs")
    given, _, rest = str(error.value).partition("; give ")[2].partition(" after ")
    words += given.split(" ")
    run = resolve_run(finetuning.parse_arguments(words))
    # Pictures and clips of another size are another preparation, the next stage.
    size, frames = run.config.model.image_size, run.config.model.video_frames
    assert rest == {
        "dense": f"a new preparation. Prepare them with --options.drawings.size {size} "
        f"--options.strokes.frames {frames} --options.strokes.video_size 24",
        "timm": f"a new preparation. Prepare them with --options.drawings.size {size}",
    }.get(name, "")
    if rest:
        kept = {k: v for k, v in config.tasks.items() if v.corpus not in ("drawings", "strokes")}
        run = resolve_run(replace(run.config, tasks=kept))
    validate_run(run)
    assert {"skill-general", "skill-text"} <= set(run.init_report.taken)
    assert train_model(run).step == 1


def test_all_settings_of_a_source_are_in_one_message(config, tmp_path):
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


def test_a_run_starts_from_a_checkpoint_of_a_library(config, tmp_path, monkeypatch):
    monkeypatch.setattr(dense_start, "INIT_NOISE", 0.0)
    bert = save_bert(tmp_path / "bert")
    with pytest.raises(UserError) as error:
        start(config, tmp_path / "bert")
    message = str(error.value)
    assert message.startswith(f"--from {tmp_path / 'bert'} has other layers")
    assert "so its token ids mean other tokens" in message
    assert f"the model {tmp_path / 'bert'} was trained with" in message
    assert ".starts" not in message, "the folder of the copy means nothing to the user"
    text, rows = map_token_ids(tmp_path / "bert")
    digest = hashlib.sha256(text.encode()).hexdigest()
    command = f"skillnet prepare headings --tokenizer {tmp_path / 'bert'} "
    assert message.endswith(f"{command}--data {tmp_path / 'data'}-{digest[:8]}")
    options = message.partition("; give ")[2].partition(" after ")[0]
    assert options == (
        f"--model.bias true --model.norm_position post --model.norm_eps 1e-12 "
        f"--model.vocab_size {len(rows)}"
    )
    manifest = tmp_path / "data" / "headings" / "manifest.json"
    values = json.loads(manifest.read_text())
    # With it the corpus has more tokens than the run, which the same message settles.
    values["tokenizer"] |= {"sha256": digest, "vocab_size": len(rows)}
    manifest.write_text(json.dumps(values | {"digest": manifest_digest(values)}))
    with pytest.raises(UserError) as error:
        validate_run(resolve_run(replace(config, init_from=str(tmp_path / "bert"))))
    assert str(error.value).endswith(f"; give {options}")
    sizes: dict[str, Any] = {
        "bias": True,
        "norm_position": "post",
        "norm_eps": 1e-12,
        "vocab_size": len(rows),
    }
    model, report = start(replace(config, model=replace(config.model, **sizes)), tmp_path / "bert")
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


def test_a_specialist_reads_the_ids_of_the_converted_tokenizer(tmp_path: Path) -> None:
    bert = save_bert(tmp_path / "bert")
    text, rows = map_token_ids(tmp_path / "bert")
    sizes = small_sizes(dim=16, max_tokens=30, vocab_size=len(rows), mel_stack=4)
    options = {"ffn_dim": 10, "checkpoints": {"text": str(tmp_path / "bert")}}
    model = build_system("specialist", sizes, options).eval()
    ours = {token: i for i, token in enumerate(_tokens(json.loads(text)))}
    ids = torch.tensor([[ours[token] for token in ("一", "a", "[UNK]", "二")]])
    with torch.no_grad():
        found, _ = model.tower_tokens("text_classification", "input", {"tokens": ids})
        expected = bert(torch.tensor([[1, 3, 0, 2]])).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "bert")
    with torch.no_grad():
        again, _ = load_model(tmp_path / "model").tower_tokens(
            "text_classification", "input", {"tokens": ids}
        )
    assert torch.equal(again, found)


def test_a_specialist_names_the_tokenizer_that_the_corpora_need(tmp_path: Path) -> None:
    save_bert(tmp_path / "bert")
    options = {"checkpoints": {"text": str(tmp_path / "bert")}}
    words = rf"has 263 tokens.* 60\. Prepare the corpora with --tokenizer {tmp_path / 'bert'}, and"
    with pytest.raises(ValueError, match=words):
        build_system("specialist", small_sizes(dim=16, vocab_size=60, mel_stack=4), options)


def init_start(words: list[str], file: Path) -> tuple[list[str], ResolvedRun]:
    """Run ``skillnet init-task --from``; return its commands, and the run of its file."""
    assert init_task.main([*words, "--file", str(file)]) == 0
    lines = file.read_text(encoding="utf-8").splitlines()
    commands = [line.removeprefix("#   ") for line in lines if line.startswith("#   ")]
    words = ["--config", "small", "--config", str(file), "--training.steps", "1"]
    return commands, resolve_run(finetuning.parse_arguments(words))


def test_init_task_writes_the_settings_of_a_checkpoint(config, tmp_path, capsys):
    save_bert(tmp_path / "bert")
    headings, words = str(tmp_path / "data" / "headings"), ["--from", str(tmp_path / "bert")]
    # The corpus has another tokenizer: the sentence of finetune, and no file.
    assert init_task.main([headings, *words, "--file", str(tmp_path / "no.yaml")]) == 2
    message = capsys.readouterr().err
    assert f"skillnet prepare headings --tokenizer {tmp_path / 'bert'}" in message
    assert "has other layers" not in message
    assert not (tmp_path / "no.yaml").exists()
    rows = [{"text": f"a{'一二'[n % 2]}", "label": "xy"[n % 2]} for n in range(60)]
    write_lines(tmp_path / "films" / "rows.jsonl", rows)
    commands, _ = init_start([str(tmp_path / "films"), *words], tmp_path / "films.yaml")
    assert commands[0].endswith(f" --tokenizer {tmp_path / 'bert'}")
    assert (
        prepare.main([*shlex.split(commands[0])[2:], "--data", str(tmp_path / "films-data")]) == 0
    )
    file = tmp_path / "prepared.yaml"
    _, run = init_start([str(tmp_path / "films-data" / "films"), *words], file)
    validate_run(run)
    assert run.init_report.fresh == ["head-text_classification"]
    assert train_model(ResolvedRun(run.config)).step == 1


def test_init_task_prepares_pictures_for_the_patches_of_a_checkpoint(config, tmp_path):
    save_source("timm", tmp_path / "vit", config)  # patches of 14 do not divide 48
    for number in range(40):
        picture = tmp_path / "pets" / "ab"[number % 2] / f"{number}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (number, 0, 0)).save(picture)
    words = [str(tmp_path / "pets"), "--from", str(tmp_path / "vit")]
    (prepared, _), run = init_start(words, tmp_path / "pets.yaml")
    assert prepared.endswith(" --options.pets.size 56")
    assert (run.config.model.image_size, run.config.model.patch_size) == (56, 14)


def test_init_task_starts_from_no_skillnet(config, tmp_path, capsys):
    build_system("skillnet", config.model, {}).save_pretrained(tmp_path / "model")
    words = [str(tmp_path / "data" / "headings"), "--file", str(tmp_path / "x.yaml")]
    assert init_task.main([*words, "--from", str(tmp_path / "model")]) == 2
    assert "holds a model of the system 'skillnet'" in capsys.readouterr().err
    assert not (tmp_path / "x.yaml").exists()


def test_a_checkpoint_of_fewer_tokens_than_the_corpus_needs_its_tokenizer(config, tmp_path):
    save_bert(tmp_path / "bert")
    (tmp_path / "bert" / "tokenizer.json").unlink()
    message = f"has 9 tokens, .* 64. Put the tokenizer.json of the checkpoint into {tmp_path}/bert"
    with pytest.raises(UserError, match=message):
        validate_run(resolve_run(replace(config, init_from=str(tmp_path / "bert"))))


def test_a_model_of_the_same_system_names_all_keys_at_once(config, tmp_path):
    theirs = replace(config.model, num_layers=3, bias=True, vocab_size=80)
    build_system("skillnet", theirs, {}).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError) as error:
        validate_run(resolve_run(replace(config, init_from=str(tmp_path / "model"))))
    assert str(error.value).endswith(
        "give --model.num_layers 3 --model.bias true --model.vocab_size 80"
    )


def test_a_class_token_leaves_masked_images_out(config: FinetuneConfig, tmp_path: Path) -> None:
    data = write_corpora(tmp_path / "more", rows=8, test_rows=4, pretrain=8)
    pretrained = small_pretraining(data, steps=1)
    save_source("vit", tmp_path / "vit", config)
    (tmp_path / "run.yaml").write_text(configuration.to_yaml(pretrained))
    words = ["--config", str(tmp_path / "run.yaml"), "--from", str(tmp_path / "vit")]

    def resolve() -> ResolvedRun:
        return resolve_run(build_joint_run(pretraining.parse_arguments(words)), "pretrain")

    with pytest.raises(UserError) as error:
        validate_run(resolve())
    assert "masked_image beside a class token" in str(error.value)
    words += str(error.value).partition("; give ")[2].split(" ")
    validate_run(resolve())
    only = {"masked_image": pretrained.tasks["masked_image"]}
    alone = replace(pretrained, tasks=only, init_from=str(tmp_path / "vit"))
    with pytest.raises(UserError, match="Give a checkpoint without a class token"):
        validate_run(resolve_run(build_joint_run(alone), "pretrain"))


def test_a_checkpoint_of_other_mel_bins_is_rejected(config: FinetuneConfig, tmp_path: Path) -> None:
    everything = small_config(tmp_path / "data")
    theirs = replace(everything.model, n_mels=128)
    build_system("dense", theirs, {"ffn_dim": 24}).save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match="reads 128 log-mel bins, and prepared sound has 80"):
        start(everything, tmp_path / "dense")


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
