"""The report on a small made-up benchmark: what it says, what it must not hold, and what it leaves behind."""

import base64
import copy
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from evaluation.report import comparison_sheet, decision_map, quality_speed_curve, results_table, write_report
from evaluation.report.columns import RESULT_COLUMNS, psnr_verdict

HOSTILE = "<b>x"
VOID = {"meta", "img", "br", "link", "input"}


def interval(value: float, width: float) -> dict[str, float]:
    return {"value": value, "low": value - width, "high": value + width}


def result(method: str, base: str | None, speedup: float, psnr: float | None) -> dict[str, Any]:
    return {
        "method": method,
        "base": base,
        "settings": {"threshold": 0.1},
        "fid": interval(12.5 + speedup, 0.7),
        "fid_vs_uncached": None if psnr is None else interval(60.0 / psnr, 0.3),
        "kid": interval(0.0123, 0.004),
        "psnr": None if psnr is None else interval(psnr, 0.4),
        "psnr_worst_tenth": None if psnr is None else psnr - 9,
        "ssim": None if psnr is None else interval(0.9 + psnr / 1000, 0.01),
        "class_accuracy": interval(0.93, 0.02),
        "images_per_second": 4.0 * speedup,
        "seconds": 100.0 / speedup,
        "speedup": speedup,
        "hit_rate": 1 - 1 / speedup,
        "flops_saved": 0.9 - 0.9 / speedup,
        "images": [],
    }


def make_document() -> dict[str, Any]:
    results = [result("None", None, 1.0, None)]
    comparisons = []
    for place, base in enumerate(("Tea", "FirstBlock", "Fora")):
        results.append(result(base, base, 2.1 + 0.3 * place, 24.0 + place))
        results.append(result(f"{base}[taylor-1]", base, 2.05 + 0.3 * place, 25.5 + place))
        results.append(result(f"{base}+AdaCorrection", base, 1.8 + 0.3 * place, 29.0 + place))
        comparisons.append(
            {
                "method": f"{base}+AdaCorrection",
                "against": base,
                "psnr_difference": interval(5.0, 0.3),
                "fid_vs_uncached_ratio": interval(0.6, 0.1) if place else None,
                "images_per_second_ratio": 0.87,
            }
        )
    return {
        "schema": 1,
        "environment": {"torch": "2.13", "cores": 2},
        "model": {"name": "tiny-dit", "blocks": 12},
        "settings": {"steps": 20, "cache": {"threshold": 0.1}},
        "results": results,
        "comparisons": comparisons,
    }


def make_trace(seed: int, steps: int = 8, blocks: int = 4) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    evaluated = random.random((steps, blocks)) < 0.35
    evaluated[0] = True
    true = np.exp(random.normal(-4, 1, (steps, blocks)) + np.linspace(0, 1.5, blocks))
    predicted = true * np.exp(random.normal(0, 0.3, (steps, blocks)))
    weights = 1 / (1 + 20 * predicted)

    def listed(field: np.ndarray, known: np.ndarray) -> list[list[float | None]]:
        return [
            [float(x) if k else None for x, k in zip(*pair, strict=True)] for pair in zip(field, known, strict=True)
        ]

    started = np.arange(steps)[:, None] + np.zeros(blocks) > 0
    return {
        "evaluated": evaluated.astype(int).tolist(),
        "predicted": listed(predicted, started),
        "true": listed(true, evaluated & started),
        "weights": listed(weights, started & ~evaluated),
    }


def make_images(names: list[str], count: int = 5, side: int = 32) -> dict[str, list[np.ndarray]]:
    random = np.random.default_rng(0)
    return {name: [random.random((side, side, 1 + 2 * (i % 2))) for i in range(count)] for name in names}


