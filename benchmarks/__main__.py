"""Run benchmarks: ``python -m benchmarks [name ...]``; each writes a dated CSV."""

import argparse
import importlib
import os
import sys
from pathlib import Path

NAMES = (
    "training_step",
    "packing",
    "many_skills",
    "stream",
    "two_workers",
    "moe",
    "ray_overhead",
    "sweep_overhead",
    "apart",
    "prepare_speed",
    "prepare_text",
    "prepare_scaling",
    "reading",
    "waiting",
    "tracker_auth",
    "registration",
    "loading",
    "serving",
    "search",
    "quantization",
    "router",
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}; all")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of a comparison")
    parser.add_argument("--threads", type=int, default=1, help="threads; with 1 CPU time counts")
    parser.add_argument("--data", type=Path, help="prepared corpora (default: the run root's)")
    parser.add_argument("--model", help="trained run that quantization measures")
    parser.add_argument("--seconds", type=float, help="of a trial of sweep_overhead (default: 60)")
    parser.add_argument("--output", type=Path, help="folder of the CSVs")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.names) - set(NAMES))
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")

    # Before torch is imported.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    from skillnet.precision import keep_freed_memory

    keep_freed_memory()
    import torch

    from benchmarks import measure
    from skillnet_platform import console

    torch.set_num_threads(options.threads)
    if options.data:
        os.environ["SKILLNET_BENCHMARK_DATA"] = str(options.data.absolute())
    if options.model:
        os.environ["SKILLNET_BENCHMARK_MODEL"] = options.model
    if options.seconds:
        os.environ["SKILLNET_BENCHMARK_SECONDS"] = str(options.seconds)
    for name in options.names or NAMES:
        console.print_note(f"{name} …")
        module = importlib.import_module(f"benchmarks.{name}")
        results = module.run(options.rounds, options.threads)
        if not results:
            continue
        path = measure.write(
            name.replace("_", "-"),
            results,
            options.threads,
            options.output or measure.RESULTS,
            getattr(module, "CLOCK", ""),
        )
        rows = [
            (
                f"{r.measured} / {r.against}" if r.against else r.measured,
                f"{r.value:.3g} ({r.low:.3g}–{r.high:.3g}) {r.unit}",
                r.target,
                r.met,
            )
            for r in results
        ]
        console.print_table(name, ["measured", "median (smallest–largest)", "target", "met"], rows)
        console.print_note(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
