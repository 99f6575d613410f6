"""What was made: one line an image, appended by the group that made it, and merged into one table at the end."""

from __future__ import annotations

import json
import os
import threading
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xfuser.core.files import replacing
from xfuser.ray.batch.batches import Plan

FOLDER = "manifest"
TABLE = "manifest.parquet"
COLUMNS = {
    "place": "int64",
    "id": "string",
    "path": "string",
    "sha256": "string",
    "bytes": "int64",
    "seed": "int64",
    "settings": "string",
    "seconds": "float64",
    "evaluated_steps": "float64",
    "evaluated_share": "float64",
    "plan_digest": "string",
    "batch": "int64",
    "batch_images": "int64",
    "group": "int64",
    "attempt": "int64",
    "finished": "float64",
}
BLOCK = 32768  # rows that a merge holds at once, and a row group of the table
_FILE = 1 << 40  # a row's position is its file's number times this, plus the byte where it begins


class ManifestWriter:
    """Appends rows to a file of its own, so that no two processes ever write into one.

    Args:
        folder: The job's folder.
        name: Of this process's file, without its suffix.
    """

    def __init__(self, folder: Path, name: str) -> None:
        (folder / FOLDER).mkdir(exist_ok=True)
        self._path = folder / FOLDER / f"{name}.jsonl"
        self._lock = threading.Lock()

    def append(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Write rows down, so that they outlive this process and this machine; how many bytes they are."""
        text = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows).encode()
        with self._lock, self._path.open("ab") as file:
            whole = file.tell()
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                file.truncate(whole)  # on a full disk, half a line would be followed by the next one
                raise
        return len(text)


def read_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Read the rows of all groups; a line that a process could not finish any more is no row."""
    for path in _files(folder):
        for _, row in _rows_of(path):
            yield row


def finished_places(folder: Path, plan: Plan) -> bytearray:
    """Find what is done: a 1 for every request that has a row and a file of the size that the row tells."""
    done = bytearray(len(plan))
    for row in read_rows(folder):
        place = row["place"]
        if place < len(done) and not done[place]:
            done[place] = _is_there(folder / row["path"], row["bytes"])
    return done


def merge(folder: Path, plan: Plan) -> dict[str, Any]:
    """Write the table of all images, in the prompts' order, and return what can be summed up of it.

    An image that was made twice, since its row or its file was lost, has the row that was finished last: that is the
    one whose bytes are in its file. Held in memory are 16 bytes for each image, and the rows of one block.
    """
    import pyarrow
    import pyarrow.parquet

    files = _files(folder)
    positions = _last_positions(files, len(plan))
    found = positions[positions >= 0]
    schema = pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in COLUMNS.items()])
    shares, told = 0.0, 0
    with (
        replacing(folder / TABLE) as temporary,
        pyarrow.parquet.ParquetWriter(temporary, schema, compression="zstd") as table,
    ):
        for start in range(0, len(found), BLOCK):
            columns = _columns_at(files, found[start : start + BLOCK])
            table.write_table(pyarrow.table(columns, schema=schema))
            known = [share for share in columns["evaluated_share"] if share is not None]
            shares, told = shares + sum(known), told + len(known)
    return {
        "images": len(found),
        "missing": len(plan) - len(found),
        "evaluated_share": shares / told if told else None,
        "manifest_bytes": (folder / TABLE).stat().st_size,
    }


def _files(folder: Path) -> list[Path]:
    return sorted((folder / FOLDER).glob("*.jsonl"))


def _rows_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a file's rows, each with the byte where it begins."""
    start = 0
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                try:
                    yield start, json.loads(line)
                except ValueError:  # a machine that lost its power may leave zeros
                    pass
            start += len(line)


def _last_positions(files: Sequence[Path], count: int) -> np.ndarray:
    """Find where each image's row is, int64 [count] by place; -1 where there is none."""
    positions, finished = array("q", [-1]) * count, array("d", [-np.inf]) * count
    for number, path in enumerate(files):
        for start, row in _rows_of(path):
            place = row["place"]
            if place < count and row["finished"] >= finished[place]:
                positions[place], finished[place] = number * _FILE + start, row["finished"]
    return np.frombuffer(positions, dtype=np.int64)


def _columns_at(files: Sequence[Path], positions: np.ndarray) -> dict[str, list[Any]]:
    """Read the rows at these positions, in their order, opening each file once."""
    columns: dict[str, list[Any]] = {name: [None] * len(positions) for name in COLUMNS}
    numbers, starts = np.divmod(positions, _FILE)
    for number in np.unique(numbers):
        with files[number].open("rb") as lines:
            for index in np.flatnonzero(numbers == number):
                lines.seek(starts[index])
                row = json.loads(lines.readline())
                for name, values in columns.items():
                    values[index] = row.get(name)
    return columns


def _is_there(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False
