"""Compare this package's caches with other projects' on tiny-dit: same weights, seeds and scheduler, one process.

    python benchmark/peers.py --num_images 64 --seed 500000 --threads 1 --output_dir peers_results

Every row alternates batch by batch with the uncached one, but for ``--untimed``. ``compute`` is the share of the work
that the transformer's blocks did, counted on the blocks themselves, and ``compute_inside`` the same counted on their
attention and feed-forward, which differs where a cache works inside of blocks. Results: peers.json, frontier.png; the
README's picture comes from benchmark/peers_report.py. A row that fails does not stop the others; the exit code is then
1, and 3 where a cache spared nothing.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xfuser.config.parser import OneLineParser  # noqa: E402
from xfuser.core.console import check_output_folder, quiet_libraries  # noqa: E402

quiet_libraries()

from diffusers.utils import logging as diffusers_logging  # noqa: E402

from benchmark.judge import SMALLEST_SAMPLE  # noqa: E402
from benchmark.measure import Sampling, conditions_of  # noqa: E402
from benchmark.outcomes import exit_code, remarks  # noqa: E402
from benchmark.peer_methods import UNCACHED, all_peers, isolate  # noqa: E402
from benchmark.peer_tools import (  # noqa: E402
    Attached,
    BlockCounter,
    HeldBytes,
    Peer,
    Subject,
    described,
    finished_rows,
    plain,
)
from benchmark.peers_report import OPPONENTS_OF, compare, frontier_picture, table_of  # noqa: E402
from evaluation.metrics import (  # noqa: E402
    FeatureNetwork,
    frechet_interval,
    gaussian,
    kernel_interval,
    mean_interval,
    psnr,
    read_reference,
    ssim,
    worst_tenth,
)
from xfuser.config.arguments import positive  # noqa: E402
from xfuser.core.distributed.environment import choose_device, describe_environment  # noqa: E402
from xfuser.core.files import replacing, write_json  # noqa: E402
from xfuser.model_executor.pipelines import LoadedPipeline, load_pipeline  # noqa: E402
from xfuser.model_executor.pipelines.loading import shipped_tiny_dit  # noqa: E402

MODEL = "tiny-dit"
GUIDANCE = 1.5
FINE_STEPS = 197
CALIBRATION_SEED = 900_000_000
CALIBRATION_IMAGES = 16
WARMUP_SEED = 800_000_000
IDLE = 0.9999  # a larger share of the work spares nothing
# Where one of these cannot be put in place, something is wrong here; of another project it is a result.
OURS = ("trajectory", "Tea", "Fast", "Fb", "Tea+AdaCorrection")


@dataclass
class Base:
    """What every row is measured against: the uncached images, the fine solution, the work of one image.

    ``features`` are of the uncached images and ``real`` of the data that the model learned; ``work`` and ``held`` are
    what the uncached run does per image and holds between steps.
    """

    loaded: LoadedPipeline
    images: np.ndarray
    fine: np.ndarray
    features: np.ndarray
    network: FeatureNetwork
    real: np.ndarray
    counters: tuple[BlockCounter, BlockCounter]
    work: tuple[float, float] = (0.0, 0.0)
    held: int = 0


@dataclass
class Measured:
    """What one row's batches gave."""

    images: list[np.ndarray] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    uncached_seconds: list[float] = field(default_factory=list)
    work: np.ndarray = field(default_factory=lambda: np.zeros(2))


