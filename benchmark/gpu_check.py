"""What an owner of N GPUs runs first: NCCL, flash-attn, every kind of parallelism, cache and compile, in one table.

    bash scripts/gpu_check.sh
    bash scripts/gpu_check.sh --device cpu --processes 2

A transformer of FLUX.1-dev's sizes with random weights in bfloat16 (a toy one in float32 on a CPU), nothing to
download. Every mesh runs in processes of its own, so that one that fails does not take the others with it, and is held
against one process: the latents after all steps, and the plan. Exit code 1 where a row failed; a check that cannot run
here is named "not run", never passed.

A row passes where the relative root mean square error is at most what its arithmetic explains: 1e-3 in float32 and 5e-2
in bfloat16 where the computation is the same, 0.2 where PipeFusion reads older keys and values on purpose, or where
rounding tipped a decision, so that the plan is another one than one process's. Ranks that disagree, and values that are
not finite, never pass.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import gcd
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xfuser.config.parser import OneLineParser  # noqa: E402
from xfuser.core.console import quiet_libraries  # noqa: E402

quiet_libraries()

from benchmark.gpu_check_worker import CACHES, TOY  # noqa: E402
from benchmark.launch import launch  # noqa: E402
from xfuser.config.arguments import positive  # noqa: E402
from xfuser.core.distributed.environment import (  # noqa: E402
    DEVICES,
    choose_device,
    describe_environment,
    device_count,
    synchronize,
)

EXACT = {"cpu": 1e-3}
EXACT_HALF, LOOSE = 5e-2, 0.2
FULL_HEADS, FULL_BLOCKS = 24, 57
CPU_PROCESSES = 2
WIDTH = 200  # of a table that no terminal limits


@dataclass(frozen=True)
class Check:
    """One mesh, in processes of its own."""

    name: str
    processes: int
    degrees: dict[str, Any] = field(default_factory=dict)
    guided: bool = False
    compile: bool = False
    displaced: bool = False
    writes_reference: bool = False
    impossible: str | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table; ``passed`` is ``None`` where nothing was run."""

    name: str
    cache: str
    passed: bool | None
    why: str = ""
    seen: dict[str, Any] = field(default_factory=dict)
    guided: bool = False


