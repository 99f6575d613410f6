"""Check what AdaCorrection's paper (arXiv 2602.13357) states about a block, on recorded generations of a small model.

    python benchmark/claims.py --model tiny-dit --num_images 32 --threads 1

- Proposition 1: a block's output and the one remembered lag steps ago differ by no more than K · lag · S. K is the
  largest ratio ‖B(h) − B(h')‖ / ‖h − h'‖ of the block that half of the images show, and the other half is judged, with
  the score S as published (γ = λ = 1), without its spatial part, and relative. Beside it the corrected form: no more
  than K ‖h − h'‖ + Kᵤ |u − u'|, where u is the step and Kᵤ comes from the same half.
- The score's scale: how often the correction weight clip(S, 0, 1) is 1, so that nothing of the memory is used.
- Theorem 1: the error of the published blend over the steps, which is to vanish, with the recursion that does hold,
  eₜ ≤ (1 − wₜ)(eₜ₋₁ + ‖Bₜ − Bₜ₋₁‖).
- A sampler's error against the tolerance of ``mode="bound"``, which is to be proportional.

‖·‖ is the mean over tokens of the Euclidean norm over channels, as in equation 1. Result: claims.json.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xfuser.config.parser import OneLineParser  # noqa: E402
from xfuser.core.console import check_output_folder, quiet_libraries  # noqa: E402

quiet_libraries()

from benchmark.common import captions_of, spread  # noqa: E402
from benchmark.measure import DEFAULT_PROMPTS, Sampling, conditions_of  # noqa: E402
from xfuser.config.arguments import positive  # noqa: E402
from xfuser.core.distributed.environment import describe_environment  # noqa: E402
from xfuser.core.files import write_json  # noqa: E402
from xfuser.model_executor.adapters import denoisers_of, spec_of  # noqa: E402
from xfuser.model_executor.cache import apply_cache_on_pipeline  # noqa: E402
from xfuser.model_executor.cache.adacorrection.offset import OffsetScore  # noqa: E402
from xfuser.model_executor.pipelines import LoadedPipeline, load_pipeline  # noqa: E402
from xfuser.model_executor.pipelines.shipped import shipped_models  # noqa: E402

RESULTS = "claims.json"
LAGS = (1, 2, 3)
FIRST_SCORE = 8  # column of a row
TOLERANCES = (0.05, 0.1, 0.2, 0.4)
SCORES = {
    "as published": OffsetScore("absolute", 1.0),
    "without the spatial part": OffsetScore("absolute", 0.0),
    "relative": OffsetScore("relative", 1.0),
}


def norm(tensor: torch.Tensor) -> torch.Tensor:
    """Compute the mean token norm of every image, [B], of [B, P, D]."""
    return torch.linalg.vector_norm(tensor, dim=-1).mean(-1)


def variation(tensor: torch.Tensor) -> torch.Tensor:
    """Compute Δ_spatial (equation 2) of every image, [B]."""
    return tensor.var(dim=-1, correction=0).sqrt().mean(-1)


class Watch:
    """Records every block at every step against what it had and gave up to three steps before.

    Attributes:
        rows: For each block, step, lag and image: the distance of the outputs (``gap``) and of the inputs (``moved``);
            what the block makes of the inputs' distance at this step (``across``), and of the steps' between for the
            old inputs (``aged``); and the scores.
        blends: For each block, step and image at lag 1: the published blend's weight, its error relative to the
            output, and the error that the recursion allows.
        images: In the batch that runs.
        first_image: Of them.
    """

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.rows: list[tuple[float, ...]] = []
        self.blends: list[tuple[float, ...]] = []
        self.first_image, self.images = 0, 1
        self._known: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._blended: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._steps: dict[int, int] = {}
        self._inside = False
        self._handles = [
            block.register_forward_hook(self._hook(number), with_kwargs=True) for number, block in enumerate(blocks)
        ]

    def begin(self, first_image: int, images: int) -> None:
        """Forget the last batch."""
        self.first_image, self.images = first_image, images
        self._known, self._blended, self._steps = {}, {}, {}

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, number: int) -> Any:
        def seen(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._inside:
                return
            if not isinstance(output, torch.Tensor):
                raise ValueError("blocks with several streams cannot be judged so; choose a model with one")
            inputs = args[0] if args else kwargs["hidden_states"]
            self._inside = True
            try:
                self._compare(number, inputs, output, lambda old: self._again(block, old, args, kwargs))
            finally:
                self._inside = False

        return seen

    @staticmethod
    def _again(block: nn.Module, inputs: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        return block(inputs, *args[1:], **kwargs) if args else block(**(kwargs | {"hidden_states": inputs}))

    def _compare(self, number: int, inputs: torch.Tensor, output: torch.Tensor, again: Any) -> None:
        step = self._steps.get(number, 0)
        known = self._known.setdefault(number, [])
        for lag, (old, gave) in enumerate(known, start=1):
            moved, reference = norm(inputs - old), norm(old)
            crossing = again(old)
            columns = [norm(output - gave), moved, norm(output - crossing), norm(crossing - gave)]
            spatial, before = variation(inputs), variation(old)
            for score in SCORES.values():
                parts = zip(moved.tolist(), reference.tolist(), spatial.tolist(), before.tolist(), strict=True)
                columns.append(torch.tensor([score(1.0, *each, inputs.shape[-1]) for each in parts]))
            for image, row in enumerate(torch.stack(columns, dim=1).tolist()):
                self.rows.append((number, step, lag, self.first_image + image % self.images, *row))
        self._blend(number, step, output, known)
        self._known[number] = [(inputs, output), *known][: LAGS[-1]]
        self._steps[number] = step + 1

    def _blend(
        self, number: int, step: int, output: torch.Tensor, known: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Follow the published blend of the block's exact outputs, with the relative score."""
        if not known:
            self._blended[number] = (output, torch.zeros(len(output)))
            return
        blended, error = self._blended[number]
        count = len(output)
        scores = torch.tensor([row[-1] for row in self.rows[-count * len(known) :][:count]])
        weight = scores.clamp(0, 1)
        allowed = (1 - weight) * (error + norm(output - known[0][1]))
        blended = torch.lerp(blended, output, weight[:, None, None])
        error = norm(output - blended)
        self._blended[number] = (blended, error)
        columns = torch.stack([weight, error / norm(output), allowed / norm(output)], dim=1)
        self.blends += [(number, step, *row) for row in columns.tolist()]


