"""What the paper's corpora and Wukong's would take: CPUs, time, storage, network.

    python -m tools.docs.scale_table            print the tables
    python -m tools.docs.scale_table --write    put them into docs/scale.md

The costs are those of the newest CSVs of ``prepare_speed``, ``reading``, ``waiting`` and
``reader_memory``, and of ``prepare_scaling`` if there is one: how many CPUs the one task that reads
a corpus can feed. Every other number is an assumption, named in ``CORPORA`` and below and printed
with the tables.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import GPU_CPUS, GPU_ROWS, RESULTS, read_csv_rows
from skillnet_platform.storage import human_bytes
from tools.docs.page_marks import put

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
#: Share of its time that a CPU works on rows: starts, stragglers and Ray take the rest. Assumed.
BUSY = 0.8
#: What was measured per row, and of how many units: seconds of sound, frames.
MEASURED_SECONDS, MEASURED_FRAMES = 10.0, 40.0
#: Bytes that a photograph of 224 x 224 takes as JPEG (``pipelines.data.shards.jpeg``), least and
#: most. Assumed: the measured ones are drawings, which take less.
PICTURE = (10e3, 30e3)
#: Of a clip of 8 x 96 x 96: a grey pixel takes two thirds of a coloured one.
SHARE = 8 * 96 * 96 / 224**2 * 2 / 3
CLIP = (PICTURE[0] * SHARE, PICTURE[1] * SHARE)


@dataclass(frozen=True)
class Plan:
    """A corpus at its full size.

    Args:
        name: folder of the corpus below the prepared corpora.
        kind: category of its rows.
        rows: how many.
        source: bytes of a row's file.
        units: seconds of sound or frames in a row; 1 for the others.
        stored: bytes of a finished row, least and most.
        reader: name of what was measured of its reading task's memory.
        why: the assumptions.
        layout: name of what was measured of its reading task's time.
    """

    name: str
    kind: str
    rows: int
    source: float
    units: float
    stored: tuple[float, float]
    reader: str
    why: str
    layout: str


MELS = 178 * 3600 / 141_600 * 100 * 80 * 4

CORPORA = (
    Plan("AISHELL-1", "sound", 141_600, 178 * 3600 * 32_000 / 141_600, 178 * 3600 / 141_600,
         (MELS, MELS), "AISHELL-1",
         "178 h in 141,600 utterances, 16 kHz of 16 bits; log-mel frames kept raw", "aishell1"),
    Plan("AIC-ICC", "image", 210_000, 100e3, 1, PICTURE, "AIC-ICC",
         "210,000 images of 0.1 MB. Decoding costs as much as for the larger measured images",
         "aic_icc"),
    Plan("VATEX", "video", 35_000, 1.5e6, 250, CLIP, "VATEX",
         "35,000 videos of 10 s, 25 frames per second, 1.5 MB. A frame costs as much as a measured "
         "one. 8 frames of 96 x 96 are kept as JPEG; a grey pixel takes two thirds of a coloured "
         "one's bytes", "vatex"),
    Plan("CodeSearchNet, Python", "code", 457_000, 2e3, 1, (3e3, 3e3), "",
         "457,000 functions with docstrings, 2 KB each", "codesearchnet"),
    Plan("Wukong", "image", 100_000_000, 100e3, 1, PICTURE, "tars",
         "100 million pairs in tars, images of 0.1 MB. The cost of captions is negligible",
         "webdataset"),
)  # fmt: skip


def newest(name: str, folder: Path = RESULTS) -> Path:
    """The newest CSV of a benchmark.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(folder.glob(f"*-{name}.csv"))
    if not found:
        raise FileNotFoundError(f"{folder}: no CSV of {name}; run python -m benchmarks {name}")
    return found[-1]


def measured(path: Path, unit: str) -> dict[str, float]:
    """What was measured in that unit: name -> median."""
    return {
        row["measured"]: float(row["value"])
        for row in read_csv_rows(path)
        if row["unit"] == unit and not row["against"]
    }


