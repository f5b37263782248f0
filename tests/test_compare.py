"""Runs side by side: what is read of each, in what they differ, and the page with their curves."""

from __future__ import annotations

import csv
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from dalle1.compare import compare, format_comparison, format_seconds, main
from dalle1.comparison_page import draw_chart, render_comparison, style_of, thin
from dalle1.models.transformer import DalleTransformer, TransformerConfig
from dalle1.run_records import RunRecord, find_runs, read_run
from dalle1.run_status import RunStatus, write_status

NOW = time.time()
TINY = {"n_layers": 1, "n_heads": 2, "d_model": 8, "text_seq_len": 4, "grid_height": 2, "grid_width": 2}
Rows = Sequence[Mapping[str, float]]


def options(**changes: Any) -> dict[str, Any]:
    """A configuration as config.yaml has it, with one repetition."""
    content: dict[str, Any] = {
        "stage": {"name": "transformer"},
        "model": {"_target_": "dalle1.models.transformer.TransformerConfig", **TINY},
        "optim": {"lr": 1e-3, "max_steps": 10, "seed": 0},
        "callbacks": {"best": {"monitor": "val/loss", "mode": "min"}, "ema": {"decay": 0.9}},
        "run_dir": "/somewhere",
    }
    for name, value in changes.items():
        group, _, key = name.partition("__")
        content[group] = content.get(group, {}) | {key: value} if key else value
    return content


def status(**changes: Any) -> RunStatus:
    """A run that trains in this process."""
    fields: dict[str, Any] = {
        "stage": "transformer", "state": "training", "step": 5, "max_steps": 10, "loss": 1.0, "samples_per_second": 8.0,
        "data_wait": None, "mfu": None, "seconds_left": None, "checkpoint_step": None, "checkpoint_time": None,
        "host": socket.gethostname(), "pid": os.getpid(), "started": NOW - 90, "updated": NOW - 1, "error": None,
    }  # fmt: skip
    return RunStatus(**(fields | changes))


