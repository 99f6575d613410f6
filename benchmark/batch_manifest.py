"""What memory the end of a large `xdit batch` takes: the manifest's merge into a table, and the report.

python benchmark/batch_manifest.py --rows 1000000 --files 100

Writes the rows of an invented job into a temporary folder, some of them twice, and merges them in a process of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow.parquet  # noqa: F401 (so that the merge's own memory is told apart from its library's)
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xfuser.config.arguments import positive  # noqa: E402
from xfuser.config.parser import OneLineParser  # noqa: E402
from xfuser.ray.batch.batches import Plan, row_of  # noqa: E402
from xfuser.ray.batch.manifest import FOLDER, merge  # noqa: E402
from xfuser.ray.batch.report import write_report  # noqa: E402
from xfuser.ray.batch.requests import Request  # noqa: E402

BATCH, AGAIN = 16, 100  # images of a batch; of so many batches, one was made twice
ONE_IMAGE = "images/one.png"
TAKEN = {"seconds": 0.1, "evaluated_steps": 13, "evaluated_share": 0.26, "plan_digest": "0123456789abcdef"}


def requests(count: int) -> Iterator[Request]:
    """Make up what a job was asked for."""
    for place in range(count):
        yield Request(f"image-{place:07d}", place % 10, place, {"num_inference_steps": 50}, None, "p.jsonl", place + 1)


def rows_of(batch: list[tuple[int, Request]], group: int, attempt: int) -> list[dict[str, Any]]:
    """Make up what a group says of a batch."""
    number = batch[0][0] // BATCH
    place_of = {"batch": number, "batch_images": len(batch), "group": group, "attempt": attempt}
    return [
        {"place": place, **row_of(request), "path": ONE_IMAGE, "bytes": 900, **TAKEN, **place_of}
        | {"sha256": hashlib.sha256(request.id.encode()).hexdigest(), "finished": 1e9 + number * 2 + attempt}
        for place, request in batch
    ]


def write_job(folder: Path, count: int, files: int) -> None:
    """Write a job's requests and manifest files, as ``files`` groups would have."""
    Plan.write(folder / "requests.jsonl", requests(count))
    (folder / ONE_IMAGE).parent.mkdir()
    Image.new("L", (32, 32)).save(folder / ONE_IMAGE)
    (folder / FOLDER).mkdir()
    with ExitStack() as opened:  # a group writes every batch through to the disk, for which nobody here can wait
        paths = [folder / FOLDER / f"group-{number:04d}-0.jsonl" for number in range(files)]
        writers = [opened.enter_context(path.open("w", encoding="utf-8")) for path in paths]
        batch: list[tuple[int, Request]] = []
        for place, request in enumerate(requests(count)):
            batch.append((place, request))
            if len(batch) == BATCH or place == count - 1:
                number = place // BATCH
                for attempt in (1, 2) if number % AGAIN == 0 else (1,):
                    group = (number + attempt) % files
                    writers[group].writelines(json.dumps(row) + "\n" for row in rows_of(batch, group, attempt))
                batch = []


def merge_alone(folder: Path) -> None:
    """Merge and report in this process, and print what it took."""
    plan = Plan(folder / "requests.jsonl", BATCH)
    peaks, began = [peak()], time.perf_counter()
    summary = merge(folder, plan)
    peaks.append(peak())
    run = {"images": 0, "seconds": 0.0, "retries": 0}
    write_report(folder, {**summary, "requests": len(plan), "rejected": 0, "settings": {}, "run": run}, [])
    peaks.append(peak())
    rows = sum(path.stat().st_size for path in (folder / FOLDER).iterdir())
    print(
        json.dumps(
            {
                "images": summary["images"],
                "missing": summary["missing"],
                "rows_mb": rows / 1e6,
                "table_mb": summary["manifest_bytes"] / 1e6,
                "before_mb": peaks[0] / 1e6,
                "merge_adds_mb": (peaks[1] - peaks[0]) / 1e6,
                "report_adds_mb": (peaks[2] - peaks[1]) / 1e6,
                "seconds": time.perf_counter() - began,
            },
            indent=2,
        )
    )


def peak() -> int:
    """The most bytes that this process has held in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=positive, default=1_000_000, help="images of the job (default: %(default)s)")
    parser.add_argument("--files", type=positive, default=100, help="groups that have made them (default: %(default)s)")
    parser.add_argument("--merge", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.merge is not None:
        merge_alone(args.merge)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_job(Path(folder), args.rows, args.files)
        subprocess.run([sys.executable, __file__, "--merge", folder], check=True)


if __name__ == "__main__":
    main()