class Comparison:
    """Runs the rows one after another and keeps what is finished.

    Args:
        sampling: What every row generates.
        folder: Where peers.json is written after each row.
        device: Where to run.
        rows: Rows that are finished already; they are not run again where their settings are the same.
        timed: Whether every row alternates with the uncached one, which takes most of the time.
    """

    def __init__(
        self, sampling: Sampling, folder: Path, device: torch.device, rows: list[dict[str, Any]], timed: bool = True
    ) -> None:
        self.sampling, self.folder, self.device = sampling, folder, device
        self.rows, self.timed = rows, timed
        starts = range(0, sampling.num_images, sampling.batch_size)
        self.batches = [range(start, min(start + sampling.batch_size, sampling.num_images)) for start in starts]
        self.scratch = tempfile.TemporaryDirectory(prefix="peers-")

    def run(self, peers: Sequence[Peer]) -> None:
        """Measure every row that is not finished; whatever one raises is its result, and the others go on."""
        kept = {row["row"]: row for row in self.rows}
        due = [peer for peer in peers if not _is_finished(kept.get(peer.name), peer)]
        columns = (TextColumn("{task.description:36}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("uncached images", total=len(due))
            base = self._base()
            for peer in due:
                progress.update(task, description=peer.name)
                row = self._measure(peer, base)
                gc.collect()  # pipelines and their hooks refer to each other in circles
                if row["does_not_run"]:
                    progress.console.print(f"{peer.name}: {row['does_not_run']}", markup=False)
                kept[peer.name] = row
                order = {each.name: index for index, each in enumerate(all_peers(self.sampling.num_inference_steps))}
                self.rows = sorted(kept.values(), key=lambda each: order.get(each["row"], len(order)))
                self.write()
                progress.advance(task)

    def write(self) -> dict[str, Any]:
        """Write peers.json and return what is in it."""
        document = {
            "schema": 1,
            "environment": describe_environment(self.device),
            "settings": run_settings(self.sampling, self.timed),
            "results": self.rows,
            "comparisons": compare(self.rows),
            "failures": {row["row"]: row["does_not_run"] for row in self.rows if row.get("failed")},
        }
        write_json(self.folder / "peers.json", document)
        return document

    def _base(self) -> Base:
        loaded = self._load()
        counters = _counters(loaded)
        evaluation = shipped_tiny_dit() / "evaluation"
        network = FeatureNetwork.load(evaluation / "classifier.safetensors")
        real = read_reference(evaluation / "reference.safetensors").features
        images, fine = self._references(loaded)
        base = Base(loaded, images, fine, features_of(network, images), network, real, counters)
        _take(counters)
        held = HeldBytes(loaded.pipeline.transformer, self.sampling.num_inference_steps)
        self._generate(loaded, range(self.sampling.batch_size), WARMUP_SEED)
        held.remove()
        base.held = held.difference or 0
        base.work = tuple(each / self.sampling.batch_size for each in _take(counters))
        return base

    def _references(self, loaded: LoadedPipeline) -> tuple[np.ndarray, np.ndarray]:
        """Return the uncached images and the fine solution, from the folder where they were made for these settings."""
        path, settings = self.folder / "references.npz", json.dumps(run_settings(self.sampling, True), sort_keys=True)
        if path.is_file():
            with np.load(path) as known:
                if str(known["settings"]) == settings:
                    return known["images"], known["fine"]
        images, fine = (
            np.concatenate([self._generate(loaded, batch, self.sampling.seed, steps)[0] for batch in self.batches])
            for steps in (None, FINE_STEPS)
        )
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, images=images, fine=fine, settings=settings)
        return images, fine

    def _measure(self, peer: Peer, base: Base) -> dict[str, Any]:
        row: dict[str, Any] = {"row": peer.name, "family": peer.family, "settings": plain(peer.settings)}
        loaded = self._load()
        counters = _counters(loaded)
        subject = Subject(
            loaded, self.sampling.num_inference_steps, lambda: self._calibrate(loaded), Path(self.scratch.name)
        )
        try:
            attached = peer.attach(subject)
            # A row may run its own first generation as it pleases; what it holds is measured in the next one.
            held = self._warm_up(peer, loaded, attached)
        except Exception as error:  # other projects' code: whatever it raises is this row's result
            return row | {"does_not_run": f"does not run: {described(error)}", "failed": peer.family in OURS}
        _take(counters)
        measured = Measured()
        for number, batch in enumerate(self.batches):
            for own in (True, False) if number % 2 else (False, True):
                if not own and not self.timed:
                    continue
                if not own:
                    measured.uncached_seconds.append(self._generate(base.loaded, batch, self.sampling.seed)[1])
                    continue
                try:
                    attached.before()
                    images, seconds = self._generate(loaded, batch, self.sampling.seed, peer.steps)
                except Exception as error:
                    where = f"batch {number + 1} of {len(self.batches)}"
                    return row | {"does_not_run": f"fails in {where}: {described(error)}", "failed": True}
                measured.images.append(images)
                measured.seconds.append(seconds)
        measured.work = np.array(_take(counters))
        try:
            told = score(measured, base) | {"details": plain(attached.details())}
        except Exception as error:
            return row | {"does_not_run": f"cannot be scored: {described(error)}", "failed": True}
        with contextlib.suppress(Exception):  # the pipeline is thrown away in any case
            attached.remove()
        bytes_held = None if held is None else max(0, held - base.held)
        idle = peer.name != UNCACHED and told["compute_inside"] > IDLE
        inactive = f"{peer.name}: it never skipped anything: another name for {UNCACHED}" if idle else None
        return row | {"does_not_run": None, "inactive": inactive} | told | {"bytes_held": bytes_held}

    def _warm_up(self, peer: Peer, loaded: LoadedPipeline, attached: Attached) -> int | None:
        """Generate a batch that is not counted; return the bytes held late in it."""
        held = HeldBytes(loaded.pipeline.transformer, peer.steps or self.sampling.num_inference_steps)
        try:
            attached.before()
            images, _ = self._generate(loaded, range(self.sampling.batch_size), WARMUP_SEED, peer.steps)
        finally:
            held.remove()
        if not np.isfinite(images).all():
            raise ArithmeticError("its images hold numbers that are not finite")
        return held.difference

    def _calibrate(self, loaded: LoadedPipeline) -> None:
        self._generate(loaded, range(CALIBRATION_IMAGES), CALIBRATION_SEED)

    def _generate(
        self, loaded: LoadedPipeline, batch: range, seed: int, steps: int | None = None
    ) -> tuple[np.ndarray, float]:
        conditions = conditions_of(loaded, self.sampling, batch.start, len(batch))
        begin = time.perf_counter()
        images = loaded.generate(
            conditions,
            [seed + index for index in batch],
            steps or self.sampling.num_inference_steps,
            guidance_scale=self.sampling.guidance_scale,
        )
        return images, time.perf_counter() - begin

    def _load(self) -> LoadedPipeline:
        return isolate(load_pipeline(MODEL, device=self.device))


def score(measured: Measured, base: Base) -> dict[str, Any]:
    """Score one row's images against the uncached ones and the fine solution."""
    images = np.concatenate(measured.images)
    near, fine = psnr(images, base.images), psnr(images, base.fine)
    features = features_of(base.network, images)
    enough = len(images) >= SMALLEST_SAMPLE
    shares = measured.work / (np.array(base.work) * len(images))
    timed = len(measured.uncached_seconds) == len(measured.seconds)
    speedup = float(np.median(np.array(measured.uncached_seconds) / measured.seconds)) if timed else None
    return {
        "compute": float(shares[0]),
        "compute_inside": float(shares[1]),
        "speedup": speedup,
        "psnr": mean_interval(near).to_dict(),
        "psnr_worst_tenth": worst_tenth(near),
        "psnr_fine": mean_interval(fine).to_dict(),
        "psnr_fine_worst_tenth": worst_tenth(fine),
        "ssim": mean_interval(ssim(images, base.images)).to_dict(),
        "fid_vs_uncached": frechet_interval(features, *gaussian(base.features)).to_dict() if enough else None,
        # Not to the uncached images: the estimate needs two samples of different seeds, and is far below 0 for a pair.
        "kid_vs_real": kernel_interval(features, base.real).to_dict() if enough else None,
        "images": {"psnr": near.tolist(), "psnr_fine": fine.tolist()},
        "seconds": measured.seconds,
        "uncached_seconds": measured.uncached_seconds,
    }


@torch.no_grad()
def features_of(network: FeatureNetwork, images: np.ndarray) -> np.ndarray:
    """Return the feature network's features [N, D] of images [N, H, W, C]."""
    return network(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()


def run_settings(sampling: Sampling, timed: bool) -> dict[str, Any]:
    """Name everything that a finished row depends on besides its own settings."""
    names = ("num_images", "batch_size", "num_inference_steps", "guidance_scale", "seed")
    own = {name: getattr(sampling, name) for name in names}
    return own | {"model": MODEL, "threads": torch.get_num_threads(), "fine_steps": FINE_STEPS, "timed": timed}


def _is_finished(row: dict[str, Any] | None, peer: Peer) -> bool:
    same = row is not None and row["settings"] == json.loads(json.dumps(plain(peer.settings)))
    return same and not row["does_not_run"]  # what did not run may do by now, and costs little to try


def _counters(loaded: LoadedPipeline) -> tuple[BlockCounter, BlockCounter]:
    transformer = loaded.pipeline.transformer
    return BlockCounter.of_blocks(transformer), BlockCounter.of_parts(transformer)


def _take(counters: tuple[BlockCounter, BlockCounter]) -> list[float]:
    return [counter.take() for counter in counters]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the other projects' loggers and diffusers' loading bar from the terminal."""
    logging.disable(logging.WARNING)
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_images", type=positive, default=64, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=500_000, help="of the first image (default: %(default)s)")
    parser.add_argument("--batch_size", type=positive, default=16, help="default: %(default)s")
    parser.add_argument("--num_inference_steps", type=positive, default=50, help="default: %(default)s")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--methods", nargs="+", metavar="TEXT", help="only rows whose name contains one of these")
    parser.add_argument("--untimed", action="store_true", help="do not measure speed, in half the time or less")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    parser.add_argument("--resume", action="store_true", help="skip rows that the output folder has already")
    parser.add_argument("--output_dir", type=Path, default=Path("peers_results"), help="default: %(default)s")
    args = parser.parse_args()
    peers = all_peers(args.num_inference_steps)
    if args.methods:
        peers = [peer for peer in peers if any(text.lower() in peer.name.lower() for text in args.methods)]
        if not peers:
            parser.error(f"--methods: no row's name contains {' or '.join(args.methods)}; --list prints them")
    if args.list:
        print("\n".join(peer.name for peer in peers))
        return
    check_output_folder(args.output_dir)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    sampling = Sampling(args.num_images, args.batch_size, args.num_inference_steps, GUIDANCE, args.seed)
    settings = run_settings(sampling, not args.untimed)
    rows = finished_rows(args.output_dir / "peers.json", settings) if args.resume else []
    comparison = Comparison(sampling, args.output_dir, choose_device(args.device), rows, not args.untimed)
    with _quiet():
        comparison.run(peers)
    document = comparison.write()
    with replacing(args.output_dir / "frontier.png") as temporary:
        temporary.write_bytes(frontier_picture(document["results"], OPPONENTS_OF))
    # The table has its own width: piped into a file it would be cut at 80 columns otherwise.
    console = Console() if sys.stdout.isatty() else Console(width=170)
    console.print(table_of(document["results"]))
    for row in document["results"]:
        if row["does_not_run"]:
            console.print(f"{row['row']}: {row['does_not_run']}", markup=False, highlight=False)
    for remark in remarks(document | {"failures": {}}):
        console.print(remark, markup=False, highlight=False, soft_wrap=True)
    if code := exit_code(document):
        raise SystemExit(code)


if __name__ == "__main__":
    main()
