"""Plots: what is drawn is where it belongs, and what is not known is not drawn."""

import ast
import math
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from vllm_k80 import plot

SVG = "{http://www.w3.org/2000/svg}"
LABELS = {"title": "Throughput", "x_label": "concurrency", "y_label": "tokens/s"}


def drawn(series: Any, **more: Any) -> ElementTree.Element:
    return ElementTree.fromstring(plot.line_plot(series, **(LABELS | more)))


def words(svg: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in svg.iter(f"{SVG}text")]


def curves(svg: ElementTree.Element) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
        for line in svg.iter(f"{SVG}polyline")
    ]


def dots(svg: ElementTree.Element) -> list[str]:
    return [str(dot.findtext(f"{SVG}title")) for dot in svg.iter(f"{SVG}circle")]


def test_a_line_lies_where_the_ticks_say() -> None:
    svg = drawn({"die 0": [(0, 0), (5, 30), (10, 60)]})
    (curve,) = curves(svg)
    place = {
        text.text: (float(text.attrib["x"]), float(text.attrib["y"]))
        for text in svg.iter(f"{SVG}text")
    }
    begin, middle, end = curve
    assert middle == pytest.approx([(a + b) / 2 for a, b in zip(begin, end, strict=True)], abs=0.1)
    assert end[0] == pytest.approx(place["10"][0], abs=0.1)  # on x, labels are centred
    assert end[1] == pytest.approx(place["60"][1] - 4, abs=0.1)  # on y, 4 pixels below their line
    assert begin[1] > end[1]  # upwards


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((0, 100), ["0", "20", "40", "60", "80", "100"]),
        ((0.0, 0.021), ["0.000", "0.005", "0.010", "0.015", "0.020", "0.025"]),
        ((300, 4100), ["0", "1,000", "2,000", "3,000", "4,000", "5,000"]),
        ((-7, 3), ["-8", "-6", "-4", "-2", "0", "2", "4"]),
        ((0, 0), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
    ],
)
def test_ticks_are_round_numbers_that_enclose_the_values(
    values: tuple[float, float], ticks: list[str]
) -> None:
    svg = drawn({"a": list(enumerate(values))})
    ends = [t.text for t in svg.iter(f"{SVG}text") if t.get("text-anchor") == "end"]
    assert ends == ticks


@pytest.mark.parametrize("unknown", [None, math.nan, math.inf])
def test_what_is_not_known_is_a_gap(unknown: float | None) -> None:
    svg = drawn({"a": [(0, 1), (1, 2), (2, unknown), (3, 2), (4, 1), (5, unknown), (6, 3)]})
    assert [len(curve) for curve in curves(svg)] == [2, 2]
    assert dots(svg) == ["a: 0, 1", "a: 1, 2", "a: 3, 2", "a: 4, 1", "a: 6, 3"]


def test_a_long_curve_has_no_dots_but_for_lone_points() -> None:
    points = [(x, float(x)) for x in range(100)] + [(100, None), (101, 5.0)]
    assert dots(drawn({"a": points})) == ["a: 101, 5"]


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [(1, None)], "b": [(1, math.nan)]}])
def test_no_data_is_said(series: Any) -> None:
    svg = drawn(series)
    assert "No data." in words(svg)
    assert not curves(svg)
    assert {f"{name} (no data)" for name in series} <= set(words(svg))


def test_a_series_without_data_beside_one_with_is_said() -> None:
    assert {"a", "b (no data)"} <= set(words(drawn({"a": [(1, 1)], "b": []})))


def test_names_cannot_break_out() -> None:
    name = "<script>\"&'</script>"
    svg = drawn({name: [(1, 1)]}, title=name, x_label=name, y_label=name)  # it parses
    assert svg.findtext(f"{SVG}title") == name
    assert words(svg).count(name) == 4
    assert dots(svg) == [f"{name}: 1, 1"]


def test_colours_are_the_pages_and_differ() -> None:
    text = plot.line_plot({f"die {n}": [(0, n), (1, n)] for n in range(8)}, **LABELS)
    lines = re.findall(r"<polyline [^>]*? (stroke=.*?) fill", text)
    assert len(set(lines)) == 8
    assert set(re.findall(r"#\w+", text)) <= set(re.findall(r"var\(--plot-\d, (#\w+)\)", text))


def test_another_kind_of_line_is_dashed() -> None:
    two = {"measured": [(1, 1), (2, 2)], "predicted": [(1, 2), (2, 3)]}
    svg = drawn(two, dashed=("predicted",))
    assert [p.attrib["stroke-dasharray"] for p in svg.iter(f"{SVG}polyline")] == ["none", "6 4"]


def test_a_legend_wraps_and_all_stays_inside() -> None:
    many = {f"k80-server-{n} die 0": [(0, n), (3600, n / 2)] for n in range(24)}
    svg = drawn(many, width=320, height=120)
    width, height = (float(svg.attrib[name]) for name in ("width", "height"))
    assert width == 320
    assert set(many) <= set(words(svg))
    for curve in curves(svg):
        assert all(0 <= x <= width and 0 <= y <= height for x, y in curve)
    for text in svg.iter(f"{SVG}text"):
        assert 0 <= float(text.attrib["x"]) <= width
        assert 0 <= float(text.attrib["y"]) <= height


def test_the_file_is_python_3_9_and_needs_the_standard_library_only() -> None:
    tree = ast.parse(Path(plot.__file__).read_text(), feature_version=(3, 9))
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported <= sys.stdlib_module_names