@contextmanager
def watching(loaded: LoadedPipeline) -> Iterator[Watch]:
    """Watch the model's blocks.

    Raises:
        ValueError: Its blocks have several streams.
    """
    (denoiser,) = denoisers_of(loaded.pipeline)
    watch = Watch(spec_of(denoiser).blocks(denoiser))
    try:
        yield watch
    finally:
        watch.remove()


def generate(loaded: LoadedPipeline, sampling: Sampling, watch: Watch | None = None) -> np.ndarray:
    images = []
    for start in range(0, sampling.num_images, sampling.batch_size):
        size = min(sampling.batch_size, sampling.num_images - start)
        if watch is not None:
            watch.begin(start, size)
        seeds = [sampling.seed + start + index for index in range(size)]
        conditions = conditions_of(loaded, sampling, start, size)
        images.append(
            loaded.generate(conditions, seeds, sampling.num_inference_steps, guidance_scale=sampling.guidance_scale)
        )
    return np.concatenate(images)


def proposition(rows: np.ndarray, num_images: int) -> dict[str, Any]:
    """Judge the bounds on the second half of the images, with constants from the first half."""
    block, lag, image = (rows[:, column].astype(int) for column in (0, 2, 3))
    gap, moved, across, aged = (rows[:, column] for column in range(4, FIRST_SCORE))
    known = image < num_images // 2
    apart = moved > 0
    largest = int(block.max()) + 1
    lipschitz, by_step = np.zeros(largest), np.zeros(largest)
    for number in range(largest):
        ours = known & (block == number)
        lipschitz[number] = (across[ours & apart] / moved[ours & apart]).max()
        by_step[number] = (aged[ours] / lag[ours]).max()
    judged = ~known
    found: dict[str, Any] = {"lipschitz": lipschitz.tolist()}
    bounds = {name: lipschitz[block] * lag * rows[:, FIRST_SCORE + place] for place, name in enumerate(SCORES)}
    bounds["corrected"] = lipschitz[block] * moved + by_step[block] * lag
    for name, bound in bounds.items():
        holds = {str(each): float((gap <= bound)[judged & (lag == each)].mean()) for each in LAGS}
        ratio = float(np.median(bound[judged] / np.maximum(gap[judged], 1e-12)))
        found[name] = {"holds": holds, "bound_over_gap": ratio}
    return found


def scale(rows: np.ndarray) -> dict[str, Any]:
    """Tell how often the weight clip(S, 0, 1) at lag 1 is 1, and its median."""
    newest = rows[rows[:, 2] == 1]
    weights = {name: newest[:, FIRST_SCORE + place].clip(0, 1) for place, name in enumerate(SCORES)}
    return {
        name: {"saturated": float((each >= 1).mean()), "median": float(np.median(each))}
        for name, each in weights.items()
    }


