"""Images from rows of a Ray Data set: one worker group, which `xdit batch` is built on too."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xfuser.config import CacheConfig
from xfuser.config.cache import FIRST
from xfuser.config.parallel import ParallelConfig
from xfuser.config.trajectory import TrajectoryConfig
from xfuser.core.console import quiet_libraries
from xfuser.core.distributed.environment import is_out_of_memory
from xfuser.core.distributed.shutdown import one_line
from xfuser.model_executor.cache.apply import on_trajectory
from xfuser.model_executor.parallel import check_combination
from xfuser.model_executor.pipelines.choosing import resolve_model
from xfuser.model_executor.pipelines.model_types import DEFAULT_MODEL_TYPE
from xfuser.ray.batch.requests import Rules, check_row, is_absent
from xfuser.ray.cluster import cause_of, ray
from xfuser.ray.rank import EngineSettings, Rank

GRACE_SECONDS = 20.0  # for the other ranks to end a call in which one has failed
_LOOK_SECONDS = 0.5  # between two looks at whether this rank's own part is over


class GroupLost(RuntimeError):
    """A rank of the group is gone, or waits for one that has failed; the group has to be built anew."""


class RanksOutOfMemory(MemoryError):
    """Memory did not suffice on a rank of several; the group has to be built anew."""


class ImageGenerator:
    """One worker group: a `torch.distributed` world of W ranks, of which this process is the first.

    For ``dataset.map_batches(ImageGenerator, fn_constructor_kwargs={...}, batch_size=8, concurrency=4)``. The rows
    have ``prompt`` or ``class_label``, and may have ``seed``, ``num_inference_steps``, ``guidance_scale`` and so on;
    they come back with ``seed``, ``image`` (the bytes of a PNG), ``image_sha256``, ``evaluated_share`` and
    ``plan_digest``. A row without a seed has one that is made of its ``id``, or else of what it asks for.

    Args:
        pipeline: Folder, hub id or model type, as for ``xdit --model``.
        parallel: The group's degrees, as a `ParallelConfig` or a dict of its fields; by default one rank.
        cache: ``{"target_speedup": 3}``, or other settings of `apply_cache_on_pipeline`.
        calibration: What `learn` has returned, so that all groups use the same. Without it, and without a file in
            ``cache``, a group learns its own from the first rows that it sees.
        num_inference_steps: Of rows that do not say.
        guidance_scale: Of rows that do not say; by default the model type's own.
        device: As for ``xdit --device``.
        threads: CPU threads of a process.
        resources: What the other ranks ask Ray for; by default one GPU each where this process was given one, else one
            CPU each.

    Raises:
        ValueError: The model cannot be loaded, or the settings do not go together.
    """

    def __init__(
        self,
        pipeline: str = DEFAULT_MODEL_TYPE,
        parallel: ParallelConfig | Mapping[str, Any] | None = None,
        cache: Mapping[str, Any] | None = None,
        calibration: Mapping[str, bytes] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        device: str = "auto",
        threads: int | None = None,
        resources: Mapping[str, float] | None = None,
    ) -> None:
        settings = settings_of(pipeline, parallel, cache, device, threads)
        self._rules = Rules.of(settings.model_type, settings.model, num_inference_steps, guidance_scale)
        self._group = RankGroup(settings, resources)
        self._learned, self._given = dict(calibration or {}), calibration is not None
        self._known_kinds: set[str] = set()
        if self._given:
            self._group.install(self._learned)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Generate an image a row.

        Raises:
            ValueError: A row asks for what cannot be; the line says which and why.
            GroupLost: Another rank is gone. In a Ray actor the process ends instead, so that Ray starts a new one.
        """
        rows = self._rows(batch)
        images: list[bytes] = [b""] * len(rows)
        shares, digests = np.ones(len(rows)), [""] * len(rows)
        for places in _by_kind(rows):
            calls = [rows[place] for place in places]
            self._learn_first(calls)
            pixels, facts = self._group.generate(calls)
            for place, image in zip(places, pixels, strict=True):
                images[place] = _png(image)
                shares[place], digests[place] = facts["evaluated_share"], facts["plan_digest"] or ""
        return {
            **batch,
            "seed": np.array([each["seed"] for each in rows], dtype=np.int64),
            "image": np.array(images, dtype=object),
            "image_sha256": np.array([hashlib.sha256(each).hexdigest() for each in images], dtype=str),
            "evaluated_share": shares,
            "plan_digest": np.array(digests, dtype=str),
        }

    def learn(self, batch: Mapping[str, np.ndarray]) -> dict[str, bytes]:
        """Learn what the trajectory needs from some rows, and return it for the ``calibration`` of all groups."""
        rows = self._rows(batch)
        for places in _by_kind(rows):
            self._learn_first([rows[place] for place in places])
        return dict(self._learned)

    def close(self) -> None:
        """End the other ranks. They also end with this process."""
        self._group.close()

    def _learn_first(self, calls: list[dict[str, Any]]) -> None:
        kind = calls[0]["kind"]
        if self._group.settings.learns and kind not in self._known_kinds:
            if not self._given:
                self._learned |= self._group.learn(calls)
            self._known_kinds.add(kind)

    def _rows(self, batch: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        names = [name for name in batch if name in self._rules.known and name != "id"]
        rows = []
        for index in range(len(next(iter(batch.values())))):
            row = {name: _plain(batch[name][index]) for name in names}
            row = {name: value for name, value in row.items() if not is_absent(value)}
            identity = _plain(batch["id"][index]) if "id" in batch else None
            # Ray Data tells no place among all rows, and one in the batch would give every batch the same seeds.
            row.setdefault("seed", _seed_of(row if identity is None else identity))
            try:
                rows.append(check_row({"id": f"row{index}", **row}, self._rules, index).call())
            except ValueError as error:
                named = f"{index} of a batch" if identity is None else f"with id {identity!r}"
                raise ValueError(f"the row {named}: {error}") from error
        return rows


class RankGroup:
    """The ranks of one group, from the first one's point of view.

    Args:
        settings: What all of them load.
        resources: What each of the others asks Ray for.
        placement: Ray's strategy by the others' place, where a placement group was made for them.

    Attributes:
        lost: Whether a rank has failed where others have not, so that no further call can be made.

    Raises:
        ValueError: The model cannot be loaded, or the settings do not fit it.
    """

    def __init__(
        self,
        settings: EngineSettings,
        resources: Mapping[str, float] | None = None,
        placement: Sequence[Any] = (),
    ) -> None:
        quiet_libraries()
        self.settings = settings
        self.lost = False
        self._peers: list[Any] = []
        others = settings.parallel.world_size - 1
        url = None
        if others:
            wanted = dict(resources or _own_resources())
            for place in range(others):
                where = {"scheduling_strategy": placement[place]} if placement else {}
                self._peers.append(ray.remote(RankProcess).options(**wanted, **where).remote())
            url = _meeting_url()
        starts = [each.start.remote(settings, place, url) for place, each in enumerate(self._peers, start=1)]
        self._rank: Rank = self._meanwhile(starts, lambda: Rank(settings, 0, url))

    def generate(self, calls: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, dict[str, Any]]:
        """See `Rank.generate`."""
        return self._together("generate", calls)

    def learn(self, calls: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
        """See `Rank.learn`."""
        return self._together("learn", calls)

    def install(self, files: Mapping[str, bytes]) -> None:
        """See `Rank.install`."""
        self._together("install", files)

    def close(self) -> None:
        """End the other ranks."""
        for each in self._peers:
            ray.kill(each)
        self._peers = []

    def _together(self, method: str, argument: Any) -> Any:
        sent = ray.put(argument) if self._peers else None
        calls = [each.call.remote(method, sent) for each in self._peers]
        return self._meanwhile(calls, lambda: getattr(self._rank, method)(argument))

    def _meanwhile(self, calls: list[Any], own: Callable[[], Any]) -> Any:
        """Do this rank's part while the others do theirs; where one has failed, nobody is left waiting for it."""
        if self.lost:
            _lose("a rank of the group has failed before")
        if not calls:
            return own()
        part, ends = _Part(own), None
        waiting, failures = list(calls), []
        while (waiting or not part.over.is_set()) and not failures and part.error is None:
            if not waiting:
                part.over.wait(_LOOK_SECONDS)
                continue
            done, waiting = ray.wait(waiting, timeout=_LOOK_SECONDS)
            failures += [error for error in map(_failure_of, done) if error is not None]
            if waiting and part.over.is_set():
                ends = ends or time.monotonic() + GRACE_SECONDS + self.settings.timeout
                if time.monotonic() > ends:
                    _lose("another rank of the group does not answer")
        if not failures and part.error is None:
            return part.result
        self._check_memory([*failures, part.error])
        # The others have a moment to refuse alike; then all of them can go on.
        part.over.wait(GRACE_SECONDS)
        done, waiting = ray.wait(calls, num_returns=len(calls), timeout=GRACE_SECONDS)
        told = [_failure_of(each) for each in done]
        self._check_memory([*told, part.error])
        if waiting or part.error is None or not all(isinstance(each, ray.exceptions.RayTaskError) for each in told):
            first = next((each for each in (part.error, *told) if each is not None), None)
            _lose(
                f"a rank of the group has failed: {'nothing was told' if first is None else one_line(cause_of(first))}"
            )
        raise part.error

    def _check_memory(self, errors: Sequence[BaseException | None]) -> None:
        """Give the ranks up where memory did not suffice for one of them: the others may be at any place in a batch.

        Raises:
            RanksOutOfMemory: It did not.
        """
        for error in errors:
            if error is not None and is_out_of_memory(cause_of(error)):
                self.lost = True
                raise RanksOutOfMemory(f"a rank of the group is out of memory: {one_line(cause_of(error))}")


class _Part:
    """One rank's own part of a call, in a thread: it may wait for another rank that will never answer."""

    def __init__(self, own: Callable[[], Any]) -> None:
        self.over = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None
        threading.Thread(target=self._run, args=(own,), daemon=True).start()

    def _run(self, own: Callable[[], Any]) -> None:
        try:
            self.result = own()
        except BaseException as error:  # it is raised again where the call was made
            self.error = error
        finally:
            self.over.set()


class RankProcess:
    """A rank that is not the first, in a process that Ray has started."""

    def start(self, settings: EngineSettings, place: int, url: str) -> None:
        """Meet the others and load. Collective."""
        quiet_libraries()
        self._rank = Rank(settings, place, url)

    def call(self, method: str, argument: Any) -> None:
        """Do what the first rank does; what comes of it stays there. Collective."""
        getattr(self._rank, method)(argument)


def settings_of(
    pipeline: str,
    parallel: ParallelConfig | Mapping[str, Any] | None,
    cache: Mapping[str, Any] | None,
    device: str = "auto",
    threads: int | None = None,
) -> EngineSettings:
    """Check what a group is to load, before anything is loaded.

    Raises:
        ValueError: There is no such model, or settings do not go together.
        TypeError: A setting is not known.
    """
    named = argparse.Namespace(model=pipeline, model_type=DEFAULT_MODEL_TYPE, model_type_named=False)
    resolve_model(named)
    degrees = parallel if isinstance(parallel, ParallelConfig) else ParallelConfig(**(parallel or {}))
    if degrees.data_parallel_degree > 1:
        raise ValueError("data_parallel_degree: groups generate different images already; raise concurrency instead")
    wanted = dict(cache or {})
    check_cache_settings(wanted, degrees)
    files = calibration_files(wanted.get("calibration"))
    return EngineSettings(named.model_type, named.model, degrees, wanted, files, device, threads)


def check_cache_settings(cache: Mapping[str, Any], degrees: ParallelConfig) -> None:
    """Refuse a cache that cannot serve a job: settings that do not go together, or what learns from one batch.

    Raises:
        ValueError: A value is out of its range, or two do not go together.
        TypeError: A setting is not known.
    """
    others = {name: value for name, value in cache.items() if name != "use_cache"}
    if on_trajectory(cache.get("use_cache"), others):
        TrajectoryConfig(**{name: value for name, value in others.items() if name != "enable_adacorrection"})
        return
    if cache.get("calibration") == FIRST:
        raise ValueError(
            "calibration='first' learns from another batch in every group; name a file that `xdit calibrate` has made"
        )
    check_combination(CacheConfig.from_keywords(**cache), degrees)


def calibration_files(path: Any) -> dict[str, bytes]:
    """Read a named calibration, by suffix, so that machines that do not have the file can use it too (ValueError)."""
    if path is None or path in ("auto", "first"):
        return {}
    try:
        files = {".safetensors": Path(path).read_bytes()}
        beside = Path(path).with_suffix(".json")
        return files | ({".json": beside.read_bytes()} if beside.is_file() else {})
    except OSError as error:
        raise ValueError(f"--calibration {path}: it cannot be read ({error.strerror})") from error


def in_actor() -> bool:
    """Whether Ray has started this process as an actor, and may start it again."""
    return ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None


def _lose(reason: str) -> None:
    """Give the group up, as a whole: torch's process groups cannot be mended."""
    if in_actor():
        print(f"xfuser: {reason}", file=sys.stderr, flush=True)
        os._exit(1)
    raise GroupLost(reason)


def _failure_of(call: Any) -> BaseException | None:
    """Read what another rank's part has failed with, where it is over and has."""
    try:
        ray.get(call)
    except ray.exceptions.RayError as error:
        return error
    return None


def _own_resources() -> dict[str, float]:
    return {"num_gpus": 1} if ray.is_initialized() and ray.get_gpu_ids() else {"num_cpus": 1}


def _meeting_url() -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"


def _by_kind(rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    kinds: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        kinds.setdefault(row["kind"], []).append(place)
    return list(kinds.values())


def _seed_of(said: Any) -> int:
    """Make a seed of what tells a row from others."""
    text = json.dumps(said, sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _png(pixels: np.ndarray) -> bytes:
    shades = np.round(pixels * 255).astype(np.uint8)
    kept = io.BytesIO()
    Image.fromarray(shades[..., 0] if shades.shape[-1] == 1 else shades).save(kept, format="PNG")
    return kept.getvalue()
