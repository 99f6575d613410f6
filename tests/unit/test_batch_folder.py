"""The folder of `xdit batch`: rows outlive what writes them, a job goes on with what is missing only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from test_batch_work import request

from xfuser.ray.batch.batches import Plan
from xfuser.ray.batch.folder import JobFolder
from xfuser.ray.batch.manifest import COLUMNS, ManifestWriter, finished_places, merge, read_rows
from xfuser.ray.batch.prompts import Rejected
from xfuser.ray.batch.report import write_report

SETTINGS = {"batch_size": 4, "cache": {"target_speedup": 3.0}}


def row(folder: Path, place: int, **more: Any) -> dict[str, Any]:
    """Write an image and make its row."""
    path = folder / f"images/00000/a{place}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    from PIL import Image

    Image.new("L", (8, 8), place).save(path)
    plain = {name: 1 if kind == "int64" else 0.5 if kind == "float64" else "x" for name, kind in COLUMNS.items()}
    own = {"place": place, "id": f"a{place}", "path": f"images/00000/a{place}.png", "bytes": path.stat().st_size}
    return plain | own | more


@pytest.fixture
def job(tmp_path: Path) -> tuple[JobFolder, Plan]:
    folder = JobFolder(tmp_path, SETTINGS, resume=True, overwrite=False)
    plan, _ = folder.begin([request(index) for index in range(6)], 4)
    return folder, plan


def test_a_line_that_could_not_be_finished_is_no_row(job: tuple[JobFolder, Plan]) -> None:
    folder, plan = job
    ManifestWriter(folder.path, "group-0-a").append([row(folder.path, 0), row(folder.path, 1)])
    with (folder.path / "manifest" / "group-0-a.jsonl").open("a") as file:
        file.write('{"place": 2, "id": "a2", "pa')
    assert [each["place"] for each in read_rows(folder.path)] == [0, 1]
    assert list(finished_places(folder.path, plan)) == [1, 1, 0, 0, 0, 0]


def test_a_row_without_its_file_is_not_done(job: tuple[JobFolder, Plan]) -> None:
    folder, plan = job
    ManifestWriter(folder.path, "a").append([row(folder.path, place) for place in range(3)])
    (folder.path / "images/00000/a1.png").unlink()
    (folder.path / "images/00000/a2.png").write_bytes(b"cut off")
    assert list(finished_places(folder.path, plan)) == [1, 0, 0, 0, 0, 0]


def test_the_table_has_every_image_once_in_the_files_order(job: tuple[JobFolder, Plan]) -> None:
    folder, plan = job
    ManifestWriter(folder.path, "b").append([row(folder.path, 4, attempt=1), row(folder.path, 0)])
    ManifestWriter(folder.path, "c").append([row(folder.path, 2), row(folder.path, 4, attempt=2)])
    merged = merge(folder.path, plan)
    table = pyarrow.parquet.read_table(folder.path / "manifest.parquet").to_pydict()
    assert table["place"] == [0, 2, 4] and table["attempt"] == [1, 1, 2]
    assert merged["images"] == 3 and merged["missing"] == 3


def test_an_image_that_was_made_twice_has_the_row_of_the_file_that_is_there(job: tuple[JobFolder, Plan]) -> None:
    """Files' names are random, so that their order says nothing of which row came last."""
    folder, plan = job
    ManifestWriter(folder.path, "a").append([row(folder.path, 1, finished=20.0, sha256="second")])
    ManifestWriter(folder.path, "b").append([row(folder.path, 1, finished=10.0, sha256="first")])
    merge(folder.path, plan)
    assert pyarrow.parquet.read_table(folder.path / "manifest.parquet")["sha256"].to_pylist() == ["second"]


