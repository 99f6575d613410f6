"""The actor of a worker group: it loads once, generates batch after batch, and writes beside the next one."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xfuser.core.distributed.environment import free_memory, is_out_of_memory
from xfuser.core.files import IMAGE_FORMATS, replacing
from xfuser.ray.batch.batches import image_path, row_of
from xfuser.ray.batch.folder import JOB, read_job
from xfuser.ray.batch.manifest import ManifestWriter
from xfuser.ray.batch.metrics import GroupMetrics
from xfuser.ray.batch.requests import Request
from xfuser.ray.cluster import ray
from xfuser.ray.generator import RankGroup
from xfuser.ray.rank import EngineSettings

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class TooLarge(ValueError):
    """A batch needs more memory than there is, by halves too."""


class NeedsHalves(MemoryError):
    """A batch needs more memory than there is, and the ranks have to be started again before its halves are tried."""


class NoRoom(OSError):
    """Results cannot be written any more; nothing is lost that was."""


class NotShared(ValueError):
    """A group's machine has another output folder than the command's."""


@dataclass(frozen=True)
class Made:
    """What the driver is told of a batch.

    Attributes:
        images: How many were written.
        seconds: Of generating.
        writing: Seconds of writing, beside the next batch.
        evaluated_share: Of the denoiser's work.
        manifest_bytes: What was appended.
        finished: When, in seconds since 1970.
    """

    images: int
    seconds: float
    writing: float
    evaluated_share: float
    manifest_bytes: int
    finished: float


class Group:
    """One worker group, as Ray's actor: with two calls at a time, one generates while the other writes.

    Args:
        number: The group's number.
        folder: The job's folder, on storage that all machines share.
        job: The job's own name, to tell whether the folder is the same.
        image_format: A key of `IMAGE_FORMATS`.
        resources: What each further rank asks Ray for.
        placement: Where each further rank runs.
    """

    def __init__(
        self,
        number: int,
        folder: str,
        job: str,
        image_format: str,
        resources: Mapping[str, float],
        placement: Sequence[Any],
    ) -> None:
        self._number, self._folder = number, Path(folder)
        self._job, self._format = job, image_format
        self._resources, self._placement = resources, placement
        self._computing = threading.Lock()
        self._ranks: RankGroup | None = None
        self._manifest: ManifestWriter | None = None
        self._metrics = GroupMetrics(number)
        self._halved: set[str] = set()

    def load(self, settings: EngineSettings) -> dict[str, Any]:
        """Load the model, unless it is there; the seconds that it took, and where.

        Raises:
            NotShared: The job's folder is not the command's.
            ValueError: The model cannot be loaded, or the settings do not fit it.
        """
        began = time.perf_counter()
        with self._computing:
            if self._ranks is None:
                self._check_shared()
                # A name that no other process has had: Ray may start this actor again while the last one still writes.
                self._manifest = ManifestWriter(self._folder, f"group-{self._number:04d}-{uuid.uuid4().hex[:12]}")
                self._ranks = RankGroup(settings, self._resources, self._placement)
        return {"seconds": time.perf_counter() - began, "machine": socket.gethostname(), "process": os.getpid()}

    def learn(self, requests: Sequence[Request]) -> dict[str, bytes]:
        """See `Rank.learn`."""
        with self._computing, self._kept() as ranks:
            return ranks.learn([each.call() for each in requests])

    def make(
        self,
        number: int,
        places: Sequence[int],
        requests: Sequence[Request],
        attempt: int,
        calibrations: Sequence[Any],
        halved: bool = False,
    ) -> Made:
        """Generate a batch, write its images and then their rows.

        Args:
            number: The batch's.
            places: The requests' places in the job.
            requests: What is to be made.
            attempt: From 1.
            calibrations: References to what groups have learned.
            halved: Whether it is known that the whole batch does not fit.

        Raises:
            TooLarge: It needs more memory than there is, by halves too.
            NeedsHalves: The same of the whole batch, where the group has several ranks. After either, such a group has
                to be started again.
            NoRoom: Nothing can be written any more.
        """
        with self._computing, self._kept() as ranks:
            for files in ray.get(list(calibrations)):
                ranks.install(files)
            began = time.perf_counter()
            pixels, facts, sizes = self._generate(ranks, [each.call() for each in requests], halved)
            seconds = time.perf_counter() - began
        began = time.perf_counter()
        try:
            written = self._write(number, places, requests, pixels, facts, sizes, attempt, seconds)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise NoRoom(error.errno, f"{error.strerror} in {self._folder}") from error
            raise
        writing = time.perf_counter() - began
        self._metrics.batch(len(requests), seconds, writing, facts["evaluated_share"])
        share = facts["evaluated_share"]
        return Made(len(requests), seconds, writing, share, written, time.time())

    def _generate(
        self, ranks: RankGroup, calls: list[dict[str, Any]], halved: bool
    ) -> tuple[np.ndarray, dict[str, Any], list[int]]:
        """Generate a batch; where memory does not suffice, once more by halves, and from then on.

        Returns:
            Pixels, what the cache did, and of each image how many were generated with it.
        """
        kind = calls[0]["kind"]
        if not halved and kind not in self._halved:
            try:
                return *ranks.generate(calls), [len(calls)] * len(calls)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(calls) == 1:
                    raise TooLarge(_too_large(1)) from error
                if ranks.lost:
                    raise NeedsHalves(str(error)) from error
        free_memory()
        middle = (len(calls) + 1) // 2
        parts = [part for part in (calls[:middle], calls[middle:]) if part]
        try:
            made = [ranks.generate(part) for part in parts]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise TooLarge(_too_large(middle)) from error
        self._halved.add(kind)
        sizes = [len(part) for part in parts for _ in part]
        return np.concatenate([pixels for pixels, _ in made]), made[0][1], sizes

    @contextmanager
    def _kept(self) -> Iterator[RankGroup]:
        """Hand the ranks out for one call, and give them up where they cannot go on after it."""
        if self._ranks is None:
            raise RuntimeError("this process has loaded nothing, or has lost its ranks; it has to be started again")
        ranks = self._ranks
        try:
            yield ranks
        finally:
            if ranks.lost:
                self._ranks = None

    def _check_shared(self) -> None:
        host = socket.gethostname()
        try:
            there = read_job(self._folder)["job"]
        except (OSError, ValueError, KeyError) as error:
            raise NotShared(
                f"--output_dir {self._folder}: {host} does not see the {JOB} that was written there; name a folder on "
                "storage that all machines share"
            ) from error
        if there != self._job:
            raise NotShared(f"--output_dir {self._folder}: on {host} another job's {JOB} is there; name another folder")

    def _write(
        self,
        number: int,
        places: Sequence[int],
        requests: Sequence[Request],
        pixels: np.ndarray,
        facts: Mapping[str, Any],
        sizes: Sequence[int],
        attempt: int,
        seconds: float,
    ) -> int:
        rows = []
        for place, request, image, together in zip(places, requests, pixels, sizes, strict=True):
            name = image_path(place, request.id, self._format)
            content = encoded(image, self._format)
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(content)
            rows.append(
                {
                    "place": place,
                    **row_of(request),
                    "path": name,
                    "sha256": hashlib.sha256(content).hexdigest(),
                    "bytes": len(content),
                    "seconds": seconds / len(requests),
                    "evaluated_steps": facts["evaluated_steps"],
                    "evaluated_share": facts["evaluated_share"],
                    "plan_digest": facts["plan_digest"],
                    "batch": number,
                    "batch_images": together,
                    "group": self._number,
                    "attempt": attempt,
                    "finished": time.time(),
                }
            )
        assert self._manifest is not None
        return self._manifest.append(rows)


def encoded(pixels: np.ndarray, image_format: str) -> bytes:
    """Make a file's content of float [H, W, C] in [0, 1]."""
    shades = np.round(pixels * 255).astype(np.uint8)
    kept = io.BytesIO()
    image = Image.fromarray(shades[..., 0] if shades.shape[-1] == 1 else shades)
    image.save(kept, **IMAGE_FORMATS[image_format])
    return kept.getvalue()


def _too_large(tried: int) -> str:
    if tried == 1:
        return (
            "out of memory with one image: use a smaller size, --enable_tiling, or more ranks a group "
            "(--ulysses_degree, --pipefusion_parallel_degree)"
        )
    return (
        f"out of memory with {tried} images at once, after the batch was halved; use --batch_size {tried // 2} or less"
    )
