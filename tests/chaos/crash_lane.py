"""Kill a command at each of its file-system events, look, and run it again.

    python -m tests.chaos.crash_lane --command prepare
    python -m tests.chaos.crash_lane --command finetune --sample 20 --seed 1
    python -m tests.chaos.crash_lane --command sweep --kinds

Without ``--sample`` every event is a kill, except inside a transaction of SQLite: of each
transaction one event is drawn by the seed. SQLite makes a transaction atomic itself, and a kill
before its end leaves the state before it.
"""

import argparse
import datetime
import itertools
import random
import re
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.measure import append_csv_rows, machine
from lab import RESULTS
from tests.chaos.crash_points import CommandEnd, CrashLab, FileEvent, crash_lab, missing_compiler
from tests.chaos.crash_scenarios import SCENARIOS, VARYING, CrashScenario

DATABASE = "mlflow.db"
JOURNAL = f"{DATABASE}-journal"
#: Random ends of the names of temporary files, of safetensors, pyarrow, MLflow and Python.
TEMPORARY = re.compile(r"(?<=/\.tmp)\w{6}$|(?<=uploading\.)\w{8}$|(?<=/tmp)\w{8}(?=/|$)")
NUMBER = re.compile(r"\d+")


@dataclass
class CrashRow:
    """One kill.

    Args:
        date, machine: when and where.
        command: name of the scenario.
        events: number of events of the undisturbed command.
        event: number of the event of the kill.
        kind, path: operation and file of this event, in the run that was killed.
        exits: exit codes of the killed command and of the same command again.
        violations: what was damaged after the kill, or differs after the second command.
        seconds: time limit of both commands and the checks.
    """

    date: str
    machine: str
    command: str
    events: int
    event: int
    kind: str
    path: str
    exits: str
    violations: str
    seconds: float


COLUMNS = [each.name for each in fields(CrashRow)]


class CrashRunner:
    """Repeat one scenario from the same run root.

    Args:
        lab: runs the commands.
        scenario: what is killed.
    """

    def __init__(self, lab: CrashLab, scenario: CrashScenario) -> None:
        self._lab, self._scenario = lab, scenario
        self._template = lab.root.with_name(f"template-{scenario.name}")
        shutil.rmtree(lab.root, ignore_errors=True)
        lab.root.mkdir(parents=True)
        scenario.setup(lab)
        shutil.rmtree(self._template, ignore_errors=True)
        shutil.copytree(lab.root, self._template, symlinks=True)
        undisturbed = self._fresh(0)
        assert undisturbed.code == 0, undisturbed.output
        self.events = undisturbed.events
        self._expected = scenario.fingerprint(lab.root)

    def kill(self, number: int) -> CrashRow:
        """Kill the command at an event, check, run it again, and compare."""
        begin = time.monotonic()
        killed = self._fresh(number)
        violations = []
        event = killed.events[-1] if killed.events else FileEvent(0, "", "")
        exits = [killed.code]
        # Threads make the number of events vary, so the last numbers might not be reached.
        if killed.code != 0:
            violations += [f"killed: {each}" for each in self._scenario.violations(self._lab.root)]
            second = self._lab.run(self._scenario.words(self._lab.root))
            exits.append(second.code)
            violations += self._differences(killed, second)
        return CrashRow(
            datetime.date.today().isoformat(),
            machine(),
            self._scenario.name,
            len(self.events),
            number,
            event.kind,
            event.path,
            " ".join(map(str, exits)),
            "; ".join(violations)[:2000],
            round(time.monotonic() - begin, 1),
        )

    def _fresh(self, kill_at: int) -> CommandEnd:
        shutil.rmtree(self._lab.root)
        shutil.copytree(self._template, self._lab.root, symlinks=True)
        return self._lab.run(self._scenario.words(self._lab.root), kill_at)

    def _differences(self, killed: CommandEnd, second: CommandEnd) -> list[str]:
        if second.code != 0:
            lines = second.output.strip().splitlines()
            return [f"the same command ended with {second.code}: {' '.join(lines[-3:])[:600]}"]
        found = self._scenario.repeated(killed.events, second.events)
        found += [f"resumed: {each}" for each in self._scenario.violations(self._lab.root)]
        resumed = self._scenario.fingerprint(self._lab.root)
        for key, expected in self._expected.items():
            if resumed[key] != expected:
                found.append(f"{key}: {describe_difference(resumed[key], expected)}")
        return found


