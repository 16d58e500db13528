"""Library encoders: same grid as SkillNet, padding without effect, checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skillnet.config import SkillNetConfig
from skillnet.modalities.pixels import with_motion
from skillnet.modality import find_modality
from skillnet_hf.hf_checkpoints import find_checkpoint
from skillnet_hf.library_encoders import EncoderAdapter, PatchProduct
from skillnet_hf.library_models import FAMILIES
from tests.helpers.small_models import batch_of, small_config

READS: dict[str, str] = {
    "bert": "text",
    "roberta": "code",
    "vit": "image",
    "speech2text": "sound",
    "ast": "sound",
    "videomae": "video",
}
EVERY = pytest.mark.parametrize("name", sorted(READS))


def study(**changes: Any) -> SkillNetConfig:
    return small_config(**({"mel_stack": 4, "n_mels": 8} | changes))


def tower(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> EncoderAdapter:
    torch.manual_seed(0)
    config = study(**changes)
    family = FAMILIES[name]
    made = family.build(family.fresh(config, 16), config.dim).to(dtype).eval()
    with torch.no_grad():  # position vectors and biases that start at zero would hide mistakes
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


@EVERY
def test_tokens_lie_on_the_grid_of_skillnets_stem(name: str) -> None:
    batch = batch_of(READS[name], study())
    stem = find_modality(READS[name]).tensor_half.stem_class(study()).double()
    expected, mask = stem(batch, READS[name])
    x, found = tower(name)(batch)
    assert x.shape == expected.shape
    assert torch.isfinite(x).all()
    assert (found is None) == (mask is None)
    assert mask is None or torch.equal(found, mask)


@EVERY
def test_padding_changes_no_real_token(name: str) -> None:
    if READS[name] not in ("text", "code", "sound"):
        return
    model = tower(name)
    batch = batch_of(READS[name], study())
    x, mask = model(batch)
    for row in range(len(x)):
        length = int(batch["frames"][row]) if "frames" in batch else int(mask[row].sum())
        key = "log_mel" if "frames" in batch else "tokens"
        alone = {k: v[row : row + 1] for k, v in batch.items()} | {
            key: batch[key][row : row + 1, :length]
        }
        y, own = model(alone)
        assert own.all()
        torch.testing.assert_close(x[row, : y.shape[1]], y[0], rtol=1e-10, atol=1e-12)


@EVERY
def test_every_parameter_has_a_gradient_in_bf16_too(name: str) -> None:
    for bf16 in (False, True):
        model = tower(name, torch.float32).train()
        batch = batch_of(READS[name], study())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            x, mask = model(
                {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
            )
        (x.float() if mask is None else x[mask].float()).square().sum().backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, key
            assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize(("name", "key"), [("vit", "pixels"), ("videomae", "frames")])
def test_a_token_stands_where_its_patch_lies(name: str, key: str) -> None:
    model: Any = tower(name, video_motion=False).model
    cut = model.patch_embed if name == "vit" else model.embeddings.patch_embeddings
    batch = batch_of(READS[name], study(video_motion=False), rows=1)
    stem: Any = (
        find_modality(READS[name]).tensor_half.stem_class(study(video_motion=False)).double()
    )
    pieces = stem.patches if name == "vit" else stem.tubelets
    x = batch[key].double() / 255
    values = [pieces(x)]
    order = (0, 3, 1, 2) if name == "vit" else (0, 1, 4, 2, 3)

    def embedded(y: Tensor) -> Tensor:
        return cut((y * 2 - 1).expand(*y.shape[:-1], 3).permute(order))

    plain = embedded(x)
    for place in range(plain.shape[1]):
        generator = torch.Generator().manual_seed(place)
        spot = torch.randint(0, x[..., 0].numel(), (1,), generator=generator)
        changed = x.clone().reshape(-1, x.shape[-1])
        changed[spot] += 0.5
        changed = changed.reshape(x.shape)
        one = (pieces(changed) != values[0]).any(-1).nonzero()
        other = (embedded(changed) != plain).any(-1).nonzero()
        assert torch.equal(one, other)


def test_video_is_given_motion_as_skillnet_is() -> None:
    model = tower("videomae")
    weight: Any = model.model.embeddings.patch_embeddings.projection.weight
    assert weight.shape[1] == 6
    batch = batch_of("video", study())
    with torch.no_grad():
        weight[:, :3] = 0  # nothing but motion is seen
    still = {"frames": batch["frames"][:, :1].expand_as(batch["frames"])}
    one, other = model(still)[0], model({"frames": torch.zeros_like(batch["frames"])})[0]
    torch.testing.assert_close(one, other)
    assert not torch.allclose(model(batch)[0], one)
    assert with_motion(batch["frames"].double())[:, 0, ..., 1:].count_nonzero() == 0


@pytest.mark.parametrize(
    ("convolution", "shape"),
    [
        (nn.Conv2d(3, 5, 4, stride=4), (2, 3, 8, 12)),
        (nn.Conv3d(6, 5, (2, 4, 3), stride=(2, 4, 3)), (2, 6, 4, 8, 9)),
    ],
)
def test_a_patch_product_is_the_convolution(convolution: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(PatchProduct(convolution)(x), convolution(x))


def test_layers_are_of_one_size_in_all_families() -> None:
    sizes = set()
    for name, part in (
        ("bert", "encoder"),
        ("roberta", "encoder"),
        ("vit", "blocks"),
        ("speech2text", "layers"),
        ("ast", "layers"),
    ):
        model = tower(name).model
        sizes.add(sum(p.numel() for p in getattr(model, part).parameters()))
    assert len(sizes) == 1
    made = sum(p.numel() for p in tower("videomae").model.encoder.parameters())
    assert made == sizes.pop() - 2 * study().dim  # its keys have no bias


# -- checkpoints ---------------------------------------------------------------------------


def written(name: str, folder: Path, **changes: Any) -> Any:
    """A checkpoint of another width than the study's, as its library writes it."""
    import timm
    import transformers

    config = study(dim=12, num_heads=3, num_layers=1, **changes)
    shape = FAMILIES[name].fresh(config, 20)
    if name == "vit":
        arguments = {k: v for k, v in shape["arguments"].items() if k != "num_classes"}
        model: Any = timm.create_model(shape["architecture"], num_classes=3, **arguments)
        timm.models.save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
        return model
    library = {
        "bert": "BertForMaskedLM",
        "roberta": "RobertaModel",
        "speech2text": "Speech2TextModel",
        "ast": "ASTModel",
        "videomae": "VideoMAEForPreTraining",
    }[name]
    family: Any = FAMILIES[name]
    model = getattr(transformers, library)(getattr(transformers, family.config_class)(**shape))
    model.save_pretrained(folder)
    return model


