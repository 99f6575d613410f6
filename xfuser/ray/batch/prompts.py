"""Prompt files, line by line: JSONL, CSV, Parquet, or a folder of them, in the order of their names."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xfuser.ray.batch.requests import Request, Rules, check_row, is_absent

LONGEST_LINE = 8 * 2**20  # bytes
SUFFIXES = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Rejected:
    """A line, or an image, that is not made.

    Attributes:
        file: Where it was asked for.
        line: The line there, from 1; the row, where it is a table.
        reason: What is wrong, in one line.
        id: Its id, where it has one.
        attempts: How often it was tried; 0 for a line that nothing could be made of.
    """

    file: str
    line: int
    reason: str
    id: str | None = None
    attempts: int = 0


@dataclass(frozen=True)
class _Row:
    file: str
    line: int
    values: dict[str, Any] | None
    problem: str = ""


def files_of(path: Path) -> list[Path]:
    """List the prompt files that a path means.

    Raises:
        ValueError: There are none, or the file is of another kind.
    """
    if path.is_dir():
        found = sorted(each for each in path.iterdir() if each.suffix.lower() in SUFFIXES and each.is_file())
        if not found:
            raise ValueError(f"--prompts {path}: no {', '.join(SUFFIXES)} file is in that folder")
        return found
    if not path.is_file():
        raise ValueError(f"--prompts {path}: no such file or folder")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--prompts {path}: expected {', '.join(SUFFIXES)}, or a folder of them")
    return [path]


def read_requests(path: Path, rules: Rules) -> Iterator[Request | Rejected]:
    """Read and check every line, in order; one that cannot be is told with its file and line.

    Raises:
        ValueError: A file cannot be read at all.
    """
    seen: dict[str, tuple[str, int]] = {}
    position = 0
    for file in files_of(path):
        for row in _rows(file):
            checked = _checked(row, rules, position, seen)
            position += 1  # bad lines count too: mending one gives no other line another seed
            yield checked


def _checked(row: _Row, rules: Rules, position: int, seen: dict[str, tuple[str, int]]) -> Request | Rejected:
    said = None if row.values is None else row.values.get("id")
    named = str(said)[:120] if isinstance(said, (str, int)) else None
    if row.values is None:
        return Rejected(row.file, row.line, row.problem)
    try:
        request = check_row(row.values, rules, position, row.file, row.line)
    except ValueError as error:
        return Rejected(row.file, row.line, str(error), named)
    if request.id in seen:
        file, line = seen[request.id]
        where = f"line {line}" if file == row.file else f"{file}, line {line}"
        return Rejected(row.file, row.line, f"'id' {request.id!r} is that of {where} already", request.id)
    seen[request.id] = (sys.intern(row.file), row.line)
    return request


def _rows(file: Path) -> Iterator[_Row]:
    suffix = file.suffix.lower()
    reader = {".jsonl": _json_lines, ".csv": _csv_rows, ".parquet": _parquet_rows}[suffix]
    try:
        yield from reader(file)
    except OSError as error:
        raise ValueError(f"--prompts {file}: it cannot be read ({error.strerror or error})") from error


def _json_lines(file: Path) -> Iterator[_Row]:
    name, number = file.name, 0
    with file.open("rb") as lines:
        while line := lines.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                while line and not line.endswith(b"\n"):
                    line = lines.readline(LONGEST_LINE)
                yield _Row(name, number, None, f"the line is longer than {LONGEST_LINE:,} bytes")
                continue
            if line.strip():
                yield _json_row(name, number, line)


def _json_row(name: str, number: int, line: bytes) -> _Row:
    try:
        values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError:
        return _Row(name, number, None, "the line is not UTF-8")
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        return _Row(name, number, None, f"the line is not JSON ({reason})")
    if not isinstance(values, dict):
        return _Row(name, number, None, 'the line is no JSON object; expected {"id": ..., ...}')
    return _Row(name, number, values)


def _csv_rows(file: Path) -> Iterator[_Row]:
    csv.field_size_limit(LONGEST_LINE)
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, strict=True)
            begins = 2
            if not reader.fieldnames:
                raise ValueError(f"--prompts {file}: its first line has to name the columns")
            for values in reader:
                line, begins = begins, reader.line_num + 1
                if None in values:
                    yield _Row(file.name, line, None, f"the line has more than the {len(reader.fieldnames)} columns")
                    continue
                yield _Row(file.name, line, {name: text for name, text in values.items() if text not in (None, "")})
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {file}: it cannot be read as CSV from there on ({error})") from error


def _parquet_rows(file: Path) -> Iterator[_Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for block in table.iter_batches(batch_size=4096):
                for values in block.to_pylist():
                    number += 1
                    present = {column: value for column, value in values.items() if not is_absent(value)}
                    yield _Row(file.name, number, present)
    except pyarrow.ArrowException as error:
        raise ValueError(f"--prompts {file}: it cannot be read as Parquet ({str(error).splitlines()[0]})") from error
