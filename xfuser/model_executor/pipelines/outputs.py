"""The folder that a run writes: whole images, and a statistics.json that belongs to all of them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xfuser.core.console import check_output_folder
from xfuser.core.files import IMAGE_FORMATS, replacing, write_json

STATISTICS = "statistics.json"
UNFINISHED = "unfinished.json"  # there while images are, and statistics are not
RAW = "images.npy"
_RAW_PART = "unfinished.npy"
FRAMES_PER_SECOND = 16  # Wan's
_IMAGE = re.compile(rf"image_\d{{5,}}\.({'|'.join(IMAGE_FORMATS)})")


class Outputs:
    """What one run writes into its folder, and what an earlier one has left there.

    Nothing is touched before the first images are finished; then the remains of an earlier run go first. So a
    statistics.json never lies beside images of another run, and a run that was stopped can go on.

    Args:
        folder: Where to write.
        command: The settings that the images depend on, in plain types; ``--resume`` wants the same again.
        count: How many images there will be.
        image_format: A key of `IMAGE_FORMATS`.
        save_raw: Whether to write the pixels as float32 [N, H, W, C], 0 to 1, too.
        overwrite: Whether an earlier run's files may be replaced.
        resume: Whether to go on where an earlier run was stopped.
    """

    def __init__(
        self,
        folder: Path,
        command: dict[str, Any],
        count: int,
        image_format: str = "png",
        save_raw: bool = False,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        self.folder, self._count, self._format = folder, count, image_format
        self._command = json.loads(json.dumps(command))
        self._save_raw, self._overwrite, self._resume = save_raw, overwrite, resume
        self._begun = False

    @property
    def names(self) -> list[str]:
        return [self._name(index) for index in range(self._count)]

    def check(self) -> frozenset[int]:
        """Find the images that need not be generated again, and change nothing.

        Raises:
            ValueError: There are files of another run, and nobody has said what becomes of them.
            OSError: Nothing can be written there.
        """
        check_output_folder(self.folder)
        left = self._left()
        if not left or self._overwrite:
            return frozenset()
        if not self._resume:
            images = sum(_IMAGE.fullmatch(path.name) is not None for path in left)
            raise ValueError(
                f"--output_dir {self.folder} holds an earlier run ({images} images); add --overwrite to replace it, "
                "--resume to go on with it, or name another folder"
            )
        self._check_same()
        if self._save_raw and not any((self.folder / name).is_file() for name in (RAW, _RAW_PART)):
            return frozenset()
        return frozenset(index for index, name in enumerate(self.names) if (self.folder / name).is_file())

    def complete(self) -> bool:
        """Whether a run with the same settings has written everything already (to be asked after `check`)."""
        whole = (STATISTICS, *self.names, *([RAW] if self._save_raw else ()))
        return self._resume and all((self.folder / name).is_file() for name in whole)

    def take(self, indices: range, pixels: np.ndarray) -> None:
        """Write finished images, float [B, H, W, C] in [0, 1]; each file is whole or not there."""
        if not len(indices):
            return
        self._begin()
        if self._save_raw:
            self._write_raw(indices, pixels)
        for index, image in zip(indices, pixels, strict=True):
            save_image(image, self.folder / self._name(index))

    def finish(self, document: dict[str, Any]) -> None:
        """Write the statistics, once all images are there."""
        if self._save_raw:
            os.replace(self.folder / _RAW_PART, self.folder / RAW)
        write_json(self.folder / STATISTICS, document | {"command": self._command})
        (self.folder / UNFINISHED).unlink(missing_ok=True)

    def _name(self, index: int) -> str:
        return f"image_{index:05d}.{self._format}"

    def _left(self) -> list[Path]:
        """Everything there that a run writes."""
        if not self.folder.is_dir():
            return []
        fixed = (STATISTICS, UNFINISHED, RAW, _RAW_PART)
        return [path for path in self.folder.iterdir() if path.name in fixed or _IMAGE.fullmatch(path.name)]

    def _begin(self) -> None:
        if self._begun:
            return
        self._begun = True
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / STATISTICS).unlink(missing_ok=True)
        write_json(self.folder / UNFINISHED, {"command": self._command})
        if self._resume:
            if self._save_raw and (self.folder / RAW).is_file():
                os.replace(self.folder / RAW, self.folder / _RAW_PART)
            return
        for path in self._left():
            if path.name != UNFINISHED:
                path.unlink()

    def _check_same(self) -> None:
        """Refuse to go on with a run of other settings (ValueError)."""
        made_with = None
        for name in (UNFINISHED, STATISTICS):
            path = self.folder / name
            if path.is_file():
                made_with = json.loads(path.read_text(encoding="utf-8")).get("command")
                break
        if made_with is None:
            raise ValueError(f"--resume: {self.folder} does not say how its images were made; use --overwrite")
        for name in sorted(made_with.keys() | self._command.keys()):
            before, now = made_with.get(name), self._command.get(name)
            if before != now:
                raise ValueError(
                    f"--resume: {self.folder} was made {_said(name, before)}, and this is {_said(name, now)}; name the "
                    "same settings, or use --overwrite"
                )

    def _write_raw(self, indices: range, pixels: np.ndarray) -> None:
        path = self.folder / _RAW_PART
        pixels = np.ascontiguousarray(pixels, dtype=np.float32)
        if not path.is_file():
            with path.open("wb") as file:
                header = np.lib.format.header_data_from_array_1_0(pixels)
                np.lib.format.write_array_header_1_0(file, header | {"shape": (self._count, *pixels.shape[1:])})
                file.truncate(file.tell() + self._count * pixels[0].nbytes)
        with path.open("r+b") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            file.seek(indices.start * pixels[0].nbytes, os.SEEK_CUR)
            file.write(pixels.tobytes())


def _said(name: str, value: Any) -> str:
    if value is None or value is False:
        return f"without --{name}"
    if value is True:
        return f"with --{name}"
    return f"with --{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def save_image(pixels: np.ndarray, path: Path) -> Path:
    """Save float [H, W, C], or a video's [F, H, W, C], in [0, 1], in the format of the path's suffix.

    It has a temporary name until it is whole. A video becomes an animation, which PNG and WebP know.
    """
    shades = np.round(pixels * 255).astype(np.uint8)
    shades = shades[..., 0] if shades.shape[-1] == 1 else shades
    options = dict(IMAGE_FORMATS[path.suffix.removeprefix(".")])
    frames = [Image.fromarray(each) for each in (shades if pixels.ndim == 4 else [shades])]
    if len(frames) > 1:
        options |= {"save_all": True, "append_images": frames[1:], "duration": 1000 / FRAMES_PER_SECOND, "loop": 0}
    with replacing(path) as temporary:
        frames[0].save(temporary, **options)
    return path
