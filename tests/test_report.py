"""The report: its numbers are those of the files, its pictures are in it, and it loads nothing."""

from __future__ import annotations

import base64
import json
import math
import random
import re
import shutil
import struct
import subprocess
import sys
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from agsel import train
from agsel.errors import UserError
from agsel.monitor import METRICS, SELECTION, STARTS, SelectionHistory, StepLines
from agsel.report import page as page_maker
from agsel.report import write_report
from agsel.report.charts import POINTS, SUBJECTS, Line, Point, Trade, draw_lines, draw_trade
from agsel.report.embedding import Embedded, Picture, Source, embed
from agsel.report.final_numbers import FinalNumber
from agsel.report.run_files import labels_of
from agsel.training import card
from agsel.training.record import Record
from tests.browser import CHROMIUM, tab
from tools import report

EMPTY = ("meta", "link", "img", "source", "br")
"""Elements that are never closed."""
DOT = Source("", "data:image/png;base64,", 1, 1)


class Page(HTMLParser):
    """What a page says.

    Attributes:
        tables: by their names, the rows with the words of their cells.
        images: attributes of every picture and source of one.
        texts: words outside of tables.
        addresses: that something in the page would load or lead to.
        unclosed: names of elements that were not closed in order.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.images: list[dict[str, str]] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.unclosed: list[str] = []
        self._open: list[str] = []
        self._table: list[list[str]] | None = None
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.addresses += [found[name] for name in ("src", "srcset", "href", "action", "data") if name in found]
        if tag in ("img", "source"):
            self.images.append(found)
        elif tag == "table":
            self._table = self.tables.setdefault(found["id"], [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("th", "td") and self._table is not None:
            self._table[-1].append("")
        if tag not in EMPTY:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._open.pop() != tag:
            self.unclosed.append(tag)
        if tag == "table":
            self._table = None

    def handle_data(self, data: str) -> None:
        words = " ".join(data.split())
        if self._table and self._table[-1]:
            self._table[-1][-1] = f"{self._table[-1][-1]} {words}".strip()
        elif words and self._open and self._open[-1] != "style":
            self.texts.append(words)

    @property
    def says(self) -> str:
        return " ".join(self.texts)

    def facts(self, name: str) -> dict[str, str]:
        return {row[0]: row[1] for row in self.tables[name]}

    def tiles(self) -> dict[str, str]:
        """Final numbers of a page of one run."""
        start = self.texts.index("Steps")
        return dict(zip(self.texts[start::2], self.texts[start + 1 :: 2], strict=False))


def make_run(folder: Path, steps: int = 40, layers: int = 6, *, slow: float = 1.0, **settings: object) -> Path:
    """A finished run by the writers of real ones, without its checkpoints."""
    folder.mkdir(parents=True)
    draw, blocks = random.Random(steps), tuple(f"layers.{index}" for index in range(layers))
    record = Record(folder, None)
    history = record.begin(blocks, 0)
    record.end()
    metrics, selection = StepLines(folder / METRICS, 0), StepLines(folder / SELECTION, 0)
    selection.append(history.heading)
    for step in range(1, steps + 1):
        history = SelectionHistory(blocks)
        chosen = draw.sample(blocks[:-1], layers // 2)
        history.add(step, "exploit", chosen, {name: math.exp(draw.gauss(0, 1)) for name in chosen})
        selection.append(history.last_line)
        metrics.append({"step": step, "seconds": slow * step} | numbers_of_step(step / steps, slow, draw))
    metrics.append(
        {"step": steps, "seconds": slow * steps, "eval_loss": 1.5 * slow, "eval_gsm8k_accuracy": 0.25 * slow}
    )
    metrics.close()
    selection.close()
    values = {"method": "adagradselect", "model_name_or_path": "models/tiny", "dataset_name": "rows.jsonl", "seed": 3}
    (folder / "config.yaml").write_text(yaml.safe_dump(values | settings))
    (folder / "environment.json").write_text(json.dumps({"ranks": 2, "packages": {"torch": "2.13.0"}}))
    result = {"steps": steps, "loss": slow, "eval_loss": 1.5 * slow, "train_seconds": 2.0, "step_seconds": slow}
    (folder / "result.json").write_text(json.dumps(result | {"peak_bytes": int(18e9 * slow)}))
    return folder


def numbers_of_step(done: float, slow: float, draw: random.Random) -> dict[str, float]:
    return {
        "loss": slow * (4 - 3 * done) + draw.gauss(0, 0.05),
        "learning_rate": 1e-3 * (1 - done),
        "speed/ms_per_step": 1000 * slow,
        "speed/data_ms": 3.0,
        "speed/tokens_per_second": 9000 / slow,
        "memory/host_gb": 12.0,
        "memory/peak_gb": 18.0 * slow,
    }


def page_of(output: Path, *folders: Path) -> Page:
    write_report(folders, output)
    return Page(output)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of words: pictures take most of the time."""
    monkeypatch.setattr(
        page_maker, "embed", lambda picture, _: Embedded(picture.title, picture.alternative, False, [DOT])
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "mine")


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return page_of(run / "report.html", run)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs of which two have folders of the same name."""
    folder = tmp_path_factory.mktemp("several")
    return [
        make_run(folder / "a" / "out", method="lisa"),
        make_run(folder / "b" / "out", slow=1.1, method="grass"),
        make_run(folder / "third", slow=0.5, method="grass", learning_rate=0.5),
    ]


@pytest.fixture(scope="module")
def comparison(several: list[Path]) -> Page:
    return page_of(several[0].parent / "several.html", *several)


def test_a_page_has_the_numbers_of_the_files(page: Page) -> None:
    assert page.unclosed == []
    assert "adagradselect on models/tiny" in page.says
    assert "finished, 40 steps" in page.says
    expected = {
        "Steps": "40",
        "Loss, last": "1",
        "Evaluation loss, last": "1.5",
        "Accuracy on gsm8k, last": "25.0 %",
        "Training time": "40 s",
        "Median step": "1,000 ms",
        "Tokens per second, median": "9,000",
        "Peak device memory": "18.0 GB",
        "Host memory, first rank": "12.0 GB",
    }
    assert page.tiles().items() >= expected.items()
    assert page.facts("configuration")["seed"] == page.facts("settings")["seed"] == "3"
    assert page.facts("environment") == {"ranks": "2", "packages.torch": "2.13.0"}
    assert page.facts("result")["peak_bytes"] == "18000000000"
    assert "Never trained: layers 5" in page.says


def test_pictures_are_in_the_page_for_every_paper_and_screen(page: Page) -> None:
    sizes = []
    for image in page.images:
        kind, data = image.get("src", image.get("srcset", "")).split(",", 1)
        file = base64.b64decode(data, validate=True)
        assert (kind, file[:8]) == ("data:image/png;base64", b"\x89PNG\r\n\x1a\n")
        assert struct.unpack(">II", file[16:24]) == (int(image["width"]), int(image["height"]))
        assert file.endswith(b"IEND\xaeB`\x82")
        sizes.append(image["width"])
    shown = [image for image in page.images if "src" in image]
    assert len(shown) == 6 + 3, "curves; maps and counts"
    assert len(page.images) == 6 * 2 + 3 * 4
    assert {image.get("media") for image in page.images} == {
        None,
        "(prefers-color-scheme: dark)",
        "(max-width: 640px)",
        "(prefers-color-scheme: dark) and (max-width: 640px)",
    }
    loss, *_, counts = (image["alt"] for image in shown)
    assert re.fullmatch(r"loss: training from 3\.\d+ to \d\.?\d*; evaluation from 1\.5 to 1\.5, over 40 steps", loss)
    assert "least often layers.5, in 0" in counts


@pytest.mark.parametrize("fixture", ["page", "comparison"])
def test_nothing_is_loaded_from_elsewhere(fixture: str, request: pytest.FixtureRequest) -> None:
    page = request.getfixturevalue(fixture)
    assert page.addresses != []
    assert [address[:60] for address in page.addresses if not address.startswith("data:")] == []
    style = page.text.split("<style>")[1].split("</style>")[0]
    assert re.findall(r"url\(|@import|http", style) == []
    assert "<script" not in page.text


@pytest.mark.usefixtures("undrawn")
def test_names_are_words_and_never_markup(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"'&{{ 7*7 }}"
    folder = make_run(tmp_path / "_$x$", model_name_or_path=hostile, dataset_name=hostile, method=hostile)
    (folder / "PREEMPTED").write_text(json.dumps({"reason": hostile, "step": 40}))
    (folder / "environment.json").write_text(json.dumps({hostile: hostile}))
    for folders in ([folder], [folder, make_run(tmp_path / "<b>")]):
        page = page_of(tmp_path / "page.html", *folders)
        assert page.unclosed == []
        assert "<script" not in page.text
        assert "<b><b>" not in page.text
        assert hostile in page.says
        assert [hostile, hostile] in [row[:2] for row in page.tables["environment"]]


def test_several_runs_are_compared_to_the_first(comparison: Page) -> None:
    final = {row[0]: row[1:] for row in comparison.tables["final"]}
    assert final[""] == ["a/out", "b/out", "third"]
    assert final["Loss, last"] == ["1", "1.1 +0.1 (+10.0 %)", "0.5 \N{MINUS SIGN}0.5 (\N{MINUS SIGN}50.0 %)"]
    assert final["Accuracy on gsm8k, last"] == ["25.0 %", "27.5 % +2.5 points", "12.5 % \N{MINUS SIGN}12.5 points"]
    assert final["Steps"] == ["40", "40 equal", "40 equal"]
    assert final["Training time"][1] == "44 s +4 s (+10.0 %)"
    assert comparison.tables["settings"][1:] == [
        ["method", "lisa", "grass", "grass"],
        ["learning_rate", "unknown", "unknown", "0.5"],
    ]
    assert "environment" not in comparison.tables, "they are equal"
    titles = comparison.says
    for what, over in product(("Loss, training", "Loss, evaluation", "Throughput"), ("steps", "training time")):
        assert f"{what}, over {over}" in titles
    trades = [image["alt"] for image in comparison.images if "Not beaten" in image.get("alt", "")]
    assert [trade.rpartition(": ")[2] for trade in trades] == ["third, a/out, b/out"] * 2 + ["third"] * 2


def test_a_front_has_what_nothing_beats_in_both() -> None:
    known = [("cheap", 1.0, 5.0), ("dearer, equal", 2.0, 5.0), ("better", 2.0, 3.0), ("beaten", 3.0, 4.0)]
    points = [None, *(Point(*values) for values in known)]
    assert [point.name for point in Trade("loss", "time", False, points).front] == ["cheap", "better"]
    assert [point.name for point in Trade("accuracy", "time", True, points).front] == ["cheap"]
    best = Point("best", 9.0, 6.0)
    assert [point.name for point in Trade("accuracy", "time", True, [*points, best]).front] == ["cheap", "best"]


def test_long_curves_are_thinned_and_keep_what_stands_out() -> None:
    values = [1.0] * 10_000
    values[5000] = 9.0
    line = Line.of("loss", list(range(10_000)), values)
    assert len(line.x) == len(line.y) == POINTS
    assert (line.high.max(), line.low.min(), line.x[0], line.x[-1]) == (9, 1, 12, 9987)
    short = Line.of("loss", [1, 2], [3.0, 4.0])
    assert (short.x.tolist(), short.y.tolist()) == ([1, 2], [3, 4])


@pytest.mark.filterwarnings("error")
def test_pictures_take_any_name_and_any_number() -> None:
    """To matplotlib `_x` is hidden and `$` begins a formula."""
    names = ["_hidden", "$x$ $", "\N{CJK UNIFIED IDEOGRAPH-4E2D}", "long" * 30, *map(str, range(20))]
    lines = [Line.of(name, [1, 2], [math.nan, 1.0]) for name in names]
    (legend,) = draw_lines([*lines, Line.of("one", [1], [math.inf])], SUBJECTS[0], "step").legends
    assert len(legend.get_texts()) == len(names) + 1
    points = [Point(name, 1.0, 1.0) for name in names]
    picture = Picture("", "", lambda paper: draw_trade(Trade("loss", "time", False, points), paper))
    assert len(embed(picture, lambda _: None).sources) == 2


def test_labels_tell_folders_apart(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a/x/out", "b/x/out", "b/x", "c", "c")]
    assert labels_of(folders) == ["a/x/out", "b/x/out", "x", "c", "c (2)"]


def test_differences_have_a_sign() -> None:
    number = FinalNumber("loss", lambda _: None)
    assert number.difference(1.5, 1.0) == "+0.5 (+50.0 %)"
    assert number.difference(1.0, 0.0) == "+1"
    assert number.difference(1.0, 1.0) == "equal"


@pytest.mark.usefixtures("undrawn")
def test_interruptions_are_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 12)
    (folder / "result.json").unlink()
    assert "not finished: the last step known is 12" in page_of(tmp_path / "page.html", folder).says
    record = Record(folder, None)
    history = record.begin([f"layers.{index}" for index in range(6)], 10)
    record.end()
    assert history.steps == list(range(1, 11))
    first, second = (json.loads(line) for line in (folder / STARTS).read_text().splitlines())
    assert first.keys() == {"step", "time"}
    assert (second["step"], second["reached"]) == (10, 12)
    second |= {"time": "2026-11-28T12:00:00+00:00", "stopped": "2026-11-28T11:58:30+00:00"}
    (folder / STARTS).write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    (folder / "PREEMPTED").write_text(json.dumps({"reason": "SIGTERM on rank 0", "step": 10}))
    says = page_of(tmp_path / "page.html", folder).says
    assert (
        "2026-11-28 12:00:00 UTC: went on after step 10, 2 steps were done again; "
        "the last step before was 0:01:30 earlier" in says
    )
    assert "stopped after step 10: SIGTERM on rank 0" in says


@pytest.mark.usefixtures("undrawn")
def test_a_result_tells_nothing_of_a_run_that_has_gone_on_since(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 12)
    lines = StepLines(folder / METRICS, 12)
    lines.append({"step": 13, "seconds": 13.0, "loss": 0.25, "eval_loss": 0.5, "memory/peak_gb": 20.0})
    lines.close()
    tiles = page_of(tmp_path / "page.html", folder).tiles()
    assert (tiles["Steps"], tiles["Loss, last"], tiles["Evaluation loss, last"]) == ("13", "0.25", "0.5")
    assert tiles["Peak device memory"] == "20.0 GB"


@pytest.mark.usefixtures("undrawn")
def test_checkpoints_have_sizes_and_faults(run: Path, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 4)
    for name, file in {"checkpoint-10": "a.pt", "checkpoint-2": "a.pt", "model": "model.safetensors"}.items():
        (folder / name).mkdir()
        (folder / name / file).write_bytes(bytes(2500))
    rows = page_of(tmp_path / "page.html", folder).tables["checkpoints"][1:]
    assert [row[:2] for row in rows] == [["checkpoint-2", "2.5 kB"], ["checkpoint-10", "2.5 kB"], ["model", "2.5 kB"]]
    assert "manifest.json" in rows[0][3]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("kept", ["config.yaml", "metrics.jsonl", "selection.jsonl", "result.json", "environment.json"])
def test_any_file_alone_gives_a_page(run: Path, kept: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / kept).write_bytes((run / kept).read_bytes())
    page = page_of(tmp_path / "page.html", tmp_path / "run")
    assert page.unclosed == []
    assert "run" in page.says
    page = page_of(tmp_path / "page.html", tmp_path / "run", run)
    assert page.unclosed == []
    assert page.tables["final"][0] == ["", "run", "mine"]


def test_an_older_run_has_curves_and_counts_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-20").mkdir()
    logged = {"log_history": [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.0}, {"step": 20, "eval_loss": 2.5}]}
    (tmp_path / "checkpoint-20" / "trainer_state.json").write_text(json.dumps(logged))
    (tmp_path / "selection.json").write_text(json.dumps({"counts": {"layers.0": 3, "layers.1": 0}}))
    page = page_of(tmp_path / "page.html", tmp_path)
    alternatives = [image["alt"] for image in page.images if "alt" in image]
    assert alternatives[0] == "loss: training from 3 to 2; evaluation from 2.5 to 2.5, over 20 steps"
    assert alternatives[1:] == ["Most often layers.0, in 3 steps; least often layers.1, in 0"]
    assert "not noted when it was started" in page.says


@pytest.mark.usefixtures("undrawn")
def test_a_history_that_began_late_is_not_taken_for_the_counts(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 12)
    heading, *lines = (folder / SELECTION).read_text().splitlines()
    (folder / SELECTION).write_text("\n".join([heading, *lines[6:], ""]))
    counts = {f"layers.{index}": 3 for index in range(5)} | {"layers.5": 9}
    (folder / "selection.json").write_text(json.dumps({"counts": counts}))
    (*_, shown) = [image["alt"] for image in page_of(tmp_path / "page.html", folder).images if "alt" in image]
    assert shown == "Most often layers.5, in 9 steps; least often layers.0, in 3"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "selection.jsonl", "result.json", "starts.jsonl"])
@pytest.mark.parametrize("content", [b"\x00\xff{]", b'{"a": [1, 2\n', b"[3]\n", b"", b'"word"\n{"step": 1}\n'])
def test_damaged_files_give_a_page_too(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"steps": 3}')
    (tmp_path / name).write_bytes(content)
    assert page_of(tmp_path / "page.html", tmp_path).unclosed == []


@pytest.mark.usefixtures("undrawn")
def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{")
    assert "cannot be read: result.json: JSONDecodeError" in page_of(tmp_path / "page.html", tmp_path).says


def test_a_long_run_of_many_blocks_is_a_small_page(tmp_path: Path) -> None:
    """Its time is measured by hand."""
    folder = make_run(tmp_path / "run", 20_000, 80)
    page = page_of(tmp_path / "page.html", folder)
    assert "finished, 20,000 steps" in page.says
    assert (tmp_path / "page.html").stat().st_size < 3e6


@pytest.mark.usefixtures("undrawn")
def test_the_command_refuses_in_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.md").write_text("mine")
    refused = {
        (str(tmp_path),): "holds no run",
        (str(run), "--output", str(tmp_path)): "is a folder",
        (str(run), "--output", str(tmp_path / "notes.md")): "is no report, and would be overwritten",
        (str(run), str(tmp_path / "absent")): "is no folder",
        (str(run), "--output", str(tmp_path / "absent" / "page.html")): "cannot write",
    }
    for words, message in refused.items():
        with pytest.raises(SystemExit, match=rf"^agsel: error: .*{message}.*$") as refusal:
            report.main(list(words))
        assert "\n" not in str(refusal.value)
    assert (tmp_path / "notes.md").read_text() == "mine"
    (tmp_path / "notes.md").unlink()
    report.main([str(run), "--output", str(tmp_path / "page.html")])
    report.main([str(run), "--output", str(tmp_path / "page.html")])
    assert capsys.readouterr().out.endswith(f"report    {tmp_path / 'page.html'}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    copied = shutil.copytree(run, tmp_path / run.name)
    (copied / "report.html").write_text("mine")
    with pytest.raises(SystemExit, match=r"is no report, and would be overwritten"):
        report.main([str(copied)])
    assert (copied / "report.html").read_text() == "mine"
    (copied / "report.html").unlink()
    report.main([str(copied)])
    assert (copied / "report.html").read_text() == (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("error", [UserError("no run"), MemoryError("too\nlarge")])
def test_a_run_is_not_lost_when_its_report_and_its_card_fail(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise error

    for name in ("write_report", "write_card"):
        monkeypatch.setattr(train, name, fail)
    monkeypatch.setattr("agsel.training.output.dist", SimpleNamespace(get_rank=lambda: 0))
    configuration: Any = SimpleNamespace(
        training=SimpleNamespace(output_dir=str(tmp_path)), output=SimpleNamespace(report=True)
    )
    result = {"steps": 3, "timed_steps": 3}
    train.describe_in_folder(card.Run({}, {}, result, SelectionHistory(()), {}, {}), configuration)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(" is not made")[0] for line in said] == ["warning   the model card", "warning   report.html"]
    assert all(f": {type(error).__name__}: " in line for line in said)


@pytest.fixture(scope="module")
def pages(page: Page, run: Path, comparison: Page, several: list[Path]) -> list[Path]:
    return [run / "report.html", several[0].parent / "several.html"]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_a_browser_shows_it_on_wide_and_narrow_screens(pages: list[Path], tmp_path: Path) -> None:
    """Without a complaint, without loading anything, and without anything that is wider than the screen."""
    grounds = {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}
    with tab(tmp_path / "profile") as browser:
        for path, width, scheme in product(pages, (1280, 400), grounds):
            browser.show(path, width, scheme)
            assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert browser.evaluate("innerWidth") == width
            assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == grounds[scheme]
            images = "Promise.all([...document.images].map(image => image.decode()))"
            assert browser.evaluate(f"{images}.then(all => all.length)") > 8
            shown = browser.evaluate("[...document.images].map(image => image.currentSrc)")
            assert set(shown) <= {
                image.get("src") or image["srcset"] for image in sources_for(Page(path), width, scheme)
            }
        assert browser.complaints == []
        loaded = {address for address in browser.loaded if not address.startswith("data:")}
        assert loaded == {path.as_uri() for path in pages}


def sources_for(page: Page, width: int, scheme: str) -> list[dict[str, str]]:
    """Those that may be shown there: of pictures with one width, that of the paper alone."""
    narrow = ["(max-width: 640px)"] if width < 640 else []
    paper = ["(prefers-color-scheme: dark)"] if scheme == "dark" else []
    meant = {" and ".join(paper), " and ".join([*paper, *narrow])}
    return [image for image in page.images if image.get("media", "") in meant]


def test_a_page_is_made_without_the_libraries_of_training() -> None:
    """They take seconds to import."""
    script = (
        "import sys, agsel.report; sys.exit(', '.join({'transformers', 'trl', 'datasets'} & set(sys.modules)) or 0)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
