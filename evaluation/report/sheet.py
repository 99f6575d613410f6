"""A sheet of sample images: one row a method, the same noise in each column."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SMALL, _LARGE = 64, 256
_FONT_SIZE = 16
_GAP = 4
_MARGIN = 10
_INK = (20, 20, 20)
_PAPER = (255, 255, 255)


@dataclass(frozen=True)
class Sheet:
    """A drawn sheet, and where on it each method's images are: left, top, width and height in pixels."""

    picture: Image.Image
    places: dict[str, list[tuple[int, int, int, int]]]


def comparison_sheet(rows: Mapping[str, Sequence[np.ndarray]], columns: int = 12, scale: int = 2) -> Image.Image:
    """As `draw_sheet`, without the places."""
    return draw_sheet(rows, columns, scale).picture


def draw_sheet(rows: Mapping[str, Sequence[np.ndarray]], columns: int = 12, scale: int = 2) -> Sheet:
    """Draw one row of images for each method, with the method's name at the left.

    Args:
        rows: For each method its images, arrays ``[H, W, C]`` of floats in [0, 1] with C = 1 or 3. Values outside are
            clipped; NaN is drawn black.
        columns: At most this many images of each method are drawn.
        scale: Integer factor by which images whose longer side is below 64 pixels are enlarged (nearest neighbour).
            Those whose longer side is above 256 pixels are reduced to that.

    Returns:
        The sheet, an RGB picture. The label column is as wide as the longest name, and each row as high as its tallest
        content.

    Raises:
        ValueError: No rows, ``columns`` or ``scale`` below 1, or an array of another shape.
    """
    if not rows:
        raise ValueError("comparison_sheet needs at least one row of images")
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be at least 1, got columns={columns}, scale={scale}")
    tiles = {name: [_tile(array, scale) for array in list(arrays)[:columns]] for name, arrays in rows.items()}
    font = ImageFont.load_default(size=_FONT_SIZE)
    labels = {name: _text_box(name, font) for name in tiles}
    every = [tile for line in tiles.values() for tile in line]
    cell_width = max((tile.width for tile in every), default=0)
    cell_height = max((tile.height for tile in every), default=0)
    label_width = max(box[2] - box[0] for box in labels.values()) + 2 * _MARGIN
    heights = [max(cell_height, box[3] - box[1]) + _GAP for box in labels.values()]
    count = max(len(line) for line in tiles.values())
    size = (label_width + count * (cell_width + _GAP) + _MARGIN, sum(heights) + 2 * _MARGIN)
    sheet = Image.new("RGB", tuple(int(np.ceil(side)) for side in size), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = float(_MARGIN)
    places: dict[str, list[tuple[int, int, int, int]]] = {}
    for (name, line), height in zip(tiles.items(), heights, strict=True):
        left, upper, _, lower = labels[name]
        draw.multiline_text((_MARGIN - left, top + (height - lower - upper) / 2), name, fill=_INK, font=font)
        corners = [(int(np.ceil(label_width)) + index * (cell_width + _GAP), int(top)) for index in range(len(line))]
        for tile, corner in zip(line, corners, strict=True):
            sheet.paste(tile, corner)
        places[name] = [(*corner, *tile.size) for tile, corner in zip(line, corners, strict=True)]
        top += height
    return Sheet(sheet, places)


def _tile(array: np.ndarray, scale: int) -> Image.Image:
    if array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape:
        raise ValueError(f"an image must be [H, W, 1] or [H, W, 3], got shape {array.shape}")
    levels = np.nan_to_num(np.asarray(array, dtype=np.float64), nan=0.0).clip(0.0, 1.0) * 255.0
    pixels = np.rint(levels).astype(np.uint8)
    tile = Image.fromarray(np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3))))
    if max(tile.size) > _LARGE:
        factor = _LARGE / max(tile.size)
        size = tuple(max(1, round(side * factor)) for side in tile.size)
        return tile.resize(size, Image.Resampling.LANCZOS)
    if max(tile.size) >= _SMALL:
        return tile
    return tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.NEAREST)


def _text_box(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the drawn text in pixels; measured because glyph widths differ."""
    return ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=font)