def loaded(
    name: str, folder: Path, config: SkillNetConfig
) -> tuple[dict[str, Any], EncoderAdapter]:
    family = FAMILIES[name]
    shape = family.read(find_checkpoint(str(folder), False), config)
    return shape, family.build(shape, config.dim, folder)


@EVERY
def test_a_checkpoints_weights_and_sizes_are_taken(name: str, tmp_path: Path) -> None:
    model = written(name, tmp_path / "checkpoint", video_motion=False)
    shape, made = loaded(name, tmp_path / "checkpoint", study())
    assert json.loads(json.dumps(shape)) == shape
    theirs = model.state_dict()
    taken = {k.removeprefix("model."): p for k, p in made.named_parameters()}
    project = {"project.weight", "project.bias"}
    for key, parameter in taken.items():
        if key in project:
            continue
        (source,) = [v for k, v in theirs.items() if k == key or k.endswith(f".{key}")][:1]
        assert torch.equal(parameter, source), key
    assert project <= taken.keys()  # from width 12 to the study's 8
    shutil.rmtree(tmp_path / "checkpoint")
    again = FAMILIES[name].build(shape, study().dim)
    again.load_state_dict(made.state_dict())
    batch = batch_of(READS[name], study())
    one, other = made.eval()(batch)[0], again.eval()(batch)[0]
    assert one.shape[-1] == study().dim
    assert torch.equal(one, other)


def test_a_projected_tower_has_a_projected_token_embedding(tmp_path: Path) -> None:
    written("bert", tmp_path / "checkpoint")
    made = loaded("bert", tmp_path / "checkpoint", study())[1]
    assert made.token_embedding(30).shape == (30, study().dim)
    with pytest.raises(ValueError, match="embeds no tokens"):
        tower("vit").token_embedding(3)


def test_checkpoints_that_do_not_fit_are_named(tmp_path: Path) -> None:
    written("bert", tmp_path / "bert")
    for name, folder, changes, words in (
        ("roberta", "bert", {}, "holds a model of the type 'bert', not 'roberta'"),
        ("bert", "bert", {"vocab_size": 90}, "vocab_size 40, the study needs model.vocab_size 90"),
        ("bert", "bert", {"max_tokens": 40}, "needs model.max_tokens 40"),
        ("vit", "bert", {}, "holds no Vision Transformer of timm"),
        ("bert", "nowhere/at-all", {}, r"options\.download true fetches it"),
    ):
        where = folder if "/" in folder else str(tmp_path / folder)
        with pytest.raises(ValueError, match=words):
            loaded(name, Path(where), study(**changes))
    written("speech2text", tmp_path / "sound")
    with pytest.raises(ValueError, match=r"2 \*\* num_conv_layers 4, the study model.mel_stack 2"):
        loaded("speech2text", tmp_path / "sound", study(mel_stack=2))
    (tmp_path / "bert" / "model.safetensors").rename(tmp_path / "bert" / "model.bin")
    with pytest.raises(ValueError, match=r"has no .*safetensors"):
        loaded("bert", tmp_path / "bert", study())


def test_inputs_that_a_family_cannot_cut_are_named() -> None:
    with pytest.raises(ValueError, match="differs in height and width"):
        FAMILIES["videomae"].fresh(study(tubelet=(2, 4, 2)), 8)
    with pytest.raises(ValueError, match=r"model\.mel_stack must be 2, 4, 8"):
        FAMILIES["speech2text"].fresh(study(mel_stack=3), 8)
    with pytest.raises(ValueError, match="more than the 2 frames of a patch"):
        FAMILIES["ast"].fresh(study(n_mels=2), 8)
