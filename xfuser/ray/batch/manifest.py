"""What was made: one line an image, appended by the group that made it, and merged into one table at the end."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
    for path in sorted((folder / FOLDER).glob("*.jsonl")):
        with path.open("rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):
                    try:
                        yield json.loads(line)
                    except ValueError:  # a machine that lost its power may leave zeros
                        continue


def finished_places(folder: Path, plan: Plan) -> bytearray:
    """Find what is done: a 1 for every request that has a row and a file of the size that the row tells."""
    done = bytearray(len(plan))
    for row in read_rows(folder):
        place = row["place"]
        if place < len(done) and not done[place]:
            done[place] = _is_there(folder / row["path"], row["bytes"])
    return done


def merge(folder: Path, plan: Plan) -> dict[str, Any]:
    """Write the table of all images, in the file's order, and return what can be summed up of it.

    An image that was made twice, since its row or its file was lost, has its last row.
    """
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    last: dict[int, int] = {}
    for row in read_rows(folder):
        known = last.setdefault(row["place"], len(last))
        for name, values in columns.items():
            if known == len(values):
                values.append(row.get(name))
            else:
                values[known] = row.get(name)
    schema = pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in COLUMNS.items()])
    table = pyarrow.table(columns, schema=schema).sort_by("place")
    with replacing(folder / TABLE) as temporary:
        pyarrow.parquet.write_table(table, temporary, compression="zstd")
    shares = [share for share in columns["evaluated_share"] if share is not None]
    return {
        "images": table.num_rows,
        "missing": len(plan) - table.num_rows,
        "evaluated_share": sum(shares) / len(shares) if shares else None,
        "manifest_bytes": (folder / TABLE).stat().st_size,
    }


def _is_there(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False
