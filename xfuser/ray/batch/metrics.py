"""What Ray's metrics endpoint tells of a batch job. The names are documented in docs/cluster.md."""

from __future__ import annotations

from ray.util import metrics

_SECONDS = [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000]


class GroupMetrics:
    """What one group counts.

    Args:
        number: The group's.
    """

    def __init__(self, number: int) -> None:
        self._tags = {"group": str(number)}
        keys = ("group",)
        self._images = metrics.Counter("xfuser_batch_images", "Images written", tag_keys=keys)
        self._generating = metrics.Histogram(
            "xfuser_batch_generate_seconds", "Generating one batch", boundaries=_SECONDS, tag_keys=keys
        )
        self._writing = metrics.Histogram(
            "xfuser_batch_write_seconds", "Writing one batch", boundaries=_SECONDS, tag_keys=keys
        )
        self._share = metrics.Gauge(
            "xfuser_batch_evaluated_share", "Share of the denoiser's work in the last batch", tag_keys=keys
        )

    def batch(self, images: int, generating: float, writing: float, share: float) -> None:
        """Count one batch."""
        self._images.inc(images, tags=self._tags)
        self._generating.observe(generating, tags=self._tags)
        self._writing.observe(writing, tags=self._tags)
        self._share.set(share, tags=self._tags)


class JobMetrics:
    """What the command itself counts."""

    def __init__(self) -> None:
        self._alive = metrics.Gauge("xfuser_batch_groups_alive", "Groups that take batches")
        self._left = metrics.Gauge("xfuser_batch_images_left", "Images that are not done")
        self._retries = metrics.Counter("xfuser_batch_retries", "Tries that failed and were made again")
        self._rejected = metrics.Counter("xfuser_batch_rejected", "Lines and images that were given up")
        self._seen = (0, 0)

    def state(self, alive: int, left: int, retries: int, rejected: int) -> None:
        """Tell how the job stands."""
        self._alive.set(alive)
        self._left.set(left)
        before = self._seen
        if retries > before[0]:
            self._retries.inc(retries - before[0])
        if rejected > before[1]:
            self._rejected.inc(rejected - before[1])
        self._seen = (retries, rejected)
