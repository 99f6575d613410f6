"""The job's units of work: batches formed from the file by rule, and never re-formed."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xfuser.core.files import replacing
from xfuser.ray.batch.prompts import Rejected
from xfuser.ray.batch.requests import Request


@dataclass(frozen=True)
class Batch:
    """Requests that are generated in one call.

    Attributes:
        number: Its place in the job.
        kind: What its requests have in common; an index into `Plan.kinds`.
        members: Their places among all requests.
    """

    number: int
    kind: int
    members: tuple[int, ...]


class Plan:
    """All requests of a job, in a file, and the batches that they form. What is held in memory is a few bytes each.

    Args:
        path: What `write` has written.
        batch_size: Images of a batch.
    """

    def __init__(self, path: Path, batch_size: int) -> None:
        self._path, self._size = path, batch_size
        self._offsets = array("Q")
        self._kind_of = array("H")
        self.kinds: list[str] = []
        digest = hashlib.sha256(f"{batch_size}".encode())
        with path.open("rb") as lines:
            while True:
                start = lines.tell()
                line = lines.readline()
                if not line:
                    break
                digest.update(line)
                kind = Request.of(json.loads(line)).kind
                if kind not in self.kinds:
                    self.kinds.append(kind)
                self._offsets.append(start)
                self._kind_of.append(self.kinds.index(kind))
        self.digest = digest.hexdigest()

    @staticmethod
    def write(path: Path, found: Iterable[Request | Rejected]) -> list[Rejected]:
        """Write the requests among what was found, and return the others."""
        rejected = []
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for each in found:
                if isinstance(each, Rejected):
                    rejected.append(each)
                else:
                    file.write(json.dumps(each.document(), ensure_ascii=False, sort_keys=True) + "\n")
        return rejected

    def __len__(self) -> int:
        return len(self._offsets)

    def batches(self) -> Iterator[Batch]:
        """Form the batches: requests of one kind, in the file's order, a batch as soon as it is full."""
        open_: dict[int, list[int]] = {}
        number = 0
        for place, kind in enumerate(self._kind_of):
            members = open_.setdefault(kind, [])
            members.append(place)
            if len(members) == self._size:
                yield Batch(number, kind, tuple(open_.pop(kind)))
                number += 1
        for kind, members in sorted(open_.items(), key=lambda item: item[1][0]):
            yield Batch(number, kind, tuple(members))
            number += 1

    def requests(self, places: Iterable[int]) -> list[Request]:
        """Read some of the requests."""
        found = []
        with self._path.open("rb") as lines:
            for place in places:
                lines.seek(self._offsets[place])
                found.append(Request.of(json.loads(lines.readline())))
        return found

    def ids(self) -> Iterator[tuple[int, str]]:
        """Read every request's place and id."""
        with self._path.open("rb") as lines:
            for place, line in enumerate(lines):
                yield place, json.loads(line)["id"]


def kind_name(kind: str) -> str:
    """Make a file's name of a kind."""
    return hashlib.sha256(kind.encode()).hexdigest()[:16]


def image_path(place: int, identity: str, suffix: str) -> str:
    """Name an image's file, below the job's folder: a thousand a folder, since file systems slow down with more."""
    return f"images/{place // 1000:05d}/{identity}.{suffix}"


def row_of(request: Request) -> dict[str, Any]:
    """Make the columns of the manifest that come from the request itself."""
    return {
        "id": request.id,
        "seed": request.seed,
        "settings": json.dumps(dict(request.sampling), sort_keys=True),
    }