def describe_difference(found: object, expected: object) -> str:
    """Return the first parts in which two values differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
        parts = [f"{key} {found.get(key)}, not {expected.get(key)}" for key in keys[:4]]
        return ", ".join(parts)[:500]
    return f"{found}, not {expected}"[:500]


def choose_events(events: Sequence[FileEvent], seed: int, sample: int | None = None) -> list[int]:
    """Return the numbers of the events to kill at.

    Args:
        events: file-system changes of the undisturbed command.
        seed: start of the random numbers of the draws.
        sample: number of events; None for all. The events are divided into this number of equal
            ranges, and one is drawn from each.
    """
    draw = random.Random(seed)
    chosen, transaction = [], []
    for event in events:
        if Path(event.path).name not in (DATABASE, JOURNAL):
            chosen.append(event.number)
            continue
        transaction.append(event.number)
        # Removing the journal is the commit.
        if event.kind == "unlink":
            chosen.append(draw.choice(transaction))
            transaction = []
    chosen.sort()
    if sample is None or sample >= len(chosen):
        return chosen
    bounds = [len(chosen) * index // sample for index in range(sample + 1)]
    return [draw.choice(chosen[low:high]) for low, high in itertools.pairwise(bounds)]


def choose_kinds(events: Sequence[FileEvent], chosen: Sequence[int], seed: int) -> list[int]:
    """Return one of the chosen events of each kind and path, drawn by the seed, in order.

    Numbers and identifiers in a path are placeholders, so the same file of two trials, steps or
    versions is one path.

    Args:
        events: file-system changes of the undisturbed command.
        chosen: numbers of events, of :func:`choose_events`.
        seed: start of the random numbers of the draws.
    """
    draw, by_kind = random.Random(seed), defaultdict[tuple[str, str], list[int]](list)
    by_number = {event.number: event for event in events}
    for number in chosen:
        event = by_number[number]
        path = NUMBER.sub("N", VARYING.sub("ID", TEMPORARY.sub("TMP", event.path)))
        by_kind[event.kind, path].append(number)
    return sorted(draw.choice(numbers) for numbers in by_kind.values())


def enumerate_kills(
    lab: CrashLab, scenario: CrashScenario, seed: int, sample: int | None = None
) -> Iterator[CrashRow]:
    """Yield a row for each chosen event of a scenario."""
    runner = CrashRunner(lab, scenario)
    events = runner.events
    if sample == 1:
        # A command with Ray has more events in one run than in another, so the last may not occur.
        events = events[: max(len(events) // 2, 1)]
    for number in choose_events(events, seed, sample):
        yield runner.kill(number)


def main(argv: list[str] | None = None) -> int:
    """Run the lane; return 1 if a kill left a violation."""
    names = [scenario.name for scenario in SCENARIOS]
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.crash_lane", description=__doc__)
    parser.add_argument("--command", choices=names, action="append", help="by default all")
    parser.add_argument("--sample", type=int, help="events of each command (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds", action="store_true", help="one event of each kind and path, not all of them"
    )
    parser.add_argument("--first", type=int, default=1, help="ignore events before this number")
    parser.add_argument("--minutes", type=float, help="start no kill after this time")
    parser.add_argument("--output", type=Path, help="the CSV")
    options = parser.parse_args(argv)
    if reason := missing_compiler():
        print(f"no command is killed: {reason}", file=sys.stderr)
        return 0
    output = options.output or RESULTS / f"{datetime.date.today().isoformat()}-crash-points.csv"
    end = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    bad = 0
    with tempfile.TemporaryDirectory() as folder, crash_lab(Path(folder)) as lab:
        for kind in SCENARIOS:
            if options.command and kind.name not in options.command:
                continue
            runner = CrashRunner(lab, kind())
            numbers = choose_events(runner.events, options.seed, options.sample)
            if options.kinds:
                numbers = choose_kinds(runner.events, numbers, options.seed)
            numbers = [number for number in numbers if number >= options.first]
            print(f"{kind.name}: {len(runner.events)} events, {len(numbers)} kills", flush=True)
            for number in numbers:
                if time.monotonic() > end:
                    break
                row = runner.kill(number)
                append_csv_rows(output, COLUMNS, [asdict(row)])
                bad += bool(row.violations)
                print(
                    f"{row.command} {row.event} {row.kind} {row.path}: exits {row.exits}, "
                    f"{row.seconds} s {row.violations}",
                    flush=True,
                )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