def test_the_table_is_written_block_by_block(job: tuple[JobFolder, Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two files, in turn, damaged lines among them: each block has those of its places, in order."""
    folder, plan = job
    monkeypatch.setattr("xfuser.ray.batch.manifest.BLOCK", 2)
    for name, places in (("a", (5, 0, 2)), ("b", (4, 1))):
        ManifestWriter(folder.path, name).append(
            [row(folder.path, place, evaluated_share=place / 10) for place in places]
        )
        with (folder.path / "manifest" / f"{name}.jsonl").open("a") as file:
            file.write("\0\0\0\n")
        ManifestWriter(folder.path, name).append([row(folder.path, places[0], attempt=2, finished=9.0)])
    merged = merge(folder.path, plan)
    with pyarrow.parquet.ParquetFile(folder.path / "manifest.parquet") as table:
        assert [table.read_row_group(index)["place"].to_pylist() for index in range(table.num_row_groups)] == [
            [0, 1],
            [2, 4],
            [5],
        ]
        assert table.read()["attempt"].to_pylist() == [1, 1, 1, 2, 2]
    assert merged["evaluated_share"] == pytest.approx((0.0 + 0.1 + 0.2 + 0.5 + 0.5) / 5)


def test_a_job_goes_on_with_the_same_settings_and_prompts_only(job: tuple[JobFolder, Plan], tmp_path: Path) -> None:
    folder, plan = job
    folder.close()
    with pytest.raises(ValueError, match="--cache was .* and is"):
        JobFolder(tmp_path, SETTINGS | {"cache": {}}, resume=True, overwrite=False)
    with pytest.raises(ValueError, match="holds a job"):
        JobFolder(tmp_path, SETTINGS, resume=False, overwrite=False)
    again = JobFolder(tmp_path, SETTINGS, resume=True, overwrite=False)
    with pytest.raises(ValueError, match="not those"):
        again.begin([request(index) for index in range(7)], 4)
    assert again.begin([request(index) for index in range(6)], 4)[0].digest == plan.digest
    assert again.job == folder.job


def test_two_commands_do_not_share_a_folder(job: tuple[JobFolder, Plan], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another `xdit batch` is at work"):
        JobFolder(tmp_path, SETTINGS, resume=True, overwrite=False)


def test_overwriting_begins_anew_and_leaves_other_files(job: tuple[JobFolder, Plan], tmp_path: Path) -> None:
    folder, _ = job
    ManifestWriter(tmp_path, "a").append([row(tmp_path, 0)])
    (tmp_path / "notes.txt").write_text("mine")
    folder.close()
    anew = JobFolder(tmp_path, {}, resume=True, overwrite=True)
    assert anew.job != folder.job and not (tmp_path / "images").exists() and (tmp_path / "notes.txt").exists()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="no job.json"):
        JobFolder(tmp_path, SETTINGS, resume=True, overwrite=False)


def test_what_was_learned_is_found_again(job: tuple[JobFolder, Plan]) -> None:
    folder, plan = job
    assert folder.calibrations(plan) == {}
    folder.keep_calibration(plan.kinds[0], {"ab.safetensors": b"learned"})
    assert folder.calibrations(plan) == {0: {"ab.safetensors": b"learned"}}


def test_what_killed_commands_have_begun_is_removed(job: tuple[JobFolder, Plan]) -> None:
    folder, plan = job
    folder.keep_calibration(plan.kinds[0], {"ab.safetensors": b"learned"})
    row(folder.path, 0)
    before = {path for path in folder.path.rglob("*") if path.is_file()}
    for where in ("", "calibration/", "images/00000/"):
        (folder.path / f"{where}.x.1.partial").write_bytes(b"half")
    folder.clean()
    assert {path for path in folder.path.rglob("*") if path.is_file()} == before


def test_the_report_shows_groups_images_and_what_was_rejected(job: tuple[JobFolder, Plan]) -> None:
    folder, plan = job
    rows = [row(folder.path, place, finished=100.0 + place, group=place % 2) for place in range(6)]
    ManifestWriter(folder.path, "a").append(rows)
    run = {"images": 6, "seconds": 1.0, "retries": 0}
    summary = {**merge(folder.path, plan), "requests": 6, "rejected": 1, "settings": SETTINGS, "run": run}
    write_report(folder.path, summary, [Rejected("p.jsonl", 9, "'id' <b> is missing")])
    text = (folder.path / "report.html").read_text()
    assert "<svg" in text and "data:image/jpeg;base64," in text
    assert "&lt;b&gt;" in text and "<b>" not in text  # what a prompt file says is text
    assert text.count("<tr><td>0</td>") == 1 and text.count("<tr><td>1</td>") == 1
    assert json.dumps(SETTINGS, indent=2).splitlines()[1].strip().split(":")[0].replace('"', "&#34;") in text
