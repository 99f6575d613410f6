"""Scores of each row against the uncached images and against the reference data, and the paired comparisons."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmark.outcomes import Run
from benchmark.rows import BLOCKS
from evaluation.metrics import (
    FeatureNetwork,
    Interval,
    Reference,
    difference_interval,
    frechet_interval,
    gaussian,
    kernel_interval,
    mean_interval,
    paired_frechet_difference,
    paired_frechet_ratio,
    psnr,
    read_reference,
    ssim,
    worst_tenth,
)
from evaluation.metrics.colour import TITLE, ColourFeatures
from xfuser.config import CacheConfig
from xfuser.config.cache import settings_read_by
from xfuser.config.methods import METHODS, with_threshold
from xfuser.model_executor.pipelines import LoadedPipeline

SMALLEST_SAMPLE = FeatureNetwork.num_features // 2  # below this its Fréchet distance says nothing
OWN_TITLE = "Fréchet distance, features of the model's own classifier"
NO_FEATURES = 'not measured: pip install "xfuser[evaluation]"'


@dataclass
class Scores:
    """What one row's images scored, batch by batch: one number an image, features [B, D]."""

    psnr: list[np.ndarray] = field(default_factory=list)
    ssim: list[np.ndarray] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)
    recognised: list[np.ndarray] = field(default_factory=list)


