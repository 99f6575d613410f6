"""`xdit batch` on a user's own Ray cluster: nothing lost, nothing twice, and the same images whoever made them."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import environment, run
from PIL import Image

pytest.importorskip("ray")
import pyarrow.parquet  # noqa: E402 (comes with Ray)

HELPERS = Path(__file__).with_name("ray_helpers")
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
COUNT, STEPS, SIZE = 12, 6, 4
BAD = ["not json", {"class_label": 1}, {"id": "a1", "class_label": 1}, {"id": "../x", "class_label": 1}]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, Any]]:
    """Two cores of a cluster that outlives the commands."""
    process = subprocess.Popen(
        [sys.executable, HELPERS / "own_cluster.py", "2"],
        env=environment(**SETTINGS),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    yield json.loads(process.stdout.readline())
    process.communicate("", timeout=120)


@pytest.fixture(scope="module")
def jobs(cluster: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All commands that the tests look at, run one after another."""
    folder = tmp_path_factory.mktemp("batch")
    good = [{"id": f"a{index}", "class_label": index % 10, "seed": 100 + index} for index in range(COUNT)]
    write(folder / "good.jsonl", good)
    write(folder / "bad.jsonl", [*good[:6], *BAD, *good[6:]])
    common = ["--num_inference_steps", STEPS, "--batch_size", SIZE, "--threads", 1]
    common += ["--ray_address", cluster["address"]]
    goal = [*common, "--adacorr_budget", 0.5]

    def batch(name: str, *more: Any, prompts: str = "good", **disturbed: Any) -> dict[str, Any]:
        arguments = ["batch", "--prompts", folder / f"{prompts}.jsonl", "--output_dir", folder / name, *more]
        return {"arguments": [str(each) for each in arguments], "folder": str(folder / name)} | disturbed

    commands = [
        batch("two", *goal, "--groups", 2, kill=cluster["raylets"], metrics=cluster["metrics"]),
        batch("one", *goal, "--groups", "1,2", "--ulysses_degree", 2, prompts="bad"),
    ]
    listed = folder / "commands.json"
    listed.write_text(json.dumps(commands))
    done = run(HELPERS / "run_commands.py", listed, limit=900, **SETTINGS)
    assert done.code == 0, done.err[-3000:]
    # Somebody loses a file, gives the same command again, and asks it to end when the last batch is in flight.
    shutil.copytree(folder / "two", folder / "again")
    next((folder / "again").glob("images/*/a3.png")).unlink()
    listed = folder / "later.json"
    listed.write_text(json.dumps([batch("again", *goal, "--groups", 2, terminate=cluster["raylets"])]))
    done = run(HELPERS / "run_commands.py", listed, limit=900, **SETTINGS)
    assert done.code == 0, done.err[-3000:]
    return folder


def write(path: Path, lines: list[Any]) -> None:
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines))


def ended(jobs: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((jobs / f"{name}.ended.json").read_text())


def table(folder: Path) -> dict[str, list[Any]]:
    return pyarrow.parquet.read_table(folder / "manifest.parquet").to_pydict()


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / path), dtype=int) for path in table(folder)["path"]])


@pytest.mark.parametrize("name", ["two", "one", "again"])
def test_every_image_is_there_once_and_as_the_manifest_says(jobs: Path, name: str) -> None:
    rows = table(jobs / name)
    assert rows["id"] == [f"a{index}" for index in range(COUNT)]
    files = sorted(str(path.relative_to(jobs / name)) for path in (jobs / name / "images").rglob("*") if path.is_file())
    assert files == sorted(rows["path"])
    for path, digest in zip(rows["path"], rows["sha256"], strict=True):
        assert hashlib.sha256((jobs / name / path).read_bytes()).hexdigest() == digest


def test_a_killed_process_costs_a_retry_and_no_image(jobs: Path) -> None:
    first = ended(jobs, "commands")[0]
    assert first["code"] == 0 and first["killed"], first["err"]
    run = json.loads((jobs / "two" / "summary.json").read_text())["run"]
    assert sum(each["rebuilt"] for each in run["groups"]) == 1


def test_one_group_of_two_ranks_makes_what_two_of_one_make(jobs: Path) -> None:
    """A killed process between them: with files, the difference is that of rounding."""
    assert np.abs(pixels(jobs / "one") - pixels(jobs / "two")).max() <= 1


def test_all_use_the_one_calibration(jobs: Path) -> None:
    for name in ("two", "one", "again"):
        rows = table(jobs / name)
        assert len(set(rows["plan_digest"])) == 1 and rows["plan_digest"][0]
        assert set(rows["evaluated_share"]) == {0.5}
        assert len(list((jobs / name / "calibration").glob("*.safetensors"))) == 1


def test_a_lost_file_is_made_again_and_is_the_same(jobs: Path) -> None:
    before, after = table(jobs / "two"), table(jobs / "again")
    assert after["sha256"] == before["sha256"]
    run = json.loads((jobs / "again" / "summary.json").read_text())["run"]
    assert run["images"] == SIZE and run["learn_seconds"] == 0


def test_who_asks_it_to_end_when_all_is_in_flight_gets_all(jobs: Path) -> None:
    (command,) = ended(jobs, "later")
    assert "SIGTERM: what is in flight has 30 seconds" in command["err"]
    assert command["code"] == 0 and f"{COUNT} images in" in command["out"], command["err"]


def test_bad_lines_are_told_and_the_others_made(jobs: Path) -> None:
    second = ended(jobs, "commands")[1]
    assert second["code"] == 3
    rejected = [json.loads(line) for line in (jobs / "one" / "rejected.jsonl").read_text().splitlines()]
    assert [each["line"] for each in rejected] == [7, 8, 9, 10] and {each["file"] for each in rejected} == {"bad.jsonl"}
    assert "4 rejected" in second["err"] and "bad.jsonl, line 7" in second["err"]


def test_rays_endpoint_tells_of_the_job_while_it_runs(jobs: Path) -> None:
    """Under the names that the documentation has, with what Prometheus' own naming adds."""
    pytest.importorskip("prometheus_client")  # of ray[default], which xfuser[ray] has: without it there is no endpoint
    seen = ended(jobs, "commands")[0]["seen"]
    by_group = [f"ray_xfuser_batch_{name} {{}}" for name in ("images_total", "evaluated_share", "generate_seconds_sum")]
    images, share, seconds = ({seen[each.format(n)] for n in "01" if each.format(n) in seen} for each in by_group)
    assert images and images <= {4.0, 8.0, 12.0}
    assert share == {0.5}
    assert seconds and all(0 < each < 300 for each in seconds)
    assert seen["ray_xfuser_batch_groups_alive"] in (0, 1, 2)
    assert seen["ray_xfuser_batch_images_left"] in (0, 4, 8, 12)
    assert any(name.startswith("ray_xfuser_batch_write_seconds_bucket") for name in seen)


def test_the_report_is_there(jobs: Path) -> None:
    assert "<svg" in (jobs / "two" / "report.html").read_text()


def test_the_cluster_is_left_as_it_was(jobs: Path, cluster: dict[str, Any]) -> None:
    code = (
        "import ray, sys, json; ray.init(address=sys.argv[1], log_to_driver=False)\n"
        "from ray.util import placement_group_table\n"
        "groups = [each['state'] for each in placement_group_table().values()]\n"
        "print(json.dumps([ray.available_resources().get('CPU'), groups]))"
    )
    done = run("-c", code, cluster["address"], **SETTINGS)
    free, groups = json.loads(done.out.splitlines()[-1])
    assert free == 2 and set(groups) <= {"REMOVED"}
