"""Where a step's time goes on 1, 2 and 4 processes, and what a cost model makes of it for 8 to 128 devices.

    python benchmark/scaling.py
    python benchmark/scaling.py --model_type flux --steps 20 --use_cache Fb --enable_adacorrection --adacorr_budget 0.5

Starts torchrun itself, once for each number of processes, and measures the denoising steps of every mesh that fits:
without and with the cache in turn, after a first pair that is not counted. A generation's first step is left out. Of
the repeats it reports the median, and of the total the lowest and the highest. Times are means over the ranks.

What the columns hold:

- compute: the evaluated blocks, attention kernels included. With flash-attn the kernel of a sequence-parallel block is
  called from within yunchang and is booked as attention exchange.
- attention exchange: Ulysses' all-to-alls, the ring's passes and the gather behind the last block, with the copies
  around them. A collective ends when the slowest rank has come, so each of them holds the wait for the peers too: on a
  machine with fewer cores than processes that is most of it.
- statistics: the step's one exchange of sums. It is the first thing in a step that waits for the other ranks, so it
  holds what they still had to do; "bare" below the table is what it takes when all ranks are ready.
- pipeline, waiting: handing tokens on to the next stage; waiting for those of the stage before, for the last stage's
  output, and for the other guidance branch.
- rest: embedding, tail, scheduler, what stands in for blocks, and the cache's bookkeeping.

On an accelerator the clock waits for the device at every change of category, so that what would overlap does not.
The extrapolation is computed by `benchmark/cost_model.py`; nothing of it was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xfuser.config.parser import OneLineParser  # noqa: E402
from xfuser.core.console import check_output_folder, quiet_libraries  # noqa: E402

quiet_libraries()

from benchmark.cost_model import FLUX, WAN, Link, Machine, exchange_bytes  # noqa: E402
from benchmark.launch import launch  # noqa: E402
from benchmark.scaling_fit import Comparison, Extrapolation, answer, compare, extrapolate  # noqa: E402
from benchmark.scaling_report import (  # noqa: E402
    computed_table,
    draw,
    measured_table,
    plain,
    shares_sentence,
)
from benchmark.scaling_worker import MESHES  # noqa: E402
from xfuser.config import CacheConfig  # noqa: E402
from xfuser.config.arguments import positive  # noqa: E402
from xfuser.core.distributed.environment import DEVICES  # noqa: E402
from xfuser.core.files import replacing, write_json  # noqa: E402
from xfuser.model_executor.cache.policies import POLICIES  # noqa: E402
from xfuser.model_executor.pipelines import MODEL_TYPES  # noqa: E402

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
WIDTH = 200  # of tables that no terminal limits
LIMIT = 3600  # seconds for one number of processes


def parser() -> argparse.ArgumentParser:
    made = OneLineParser(description=__doc__.splitlines()[0])
    made.add_argument("--processes", type=positive, nargs="+", choices=MESHES, default=list(MESHES))
    made.add_argument("--device", choices=DEVICES, default="auto", help="default: %(default)s")
    made.add_argument("--model_type", choices=MODEL_TYPES, default="tiny-dit", help="default: %(default)s")
    made.add_argument("--model", help="folder or hub id of a diffusers pipeline (default: the type's own)")
    made.add_argument("--num_images", type=positive, default=4, help="images at once (default: %(default)s)")
    made.add_argument("--steps", type=positive, default=20, help="denoising steps, at least 3 (default: %(default)s)")
    made.add_argument("--repeats", type=positive, default=5, help="counted pairs (default: %(default)s)")
    methods = [name for name in POLICIES if name is not None]
    made.add_argument("--use_cache", choices=methods, default="Fb", help="default: %(default)s")
    made.add_argument("--enable_adacorrection", action="store_true", help="review the base method's proposals")
    made.add_argument("--adacorr_budget", type=float, help="share of block evaluations, 0 to 1")
    made.add_argument("--output_dir", type=Path, default=Path("scaling_results"), help="default: %(default)s")
    made.add_argument("--measured", type=Path, help="take the measurements from an earlier run's scaling.json")
    group = made.add_argument_group(
        "cost model (assumptions; the defaults are an H100 node with NVLink and 400 Gb/s InfiniBand a GPU)"
    )
    group.add_argument("--evaluated_share", type=float, default=0.5, help="of the steps, with the cache (default: 0.5)")
    numbers = {
        "flops": (450e12, "achievable FLOP/s of a GPU: 45%% of the data sheet's 989e12 in dense bfloat16"),
        "inside_latency": (15e-6, "seconds, a collective inside a node"),
        "inside_bandwidth": (360e9, "bytes/s a GPU inside a node: 80%% of NVLink 4's 450e9 one way (data sheet)"),
        "across_latency": (30e-6, "seconds, a collective between nodes"),
        "across_bandwidth": (40e9, "bytes/s a GPU between nodes: 80%% of 400 Gb/s (NDR InfiniBand, data sheet)"),
        "control_latency": (50e-6, "seconds, a round of the gloo all-gather inside a node (TCP; an assumption)"),
        "control_across_latency": (100e-6, "the same between nodes"),
        "control_bandwidth": (1e9, "bytes/s of the control channel"),
        "block_seconds": (100e-6, "a block's fixed cost: about 20 kernel launches of 5 µs"),
    }
    for name, (default, what) in numbers.items():
        group.add_argument(f"--{name}", type=float, default=default, help=f"{what} (default: {default:g})")
    group.add_argument(
        "--decision_seconds", type=float, help="host's time to decide (default: measured here, by the block)"
    )
    group.add_argument("--gpus_per_node", type=positive, default=8, help="default: %(default)s")
    return made


def cache_of(args: argparse.Namespace) -> dict[str, Any]:
    """The cached variant's settings (ValueError where they contradict each other)."""
    settings: dict[str, Any] = {"use_cache": args.use_cache, "enable_adacorrection": args.enable_adacorrection}
    threshold = MODEL_TYPES[args.model_type].thresholds.get(args.use_cache)
    if threshold is not None:
        settings["rel_l1_thresh"] = threshold
    if args.adacorr_budget is not None:
        settings["adacorr_budget"] = args.adacorr_budget
    CacheConfig.from_keywords(**settings)
    return settings


