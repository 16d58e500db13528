"""Preparing text beside Hugging Face ``datasets``: whole commands, from their start to their end.

Both read one file of JSON lines, tokenize each text with the same ready tokenizer in as many
processes, and write Arrow files. ``skillnet prepare`` also assigns splits, compares rows, numbers
classes, hashes what it wrote, and could resume. ``datasets`` is used as its documentation advises:
``load_dataset``, a batched ``map`` with ``num_proc``, ``save_to_disk``. The third side is a pool of
processes that parse and tokenize, and keep nothing: what no program can avoid.

CPU time is that of all processes of a command.
"""

import json
import multiprocessing
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from benchmarks.measure import Result, Took, alternate, ratio, spread, time_command

#: Rows of the files.
ROWS = (10_000, 1_000_000)
#: Characters of a row, as in titles of news; and classes.
CHARACTERS, CLASSES = (10, 40), 15
MAX_TOKENS = 128
#: Rows of a batch of ``map`` and of the pool.
BATCH = 2_000
MOST_ROUNDS = 3
CLOCK = "cpu and wall, see the rows"


def run(rounds: int, threads: int) -> list[Result]:
    """Ratios of whole commands, for few rows and for many."""
    processes = len(os.sched_getaffinity(0))
    results = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tokenizer = train_tokenizer(folder)
        for rows in ROWS:
            path = write_rows(folder / f"{rows}.jsonl", rows)
            took = _compare(path, tokenizer, processes, min(rounds, MOST_ROUNDS))
            results += _ratios(took, rows, processes)
    return results


def _ratios(took: dict[str, list[Took]], rows: int, processes: int) -> list[Result]:
    setting = f"{rows} rows of {sum(CHARACTERS) // 2} characters, {processes} processes"
    rounds, results = len(took["prepare"]), []
    for clock in Took._fields:
        seconds = {name: [getattr(each, clock) for each in all_] for name, all_ in took.items()}
        for name, values in seconds.items():
            label = f"{name}, {clock} time"
            results.append(Result(label, "", "s", *spread(values), "", rounds, setting))
        for other, target in (("datasets", "<= 1.1"), ("pool", "")):
            found = ratio(seconds["prepare"], seconds[other])
            label = f"prepare, {clock} time"
            results.append(Result(label, other, "ratio", *found, target, rounds, setting))
    return results


def _compare(path: Path, tokenizer: Path, processes: int, rounds: int) -> dict[str, list[Took]]:
    prepare = ["pipelines.prepare", "--corpus", f"mine=folder:{path}", "--cpus", str(processes)]
    module = "benchmarks.prepare_text"
    given = [str(path), str(tokenizer), str(processes)]
    sides = {
        "prepare": [*prepare, "--tokenizer", str(tokenizer), "--data"],
        "datasets": [module, "datasets", *given],
        "pool": [module, "pool", *given],
    }
    took: dict[str, list[Took]] = {name: [] for name in sides}
    for _, name in alternate(sides, rounds):
        with tempfile.TemporaryDirectory() as output:
            words = [sys.executable, "-m", *sides[name], f"{output}/out"]
            took[name].append(time_command(words))
    return took


def write_rows(path: Path, rows: int) -> Path:
    """Write lines of random Chinese characters and a class.

    Args:
        path: file to write.
        rows: number of lines.
    """
    choose = random.Random(0)
    characters = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]
    with path.open("w", encoding="utf-8") as stream:
        for number in range(rows):
            text = "".join(choose.choices(characters, k=choose.randint(*CHARACTERS)))
            row = {"text": text, "label": f"class {number % CLASSES}"}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def train_tokenizer(folder: Path) -> Path:
    """Train a tokenizer on such texts, and return its file.

    Args:
        folder: receives the file.
    """
    from pipelines.data.tokenizer import training as tokenizers

    lines = write_rows(folder / "training.jsonl", 20_000).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    path = folder / "tokenizer.json"
    path.write_text(tokenizers.train_tokenizer(texts, [], size=6_000), encoding="utf-8")
    return path


# -- contenders -----------------------------------------------------------------------------


def map_datasets(path: str, tokenizer: str, processes: int, output: str) -> None:
    """Prepare the rows with ``datasets``."""
    import datasets
    from tokenizers import Tokenizer

    datasets.disable_progress_bars()
    encoder = Tokenizer.from_file(tokenizer)

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"tokens": [e.ids[:MAX_TOKENS] for e in encoder.encode_batch_fast(batch["text"])]}

    rows = datasets.load_dataset(
        "json", data_files=path, split="train", cache_dir=f"{output}-cache"
    )
    made = rows.map(encode, batched=True, batch_size=BATCH, num_proc=processes)
    made.save_to_disk(output)


def pool_rows(path: str, tokenizer: str, processes: int, output: str) -> None:
    """Parse and tokenize the rows in a pool, and keep nothing."""
    context = multiprocessing.get_context("spawn")
    with (
        open(path, encoding="utf-8") as stream,  # noqa: PTH123
        context.Pool(processes, _load_encoder, (tokenizer,)) as pool,
    ):

        def batches() -> Iterator[list[str]]:
            while lines := list(islice(stream, 10 * BATCH)):
                yield lines

        for _ in pool.imap_unordered(_encode, batches()):
            pass


def _load_encoder(tokenizer: str) -> None:
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    globals()["_encoder"] = Tokenizer.from_file(tokenizer)


def _encode(lines: list[str]) -> int:
    encoder = globals()["_encoder"]
    rows = [json.loads(line) for line in lines]
    return len([e.ids[:MAX_TOKENS] for e in encoder.encode_batch_fast([r["text"] for r in rows])])


if __name__ == "__main__":
    SIDES = {"datasets": map_datasets, "pool": pool_rows}
    SIDES[sys.argv[1]](sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
