"""What each system costs at the sizes of a configuration: parameters and operations per task.

    python -m tools.docs.system_costs --config quickstart --model.bigram_buckets 0
    python -m tools.docs.system_costs --systems skillnet,dense:size=executed --data corpora

Words that it does not know are those of ``skillnet finetune``. With ``--data`` operations are
those of an example of the test split's mean length, else of the longest that the model reads.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

SYSTEMS = "skillnet,dense,dense:size=executed,moe,specialist"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.docs.system_costs", description=__doc__)
    parser.add_argument("--systems", default=SYSTEMS, help="name[:option=value]…, with commas")
    parser.add_argument("--markdown", action="store_true", help="print a table for a document")
    options, words = parser.parse_known_args(argv)

    from pipelines.training.config.run import FinetuneConfig
    from skillnet_evidence.cells import markdown_table
    from skillnet_platform import config as configuration
    from skillnet_platform import console

    config = configuration.parse_config(FinetuneConfig, words, "python -m tools.docs.system_costs")
    lengths = {name: _lengths(config, name) if config.data else {} for name in config.measured}
    header = ["system", "total", *(name.replace("_", " ") for name in config.measured), "mean"]
    rows = []
    for spoken in options.systems.split(","):
        rows += _rows(spoken, config, lengths)
    if options.markdown:
        print(markdown_table(header, rows))
    else:
        console.print_table(
            "parameters in millions; operations per example in millions", header, rows
        )
    return 0


def read_system(spoken: str) -> tuple[str, dict[str, Any]]:
    """("dense", {"size": "executed"}) of "dense:size=executed"."""
    import yaml

    name, *options = spoken.split(":")
    pairs = (option.partition("=") for option in options)
    return name, {key: yaml.safe_load(value) for key, _, value in pairs}


def _rows(spoken: str, config: Any, lengths: dict[str, dict[str, int]]) -> list[list[str]]:
    """Two rows of a system: parameters that a task activates, and operations of an example."""
    from skillnet.accounting import account_task
    from skillnet.systems import build_system

    name, options = read_system(spoken)
    # The reference tasks of a baseline are those of the run.
    joint = replace(config, system=name).joint()
    model = build_system(name, joint.model, options)
    costs = [account_task(model, task, lengths[task]) for task in config.measured]
    activated = [cost.activated for cost in costs]
    flops = [cost.flops_per_example for cost in costs]
    return [
        [spoken, _millions(costs[0].total), *map(_millions, [*activated, _mean(activated)])],
        ["operations", "", *map(_millions, [*flops, _mean(flops)])],
    ]


def _lengths(config: Any, task: str) -> dict[str, int]:
    """Mean length of the rows of a task's test split, by tower."""
    from pipelines.data.shards.dataset import open_corpus
    from pipelines.training.evaluation.inference import mean_row_lengths, split_inputs
    from pipelines.training.loading.task_columns import tower_column
    from skillnet_platform.storage.location import join_location, parse_location

    settings, spec = config.tasks[task], config.model.tasks[task]
    corpus = open_corpus(join_location(parse_location(config.data, Path()), settings.corpus))
    return mean_row_lengths(
        {
            tower: split_inputs(
                corpus.splits["test"].table(),
                plan,
                config.model,
                corpus.name,
                column=tower_column(spec, tower),
                limit=None if tower == "query" else settings.max_length,
            )
            for tower, plan in spec.towers.items()
        }
    )


def _mean(values: list[int]) -> float:
    return sum(values) / len(values)


def _millions(value: float) -> str:
    millions = value / 1e6
    return f"{millions:.1f}" if millions < 100 else f"{millions:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