def make_run(
    directory: Path,
    rows: Rows = ({"step": 4, "val/loss": 2.0}, {"step": 9, "val/loss": 1.5}),
    *,
    config: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
    said: RunStatus | None = None,
) -> Path:
    """Write a run's directory; what is None is not there."""
    logs = directory / "logs" / "version_0"
    logs.mkdir(parents=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(logs / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    if config is not None:
        (directory / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
    if summary is not None:
        (directory / "summary.json").write_text(json.dumps({"stage": "transformer", **summary}))
    if said is not None:
        write_status(directory, said)
    return directory


def read(*places: Path) -> list[RunRecord]:
    return [read_run(run, now=NOW) for run in find_runs([str(place) for place in places])[0]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command and returns what it prints."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "300")  # whatever the terminal of the tests is
        main()
        return capsys.readouterr().out

    return run


def test_run_is_read_from_its_files(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "perf/samples_per_second": 10.0},
        {"step": 3, "perf/samples_per_second": 30.0},
        {"step": 4, "perf/samples_per_second": 20.0, "val/loss": 1.0},
        {"step": 9, "val/loss": 2.0, "val/image_accuracy": 0.25},
        {"step": 10, "val/loss": 1.75, "val/image_accuracy": 0.5},
    ]
    said = status(state="complete", step=10)
    summary = {"wall_seconds": 75.5, "step": 10, "loss": 1.75}
    (run,) = read(
        make_run(tmp_path / "a", rows, config=options(run_dir="/x/a", out="/x/a/b"), summary=summary, said=said)
    )
    assert (run.stage, run.state, run.step, run.max_steps) == ("transformer", "complete", 10, 10)
    assert (run.wall_seconds, run.pictures_per_second) == (75.5, 20.0)
    assert run.n_weights == sum(w.numel() for w in DalleTransformer(TransformerConfig(**TINY)).parameters())  # type: ignore[arg-type]
    # Lightning counts updates from 0, and logs the final validation under their number.
    assert run.curves["val/loss"] == [(5, 1.0), (10, 2.0), (10, 1.75)]
    assert (run.final("val/loss"), run.best("val/loss")) == (1.75, (1.0, 5))
    assert (run.final("val/image_accuracy"), run.best("val/image_accuracy")) == (0.5, (0.5, 10))
    assert (run.final("val/none"), run.best("val/none")) == (None, None)
    assert run.options["out"] == "{run_dir}/b"
    assert run.problems == ()


def test_mode_of_the_monitored_metric_is_that_of_the_run(tmp_path: Path) -> None:
    config = options(callbacks__best={"monitor": "val/loss", "mode": "max"})
    (run,) = read(make_run(tmp_path / "a", config=config))
    assert run.best("val/loss") == (2.0, 5)


def test_only_options_that_differ_are_shown_and_each_once(tmp_path: Path) -> None:
    for name, lr in (("a", 1e-3), ("b", 2e-3)):
        # `data.lr` repeats optim.lr; `data.size` and `data.window` are options of their own, whatever their values.
        of_data = {"lr": lr, "size": lr * 2, "window": lr}
        more = {"data": of_data, "name": name, "run_dir": f"/x/{name}", "logs": f"/x/{name}/logs"}
        make_run(tmp_path / name, config=options(optim__lr=lr, **more))
    make_run(tmp_path / "without-config")
    write_status(tmp_path / "without-config", status())
    (group,) = compare(read(tmp_path))["stages"]
    assert group["options"] == ["optim.lr", "data.size", "data.window"]
    text = format_comparison(compare(read(tmp_path)), width=200)
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["a"][-3:] == ["0.001", "0.002", "0.001"]
    assert "optim.max_steps" not in text


def test_as_many_options_are_printed_as_there_is_room_for(tmp_path: Path) -> None:
    for number in range(2):
        make_run(tmp_path / str(number), config=options(**{f"model__size_{n}": str(number) * 25 for n in range(30)}))
    comparison = compare(read(tmp_path))
    text = format_comparison(comparison, width=150)
    shown = text.count("model.size_")
    assert 0 < shown < 30
    longest = max(map(len, text.splitlines()))
    assert longest <= 150 < longest + len("  ") + 25
    assert f"have no room here: {30 - shown};" in text
    assert "no room" not in format_comparison(comparison, width=2000)


def test_what_holds_no_run_is_named_beside_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "sweep" / "0", config=options())
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    (tmp_path / "sweep" / "notes").mkdir()
    monkeypatch.chdir(tmp_path)
    # As a shell has it for sweep/*.
    monkeypatch.setattr("sys.argv", ["compare", "sweep/0", "sweep/notes", "sweep/sweep.json"])
    main()
    assert "no run at or below sweep/notes, sweep/sweep.json" in capsys.readouterr().out


def test_stages_are_apart_and_a_run_comes_once(tmp_path: Path) -> None:
    make_run(tmp_path / "x" / "transformer", config=options())
    make_run(tmp_path / "x" / "dvae", summary={"stage": "dvae", "wall_seconds": 1.0})
    (tmp_path / "x" / "samples").mkdir()
    (tmp_path / "x" / "samples" / "summary.json").write_text("{}")
    runs = find_runs([str(tmp_path), f"{tmp_path}/x/*", f"{tmp_path}/x/dvae/"])
    assert runs == ([str(tmp_path / "x" / "dvae"), str(tmp_path / "x" / "transformer")], [])
    comparison = compare([read_run(run, now=NOW) for run in runs[0]])
    assert [group["stage"] for group in comparison["stages"]] == ["dvae", "transformer"]
    assert comparison["directory"] == os.path.relpath(tmp_path / "x")
    assert [group["runs"][0]["run"] for group in comparison["stages"]] == ["dvae", "transformer"]


def test_failed_and_unfinished_runs_have_rows(tmp_path: Path) -> None:
    make_run(tmp_path / "done", summary={"wall_seconds": 3700.0, "step": 10, "loss": 1.5})
    make_run(tmp_path / "failed", [], said=status(state="failed", error="ValueError: the loss must be finite"))
    make_run(tmp_path / "going", [{"step": 4, "val/loss": 1.0}], said=status())
    make_run(tmp_path / "silent", [], said=status(host="elsewhere", updated=NOW - 5000, started=NOW - 6000))
    make_run(tmp_path / "begun", [], config=options())
    text = format_comparison(compare(read(tmp_path)), width=200)
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert lines["going"].split()[1:9] == ["training", "5", "of", "10", "1", "1", "5", "0:01:29"]
    assert "1:01:40" in lines["done"]
    assert "failed" in lines["failed"]
    assert "16:40" in lines["silent"]
    assert "unknown" in lines["begun"]
    assert "failed: ValueError: the loss must be finite" in text
    # Those with a value first, the best of them first.
    order = [row["run"] for row in compare(read(tmp_path))["stages"][0]["runs"]]
    assert order == ["going", "done", "begun", "failed", "silent"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("status.json", b"{", "must be a run's status.json"),
        ("config.yaml", b"a: [", "config.yaml' must be YAML without loops, it is not"),
        ("config.yaml", b"a: &a {b: *a}", "config.yaml' must be YAML without loops, it is not"),
        ("config.yaml", b"- a", "config.yaml' must hold options"),
        ("config.yaml", b"!!python/object/apply:os.system ['false']", "config.yaml' must be YAML"),
        ("summary.json", b"nothing", "summary.json' must be JSON"),
        ("summary.json", b"[]", "summary.json' must hold a summary"),
        ("logs/version_0/metrics.csv", b"step,val/loss\nx,1\n", "logs' must hold curves"),
        ("logs/version_0/metrics.csv", b"\xff\xfe\x00", "logs' must hold curves"),
        ("logs/version_0/metrics.csv", b"step,val/loss\n1,2,3,4\n", "logs' must hold curves"),
    ],
)
def test_damaged_file_is_named_and_its_run_has_a_row(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    run = make_run(tmp_path / "a", config=options(), summary={"wall_seconds": 1.0}, said=status(state="complete"))
    (run / name).write_bytes(content)
    (record,) = read(tmp_path)
    (problem,) = record.problems
    assert message in problem
    assert "\n" not in problem
    text = format_comparison(compare([record]), width=200)
    assert f"a: {problem}" in text


@pytest.mark.parametrize(
    ("name", "value"),
    [("step", "five"), ("max_steps", None), ("pid", "1"), ("started", []), ("samples_per_second", "8"), ("error", 3)],
)
def test_status_of_wrong_types_is_no_status(tmp_path: Path, name: str, value: object) -> None:
    run = make_run(tmp_path / "a", summary={"wall_seconds": 1.0}, said=status())
    content = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(content | {name: value}))
    (record,) = read(tmp_path)
    (problem,) = record.problems
    assert problem.endswith(f"must be a run's status.json, its {name} is {value!r}")
    assert (record.state, record.wall_seconds) == ("complete", 1.0)
    format_comparison(compare([record]), width=200)


def test_values_of_wrong_types_are_none(tmp_path: Path) -> None:
    summary = {"wall_seconds": "long", "step": [], "loss": "low", "stage": 3}
    config = options(optim="none", model={"d_model": "wide"}, callbacks=[])
    (run,) = read(make_run(tmp_path / "a", [{"step": 1, "val/loss": float("nan")}], config=config, summary=summary))
    assert (run.wall_seconds, run.step, run.n_weights, run.max_steps) == (None, None, None, None)
    assert (run.stage, dict(run.curves), run.final("val/loss")) == ("unknown", {}, None)
    assert compare([run])["stages"][0]["runs"][0]["run"] == "a"


def test_runs_may_have_logged_different_metrics(tmp_path: Path, call: Callable[..., str]) -> None:
    make_run(tmp_path / "a", [{"step": 1, "val/loss": 1.0}], summary={})
    make_run(tmp_path / "b", [{"step": 1, "val/text_accuracy": 0.5}], summary={})
    make_run(tmp_path / "c", [{"step": 1, "val/text_accuracy": 0.75}], summary={"stage": "other"})
    call(tmp_path, "metric=val/loss", "metric=val/text_accuracy", f"out={tmp_path / 'c.csv'}")
    with open(tmp_path / "c.csv", newline="") as file:
        rows = {os.path.basename(row["directory"]): row for row in csv.DictReader(file)}
    assert [rows[name]["val/loss last"] for name in "abc"] == ["1.0", "", ""]
    assert [rows[name]["val/text_accuracy best"] for name in "abc"] == ["", "0.5", "0.75"]
    assert [rows[name]["stage"] for name in "abc"] == ["transformer", "transformer", "other"]
    runs = read(tmp_path)
    page = render_comparison(compare(runs, metrics=["val/text_accuracy"]), {run.directory: run.curves for run in runs})
    assert page.count("<polyline") == 2


def test_sorting(tmp_path: Path, call: Callable[..., str]) -> None:
    for name, (loss, accuracy, lr) in {"a": (1.0, 0.1, 3), "b": (2.0, 0.9, 1), "c": (3.0, 0.5, 2)}.items():
        rows = [{"step": 1, "val/loss": loss, "val/text_accuracy": accuracy}]
        make_run(tmp_path / name, rows, config=options(optim__lr=lr), summary={"wall_seconds": 10 - lr})

    def order(*arguments: str) -> str:
        text = call(tmp_path, *arguments)
        return "".join(re.findall(r"^([abc]) ", text, flags=re.MULTILINE))

    assert order() == "abc"
    assert order("metric=val/text_accuracy") == "bca", "more is better"
    assert order("sort=optim.lr") == "bca"
    assert order("sort=wall_seconds") == "acb"
    assert order("metric=val/text_accuracy", "sort=run") == "abc"


def test_numbers_in_names_are_sorted_by_their_size(tmp_path: Path) -> None:
    for name in ("run-10", "run-9", "a"):
        make_run(tmp_path / name, summary={})
    for sort in ("run", "best"):
        rows = compare(read(tmp_path), sort=sort)["stages"][0]["runs"]
        assert [row["run"] for row in rows] == ["a", "run-9", "run-10"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["gone"], 1, "there must be a run at 'gone', there is nothing; correct the path"),
        (["."], 1, "there must be a run at or below '.', a directory with status.json, config.yaml or summary.json"),
        (["a", "metric=val/lost"], 1, "metric must be one that a run has logged, got 'val/lost'; there are val/loss"),
        (["a", "sort=lr"], 1, "sort must be one of best, last, run"),
        (["a", "out=page.htm"], 2, "out must end in .html, .json, .csv, got 'page.htm'"),
        (["a", "best=1"], 2, "there is no option 'best'; there are metric, sort, out"),
    ],
)
def test_mistake_gets_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "a":
        make_run(tmp_path / "a", summary={})
    monkeypatch.setattr(sys, "argv", ["compare", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


class _Elements(HTMLParser):
    """Names of all elements, their attributes and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_hostile_names_stay_text(tmp_path: Path, call: Callable[..., str]) -> None:
    nasty = "\"><img src=x onerror=alert(1)><script>alert(2)<&'"
    for name in (f"a{nasty}".replace("/", ""), "b"):
        said = status(state="failed", error=f"ValueError: {nasty}")
        make_run(tmp_path / name, config=options(optim__note=name + nasty), said=said)
    call(tmp_path, f"out={tmp_path / 'page.html'}")
    elements = _Elements((tmp_path / "page.html").read_text())
    assert elements.names.count("script") == 1
    assert "img" not in elements.names
    assert not [name for name, _ in elements.attributes if name.startswith("on") or name == "style"]
    assert elements.text.count(f"a{nasty}") >= 3, "in the table, with the error and as an option"
    # Nothing is loaded: no address but that of the SVG's own clip paths.
    assert not [value for name, value in elements.attributes if name in ("src", "href") and value != "data:,"]
    assert any((value or "").startswith("default-src 'none'") for name, value in elements.attributes)


def test_page_has_options_as_the_table_has_them(tmp_path: Path, call: Callable[..., str]) -> None:
    for name, (clip, compiled) in {"a": (None, True), "b": (0.5, False)}.items():
        make_run(tmp_path / name, config=options(optim__clip=clip, optim__compiled=compiled))
    printed = call(tmp_path, f"out={tmp_path / 'page.html'}").split()
    page = (tmp_path / "page.html").read_text()
    for text in ("null", "true", "0.5", "false"):
        assert text in printed
        assert f'<td data-value="{text}">{text}</td>' in page


def test_files_hold_the_same_numbers(tmp_path: Path, call: Callable[..., str]) -> None:
    rows = [{"step": 4, "val/loss": 2.25}, {"step": 9, "val/loss": float("inf")}]
    make_run(tmp_path / "a", rows, config=options(), said=status(state="stopped"))
    make_run(tmp_path / "b", config=options(optim__lr=float("inf")), said=status(state="complete"))
    text = call(tmp_path, *(f"out={tmp_path / f'c.{ending}'}" for ending in ("html", "json", "csv")))
    assert text.count("written: ") == 3
    content = json.loads((tmp_path / "c.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    (group,) = content["stages"]
    values = {row["run"]: row["metrics"]["val/loss"]["last"] for row in group["runs"]}
    assert values == {"a": 2.25, "b": 1.5}
    with open(tmp_path / "c.csv", newline="") as file:
        assert [row["val/loss last"] for row in csv.DictReader(file)] == ["1.5", "2.25"]
    assert "2.25" in _Elements((tmp_path / "c.html").read_text()).text


def test_lines_are_where_their_values_are() -> None:
    chart = draw_chart("loss", [[(0, 0.0), (50, 5.0), (100, 10.0)], [], [(100, 2.5)]])
    assert [line.number for line in chart.lines] == [0, 2]
    # The view box is 720 x 320, with 62, 12, 10 and 26 for the numbers; ticks reach from 0 to 10.
    assert chart.lines[0].points == "62.0,294.0 385.0,152.0 708.0,10.0"
    assert chart.lines[1].points == "703.0,223.0 713.0,223.0", "one value is a short stroke"
    assert chart.y_ticks[0] == (294.0, "0")
    assert chart.y_ticks[-1] == (10.0, "10")
    assert chart.n_outside == 0
    with pytest.raises(ValueError, match="a chart needs at least one value, loss has none"):
        draw_chart("loss", [[]])


def test_run_that_diverges_does_not_hide_the_others() -> None:
    good = [(step, 1.0 + step % 3) for step in range(100)]
    chart = draw_chart("loss", [good, [(1, 2.0), (2, 1e9)]])
    numbers = [float(label.replace(",", "")) for _, label in chart.y_ticks]
    assert max(numbers) < 10
    assert chart.n_outside == 1
    heights = [float(point.split(",")[1]) for point in chart.lines[0].points.split()]
    assert max(heights) - min(heights) > 50


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-12, 7e8])
def test_constant_curve_is_a_line(value: float) -> None:
    chart = draw_chart("loss", [[(0, value), (10, value)]])
    (first, last) = chart.lines[0].points.split()
    assert first.split(",")[1] == last.split(",")[1]
    assert 10 <= float(first.split(",")[1]) <= 294


def test_thin_curves_keep_ends_and_extremes() -> None:
    curve = [(step, float(step % 7)) for step in range(10_000)]
    curve[5003] = (5003, 99.0)
    curve[7001] = (7001, -99.0)
    kept = thin(curve)
    assert len(kept) <= 402
    assert (kept[0], kept[-1]) == (curve[0], curve[-1])
    assert (5003, 99.0) in kept
    assert (7001, -99.0) in kept
    assert kept == sorted(kept)
    assert thin(curve[:400]) == curve[:400]


def test_runs_are_told_apart() -> None:
    styles = [tuple(style_of(number).values()) for number in range(100)]
    assert len(set(styles)) == 100


def test_times() -> None:
    assert [format_seconds(value) for value in (None, 4.25, 61, 3600)] == ["", "4.2 s", "0:01:01", "1:00:00"]


def test_a_hundred_runs_are_read_and_drawn_at_once(tmp_path: Path, call: Callable[..., str]) -> None:
    rows = [{"step": 10 * i, "train/loss": 1.0 / (i + 1), "val/loss": 2.0 / (i + 1)} for i in range(200)]
    for number in range(100):
        make_run(tmp_path / str(number), rows, config=options(optim__lr=number, optim__max_steps=2000), summary={})
    started = time.process_time()
    call(tmp_path, f"out={tmp_path / 'page.html'}")
    # A second here; a way of work that grows with the square of the runs would take minutes.
    assert time.process_time() - started < 20
    page = (tmp_path / "page.html").read_text()
    assert page.count("<polyline") == 200
    assert len(page) < 2_000_000
