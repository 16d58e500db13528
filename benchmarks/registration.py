"""Registration of the demo's model, and the first prediction and search with a registered model.

A short training of the preset ``quickstart`` writes a model of the demo's size; only the sizes
matter here. *Registration* is timed as the demo runs it: in the process that evaluated the model,
whose libraries are loaded, with all cores. *Predict* and *search* are commands of their own, with
one thread. Their floor is a process that imports torch. A wrong name of a file needs none of it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.measure import Result, Took, find_corpora, ratio, side, spread, time_command

CLOCK = "wall and cpu"
MOST_ROUNDS = 5
#: Steps of the training: each of the six tasks gets some.
STEPS = 60
RUN, NAME = "bench", "bench"


def run(rounds: int, threads: int) -> list[Result]:
    """Seconds of a registration and of commands with a registered model, and their floor."""
    del threads
    rounds = min(rounds, MOST_ROUNDS)
    data = find_corpora("registration")
    if data is None:
        return []
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="skillnet-")))
        os.environ["SKILLNET_HOME"] = str(home)
        os.environ.pop("OMP_NUM_THREADS", None)
        _train(data)
        register = stack.enter_context(side(registrar, RUN, str(data)))
        registrations = [register(f"{NAME}-{number}") for number in range(rounds)]
        model = f"models:/{NAME}-0@champion"
        words = [sys.executable, "-m"]
        search = [
            *words,
            "skillnet_serving.search",
            "红色的心",
            "--model",
            model,
            "--data",
            str(data),
        ]
        commands = {
            "predict": [*words, "pipelines.predict", "--text", "宋代陶瓷工艺史", "--model", model],
            "search, new index": search,
            "search": search,
            "wrong name": [*words, "pipelines.predict", "missing.png", "--model", model],
            "floor": [sys.executable, "-c", "import torch"],
        }
        took: dict[str, list[Took]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                if name == "search, new index":
                    shutil.rmtree(home / "cache" / "indexes", ignore_errors=True)
                # A wrong name ends with 2.
                codes = (2,) if name == "wrong name" else (0,)
                took[name].append(time_command(command, codes, OMP_NUM_THREADS="1"))
    wall = spread([taken.wall for taken in registrations])
    setting = f"demo's model and corpora, {len(os.sched_getaffinity(0))} cores"
    results = [
        Result("registration", "", "s", *wall, "<= 10", rounds, setting, "the first loads MLflow")
    ]
    cpu = {name: [taken.cpu for taken in values] for name, values in took.items()}
    for name in ("predict", "search, new index", "search", "wrong name", "floor"):
        target = "<= 3" if name in ("predict", "search") else ""
        results.append(Result(name, "", "CPU s", *spread(cpu[name]), target, rounds, setting))
    for name in ("predict", "search"):
        found = ratio(cpu[name], cpu["floor"])
        results.append(Result(name, "import of torch", "ratio of CPU times", *found, "", rounds))
    return results


def registrar(run: str, data: str, folder: Path, stack: ExitStack) -> Callable[..., object]:
    """Return the registration of a run's model under a name, with the run's evaluation."""
    del folder, stack
    from pipelines.serving.registration import register_model
    from pipelines.training.evaluation.evaluator import evaluate_model  # the demo has loaded it
    from pipelines.training.runs import model_source

    del evaluate_model
    home = Path(os.environ["SKILLNET_HOME"])
    rows: list[dict[str, Any]] = json.loads((home / run / "result.json").read_text())["evaluation"]

    def register(name: str) -> object:
        source = model_source.resolve_model(run, None)
        return register_model(source, data, rows=rows, name=name)

    return register


def _train(data: Path) -> None:
    words = ["--config", "quickstart", "--name", RUN, "--data", str(data)]
    words += ["--training.steps", str(STEPS)]
    words += ["--tracking.register", "false"]
    subprocess.run(
        [sys.executable, "-m", "pipelines.finetune", *words], check=True, stdout=subprocess.DEVNULL
    )