def convergence(blends: np.ndarray, steps: int) -> dict[str, Any]:
    """Tell the blend's relative error over the steps, and how often the recursion bounds it."""
    at = [step for step in dict.fromkeys((1, steps // 5, steps // 2, 4 * steps // 5, steps - 1)) if step > 0]
    medians = {str(step): float(np.median(blends[blends[:, 1] == step, 3])) for step in at}
    # Equality is reached, so that rounding decides.
    held = blends[:, 3] <= blends[:, 4] * (1 + 1e-4) + 1e-6
    return {"error_at_step": medians, "recursion_holds": float(held.mean())}


def tolerances(loaded: LoadedPipeline, sampling: Sampling, uncached: np.ndarray) -> dict[str, Any]:
    """Measure the images' root mean square error for every tolerance, and the exponent of a power law through them."""
    errors = {}
    for tolerance in TOLERANCES:
        settings = {"use_cache": "Fb", "rel_l1_thresh": 10.0, "enable_adacorrection": True}
        engine = apply_cache_on_pipeline(loaded.pipeline, adacorr_tolerance=tolerance, **settings)
        try:
            images = generate(loaded, sampling)
        finally:
            engine.remove()
        errors[f"{tolerance:g}"] = float(np.sqrt(np.square(images - uncached).mean()))
    some = {name: value for name, value in errors.items() if value > 0}
    exponent = None
    if len(some) > 1:
        exponent = float(np.polyfit(np.log([float(name) for name in some]), np.log(list(some.values())), 1)[0])
    return {"rms_error": errors, "exponent": exponent}


def tables_of(results: dict[str, Any]) -> list[Table]:
    """Lay out what was found."""
    bounds = Table(title="‖B − remembered‖ ≤ bound, share of (image, block, step)")
    for column in ("bound", *(f"lag {lag}" for lag in LAGS), "bound / distance, median"):
        bounds.add_column(column, justify="left" if column == "bound" else "right")
    for name, found in results["proposition"].items():
        if isinstance(found, dict):
            shares = [f"{found['holds'][str(lag)]:.1%}" for lag in LAGS]
            bounds.add_row(
                name if name == "corrected" else f"K · lag · S, S {name}", *shares, f"{found['bound_over_gap']:.2g}"
            )
    scales = Table(title="correction weight clip(S, 0, 1)", show_lines=False)
    for column in ("S", "is 1", "median"):
        scales.add_column(column, justify="left" if column == "S" else "right")
    for name, found in results["scale"].items():
        scales.add_row(name, f"{found['saturated']:.1%}", f"{found['median']:.3g}")
    errors = Table(title="published blend, relative score: error relative to the block's output, median")
    for step in results["convergence"]["error_at_step"]:
        errors.add_column(f"step {step}", justify="right")
    errors.add_column("recursion holds", justify="right")
    shown = [f"{value:.4f}" for value in results["convergence"]["error_at_step"].values()]
    errors.add_row(*shown, f"{results['convergence']['recursion_holds']:.1%}")
    linear = Table(title="error of the images (root mean square) against the tolerance")
    for name in results["tolerance"]["rms_error"]:
        linear.add_column(name, justify="right")
    linear.add_column("exponent", justify="right")
    exponent = results["tolerance"]["exponent"]
    values = [f"{value:.5f}" for value in results["tolerance"]["rms_error"].values()]
    linear.add_row(*values, "" if exponent is None else f"{exponent:.2f}")
    return [bounds, scales, errors, linear]


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(shipped_models()), default="tiny-dit", help="default: %(default)s")
    parser.add_argument("--num_images", type=positive, default=32, help="half of them judged (default: %(default)s)")
    parser.add_argument("--batch_size", type=positive, default=8, help="default: %(default)s")
    parser.add_argument("--num_inference_steps", type=positive, default=50, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=300_000, help="of the first image (default: %(default)s)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--output_dir", type=Path, default=Path("claims_results"), help="default: %(default)s")
    args = parser.parse_args()
    if args.num_images < 2:
        parser.error("--num_images: one half is judged with what the other shows, so it takes 2 or more")
    if args.num_inference_steps <= LAGS[-1]:
        parser.error(f"--num_inference_steps: lags of up to {LAGS[-1]} steps are judged, so it takes more than that")
    check_output_folder(args.output_dir)
    if args.threads:
        torch.set_num_threads(args.threads)
    loaded = load_pipeline(args.model)
    prompts = spread(captions_of(args.model), args.num_images) or DEFAULT_PROMPTS
    guidance, steps = loaded.spec.guidance_scale, args.num_inference_steps
    sampling = Sampling(args.num_images, args.batch_size, steps, guidance, args.seed, prompts)
    try:
        with watching(loaded) as watch:
            uncached = generate(loaded, sampling, watch)
    except ValueError as error:
        parser.error(f"--model {args.model}: {error}")
    rows, blends = np.array(watch.rows), np.array(watch.blends)
    results = {
        "proposition": proposition(rows, args.num_images),
        "scale": scale(rows),
        "convergence": convergence(blends, steps),
        "tolerance": tolerances(loaded, sampling, uncached),
    }
    environment = describe_environment(loaded.pipeline.device)
    document = {"schema": 1, "environment": environment, "model": args.model, "images": args.num_images, "steps": steps}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / RESULTS, document | results)
    console = Console(width=max(100, Console().width))
    for table in tables_of(results):
        console.print(table)


if __name__ == "__main__":
    main()