def checks(processes: int, heads: int, blocks: int, compile_too: bool) -> Iterator[Check]:
    """Every kind of parallelism on so many processes, the references first."""
    yield Check("one process", 1, writes_reference=True)
    yield Check("one process, guidance", 1, guided=True, writes_reference=True)
    never = None if compile_too else "--no_compile"
    yield Check("one process, compiled", 1, compile=True, impossible=never)
    few = "there is one device only" if processes == 1 else None
    ulysses = gcd(processes, heads)
    rest = processes // ulysses
    both = {"ulysses_degree": ulysses} | ({"ring_degree": rest} if rest > 1 else {})
    name = f"ulysses {ulysses}" + (f" × ring {rest}" if rest > 1 else "")
    yield Check(name, processes, both, impossible=few)
    yield Check(f"{name}, compiled", processes, both, compile=True, impossible=few or never)
    yield Check(f"ring {processes}", processes, {"ring_degree": processes}, impossible=few)
    mixed = None if processes % 2 == 0 and processes >= 4 else "it needs an even number of at least 4 devices"
    degrees = {"ring_degree": 2, "ulysses_degree": processes // 2}
    fits = None if processes > 1 and heads % max(processes // 2, 1) == 0 else f"{heads} heads do not divide so"
    yield Check(f"ring 2 × ulysses {processes // 2}", processes, degrees, impossible=few or mixed or fits)
    stages = {"pipefusion_parallel_degree": processes}
    many = None if processes <= blocks else f"the model has only {blocks} blocks"
    synchronous = stages | {"pipefusion_max_lag": 0}
    yield Check(f"pipefusion {processes}, synchronous", processes, synchronous, impossible=few or many)
    lagging = stages | {"pipefusion_max_lag": 2, "warmup_steps": 2}
    yield Check(f"pipefusion {processes}, displaced", processes, lagging, displaced=True, impossible=few or many)
    half = processes // 2
    degrees = {"pipefusion_parallel_degree": 2, "ulysses_degree": half, "pipefusion_max_lag": 0}
    yield Check(f"pipefusion 2 × ulysses {half}", processes, degrees, impossible=few or mixed or fits)
    odd = None if processes % 2 == 0 else "guidance has 2 branches, and the devices are an odd number"
    branch = {"use_cfg_parallel": True} | ({"ring_degree": half} if half > 1 else {})
    name = "cfg 2" + (f" × ring {half}" if half > 1 else "")
    yield Check(name, processes, branch, guided=True, impossible=few or odd)
    yield Check(f"data {processes}", processes, {"data_parallel_degree": processes}, impossible=few)


def run_check(check: Check, args: argparse.Namespace, device: torch.device, folder: Path) -> list[Row]:
    """A row for each cache."""
    if check.impossible is not None:
        return [Row(check.name, cache, None, check.impossible) for cache in CACHES]
    job = {"device": device.type, "size": args.size, "steps": args.steps, "repeats": args.repeats}
    job |= {"degrees": check.degrees, "guided": check.guided, "compile": check.compile, "timeout": args.timeout}
    job["writes_reference"] = check.writes_reference
    output, log = folder / "rows.json", folder / "log.txt"
    output.unlink(missing_ok=True)
    arguments = [json.dumps(job), str(folder), str(output)]
    code = launch("benchmark.gpu_check_worker", check.processes, arguments, args.timeout, log)
    if code != 0 or not output.exists():
        why = f"no end after {args.timeout:g} s" if code == 124 else reason(log.read_text(encoding="utf-8"), code)
        return [Row(check.name, cache, False, why) for cache in CACHES]
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    return [judged(check, row, device) for row in rows]


def reason(log: str, code: int) -> str:
    """The first error that a rank's traceback ends with; later ones are those of ranks that it left alone."""
    pattern = r"^(?:\[rank\d+\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception|Disagreement|Exit)\b.*)$"
    found = re.search(pattern, log, re.MULTILINE)
    return found.group(1).strip() if found else f"exit code {code}"


def judged(check: Check, row: dict[str, Any], device: torch.device) -> Row:
    exact = EXACT.get(device.type, EXACT_HALF)
    # Without a cache there is one plan only; ranks of a guidance branch have their own branch's part of it.
    other = row["cache"] != "none" and not row["same_plan"]
    loose = check.displaced or other
    allowed = LOOSE if loose else exact
    if not row["digests_equal"]:
        why = "the ranks have different plans"
    elif not row["finite"]:
        why = "the latents are not finite"
    elif check.compile and not row["graphs"]:
        why = "torch compiled nothing"
    elif not row["relative"] <= allowed:
        why = f"relative error {row['relative']:.2g}, at most {allowed:g} allowed"
    else:
        apart = "; in one process each guidance branch decides for itself" if check.guided else ""
        note = f"another plan than one process's{apart}" if other else ""
        return Row(check.name, row["cache"], True, note, row, check.guided)
    return Row(check.name, row["cache"], False, why, row, check.guided)


def check_nccl(device: torch.device, args: argparse.Namespace, processes: int, folder: Path) -> Row:
    if device.type == "cpu":
        return Row("NCCL all-reduce", "–", None, "no GPU is used; the ranks talk over gloo")
    if processes == 1:
        return Row("NCCL all-reduce", "–", None, "there is one device only")
    log = folder / "log.txt"
    code = launch("benchmark.gpu_check_nccl", processes, [], args.timeout, log)
    text = log.read_text(encoding="utf-8")
    return Row("NCCL all-reduce", "–", code == 0, text.strip().splitlines()[-1] if code == 0 else reason(text, code))


def check_flash(device: torch.device) -> Row:
    """flash-attn against torch's own attention."""
    name = "flash-attn"
    if device.type == "cpu":
        return Row(name, "–", None, "it needs a GPU; torch's own kernel is used")
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        return Row(name, "–", None, f"{error}; torch's own kernel is used")
    query, key, value = (torch.randn(1, 512, 24, 128, device=device, dtype=torch.bfloat16) for _ in range(3))
    ours = flash_attn_func(query, key, value).float()
    heads_first = (each.transpose(1, 2).float() for each in (query, key, value))
    theirs = torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    synchronize(device)
    error = float((ours - theirs).norm() / theirs.norm())
    return Row(name, "–", error <= EXACT_HALF, f"relative error {error:.2g} to torch's attention in float32")


def table_of(rows: list[Row], args: argparse.Namespace, device: torch.device) -> Table:
    known = describe_environment(device)
    machine = known.get("accelerator") or f"{known['processor']}, {known['cores']} cores"
    model = "FLUX.1-dev's sizes" if args.size == "full" else "a toy FLUX"
    table = Table(title=f"{model}, random weights, {args.steps} steps, medians of {args.repeats}, on {machine}")
    columns = ("check", "cache", "relative error", "largest", "plans", "hit rate", "s/step", "low to high", "speed-up")
    for column in (*columns, "verdict"):
        table.add_column(column, overflow="fold")
    alone = {
        row.guided: row.seen["seconds"]
        for row in rows
        if row.name.startswith("one process") and row.seen and row.cache == "none" and "compiled" not in row.name
    }
    for row in rows:
        verdict = "not run: " if row.passed is None else "passed" if row.passed else "FAILED: "
        verdict += f" ({row.why})" if row.passed and row.why else row.why
        seen = row.seen
        if not seen:
            table.add_row(row.name, row.cache, *[""] * 7, verdict)
            continue
        speed = f"{alone[row.guided] / seen['seconds']:.2f}×" if row.guided in alone else "–"
        table.add_row(
            row.name,
            row.cache,
            f"{seen['relative']:.1e}",
            f"{seen['largest']:.1e}",
            "equal" if seen["digests_equal"] else "DIFFER",
            f"{seen['hit_rate']:.0%}",
            f"{seen['seconds']:.4f}",
            f"{seen['low']:.4f} to {seen['high']:.4f}",
            speed,
            verdict,
        )
    return table


def parser() -> argparse.ArgumentParser:
    made = OneLineParser(description=__doc__.splitlines()[0])
    made.add_argument("--device", choices=DEVICES, default="auto", help="default: %(default)s")
    made.add_argument("--processes", type=positive, help="default: the machine's GPUs, or 2 on a CPU")
    made.add_argument("--size", choices=("full", "toy"), help="default: full on GPUs, toy on a CPU")
    made.add_argument("--steps", type=positive, default=12, help="denoising steps (default: %(default)s)")
    made.add_argument("--repeats", type=positive, default=3, help="timed generations (default: %(default)s)")
    made.add_argument("--timeout", type=float, default=900, help="seconds for one check (default: %(default)g)")
    made.add_argument("--no_compile", action="store_true", help="leave the compiled rows out")
    return made


def main() -> None:
    args = parser().parse_args()
    try:
        device = choose_device(args.device)
    except ValueError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    devices = device_count(device)
    processes = args.processes or devices or CPU_PROCESSES
    if devices is not None and processes > devices:
        print(f"gpu_check: --processes {processes}: this machine has {devices} GPUs", file=sys.stderr)
        raise SystemExit(2)
    args.size = args.size or ("toy" if device.type == "cpu" else "full")
    heads, blocks = FULL_HEADS, FULL_BLOCKS
    if args.size == "toy":
        heads, blocks = TOY["num_attention_heads"], TOY["num_layers"] + TOY["num_single_layers"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = [check_nccl(device, args, processes, folder), check_flash(device)]
        for check in checks(processes, heads, blocks, not args.no_compile):
            print(f"{check.name} …", flush=True)
            rows += run_check(check, args, device, folder)
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    console.print(table_of(rows, args, device))
    counts = {name: sum(row.passed is verdict for row in rows) for name, verdict in VERDICTS.items()}
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    raise SystemExit(1 if counts["failed"] else 0)


VERDICTS = {"passed": True, "failed": False, "not run": None}

if __name__ == "__main__":
    main()
