"""Measure what `target_speedup` promises and gives: whole calls, cached and uncached in turn, and the first use.

    python benchmark/target_speedup.py --targets 1.5 2 3 4 --batch_size 1 --pairs 20 --threads 1

Every target learns anew in its own first call, which is compared with uncached ones; pairs of calls follow. Run it
alone on the machine, since what is predicted comes from the seconds of that first call. The last row evaluates every
step, which shows what being attached costs. Result: target_speedup.json.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xfuser.config.parser import OneLineParser  # noqa: E402
from xfuser.core.console import check_output_folder, quiet_libraries  # noqa: E402

quiet_libraries()

from benchmark.common import captions_of, spread  # noqa: E402
from benchmark.measure import DEFAULT_PROMPTS, Sampling, conditions_of, timed  # noqa: E402
from xfuser.config.arguments import positive  # noqa: E402
from xfuser.core.distributed.environment import choose_device, describe_environment  # noqa: E402
from xfuser.core.files import write_json  # noqa: E402
from xfuser.model_executor.cache.adacorrection.trajectory import attach_trajectory  # noqa: E402
from xfuser.model_executor.cache.adacorrection.trajectory.goals import Unreachable  # noqa: E402
from xfuser.model_executor.pipelines import LoadedPipeline, load_pipeline  # noqa: E402
from xfuser.model_executor.pipelines.shipped import shipped_models  # noqa: E402

RESULTS = "target_speedup.json"
WARM = 3  # calls before anything counts


def measure(
    plain: LoadedPipeline, cached: LoadedPipeline, settings: dict[str, Any], sampling: Sampling, pairs: int
) -> dict[str, Any]:
    """Learn in a first call, then call both pipelines in turn.

    Args:
        plain: The model without a cache.
        cached: The same model, loaded again.
        settings: Of the trajectory.
        sampling: The images of a call.
        pairs: Calls of each.

    Returns:
        ``first_call`` (its time as a share of an uncached one's), ``first_call_exact``, ``call`` (uncached time over
        cached, pair by pair), ``loop`` (what the summary says that the denoising loop got), ``predicted``, ``cost``.
    """
    device = torch.device(plain.pipeline.device)
    conditions = conditions_of(plain, sampling, 0, sampling.batch_size)
    seeds = [sampling.seed + index for index in range(sampling.batch_size)]

    def call(loaded: LoadedPipeline) -> tuple[float, np.ndarray]:
        steps, guidance = sampling.num_inference_steps, sampling.guidance_scale
        return timed(lambda: loaded.generate(conditions, seeds, steps, guidance_scale=guidance), device)

    uncached = [call(plain)[0] for _ in range(2 * WARM)][WARM:]
    with tempfile.TemporaryDirectory() as store:
        engine = attach_trajectory(cached.pipeline, store=store, **settings)
        try:
            first, images = call(cached)
            exact = bool(np.array_equal(images, call(plain)[1]))
            ratios, loops = [], []
            for index in track(range(pairs + 1), description=" ".join(f"{k} {v:g}" for k, v in settings.items())):
                # Which one is first changes from pair to pair.
                pair = {id(each): call(each)[0] for each in ((plain, cached), (cached, plain))[index % 2]}
                if index:
                    ratios.append(pair[id(plain)] / pair[id(cached)])
                    loops.append(engine.summary()["got"].get("speedup"))
            summary = engine.summary()
        finally:
            engine.remove()
    return {
        "settings": settings,
        "first_call": first / statistics.median(uncached),
        "first_call_exact": exact,
        "call": ratios,
        "loop": [each for each in loops if each is not None],
        "predicted": summary["predicted"],
        "got": summary["got"],
    }


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    """Lay the rows out: medians, and the range of whole calls."""
    table = Table(title=title)
    for name in ("asked", "predicted loop", "loop", "whole call", "from", "to", "first call"):
        table.add_column(name, justify="left" if name == "asked" else "right")
    for row in rows:
        asked = " ".join(f"{name} {value:g}" for name, value in row["settings"].items())
        predicted = (row["predicted"] or {}).get("speedup")
        loop = statistics.median(row["loop"]) if row["loop"] else None
        values = (
            predicted,
            loop,
            statistics.median(row["call"]),
            min(row["call"]),
            max(row["call"]),
            row["first_call"],
        )
        table.add_row(asked, *("" if value is None else f"{value:.2f}" for value in values))
    return table


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(shipped_models()), default="tiny-dit", help="default: %(default)s")
    parser.add_argument(
        "--targets", type=float, nargs="+", default=[1.5, 2, 3, 4], help="times faster, above 1 (default: 1.5 2 3 4)"
    )
    parser.add_argument("--batch_size", type=positive, default=1, help="images a call (default: %(default)s)")
    parser.add_argument("--num_inference_steps", type=positive, help="default: the model's own")
    parser.add_argument("--pairs", type=positive, default=20, help="calls of each, in turn (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=500_000, help="of the first image (default: %(default)s)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("--output_dir", type=Path, default=Path("target_speedup"), help="default: %(default)s")
    args = parser.parse_args()
    if min(args.targets) <= 1:
        parser.error(f"--targets {min(args.targets):g}: expected numbers above 1, the times that it is to be faster")
    check_output_folder(args.output_dir)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    plain, cached = (load_pipeline(args.model, device=device) for _ in range(2))
    steps = args.num_inference_steps or plain.spec.num_inference_steps
    prompts = spread(captions_of(args.model), args.batch_size) or DEFAULT_PROMPTS
    guidance = plain.spec.guidance_scale
    sampling = Sampling(args.batch_size, args.batch_size, steps, guidance, args.seed, prompts)
    asked: list[dict[str, Any]] = [{"target_speedup": target} for target in args.targets]
    try:
        rows = [
            measure(plain, cached, settings, sampling, args.pairs) for settings in (*asked, {"adacorr_budget": 1.0})
        ]
    except Unreachable as error:
        parser.error(str(error))
    environment = describe_environment(device)
    document = {"schema": 1, "environment": environment, "model": args.model, "steps": steps, "results": rows}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / RESULTS, document | {"batch_size": args.batch_size, "pairs": args.pairs})
    title = f"{args.model}, {steps} steps, batch {args.batch_size}, {args.pairs} pairs, medians"
    Console(width=max(100, Console().width)).print(table_of(rows, title))


if __name__ == "__main__":
    main()