class Checker(HTMLParser):
    """Checks that tags close in order, and gathers the text, the tags and the sources of pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text: list[str] = []
        self.sources: list[str] = []
        self.links: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "img":
            self.sources.append(dict(attrs)["src"] or "")
        if tag == "a":
            self.links.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Checker]:
    document = make_document()
    document["results"].append(result(HOSTILE, None, 3.0, 20.0))
    path = tmp_path_factory.mktemp("report") / "made" / "report.html"
    images = make_images([row["method"] for row in document["results"]])
    write_report(path, document, images, {"Tea+AdaCorrection": make_trace(0), HOSTILE: make_trace(1)})
    page = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    checker.close()
    return path, page, checker


def test_html_is_well_formed_and_self_contained(report: tuple[Path, str, Checker]) -> None:
    _, page, checker = report
    assert checker.open == []
    assert not re.search(r"https?://|<script|@import|url\(", page, re.IGNORECASE)
    assert all(source.startswith("data:image/png;base64,") for source in checker.sources)


def test_html_names_every_method_and_column(report: tuple[Path, str, Checker]) -> None:
    _, _, checker = report
    for row in make_document()["results"]:
        assert row["method"] in checker.text
    for column in RESULT_COLUMNS:
        assert checker.text.count(column.title) >= 2, "a heading and an explanation"
    assert "closer to uncached" in checker.text


def test_html_shows_model_settings_and_environment(report: tuple[Path, str, Checker]) -> None:
    text = report[2].text
    assert {"tiny-dit", "steps", "20", '{"threshold": 0.1}', "torch", "2.13"} <= set(text)


def test_html_escapes_a_hostile_method(report: tuple[Path, str, Checker]) -> None:
    _, page, checker = report
    assert HOSTILE not in page
    assert "b" not in checker.tags
    assert checker.text.count(HOSTILE) == 2, "its row and its decision map"


def test_html_pictures_decode(report: tuple[Path, str, Checker]) -> None:
    sources = report[2].sources
    assert len(sources) == 4, "the sheet, the curve and two maps"
    for source in sources:
        with Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert min(picture.size) > 100


def test_html_shows_missing_scores_as_dashes_and_intervals(report: tuple[Path, str, Checker]) -> None:
    _, page, checker = report
    row = page.split(">None<", 1)[1].split("</tr>", 1)[0]
    assert row.count("<td>–</td>") == 4
    assert "23.60 to 24.40" in checker.text
    assert "None" not in re.sub(r"<[^>]*>", " ", row)


def read(path: Path) -> Checker:
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    checker.close()
    return checker


def test_settings_stand_once_and_cells_hold_what_differs(tmp_path: Path) -> None:
    document = make_document()
    for row in document["results"]:
        corrected = row["method"].endswith("+AdaCorrection")
        row["settings"] = {}
        if row["base"] is not None:
            own = {"rel_l1_thresh": len(row["base"]), "approximation": "taylor-1" if "1" in row["method"] else "none"}
            row["settings"] = {"use_cache": row["base"], "sync": "step", "depth": 3.0} | own
        if corrected:
            row["settings"]["adacorr_budget"] = 0.5
    document["results"].append(result("None[steps of Tea]", "Tea", 2.0, 22.0) | {"settings": {"steps": 10}})
    on_trajectory = {"level": "trajectory", "calibration": "x.safetensors"}
    document["results"].append(result("Tea+AdaCorrection[t]", "Tea", 2.0, 42.0) | {"settings": on_trajectory})
    write_report(tmp_path / "report.html", document, {}, {})
    text = read(tmp_path / "report.html").text
    assert text.count("sync") == text.count("depth") == 1 and text[text.index("depth") + 1] == "3"
    cells = {name: text[text.index(name, text.index("Results")) + 1] for name in ("Tea", "Tea[taylor-1]")}
    assert cells == {"Tea": "rel_l1_thresh=3, approximation=none", "Tea[taylor-1]": "approximation=taylor-1"}
    assert text[text.index("Tea+AdaCorrection") + 1] == "adacorr_budget=0.5", "and nothing that its base has too"
    assert "level=trajectory, calibration=x.safetensors" in text and "steps=10" in text


@pytest.mark.parametrize(("low", "shown"), [(0.01, True), (-0.5, False), (None, False)])
def test_kid_is_shown_where_it_can_be_told_from_noise(low: float | None, shown: bool) -> None:
    (column,) = (column for column in RESULT_COLUMNS if column.key == "kid")
    assert column.cell({"kid": {"value": 0.25, "low": low, "high": 0.9}}).value == ("250.0" if shown else "–")
    assert column.cell({"kid": {"value": -2.423, "low": -4.0, "high": -0.8}}).value == "–"
    assert column.cell({"kid": None}).value == "–"


def test_the_sheet_links_to_the_files(tmp_path: Path) -> None:
    """A link lies over its tile: cut out of the picture at that place, the tile is the image."""
    document, side = make_document(), 80
    names = [row["method"] for row in document["results"][:3]]
    document["results"][0]["images"] = [f"images/None/{index}.png" for index in range(5)]
    document["results"][1]["images"] = ["images/a b#/0.png", "images/javascript:x"]
    images = make_images(names, side=side)
    write_report(tmp_path / "report.html", document, images, {})
    checker = read(tmp_path / "report.html")
    assert [link["href"] for link in checker.links[5:]] == ["images/a%20b%23/0.png", "images/javascript%3Ax"]
    assert [link["title"] for link in checker.links[:2]] == ["None, image 0", "None, image 1"]
    with Image.open(io.BytesIO(base64.b64decode(checker.sources[0].split(",", 1)[1]))) as picture:
        sheet = np.asarray(picture)
    numbers = [float(number) / 100 for number in re.findall(r": ([\d.]+)%", checker.links[1]["style"] or "")]
    left, top, width, height = np.rint(np.array(numbers) * [*sheet.shape[1::-1], *sheet.shape[1::-1]]).astype(int)
    assert (width, height) == (side, side)
    cut = sheet[top : top + height, left : left + width] / 255
    assert np.abs(cut - images["None"][1]).max() < 1 / 255


def test_large_images_are_reduced_on_the_sheet() -> None:
    assert comparison_sheet({"m": [np.zeros((600, 1200, 3))]}).height < 128 + 40
    assert comparison_sheet({"m": [np.zeros((200, 250, 3))]}).width > 250


def test_rows_that_are_no_cache_or_failed_say_so(tmp_path: Path) -> None:
    document = make_document()
    document["results"][1]["inactive"] = "Tea: it never hit"
    document["failures"] = {"Fb": "Fb: out of memory"}
    write_report(tmp_path / "report.html", document, {}, {})
    text = read(tmp_path / "report.html").text
    assert "inactive" in text[text.index("Tea") : text.index("Tea[taylor-1]")] and text.count("inactive") == 1
    assert "Inactive: Tea: it never hit" in text and ": Fb: out of memory" in text
    console = Console(width=140, file=io.StringIO(), color_system=None)
    console.print(results_table(document))
    printed = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    (line,) = [line for line in printed if line.split()[:1] == ["Tea"]]
    assert "24.00" not in line and "–" in line, "its images are the uncached ones"
    assert "inactive" in console.file.getvalue()  # type: ignore[attr-defined]
    assert quality_speed_curve(document["results"]) != quality_speed_curve(make_document()["results"])


def test_nothing_is_left_under_a_temporary_name(report: tuple[Path, str, Checker]) -> None:
    assert [entry.name for entry in report[0].parent.iterdir()] == ["report.html"]


def test_failed_write_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def refuse(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("evaluation.report.html.os.replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, make_document(), {}, {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"


def test_report_of_another_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="schema 1"):
        write_report(tmp_path / "x.html", make_document() | {"schema": 2}, {}, {})
    assert not list(tmp_path.iterdir())


def test_sheet_grows_with_rows_columns_and_scale() -> None:
    one, two = comparison_sheet(make_images(["b"])), comparison_sheet(make_images(["a", "b"]))
    assert two.height - one.height >= 64
    assert two.width == one.width
    assert comparison_sheet(make_images(["b"]), columns=2).width < one.width
    assert comparison_sheet(make_images(["b"]), scale=1).height < one.height


def test_sheet_does_not_cut_long_names() -> None:
    short, long = (comparison_sheet(make_images([name], count=1)) for name in ("a", "W" * 60))
    assert long.width - short.width > 400
    ink = np.asarray(long)[:, : long.width - 64 - 4 - 10].min(axis=(0, 2)) < 128
    assert ink.any() and not ink[-5:].any(), "there is paper between the last letter and the image"


def test_sheet_enlarges_by_whole_pixels_and_clips() -> None:
    image = np.zeros((2, 2, 1))
    image[0, 1], image[1, 0] = 1.5, np.nan
    sheet = np.asarray(comparison_sheet({"m": [image]}, scale=8))
    tile = sheet[10:26, -30:-14]
    assert (tile[:8, 8:] == 255).all()
    assert (tile[8:, :] == 0).all()


def test_sheet_leaves_large_images_alone() -> None:
    assert comparison_sheet(make_images(["a"], side=64), scale=3).height < 100


@pytest.mark.parametrize("shape", [(8, 8), (3, 8, 8), (8, 0, 3)])
def test_sheet_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="an image must be"):
        comparison_sheet({"m": [np.zeros(shape)]})


def test_sheet_refuses_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        comparison_sheet({})
    with pytest.raises(ValueError, match="columns"):
        comparison_sheet(make_images(["a"]), columns=0)


def test_decision_map_depends_on_the_trace_alone() -> None:
    first = decision_map(make_trace(0))
    assert first == decision_map(make_trace(0))
    assert first != decision_map(make_trace(1))
    for field in ("evaluated", "predicted", "true", "weights"):
        trace = copy.deepcopy(make_trace(0))
        trace[field][3] = make_trace(1)[field][7]
        assert decision_map(trace) != first, f"{field} is not drawn"


@pytest.mark.parametrize("fill", [None, 0.0, 0.25])
def test_decision_map_of_constant_errors(fill: float | None) -> None:
    field = [[fill] * 3] * 2
    png = decision_map({"evaluated": [[1, 0, 1]] * 2, "predicted": field, "true": field, "weights": field})
    assert png.startswith(b"\x89PNG")


def test_decision_map_refuses_ragged_traces() -> None:
    trace = make_trace(0)
    with pytest.raises(ValueError, match="differ in shape"):
        decision_map(trace | {"true": trace["true"][:-1]})
    with pytest.raises(ValueError, match="weights"):
        decision_map(trace | {"weights": []})


def test_curve_takes_missing_infinite_and_odd_scores() -> None:
    rows = make_document()["results"]
    rows[1]["psnr"] = {"value": float("inf"), "low": None, "high": None}
    rows[2]["method"] = "costs $5 and $6"
    rows[3]["fid_vs_uncached"] = interval(0.0, 0.1)
    with Image.open(io.BytesIO(quality_speed_curve(rows))) as picture:
        assert picture.format == "PNG"
    assert quality_speed_curve([]).startswith(b"\x89PNG")


def test_terminal_table_is_whole_at_140_columns() -> None:
    console = Console(width=140, file=io.StringIO(), color_system=None)
    document = make_document()
    document["results"][1]["fid"] = interval(312.4, 25.0)
    console.print(results_table(document))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= 140
    assert "…" not in printed
    for row in document["results"]:
        assert row["method"] in printed
    for text in ("287.4..337.4", "15.0", "23.60..24.40", "0.9140..0.9340", "91.0..95.0", "–", "uncached"):
        assert text in printed


def test_verdict_needs_an_interval_that_leaves_zero_out() -> None:
    assert psnr_verdict({"psnr_difference": interval(-2.0, 0.5)}) == "further from uncached"
    assert psnr_verdict({"psnr_difference": interval(0.2, 0.5)}) == "no clear difference"
    assert psnr_verdict({"psnr_difference": None}) == "–"