def tables(folder: Path = RESULTS) -> str:
    """The tables, as Markdown."""
    speed, reading, waiting, readers = (
        newest(name, folder) for name in ("prepare-speed", "reading", "waiting", "reader-memory")
    )
    scaling = max(folder.glob("*-prepare-scaling.csv"), default=None)
    reads = measured(scaling, "s/row") if scaling is not None else {}
    per_row = {k.removeprefix("prepare, "): v for k, v in measured(speed, "s/row").items()}
    cell = measured(reading, "bytes/row")["reading encoded pictures"]
    load = measured(waiting, "s/row")["loader"]
    held, kept = measured(readers, "bytes/row"), measured(readers, "bytes/row on disk")
    more = [f"`{path.name}`" for path in (readers, scaling) if path is not None]
    sizes = {
        "image": "1600 x 1200 pixels, JPEG",
        "sound": "10 s, WAV, 32 kHz stereo",
        "video": "40 frames of 256 x 256, MP4",
        "code": "a function of Python's standard library",
    }
    costs = "; ".join(f"{kind} {per_row[kind]:.2g} ({size})" for kind, size in sizes.items())
    lines = [
        f"Seconds of one core per row: {costs}. From `{speed.name}`, `{reading.name}`, "
        f"`{waiting.name}`, {' and '.join(more)}.",
        "",
        "| corpus | CPU hours | on 16 CPUs | on 256 CPUs | read rate, 256 CPUs | prepared "
        "| memory of the reading task | spool |" + (" max CPUs |" if reads else ""),
        "|---|---:|---:|---:|---:|---:|---:|---:|" + ("---:|" if reads else ""),
    ]
    fed: dict[str, float] = {}
    for plan in CORPORA:
        cost = per_row[plan.kind] * plan.units / units_measured(plan.kind)
        if reads:
            fed[plan.name] = cost / reads[f"reading rows, {plan.layout}"]
        hours = plan.rows * cost / BUSY / 3600
        few, many = (min(cpus, fed.get(plan.name, cpus)) for cpus in (16, 256))
        read = many * plan.source / cost * BUSY
        stored = " to ".join(dict.fromkeys(human_bytes(plan.rows * size) for size in plan.stored))
        lines.append(
            f"| {plan.name} | {hours:,.1f} | {_time(hours / few)} | {_time(hours / many)} | "
            f"{human_bytes(read)}/s | {stored} | {_reading(plan, held, kept)} |"
            + (f" {fed[plan.name]:,.0f} |" if reads else "")
        )
    lines += ["", *_fed(fed)]
    cores = GPU_ROWS * load
    lines += [
        "",
        f"Training on JPEG images of 224 x 224 ({cell / 1024:.1f} KiB each, 64 measured) takes "
        f"{load * 1e3:.2f} ms of a core per row. A GPU that processes {GPU_ROWS:,} rows per second "
        f"needs {cores:.1f} cores, and {'does not wait' if cores < GPU_CPUS else 'waits'} beside "
        f"{GPU_CPUS}.",
        "",
        "Assumptions:",
        "",
        f"- A CPU processes rows {BUSY:.0%} of the time, without start-up and the reading task.",
        f"- A photograph of 224 x 224 takes {PICTURE[0] / 1e3:.0f} to {PICTURE[1] / 1e3:.0f} KB as "
        "JPEG; none was available.",
        *(f"- {plan.name}: {plan.why}." for plan in CORPORA),
    ]
    return "\n".join(lines)


def _fed(fed: dict[str, float]) -> list[str]:
    """State the spool and how many CPUs each corpus can use; ``fed`` is their number."""
    if not fed:
        return ["How many CPUs the reading task of a corpus can feed was not measured."]
    slow = {name: math.ceil(256 / cpus) for name, cpus in fed.items() if cpus < 256}
    parts = ", ".join(f"{count} of {name}" for name, count in slow.items())
    return [
        "The spool exists only while a tokenizer is trained. *Max CPUs* is the number that the "
        "reading task can supply; the times use at most it."
        + (f" To use 256 CPUs, divide the corpus: {parts}." if parts else "")
    ]


def _reading(plan: Plan, held: dict[str, float], kept: dict[str, float]) -> str:
    """Return the cells for the memory of a reading task and its spool on disk."""
    if not plan.reader:
        return "– | –"
    row = held[f"read, {plan.reader}"]
    memory = human_bytes(plan.rows * row) if row >= 1 else "constant"
    if plan.kind == "sound":  # transcripts are encoded as characters, so no tokenizer is trained
        return f"{memory} | none"
    return f"{memory} | {human_bytes(plan.rows * kept[f'spool, {plan.reader}'])}"


def units_measured(kind: str) -> float:
    """Of how many units the measured row of a kind was."""
    return {"sound": MEASURED_SECONDS, "video": MEASURED_FRAMES}.get(kind, 1.0)


def _time(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.1f} h" if hours >= 1 else f"{max(hours * 60, 0.1):.1f} min"


def main(argv: list[str] | None = None) -> int:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into docs/scale.md")
    given = parser.parse_args(argv)
    text = tables()
    if given.write:
        put(PAGE, "scale", text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
