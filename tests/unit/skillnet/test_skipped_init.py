"""Construction without random numbers: zeros instead of draws, and loading without a draw."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from skillnet.skipped_init import SkippedInit
from skillnet.systems import find_system, load_model
from tests.helpers.small_models import small_config


class _Layers(nn.Module):
    """One parameter or buffer for each way in which torch draws numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.embedding = nn.Linear(3, 4), nn.Embedding(5, 3)
        self.attention, self.norm = nn.MultiheadAttention(4, 2), nn.LayerNorm(4)
        self.truncated = nn.init.trunc_normal_(nn.Parameter(torch.empty(3, 4)), std=0.02)
        self.drawn = nn.Parameter(torch.randn(3, 4, generator=torch.Generator()))
        self.uniform = nn.Parameter(torch.rand(3, 4))
        self.register_buffer("places", torch.arange(4))


def test_random_weights_become_zeros_and_constants_stay() -> None:
    before = torch.get_rng_state()
    with SkippedInit():
        built = _Layers()
    assert torch.equal(torch.get_rng_state(), before)
    constant = {"norm.weight": 1.0}
    for name, parameter in built.named_parameters():
        assert torch.equal(parameter, torch.full_like(parameter, constant.get(name, 0.0))), name
        assert parameter.requires_grad, name
    assert built.places.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("system", ["skillnet", "alone", "dense", "moe", "specialist"])
def test_loading_draws_no_random_number(tmp_path: Path, system: str) -> None:
    kind = find_system(system).model
    trained = kind(small_config(mel_stack=4), kind.parse_options({}))
    trained.save_pretrained(tmp_path / "model")
    before = torch.get_rng_state()
    loaded = load_model(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)
    weights, expected = loaded.state_dict(), trained.state_dict()
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


def test_loading_does_not_import_torchs_compiler(tmp_path: Path) -> None:
    kind = find_system("skillnet").model
    kind(small_config(), kind.parse_options({})).save_pretrained(tmp_path / "model")
    script = (
        "import sys; from skillnet.systems import load_model; load_model(sys.argv[1]); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "model")], check=True)
