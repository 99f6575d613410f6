"""Prompt files of `xdit batch`: good lines become requests, bad ones are told with file, line and reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from xfuser.ray.batch.prompts import Rejected, files_of, read_requests
from xfuser.ray.batch.requests import LARGEST_SEED, Request, Rules, check_row


@pytest.fixture(scope="module")
def labelled() -> Rules:
    return Rules.of("tiny-dit", None, 50, seed=100)


@pytest.fixture(scope="module")
def prompted() -> Rules:
    return Rules.of("pixart", None, 20, seed=0)


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., Path]:
    def write(*found: Any) -> Path:
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in found))
        return path

    return write


def refusal(row: dict[str, Any], rules: Rules) -> str:
    with pytest.raises(ValueError) as caught:
        check_row(row, rules, 0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_line_says_what_it_wants_and_the_job_the_rest(labelled: Rules) -> None:
    made = check_row({"id": "a", "class_label": "bag", "steps": 20, "guidance_scale": 2}, labelled, 3)
    assert made.id == "a" and made.condition == labelled.labels["bag"] and made.seed == 103
    assert dict(made.sampling) == {"num_inference_steps": 20, "guidance_scale": 2.0}
    assert check_row({"id": 7, "label": 3, "seed": 5}, labelled, 0).seed == 5


def test_ten_kinds_of_bad_lines_are_told_apart(prompted: Rules, lines: Callable[..., Path]) -> None:
    good = {"id": "good", "prompt": "a dog", "height": 64, "width": 64}
    bad = {
        "not json": "JSON",
        json.dumps(good | {"id": None}): "'id' is missing",
        json.dumps(good): "is that of line 1 already",
        json.dumps(good | {"id": "b", "prompt": 7}): "expected a text",
        json.dumps(good | {"id": "c", "height": 65}): "'height' 65 is not a multiple of",
        json.dumps(good | {"id": "d", "steps": -5}): "expected a whole number",
        json.dumps(good | {"id": "../x"}): "cannot name a file",
        json.dumps(good | {"id": "e", "prompt": "  "}): "'prompt' is empty",
        json.dumps(good | {"id": "f", "prompt": "x" * 2**20}): "1,048,576 characters",
        json.dumps(good | {"id": "g", "hieght": 64}): "did you mean height",
    }
    found = list(read_requests(lines(good, *bad, good | {"id": "last"}), prompted))
    assert [isinstance(each, Request) for each in found] == [True] + [False] * len(bad) + [True]
    for number, (each, reason) in enumerate(zip(found[1:-1], bad.values(), strict=True), start=2):
        assert isinstance(each, Rejected)
        assert (each.file, each.line) == ("prompts.jsonl", number)
        assert reason in each.reason and "\n" not in each.reason


@pytest.mark.parametrize(
    "identity", ["a/b", "..", "../x", ".hidden", "-rf", "a b", "a\nb", "ä", "x" * 121, "", "C:\\x"]
)
def test_an_id_is_the_name_of_a_file_and_of_nothing_else(identity: str, labelled: Rules) -> None:
    assert "'id'" in refusal({"id": identity, "class_label": 1}, labelled)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"class_label": "bagg"}, "did you mean bag"),
        ({"class_label": 10}, "expected 0 to 9"),
        ({"class_label": True}, "is no class"),
        ({"class_label": None}, "'class_label' is missing"),
        ({"prompt": "a dog"}, "'prompt'"),
        ({"seed": -1}, "'seed'"),
        ({"seed": LARGEST_SEED + 1}, "'seed'"),
        ({"seed": 1.5}, "'seed'"),
        ({"steps": True}, "'num_inference_steps'"),
        ({"guidance_scale": "much"}, "expected a number"),
        ({"guidance_scale": float("nan")}, "expected a number"),
        ({"height": 64}, "draws 32 x 32 only"),
        ({"generator": 1}, "not known"),
    ],
)
def test_what_a_line_cannot_ask_for(more: dict[str, Any], said: str, labelled: Rules) -> None:
    assert said.casefold() in refusal({"id": "a", "class_label": 1} | more, labelled).casefold()


def test_guidance_that_nothing_reads_is_refused(prompted: Rules) -> None:
    row = {"id": "a", "prompt": "a dog", "negative_prompt": "blurred"}
    assert check_row(row, prompted, 0).negative_prompt == "blurred"
    assert "nothing reads it" in refusal(row | {"guidance_scale": 1}, prompted)
    assert "use 'guidance_scale'" in refusal({"id": "a", "prompt": "a dog", "true_cfg_scale": 2}, prompted)


def test_all_kinds_of_files_say_the_same(tmp_path: Path, labelled: Rules) -> None:
    rows = [{"id": f"a{index}", "class_label": index, "seed": 9 + index, "steps": 20} for index in range(4)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.csv").write_text("id,class_label,seed,steps\n" + "".join(f"a{i},{i},{9 + i},20\n" for i in range(4)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    wanted = [check_row(row, labelled, 0).call() for row in rows]
    for path in files_of(tmp_path):
        found = list(read_requests(path, labelled))
        assert [each.call() for each in found if isinstance(each, Request)] == wanted, path
    together = list(read_requests(tmp_path, labelled))
    assert [isinstance(each, Request) for each in together] == [True] * 4 + [False] * 8  # in the order of their names
    assert isinstance(together[4], Rejected) and "a.jsonl, line 1" in together[4].reason


def test_tables_with_gaps_say_nothing_there(tmp_path: Path, labelled: Rules) -> None:
    table = pyarrow.table({"id": ["a", "b"], "class_label": [1, 2], "steps": pyarrow.array([20.0, None])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    first, second = read_requests(tmp_path / "a.parquet", labelled)
    assert isinstance(first, Request) and first.sampling["num_inference_steps"] == 20
    assert isinstance(second, Request) and second.sampling["num_inference_steps"] == 50


def test_a_bad_line_gives_no_other_line_another_seed(labelled: Rules, lines: Callable[..., Path]) -> None:
    good = [{"id": f"a{index}", "class_label": 1} for index in range(3)]
    plain = [each.seed for each in read_requests(lines(*good), labelled) if isinstance(each, Request)]
    mended = [
        each.seed for each in read_requests(lines(good[0], "bad", good[2]), labelled) if isinstance(each, Request)
    ]
    assert mended == [plain[0], plain[2]]


@pytest.mark.parametrize(
    ("name", "said"), [("none.jsonl", "no such file"), ("a.txt", "expected .jsonl"), ("", "no .jsonl")]
)
def test_what_is_no_prompt_file_is_refused_in_a_line(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a dog")
    with pytest.raises(ValueError, match=said):
        files_of(tmp_path / name)


def test_bytes_that_are_no_table_are_refused_in_a_line(tmp_path: Path, labelled: Rules) -> None:
    for name in ("a.parquet", "a.csv"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00 no table")
        with pytest.raises(ValueError, match="cannot be read") as caught:
            list(read_requests(tmp_path / name, labelled))
        assert "\n" not in str(caught.value)
