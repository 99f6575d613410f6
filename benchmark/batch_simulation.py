"""What a batch job becomes on 1 to 1,000 groups, from a run that was measured: a discrete-event model (SimPy).

    xdit batch --prompts prompts.jsonl --output_dir job --groups 2
    python benchmark/batch_simulation.py --run job/summary.json
    python benchmark/batch_simulation.py --run job/summary.json --prompts 1000000 --batch_seconds 20 --mean_hours 24

First the measured run itself is simulated, with its groups, batches and start, and compared: further off than --within,
and nothing else is computed. Then the job of --prompts on every number of --groups.

The model: a driver that serves one event at a time, at the processor time that the measured driver took for a batch;
groups that start, load, and have one batch ahead; a batch's seconds drawn from the measured ones; a calibration that
the first group learns before any batch; groups that are lost at random times and come back after their start, whose
batch is made again. Not modelled: the network, shared storage under load, an autoscaler's delays, and Ray's own
control store.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import simpy
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xfuser.config.arguments import positive  # noqa: E402
from xfuser.config.parser import OneLineParser  # noqa: E402
from xfuser.core.files import write_json  # noqa: E402

AHEAD = 2  # as in xfuser/ray/batch/groups.py
REQUEST_BYTES = 180  # of the driver's memory: offset, kind, done, a place in a batch, the id while lines are checked
NEVER_HOURS = 1e9  # hours between two losses, where none is to be expected


@dataclass(frozen=True)
class Measured:
    """What a run has shown.

    Attributes:
        images: Made in it.
        batches: Seconds of each.
        writes: Seconds of writing each.
        groups: How many.
        starts: Seconds from a group's room to its first batch.
        learning: Seconds of learning the calibration; 0 without a goal.
        driver: Processor seconds that the driver took for a batch.
        row_bytes: Of the manifest, appended for an image.
        job: Wall seconds from the first request for room to the last answer.
    """

    images: int
    batches: list[float]
    writes: list[float]
    groups: int
    starts: list[float]
    learning: float
    driver: float
    row_bytes: float
    job: float

    @classmethod
    def of(cls, summary: dict[str, Any]) -> Measured:
        """Read a summary.json.

        Raises:
            ValueError: It is of a run that made nothing, or lists not all of its batches.
        """
        run = summary["run"]
        groups = [each for each in run["groups"] if each["batches"]]
        if not run["batches"] or sum(each["batches"] for each in groups) != len(run["batches"]):
            raise ValueError(
                "--run: its summary lists no batches, or not all; name a run of at most 5000 that made some"
            )
        return cls(
            run["images"],
            run["batches"],
            run["writes"],
            len(groups),
            [each["start_seconds"] for each in groups],
            run["learn_seconds"],
            run["driver_cpu_seconds"] / len(run["batches"]),
            run["appended_bytes"] / run["images"],
            run["seconds_of"]["job"],
        )


@dataclass(frozen=True)
class Case:
    """One job to simulate.

    Attributes:
        batches: How many.
        groups: How many take them.
        starts: Seconds that a group's start takes; drawn from.
        seconds: Of a batch; drawn from, or taken in turn.
        writes: Of writing one, alike.
        in_turn: Whether the measured seconds are taken as they came.
        learning: Seconds before any batch, of the first group.
        driver: Of the driver, for a batch.
        mean_hours: Between two losses of one group.
        seed: Of what is drawn.
    """

    batches: int
    groups: int
    starts: list[float]
    seconds: list[float]
    writes: list[float]
    in_turn: bool = False
    learning: float = 0.0
    driver: float = 0.0
    mean_hours: float = NEVER_HOURS
    seed: int = 0


@dataclass
class Seen:
    """What came of it.

    Attributes:
        finish: Seconds.
        busy: Seconds of generating that counted.
        repeated: Seconds of generating that were lost.
        alive: Seconds that groups could have generated in.
        losses: Of groups.
        driver_busy: Seconds.
        drawn: Batches whose seconds were drawn.
    """

    finish: float = 0.0
    busy: float = 0.0
    repeated: float = 0.0
    alive: float = 0.0
    losses: int = 0
    driver_busy: float = 0.0
    drawn: int = 0


@dataclass
class Simulation:
    """One job in SimPy's time."""

    case: Case
    env: simpy.Environment = field(default_factory=simpy.Environment)
    seen: Seen = field(default_factory=Seen)

    def run(self) -> Seen:
        """Simulate the job to its end."""
        case = self.case
        self._dice = random.Random(case.seed)
        self._left = deque(range(case.batches))
        self._done = 0
        self._over = self.env.event()
        self._learned = self.env.event()
        self._driver = simpy.Resource(self.env)
        if not case.learning:
            self._learned.succeed()
        for number in range(case.groups):
            self.env.process(self._group(number))
        self.env.run(until=self._over)
        self.seen.finish = self.env.now
        return self.seen

    def _group(self, number: int) -> Generator[simpy.Event, Any, None]:
        """Start, learn where it is the first, then work until nothing is left; again after each loss."""
        case, dice = self.case, self._dice
        while True:
            yield self.env.timeout(case.starts[number % len(case.starts)] if case.in_turn else dice.choice(case.starts))
            began = self.env.now
            if number == 0 and not self._learned.triggered:
                yield self.env.timeout(case.learning)
                self._learned.succeed()
            yield self._learned
            lost_at = self.env.now + dice.expovariate(1 / (case.mean_hours * 3600))
            held: deque[int] = deque()
            yield from self._ask(held)
            while held:
                seconds = self._seconds()
                ahead = self.env.process(self._ask(held)) if self._worth_asking() else None
                if self.env.now + seconds > lost_at:
                    break
                yield self.env.timeout(seconds)
                self.seen.busy += seconds
                held.popleft()
                self._done += 1
                if self._done == case.batches:
                    yield self.env.timeout(self._dice.choice(case.writes))
                    yield from self._serve()
                    self.seen.alive += self.env.now - began
                    self._over.succeed()
                    return
                if not held:
                    yield ahead if ahead is not None and ahead.is_alive else self.env.process(self._ask(held))
            else:
                self.seen.alive += self.env.now - began
                return
            part = max(0.0, lost_at - self.env.now)
            yield self.env.timeout(part)
            self.seen.repeated += part
            self.seen.losses += 1
            self.seen.alive += self.env.now - began
            if ahead is not None and ahead.is_alive:
                yield ahead
            self._left.extendleft(reversed(held))

    def _ask(self, held: deque[int]) -> Generator[simpy.Event, Any, None]:
        """Have the driver note an answer and give the next batch."""
        yield from self._serve()
        if self._left:
            held.append(self._left.popleft())

    def _serve(self) -> Generator[simpy.Event, Any, None]:
        with self._driver.request() as turn:
            yield turn
            yield self.env.timeout(self.case.driver)
            self.seen.driver_busy += self.case.driver

    def _worth_asking(self) -> bool:
        return len(self._left) > self.case.groups  # behind the last batches nobody waits while another has two

    def _seconds(self) -> float:
        case = self.case
        self.seen.drawn += 1
        if case.in_turn:
            return case.seconds[(self.seen.drawn - 1) % len(case.seconds)]
        return self._dice.choice(case.seconds)