class Judge:
    """Scores runs while they go on, so that images need not be kept for it.

    Without an evaluation folder and a network only PSNR, SSIM and speed are known.

    Args:
        loaded: The model that is run.
        folder: Holds ``classifier.safetensors`` and ``reference.safetensors``.
        network: Where there is no folder, what makes features [N, D] of images [N, 3, H, W] in [0, 1]: the distance to
            the uncached images is known then.

    Attributes:
        distance: What the Fréchet distances are of, for people.
    """

    def __init__(self, loaded: LoadedPipeline, folder: Path | None, network: nn.Module | None = None) -> None:
        self.labelled = loaded.spec.conditioned_on == "label"
        self.classifier = FeatureNetwork.load(folder / "classifier.safetensors") if folder else None
        self.network = self.classifier or network
        self.distance = OWN_TITLE if folder else NO_FEATURES if network is None else TITLE
        self.smallest = 0 if self.network is None else self.network.num_features // 2
        self.reference: Reference | None = read_reference(folder / "reference.safetensors") if folder else None
        self._scores: defaultdict[str, Scores] = defaultdict(Scores)

    @classmethod
    def of(cls, loaded: LoadedPipeline, folder: Path | None) -> Judge:
        """Take the folder's classifier; where there is none, the public network for colour images, if installed."""
        return cls(loaded, folder, ColourFeatures.load() if folder is None and ColourFeatures.installed() else None)

    @torch.no_grad()
    def see(self, runs: list[Run], conditions: list[Any]) -> None:
        """Score every run's newest batch, the images of these labels or prompts; the first run is the uncached one."""
        uncached = runs[0].images[-1]
        for run in runs:
            scores, images = self._scores[run.row.method], run.images[-1]
            if run is not runs[0]:
                near, alike = closeness(images, uncached)
                scores.psnr.append(near)
                scores.ssim.append(alike)
            if self.network is None:
                continue
            still = images if images.ndim == 4 else images[:, images.shape[1] // 2]
            pixels = torch.from_numpy(still).permute(0, 3, 1, 2)
            scores.features.append(self.network(pixels).numpy())
            if self.classifier is not None and self.labelled:
                recognised = self.classifier.classify(pixels).argmax(1) == torch.tensor(conditions)
                scores.recognised.append(recognised.double().numpy())

    def psnr_of(self, run: Run) -> np.ndarray:
        """Every image's PSNR to the uncached one, in dB."""
        return np.concatenate(self._scores[run.row.method].psnr)

    def results(self, runs: list[Run], paths: dict[str, list[str]]) -> list[dict[str, Any]]:
        """One entry a row, as the results file has it; ``paths`` are those of the images that were written."""
        return [self._result(run, runs[0], paths.get(run.row.method, [])) for run in runs]

    def comparisons(self, runs: list[Run]) -> list[dict[str, Any]]:
        """Each corrected row against its base, its base with the same approximation, and fewer steps at its cost; each
        base with another approximation against the base, and fitted weights against those of a polynomial. What never
        hit is not compared.
        """
        by_method = {run.row.method: run for run in runs if run.inactive is None}
        pairs = []
        for run in by_method.values():
            base, stand_in = run.row.base, run.row.config.predictor
            opponents: tuple[str | None, ...] = ()
            if run.row.config.mode is not None:
                opponents = (base, f"{base}[{stand_in}]", f"None[steps of {base}]")
                opponents += (f"{run.row.method}{BLOCKS}",) if run.row.trajectory is not None else ()
            elif run.row.method == f"{base}[{stand_in}]":
                opponents = (base, f"{base}[taylor-1]") if stand_in == "fitted" else (base,)
            pairs += [(run, by_method[name]) for name in opponents if name in by_method]
        return [self._compare(run, against, runs[0]) for run, against in pairs]

    def _result(self, run: Run, uncached: Run, paths: list[str]) -> dict[str, Any]:
        mine, theirs = self._features(run), self._features(uncached)
        known, is_uncached = self._scores[run.row.method], run is uncached
        scores: dict[str, Any] = dict.fromkeys(("fid", "fid_difference", "fid_vs_uncached", "kid", "class_accuracy"))
        enough = mine is not None and theirs is not None and len(mine) >= self.smallest
        if enough and not is_uncached:
            scores["fid_vs_uncached"] = frechet_interval(mine, *gaussian(theirs)).to_dict()
        if enough and self.reference is not None:
            fid = frechet_interval(mine, self.reference.mean, self.reference.covariance)
            scores["fid"] = fid.to_dict()
            scores["kid"] = kernel_interval(mine, self.reference.features).to_dict()
            if not is_uncached:
                moved = paired_frechet_difference(mine, theirs, self.reference.mean, self.reference.covariance)
                scores["fid_difference"] = moved.to_dict()
        if self.classifier is not None and self.labelled:
            scores["class_accuracy"] = mean_interval(np.concatenate(known.recognised)).to_dict()
        quality: dict[str, Any] = {"psnr": None, "psnr_worst_tenth": None, "ssim": None}
        if not is_uncached:
            quality["psnr"] = mean_interval(np.concatenate(known.psnr)).to_dict()
            quality["psnr_worst_tenth"] = worst_tenth(np.concatenate(known.psnr))
            quality["ssim"] = mean_interval(np.concatenate(known.ssim)).to_dict()
        return {
            "method": run.row.method,
            "base": run.row.base,
            "inactive": run.inactive,
            "settings": _settings(run),
            **scores,
            **quality,
            "images_per_second": run.images_per_second,
            "seconds": run.seconds,
            "speedup": _times_faster(run, uncached),
            "hit_rate": float(np.average(run.hit_rates, weights=run.batch_sizes)),
            "flops_saved": float(np.average(run.flops_saved, weights=run.batch_sizes)),
            "non_finite": run.non_finite,
            "prediction_coverage": float(np.mean(run.coverage)) if run.coverage else None,
            "images": paths,
            **_matched(run),
        }

    def _compare(self, run: Run, against: Run, uncached: Run) -> dict[str, Any]:
        ours, theirs = (np.concatenate(self._scores[each.row.method].psnr) for each in (run, against))
        ratio: Interval | None = None
        fid_difference: Interval | None = None
        if self.network is not None and len(ours) >= self.smallest:
            a, b, reference = (self._features(each) for each in (run, against, uncached))
            ratio = paired_frechet_ratio(a, b, reference)
        if ratio is not None and self.reference is not None:
            fid_difference = paired_frechet_difference(a, b, self.reference.mean, self.reference.covariance)
        return {
            "method": run.row.method,
            "against": against.row.method,
            "psnr_difference": difference_interval(ours, theirs).to_dict(),
            "fid_vs_uncached_ratio": ratio.to_dict() if ratio else None,
            "fid_difference": fid_difference.to_dict() if fid_difference else None,
            "images_per_second_ratio": _times_faster(run, against),
        }

    def _features(self, run: Run) -> np.ndarray | None:
        features = self._scores[run.row.method].features
        return np.concatenate(features) if features else None


def closeness(images: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """PSNR in dB and SSIM of images [N, H, W, C] to their references; of videos [N, F, H, W, C], over all frames."""
    if images.ndim == 4:
        return psnr(images, references), ssim(images, references)
    count, frames = images.shape[:2]
    # One below the other, the frames are an image whose squared error is the video's.
    tall = [each.reshape(count, -1, *each.shape[3:]) for each in (images, references)]
    single = [each.reshape(-1, *each.shape[2:]) for each in (images, references)]
    return psnr(*tall), ssim(*single).reshape(count, frames).mean(axis=1)


def _times_faster(run: Run, other: Run) -> float:
    """Median over the batches, which both generated one after the other: a disturbance of the machine hits few."""
    return float(np.median(np.array(other.batch_seconds) / np.array(run.batch_seconds)))


def _settings(run: Run) -> dict[str, Any]:
    settings = _read_settings(run.row.config)
    if run.row.fewer_steps:
        return {"num_inference_steps": float(np.mean(run.steps))}
    if run.row.base is None:
        return {}
    settings["approximation"] = run.row.config.predictor
    if run.row.config.mode is not None:
        settings["adacorr_mode"] = run.row.config.mode
    if run.row.trajectory is not None:
        settings = {"level": "trajectory", "calibration": run.row.trajectory.name}
    if run.row.matched:
        settings["adacorr_budget"] = "the base method's own share, batch by batch"
    if run.match is not None:
        ends = dict.fromkeys(f"{value:.4g}" for value in (min(run.match.values), max(run.match.values)))
        settings[run.match.dial.name] = f"{' to '.join(ends)}, searched to save as many FLOPs as {run.row.base}"
    return settings


def _read_settings(config: CacheConfig) -> dict[str, Any]:
    """The settings that the row's methods read: another method's defaults say nothing about it."""
    theirs = {each.name for method in METHODS for each in settings_read_by(method)}
    theirs -= {each.name for each in settings_read_by(config.use_cache)}
    if config.mode is not None:
        theirs -= {"sync"}
    if config.use_cache not in with_threshold():
        theirs |= {"rel_l1_thresh"}
    return {
        name: value
        for name, value in vars(config).items()
        if value is not None
        and name not in theirs
        and (config.mode is not None or not name.startswith(("adacorr_", "granularity")))
    }


def _matched(run: Run) -> dict[str, Any]:
    """What a matched row saved, what it had to, and the setting in every batch."""
    if run.match is None:
        return {}
    match = run.match
    known = {"target": match.target, "reached": match.reached, "setting": match.dial.name, "values": match.values}
    return {"matched_compute": known}