def measure(args: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """What the processes measured, by their number."""
    job = {"model_type": args.model_type, "model": args.model, "device": args.device, "images": args.num_images}
    job |= {"steps": args.steps, "repeats": args.repeats, "cache": cache_of(args)}
    documents = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in sorted(set(args.processes)):
            print(f"{world} process{'' if world == 1 else 'es'}: {', '.join(MESHES[world])}", flush=True)
            output = Path(folder) / f"{world}.json"
            code = launch("benchmark.scaling_worker", world, [json.dumps(job), str(output)], LIMIT)
            if code != 0:
                raise SystemExit(f"scaling: the run with {world} processes ended with exit code {code}")
            documents[world] = json.loads(output.read_text(encoding="utf-8"))
    return documents


def decision_seconds(args: argparse.Namespace, documents: dict[int, dict[str, Any]]) -> float:
    """A block's share of what the host spends on deciding: assumed, or the fastest that was measured here."""
    if args.decision_seconds is not None:
        return args.decision_seconds / FLUX.depth
    facts = [mesh["facts"]["cached"] for each in documents.values() for mesh in each["meshes"].values()]
    return min(each["decision_seconds"] / each["blocks"] for each in facts)


def machine_of(args: argparse.Namespace) -> Machine:
    return Machine(
        args.flops,
        Link(args.inside_latency, args.inside_bandwidth),
        Link(args.across_latency, args.across_bandwidth),
        Link(args.control_latency, args.control_bandwidth),
        Link(args.control_across_latency, args.control_bandwidth),
        args.gpus_per_node,
        args.block_seconds,
    )


def extrapolations(args: argparse.Namespace, each_block: float) -> dict[str, list[Extrapolation]]:
    machine = machine_of(args)
    return {
        work.name: [
            extrapolate(
                work,
                ranks,
                replace(machine, decision_seconds=each_block * work.depth),
                args.evaluated_share,
                exchange_bytes(work.depth, 2),
            )
            for ranks in RANKS
        ]
        for work in (FLUX, WAN)
    }


def report(args: argparse.Namespace, documents: dict[int, dict[str, Any]], settings: dict[str, Any]) -> None:
    element = 4 if next(iter(documents.values()))["environment"]["device"] == "cpu" else 2
    rows: list[Comparison] = list(compare(documents, element))
    each_block = decision_seconds(args, documents)
    computed = extrapolations(args, each_block)
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    console.print(measured_table(rows, documents, settings), shares_sentence(rows, documents), sep="\n")
    for name, extrapolated in computed.items():
        console.print(computed_table(name, extrapolated, args, each_block))
    answers = [answer(name, extrapolated, args.evaluated_share) for name, extrapolated in computed.items()]
    console.print(*answers, sep="\n")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    assumed = {name: value for name, value in vars(args).items() if isinstance(value, (int, float))}
    write_json(
        args.output_dir / "scaling.json",
        {
            "schema": 1,
            "settings": settings,
            "measured": {str(world): document for world, document in documents.items()},
            "assumed": assumed | {"decision_seconds_a_block": each_block},
            "computed": {name: [plain(row) for row in extrapolated] for name, extrapolated in computed.items()},
            "answers": answers,
        },
    )
    with replacing(args.output_dir / "scaling.png") as path:
        path.write_bytes(draw(rows, documents, computed, args.evaluated_share))
    print(f"written: {args.output_dir}/scaling.json and scaling.png")


def main() -> None:
    args = parser().parse_args()
    try:
        if args.steps < 3:
            raise ValueError("--steps: the first one is not counted; name at least 3")
        check_output_folder(args.output_dir)
        if args.measured is None:
            settings = {"model_type": args.model_type, "model": args.model, "num_images": args.num_images}
            settings |= {"steps": args.steps, "repeats": args.repeats, "cache": cache_of(args)}
            documents = measure(args)
        else:
            known = json.loads(args.measured.read_text(encoding="utf-8"))
            settings = known["settings"]
            documents = {int(world): document for world, document in known["measured"].items()}
    except (ValueError, KeyError, OSError) as error:
        print(f"scaling: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    report(args, documents, settings)


if __name__ == "__main__":
    main()
