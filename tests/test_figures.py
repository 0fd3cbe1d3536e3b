"""``pahq plot``: that figures say what the folders hold, can be read, and are the same bytes each time."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

import commands
import figure_files
from commands import Pahq
from pahq.errors import PahqError
from pahq.evaluation.circuit import Circuit
from pahq.evaluation.reference import Reference, areas
from pahq.evaluation.truth.base import read_truth
from pahq.report import figures
from pahq.report.figures import curves
from pahq.report.figures.chart import DPI, Chart, draw, inches_of
from pahq.report.figures.style import COLUMN, PAGE, numeral
from pahq.reproduction.figures import rtn

ROOT = Path(__file__).parent.parent
KINDS = {
    "graph": ["tight"],
    "roc": ["compared"],
    "faithfulness": ["compared"],
    "cost": ["loose", "tight", "scored"],
    "timeline": ["tight"],
    "snr": ["snr"],
    "sensitivity": ["sensitivity"],
    "groups": ["groups"],
}
"""A folder or several that each kind can be drawn from."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return figure_files.make(tmp_path_factory.mktemp("figures"))


def of(files: Path, kind: str, **options: Any) -> figures.Chart:
    return figures.plot(kind, [files / name for name in KINDS[kind]], **options)


def data(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.with_suffix(".csv").read_text().splitlines()))


