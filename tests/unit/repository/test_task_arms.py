"""The arms of a comparison of one task differ only in what the comparison states."""

import argparse
from dataclasses import replace
from pathlib import Path

from benchmarks.method_trials import CONFIGURED
from benchmarks.task_arms import METRICS, list_heading_arms, list_length_arms, list_pair_arms

OPTIONS = argparse.Namespace(
    data=Path("corpora"), steps=250, longer=2.0, pretraining_steps=300, max_length=192, lr=1.5e-3
)


def test_lengths_differ_in_tokens_or_in_steps() -> None:
    arms = list_length_arms(OPTIONS)
    runs = [arm.finetuning for arm in arms.values()]
    sizes = [(run.tasks["text_to_code"].max_length, run.training.steps) for run in runs]
    assert sizes == [(96, 250), (192, 250), (96, 500)]
    for run in runs:
        assert replace(run, tasks=runs[0].tasks, training=runs[0].training) == runs[0]


def test_pairs_take_half_of_equally_many_steps() -> None:
    arms = list_pair_arms(OPTIONS)
    base, paired = arms[CONFIGURED], arms["with pairs"]
    assert base.finetuning == paired.finetuning
    assert base.pretraining is not None
    assert paired.pretraining is not None
    assert replace(paired.pretraining, tasks=base.pretraining.tasks) == base.pretraining
    weights = {name: task.weight or 0 for name, task in paired.pretraining.tasks.items()}
    assert weights.pop("pairs_code") == sum(weights.values())
    others = {name: (task.weight or 0) / 2 for name, task in base.pretraining.tasks.items()}
    assert weights == others
    assert all(task.split.startswith("pretrain") for task in paired.pretraining.tasks.values())


def test_headings_differ_in_the_corpus_of_the_masked_task() -> None:
    without, base, unused = list_heading_arms(OPTIONS).values()
    assert {arm.task for arm in (without, base, unused)} == {"text_classification"} < set(METRICS)
    assert without.pretraining is None
    assert without.finetuning == base.finetuning == unused.finetuning
    assert base.pretraining is not None
    assert unused.pretraining is not None
    assert replace(unused.pretraining, tasks=base.pretraining.tasks) == base.pretraining
    masked = unused.pretraining.tasks["masked_text"]
    assert masked.corpus == "headings_unused"
    assert replace(masked, corpus="headings") == base.pretraining.tasks["masked_text"]
