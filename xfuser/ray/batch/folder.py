"""The job's folder: what it holds, who may write there, and whether a job may go on."""

from __future__ import annotations

import fcntl
import json
import shutil
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from xfuser.core.console import check_output_folder
from xfuser.core.files import replacing, write_json
from xfuser.ray.batch import manifest
from xfuser.ray.batch.batches import Plan, kind_name
from xfuser.ray.batch.prompts import Rejected
from xfuser.ray.batch.requests import Request

JOB = "job.json"
REQUESTS = "requests.jsonl"
REJECTED = "rejected.jsonl"
SUMMARY = "summary.json"
REPORT = "report.html"
CALIBRATION = "calibration"
IMAGES = "images"
_LOCK = ".lock"
_OURS = (JOB, REQUESTS, REJECTED, SUMMARY, REPORT, CALIBRATION, IMAGES, manifest.FOLDER, manifest.TABLE)


class JobFolder:
    """One job's folder, held by one command at a time.

    Args:
        path: Where to write.
        settings: What the images depend on, in plain types; a job that goes on wants the same again.
        resume: Whether a job that is there may go on.
        overwrite: Whether a job that is there is replaced.

    Raises:
        ValueError: Another job is there, or another command is at work there.
        OSError: Nothing can be written there.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
        self.path = path.absolute()
        self._settings = json.loads(json.dumps(dict(settings)))
        check_output_folder(path)
        before = read_job(path) if (path / JOB).is_file() else None
        if before is None:
            left = [name for name in _OURS if (path / name).exists() and name not in (REQUESTS, REJECTED)]
            if left and not overwrite:
                raise ValueError(
                    f"--output_dir {path} holds {left[0]}, and no {JOB}; name another folder, or --overwrite"
                )
        elif not overwrite:
            if not resume:
                raise ValueError(
                    f"--output_dir {path} holds a job; leave --no_resume out to go on, or name --overwrite"
                )
            self._check_same(before["settings"])
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.path)
        if overwrite:
            self._clear()
        self.job = before["job"] if before is not None and not overwrite else uuid.uuid4().hex
        self._before = None if overwrite else before

    def begin(self, found: Iterable[Request | Rejected], batch_size: int) -> tuple[Plan, list[Rejected]]:
        """Write down what is to be made, or compare it with what a job that goes on was to make.

        Raises:
            ValueError: No line asks for an image, or they ask for other images than before.
        """
        new = self.path / f".{REQUESTS}"
        try:
            rejected = Plan.write(new, found)
            plan = Plan(new, batch_size)
            if self._before is not None and self._before["digest"] != plan.digest:
                raise ValueError(
                    f"--prompts: they are not those that {self.path} was begun with, and batches are not formed anew; "
                    "name the same prompts, or another --output_dir"
                )
            write_rejected(self.path, rejected)
            if not len(plan):
                return plan, rejected
            if self._before is None:
                shutil.copyfile(new, self.path / REQUESTS)
                write_json(self.path / JOB, {"job": self.job, "digest": plan.digest, "settings": self._settings})
        finally:
            new.unlink(missing_ok=True)
        plan = Plan(self.path / REQUESTS, batch_size)
        if plan.digest != read_job(self.path)["digest"]:
            raise ValueError(f"{self.path / REQUESTS} was changed or is cut off; begin anew with --overwrite")
        return plan, rejected

    def calibrations(self, plan: Plan) -> dict[int, dict[str, bytes]]:
        """Read what was learned, by kind."""
        found = {}
        for index, kind in enumerate(plan.kinds):
            listed = self.path / CALIBRATION / f"{kind_name(kind)}.json"
            if listed.is_file():
                names = json.loads(listed.read_text(encoding="utf-8"))["files"]
                found[index] = {name: (listed.parent / name).read_bytes() for name in names}
        return found

    def keep_calibration(self, kind: str, files: Mapping[str, bytes]) -> None:
        """Write what was learned; whole, or not there."""
        folder = self.path / CALIBRATION
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            with replacing(folder / name) as temporary:
                temporary.write_bytes(content)
        write_json(folder / f"{kind_name(kind)}.json", {"kind": kind, "files": sorted(files)})

    def clean(self) -> None:
        """Remove what killed processes have begun and could not finish."""
        for pattern in (".*.partial", f"{CALIBRATION}/.*.partial", f"{IMAGES}/*/.*.partial"):
            for path in self.path.glob(pattern):
                with suppress(FileNotFoundError):
                    path.unlink()

    def close(self) -> None:
        """Let other commands work here."""
        self._lock.close()

    def _clear(self) -> None:
        for name in _OURS:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _check_same(self, before: Mapping[str, Any]) -> None:
        for name in sorted(before.keys() | self._settings.keys()):
            then, now = before.get(name), self._settings.get(name)
            if then != now:
                raise ValueError(
                    f"--{name} was {then!r} when the job in {self.path} began, and is {now!r}; name the same, use "
                    "--overwrite, or another --output_dir"
                )


def read_job(folder: Path) -> dict[str, Any]:
    """Read what a job was begun with (ValueError where it cannot be)."""
    try:
        return json.loads((folder / JOB).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / JOB} cannot be read ({error}); begin anew with --overwrite") from error


def write_rejected(folder: Path, rejected: Iterable[Rejected]) -> None:
    """Write all that is not made, with file, line and reason; no file where there is nothing."""
    path = folder / REJECTED
    lines = [json.dumps(vars(each), ensure_ascii=False) for each in rejected]
    if not lines:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _locked(folder: Path) -> IO[str]:
    file = (folder / _LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ValueError(
            f"--output_dir {folder}: another `xdit batch` is at work there; wait for it, or end it"
        ) from error
    return file