def replay(measured: Measured) -> tuple[float, float]:
    """Simulate the run that was measured; its predicted seconds, and how far off they are."""
    case = Case(
        len(measured.batches),
        measured.groups,
        measured.starts,
        measured.batches,
        measured.writes,
        True,
        measured.learning,
        measured.driver,
    )
    finish = Simulation(case).run().finish
    return finish, abs(finish / measured.job - 1)


def scaled(measured: Measured, args: argparse.Namespace, groups: int) -> Case:
    """The job of many prompts on so many groups."""
    size = args.batch_size or max(1, round(measured.images / len(measured.batches)))
    factor = 1.0 if args.batch_seconds is None else args.batch_seconds / statistics.fmean(measured.batches)
    return Case(
        -(-args.prompts // size),
        groups,
        measured.starts if args.start_seconds is None else [args.start_seconds],
        [each * factor for each in measured.batches],
        measured.writes,
        False,
        measured.learning * factor,
        measured.driver,
        args.mean_hours,
        args.seed,
    )


def row(case: Case, seen: Seen, measured: Measured, prompts: int) -> dict[str, Any]:
    """What is reported of one job."""
    return {
        "groups": case.groups,
        "hours": seen.finish / 3600,
        "efficiency": seen.busy / (seen.finish * case.groups),
        "idle_share": max(0.0, 1 - (seen.busy + seen.repeated) / seen.alive) if seen.alive else 0.0,
        "repeated_share": seen.repeated / (seen.busy + seen.repeated),
        "losses": seen.losses,
        "driver_load": seen.driver_busy / seen.finish,
        "manifest_bytes": measured.row_bytes * prompts,
        "manifest_files": case.groups + seen.losses,
        "driver_bytes": REQUEST_BYTES * prompts,
        "batches_per_second": case.batches / seen.finish,
    }


def verdict(rows: list[dict[str, Any]], measured: Measured) -> str:
    """Say what breaks first, and what is done about it."""
    largest = rows[-1]
    most = 1 / measured.driver if measured.driver else float("inf")
    full = next((each["groups"] for each in rows if each["driver_load"] > 0.8), None)
    begun = (
        f"The driver breaks first: it is full from {full} groups on"
        if full is not None
        else f"Nothing breaks up to {largest['groups']} groups; the driver would be the first, and is busy for "
        f"{largest['driver_load']:.0%} of the time there"
    )
    return (
        f"{begun}. It takes {1000 * measured.driver:.1f} ms of a processor for a batch, so it can serve "
        f"{most:.0f} batches a second, however many groups ask. What is done: a group has one batch ahead, so it waits "
        "only where the driver is full; answers are fetched together; images and rows do not pass through the driver. "
        "What to do: larger batches, or several jobs, each with a part of the prompts and a folder of its own."
    )


def main() -> None:
    """Compare with the measured run, then compute."""
    args = build_parser().parse_args()
    try:
        measured = Measured.of(json.loads(args.run.read_text(encoding="utf-8")))
        predicted, off = replay(measured)
    except (OSError, KeyError, ValueError) as error:
        build_parser().error(f"--run {args.run}: {error}")
    console = Console()
    console.print(
        f"the measured run: {measured.images} images, {measured.groups} groups, {measured.job:.1f} s; simulated "
        f"{predicted:.1f} s, {off:.1%} off",
        markup=False,
    )
    if off > args.within:
        raise SystemExit(f"batch_simulation.py: more than {args.within:.0%} off, so nothing is computed from it")
    rows = []
    for groups in sorted(args.groups):
        case = scaled(measured, args, groups)
        rows.append(row(case, Simulation(replace(case)).run(), measured, args.prompts))
    console.print(table(rows, args))
    said = verdict(rows, measured)
    console.print(said, markup=False)
    if args.output is not None:
        checked = {"measured": measured.job, "simulated": predicted, "off": off}
        write_json(args.output, {"check": checked, "rows": rows, "verdict": said})


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> Table:
    """Draw what was computed."""
    drawn = Table(
        title=f"{args.prompts:,} prompts, a group lost every {args.mean_hours:g} hours: computed, not measured",
        box=None,
    )
    for name in ("groups", "hours", "efficiency", "idle", "repeated", "losses", "driver", "manifest", "driver memory"):
        drawn.add_column(name, justify="right", no_wrap=True)
    for each in rows:
        drawn.add_row(
            str(each["groups"]),
            f"{each['hours']:.2f}",
            f"{each['efficiency']:.1%}",
            f"{each['idle_share']:.2%}",
            f"{each['repeated_share']:.2%}",
            str(each["losses"]),
            f"{each['driver_load']:.1%}",
            f"{each['manifest_bytes'] / 1e6:.0f} MB",
            f"{each['driver_bytes'] / 1e6:.0f} MB",
        )
    return drawn


def build_parser() -> OneLineParser:
    """Make the parser."""
    parser = OneLineParser(prog="batch_simulation.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run", type=Path, required=True, help="summary.json of a measured run")
    parser.add_argument("--prompts", type=positive, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--groups", type=positive, nargs="+", default=[1, 10, 100, 1000], help="default: 1 10 100 1000")
    parser.add_argument("--batch_size", type=positive, help="default: the measured run's")
    parser.add_argument("--batch_seconds", type=float, help="mean of a batch (default: as measured)")
    parser.add_argument("--start_seconds", type=float, help="of a group (default: as measured)")
    parser.add_argument("--mean_hours", type=float, default=24.0, help="between two losses of a group (default: 24)")
    parser.add_argument("--within", type=float, default=0.1, help="of the measured run's time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="a JSON file with all numbers")
    return parser


if __name__ == "__main__":
    main()