def texts(figure: Any) -> Iterator[tuple[str, Any]]:
    """Every piece of text that is drawn, and its box in pixels."""
    from matplotlib.text import Text

    figure.canvas.draw()  # so that everything is in its place
    drawn, plain = list[Any](), Text.draw

    def noted(self: Any, renderer: Any) -> None:
        drawn.append(self)
        plain(self, renderer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", noted)
        figure.canvas.draw()
    for text in drawn:
        if text.get_text().strip() and text.get_visible():
            yield text.get_text(), text.get_window_extent()


def check_readable(figure: Any) -> None:
    """No text leaves the page, and none lies on another."""
    found = [(text, box) for text, box in texts(figure) if box.width > 0]
    assert found
    for text, box in found:
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= figure.bbox.x1 + 1, text
        assert box.y1 <= figure.bbox.y1 + 1, text
    for (text, box), (other, that) in combinations(found, 2):
        wide = min(box.x1, that.x1) - max(box.x0, that.x0)
        high = min(box.y1, that.y1) - max(box.y0, that.y0)
        turned = box.height > box.width and len(text) > 2  # the box of slanted text is more than the text
        assert turned or min(wide, high) < 1.5, (text, other)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_as_a_file_with_its_data(pahq: Pahq, files: Path, tmp_path: Path, kind: str) -> None:
    assert set(KINDS) == set(figures.KINDS)
    folders = [files / name for name in KINDS[kind]]
    for ending in ("svg", "pdf", "png"):
        out = tmp_path / f"{kind}.{ending}"
        answer = pahq("plot", kind, *folders, "--out", out)
        assert (answer.code, answer.out) == (0, f"written: {out} ({kind}.csv beside it)\n"), answer.err
    svg = (tmp_path / f"{kind}.svg").read_text()
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert "<text" in svg  # text is text
    pdf = (tmp_path / f"{kind}.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"/FontFile2" in pdf  # whole outlines, no bitmaps (type 3)
    assert b"/Type3" not in pdf
    png = (tmp_path / f"{kind}.png").read_bytes()
    assert struct.unpack(">I", png[16:20])[0] == round(COLUMN * DPI)
    rows = data(tmp_path / f"{kind}.png")
    assert len(rows) == len(of(files, kind).rows) > 0
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("width", ["column", "page"])
@pytest.mark.parametrize("kind", KINDS)
def test_text_lies_on_the_page_and_not_on_text(files: Path, kind: str, width: str) -> None:
    check_readable(
        of(files, kind).figure(width, "A title that is rather long, so that it needs a second line in a column")
    )


@pytest.mark.parametrize("seconds", [[0.0165], [0.0226, 0.0155], [0.0177, 0.0171]])
def test_numbers_on_an_axis_keep_apart(seconds: list[float]) -> None:
    costs = [{"seconds": s, "total_seconds": s, "host_bytes": 2**29, "device_bytes": None} for s in seconds]
    rows = curves.cost_rows(
        [{"name": f"run {s}", "group": "acdc", "cost": cost} for s, cost in zip(seconds, costs, strict=True)]
    )
    check_readable(Chart("cost", curves.draw_cost, rows).figure("column"))


def test_the_check_of_text_can_fail(files: Path) -> None:
    figure = of(files, "cost").figure()
    figure.axes[0].text(0, 0, "search", transform=figure.axes[0].xaxis.label.get_transform())
    figure.text(0.5, 0.5, "one")
    figure.text(0.51, 0.5, "other")
    with pytest.raises(AssertionError):
        check_readable(figure)


def test_the_same_bytes_in_another_process(files: Path, tmp_path: Path) -> None:
    code = (
        "import hashlib, sys\n"
        "from pathlib import Path\n"
        "from pahq.report import figures\n"
        "files, out = map(Path, sys.argv[1:3])\n"
        "for word in sys.argv[3:]:\n"
        "    kind, name, end = word.split('/')\n"
        "    path = figures.plot(kind, [files / name]).save(out / f'{kind}.{end}')\n"
        "    print(hashlib.sha256(path.read_bytes()).hexdigest())\n"
    )
    words = ["graph/tight/svg", "timeline/tight/svg", "timeline/tight/pdf", "roc/compared/png"]
    (tmp_path / "there").mkdir()
    environment = os.environ | {"PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "86400"}
    command = [sys.executable, "-c", code, str(files), str(tmp_path / "there"), *words]
    there = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.split()
    here = []
    for word in words:
        kind, name, end = word.split("/")
        path = figures.plot(kind, [files / name]).save(tmp_path / f"{kind}.{end}")
        here.append(hashlib.sha256(path.read_bytes()).hexdigest())
    assert here == there


def test_nothing_global_is_left_changed(files: Path, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    of(files, "timeline").save(tmp_path / "x.svg")
    assert dict(matplotlib.rcParams) == before
    code = "import sys; from pahq.report.figures import KINDS; assert not {'numpy', 'matplotlib'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_users_own_settings_do_not_count(files: Path, tmp_path: Path) -> None:
    plain = of(files, "cost").save(tmp_path / "a.svg").read_bytes()
    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path", "lines.linewidth": 9, "axes.grid": True}):
        assert of(files, "cost").save(tmp_path / "b.svg").read_bytes() == plain


def test_a_title_stays_text(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    title = "cost of $x_1$ in </text><script>\x01&"
    answer = pahq("plot", "cost", files / "loose", "--out", tmp_path / "x.svg", "--title", title, "--width", "page")
    assert answer.code == 0
    root = ElementTree.parse(tmp_path / "x.svg").getroot()
    found = "".join(root.itertext())
    assert "cost of $x_1$ in </text><script>\N{REPLACEMENT CHARACTER}&" in found
    assert not [element for element in root.iter() if element.tag.endswith("script")]


def test_time_bars_are_as_thin_for_one_run_as_for_many(files: Path) -> None:
    def thickness(count: int) -> float:
        chart = of(files, "cost")
        figure = figures.Chart("cost", chart.draw, [chart.rows[0]] * count).figure()
        figure.canvas.draw()
        return figure.axes[0].patches[0].get_window_extent().height / figure.dpi

    one, many = thickness(1), thickness(12)
    assert one == pytest.approx(many, rel=0.35)
    assert one < 0.2  # inches


def test_cost_is_the_runs_own(files: Path) -> None:
    rows = of(files, "cost").rows
    for row, name in zip(rows, KINDS["cost"], strict=True):
        record = json.loads((files / name / "run.json").read_text())
        assert row["seconds"] == record["search"]["seconds"]
        assert row["host_bytes"] == record["peak_memory"]["host_bytes"]
    compared = {row["name"]: row["seconds"] for row in figures.cost(files / "compared").rows}
    assert compared == {"acdc 0.05": rows[0]["seconds"], "eap 40 edges": rows[2]["seconds"]}


def test_the_timeline_is_the_sweep(files: Path) -> None:
    circuit, rows = Circuit.load(files / "tight"), of(files, "timeline").rows
    assert [row["order"] for row in rows] == list(range(circuit.n_tested))
    assert {row["edge"] for row in rows if row["kept"]} == {f"{e.sender}->{e.receiver}" for e in circuit.edges()}
    for row in rows:
        at = circuit.graph.edge(row["edge"])
        assert row["effect"] == circuit.effects[at]
        assert row["kept"] == (row["judged"] >= row["threshold"])
    kept = sum(row["kept"] for row in rows)
    labels = [text.get_text() for text in of(files, "timeline").figure().legends[0].get_texts()]
    assert labels == [f"removed: {len(rows) - kept:,}", f"kept: {kept:,}", "threshold 0.02"]


def test_decisions_measured_again_have_a_mark(files: Path) -> None:
    chart = of(files, "timeline")
    rows = [row | {"refined": row["order"] % 7 == 0} for row in chart.rows]
    figure = figures.Chart("timeline", chart.draw, rows).figure()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert f"measured again in FP32: {sum(row['refined'] for row in rows)}" in labels


def test_roc_of_runs_is_that_of_the_comparison(files: Path) -> None:
    truth = str(files / "tight" / "circuit.json")
    rows = figures.roc([files / "loose", files / "scored"], truth=truth).rows
    best = [row["auc"] for row in rows if row["of"] == "edges"]
    assert best == sorted(best, reverse=True)
    known = read_truth(Path(truth))
    for name, folder in (("acdc", "loose"), ("eap", "scored")):
        circuit = Circuit.load(files / folder)
        wanted = areas([circuit], Reference("x", circuit.graph, known.mask))
        for kind in ("edges", "nodes"):
            mine = [row for row in rows if (row["name"], row["of"]) == (name, kind)]
            assert {row["auc"] for row in mine} == {wanted[kind]["auc"]}
            assert [[row["fpr"], row["tpr"]] for row in mine if not row["end"]] == sorted(wanted[kind]["points"])
    assert {row["auc"] for row in figures.roc(files / "compared").rows} == {row["auc"] for row in rows}
    against = figures.roc(files / "loose", against=files / "tight").rows
    assert against[0]["auc"] == next(row["auc"] for row in rows if row["name"] == "acdc")


def test_roc_draws_its_points(files: Path) -> None:
    chart = of(files, "roc")
    figure = chart.figure()
    for axes, kind in zip(figure.axes, ("edges", "nodes"), strict=True):
        assert axes.get_title() == kind
        lines = {tuple(map(tuple, line.get_xydata().tolist())) for line in axes.get_lines()}
        for name in ("acdc", "eap"):
            mine = [(row["fpr"], row["tpr"]) for row in chart.rows if (row["name"], row["of"]) == (name, kind)]
            assert tuple(mine) in lines


def test_faithfulness_of_several_folders_keeps_them_apart(files: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "again", tmp_path / "other" / "again"
    for folder in (again, other):
        shutil.copytree(files / "evaluated", folder)
    rows = figures.faithfulness([files / "evaluated", again, other, other]).rows
    told = ["acdc", "acdc (again)", f"acdc ({other})", f"acdc ({other}, 2)"]
    assert [row["group"] for row in rows] == told
    record = json.loads((files / "evaluated" / "evaluation.json").read_text())
    point = record["runs"][0]["circuit"]
    assert rows[0]["recovered"] == rows[1]["recovered"] == point["recovered"]
    assert rows[0]["low"] == point["recovered_interval"]["low"]


def test_infinite_ratios_are_no_line_and_whole_in_the_data(files: Path, tmp_path: Path) -> None:
    chart = of(files, "snr")
    assert chart.notes == ("exact: no noise, so it has no line",)
    labels = [text.get_text() for text in chart.figure().legends[0].get_texts()]
    assert labels == ["differences, both in FP32", "values, no head in FP32"]
    rows = data(chart.save(tmp_path / "snr.png"))
    assert rows[0]["snr_db"] == "inf"
    assert float(rows[1]["snr_db"]) == pytest.approx(20)


def test_errors_of_zero_have_hollow_marks(files: Path) -> None:
    figure = of(files, "sensitivity").figure()
    assert figure.legends[0].get_title().get_text() == "hollow, at the bottom: no error"
    hollow = [line for line in figure.axes[0].get_lines() if line.get_markerfacecolor() == "white"]
    assert sum(len(line.get_xdata()) for line in hollow) == 3  # q in three formats
    assert figure.axes[0].get_yscale() == "log"


def test_the_reproductions_figure_can_be_read() -> None:
    rows = [{"method": "rtn", "threshold": threshold, "zero_effects": 0.9} for threshold in (0.3, 0.1, 0.01)]
    areas_of = [{"method": "rtn", "auc_against_fp32": 0.9, "points": [[0.1, 0.7]]}]
    figure = figures.Chart("rtn", lambda figure, of: rtn(figure, of, areas_of), rows).figure("page")
    check_readable(figure)
    assert not [text for text, _ in texts(figure) if "$" in text]


def test_numbers_on_axes() -> None:
    shown = [numeral(value) for value in (0.0, 1.0, 0.001, 1e-5, 20_000.0, -0.1)]
    assert shown == ["0", "1", "0.001", "10⁻⁵", "20,000", "\N{MINUS SIGN}0.1"]


WRONG = [
    (["plot", "plan", "{files}/tight"], "plot: kind 'plan' is unknown; known: graph, roc,"),
    (["plot", "grap", "{files}/tight"], "did you mean 'graph'?"),
    (["plot", "graph", "{files}/gone"], "gone: there is no such folder"),
    (
        ["plot", "graph", "{files}/snr"],
        "snr is a study of pahq precision snr; give the folder of a run of pahq discover",
    ),
    (["plot", "graph", "{files}/tight", "{files}/loose"], "2 folders are given, but it is about one"),
    (["plot", "graph", "{files}/tight", "--edges", "0"], "edges: 0 are too few to draw"),
    (["plot", "graph", "{files}/tight", "--truth", "a", "--against", "b"], "truth, against: only one can be beside"),
    (["plot", "graph", "{files}/tight", "--truth", "ioi-gpt"], "did you mean 'ioi-gpt2'?"),
    (["plot", "roc", "{files}/tight"], "tight is a run of pahq discover; name a known circuit with --truth"),
    (["plot", "roc", "{files}/tight", "{files}/compared"], "name runs alone, or folders of pahq evaluate or compare"),
    (["plot", "roc", "{files}/compared", "--truth", "x"], "with a reference of its own; leave --truth out"),
    (["plot", "roc", "{files}/tight", "--ranking", "up"], "ranking: 'up' is unknown; known: absolute, signed"),
    (["plot", "faithfulness", "{files}/tight"], "pahq evaluate RUN... --out DIR"),
    (["plot", "cost", "{files}/snr"], "give runs of pahq discover"),
    (["plot", "timeline", "{files}/scored"], "eap scores edges and takes no decisions in turn"),
    (["plot", "timeline", "{files}/tight", "--truth", "x"], "plot timeline: it has no option --truth"),
    (["plot", "snr", "{files}/tight"], "give the folder of pahq precision snr --out DIR"),
    (
        ["plot", "snr", "{files}/groups"],
        "groups is a study of pahq precision groups; give the folder of pahq precision snr",
    ),
    (["plot", "cost", "{files}/tight", "--width", "1"], "width: '1' is no width; give column (3.25 inches), page"),
    (["plot", "cost", "{files}/tight", "--out", "{tmp}/x.gif"], "'.gif' is no format of figures"),
    (["plot", "cost", "{files}/tight", "--out", "{tmp}/no/x.svg"], "there is no folder"),
    (["plot", "cost", "{files}/tight", "--out", "{tmp}/x.svg/"], "a folder lies there"),
]


@pytest.mark.parametrize(("words", "error"), WRONG, ids=[" ".join(words[1:]) for words, _ in WRONG])
def test_what_cannot_be_drawn_is_one_line(
    pahq: Pahq, files: Path, tmp_path: Path, words: list[str], error: str
) -> None:
    if words[-1] == "{tmp}/x.svg/":
        (tmp_path / "x.svg").mkdir()
    given = [word.format(files=files, tmp=tmp_path) for word in words]
    answer = pahq(*given, *(() if "--out" in words else ("--out", tmp_path / "x.png")))
    assert error in answer.error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("kind", "folder", "path"),
    [
        ("roc", "compared", ("comparison.json", "roc", 0, "edges")),
        ("faithfulness", "compared", ("comparison.json", "runs", 0, "curves")),
        ("cost", "compared", ("comparison.json", "runs", 0, "cost")),
        ("snr", "snr", ("run.json", "figures", "rows", 0, "signal")),
        ("sensitivity", "sensitivity", ("run.json", "figures", "rows", 0, "kind")),
        ("groups", "groups", ("run.json", "figures")),
    ],
)
def test_a_damaged_record_is_one_line(
    pahq: Pahq, files: Path, tmp_path: Path, kind: str, folder: str, path: Any
) -> None:
    shutil.copytree(files / folder, tmp_path / "bad")
    figure_files.spoil(tmp_path / "bad", *path)
    answer = pahq("plot", kind, tmp_path / "bad", "--out", tmp_path / "x.svg")
    assert re.search(r"bad: its record is damaged or of another version \(.*is missing\); make it anew", answer.error)
    assert not (tmp_path / "x.csv").exists()


def test_data_of_something_else_are_never_replaced(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("a,b\n")
    answer = pahq("plot", "cost", files / "loose", "--out", tmp_path / "mine.svg")
    assert "mine.csv: it lies where the figure's data would go" in answer.error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.csv"]
    for kind in ("cost", "graph"):  # a figure of before is replaced, and so are its data
        assert pahq("plot", kind, files / "loose", "--out", tmp_path / "x.svg").code == 0
    assert "sender" in data(tmp_path / "x.svg")[0]
    assert pahq("plot", "graph", files / "loose", "--out", tmp_path / "x.pdf").code == 0


def test_one_json_document(pahq: Pahq, files: Path, tmp_path: Path) -> None:
    answer = pahq("plot", "graph", files / "tight", "--edges", 5, "--out", tmp_path / "x.svg", "--json")
    record = json.loads(answer.out)
    edges = Circuit.load(files / "tight").n_edges
    assert (record["kind"], record["rows"], record["file"]) == ("graph", edges, str(tmp_path / "x.svg"))
    assert record["notes"] == [f"{edges - 5} of {edges} edges, the smallest, are not drawn (--edges sets how many are)"]
    loud = pahq("plot", "graph", files / "tight", "--edges", 5, "--out", tmp_path / "x.svg")
    assert loud.err == f"note: {record['notes'][0]}\n"
    quiet = pahq("plot", "graph", files / "tight", "--edges", 5, "--out", tmp_path / "x.svg", "-q")
    assert (quiet.out, quiet.err) == ("", "")


def test_help_comes_at_once_and_names_the_kinds() -> None:
    told = commands.help_without(["torch", "numpy", "matplotlib", "rich.progress"], ["plot", "--help"])
    assert not [kind for kind in figures.KINDS if not re.search(rf"\b{kind}\b", told)]


def test_without_matplotlib_there_is_one_line(
    pahq: Pahq, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    answer = pahq("plot", "cost", files / "loose", "--out", tmp_path / "x.svg")
    assert answer.error == "plot: matplotlib is not installed (pip install 'pahq[plot]')"
    assert not list(tmp_path.iterdir())
    assert draw(lambda *_: None, []) is None


def test_a_fault_of_a_figures_own_is_no_missing_package() -> None:
    def broken(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'nothing'", name="nothing")

    with pytest.raises(ModuleNotFoundError):
        draw(broken, [])


def test_widths() -> None:
    assert [inches_of(width) for width in ("column", "page", "5", 3)] == [COLUMN, PAGE, 5, 3]
    for width in ("wide", "0", "nan", "inf", "-4", 1000):
        with pytest.raises(PahqError, match="is no width"):
            inches_of(width)


def test_a_notebook_shows_a_chart(files: Path) -> None:
    assert of(files, "graph")._repr_png_().startswith(b"\x89PNG")
    assert np.isfinite(of(files, "graph").figure().get_figheight())
