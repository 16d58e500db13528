"""The table of what systems cost."""

import dataclasses
from pathlib import Path

import pytest
import torch

from pipelines.training.config.run import FinetuneConfig
from skillnet.accounting import account_task
from skillnet.skills import default_tasks
from skillnet.systems import build_system
from skillnet_platform import config as configuration
from tests.helpers.small_corpora import small_config, write_corpora
from tools.docs.system_costs import main, read_system


def test_the_table_has_each_systems_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_corpora(tmp_path / "data")
    sizes = {
        "dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_dim": 24,
        "patch_size": 16,
        "vocab_size": 4000,
    }
    words = [word for key, value in sizes.items() for word in (f"--model.{key}", str(value))]
    systems = ["--systems", "skillnet,dense:size=executed", "--markdown"]
    assert main([*systems, "--data", str(data), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        "| system",
        "| ---",
        "| skillnet",
        "| operations",
        "| dense:size=executed",
        "| operations",
    ]
    means = [float(line.split(" | ")[-1].strip("| ")) for line in (lines[3], lines[5])]
    assert means[1] == pytest.approx(means[0], rel=0.02)
    assert len(lines[3].split(" | ")) == 3 + len(default_tasks())


def test_the_page_of_baselines_counts_as_the_code_does() -> None:
    words = ["--config", "quickstart", "--model.bigram_buckets", "0"]
    config = configuration.parse_config(FinetuneConfig, words, "test")
    page = Path(__file__).parents[3] / "docs" / "baselines.md"
    lines = page.read_text(encoding="utf-8").splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("| system | parameters |"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[begin + 2 :]]
    rows = rows[: next(n for n, row in enumerate(rows) if row == [""])]
    spoken = {"`moe`, 5 experts": "moe:experts=5"}
    spoken |= {"`dense`, executed": "dense:size=executed"}
    assert len(rows) == 6
    for name, *figures, _ in rows:
        system, options = read_system(spoken.get(name, name.strip("`")))
        # No weight has a place in memory: only their number is asked for.
        with torch.device("meta"):
            joint = dataclasses.replace(config, system=system).joint()
            model = build_system(system, joint.model, options)
        activated = [model.activated_parameters(task) for task in default_tasks()]
        total = sum(p.numel() for p in model.parameters())
        wanted = [total, sum(activated) / len(activated)]
        assert [float(figure) for figure in figures] == [
            pytest.approx(count / 1e6, abs=0.051) for count in wanted
        ], name


def test_options_of_a_system() -> None:
    assert read_system("moe:experts=5:balance=0.1") == ("moe", {"experts": 5, "balance": 0.1})
    model = build_system("dense", small_config(Path()).model)
    assert account_task(model, "text_to_code", {"query": 2, "candidate": 3}).tokens == 5
