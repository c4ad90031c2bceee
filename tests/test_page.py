"""The page and its pictures as files: what they hold is what was measured, and a failed one leaves the old one."""

from __future__ import annotations

import base64
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from torch import Tensor

import unrolled as ur
from unrolled.drawing.graph_layout import placed
from unrolled.drawing.inside import inside
from unrolled.drawing.measuring import portrait
from unrolled.drawing.paper import chart_picture, figure_of
from unrolled.drawing.portrait import MISSING, Chart, Series
from unrolled.drawing.vega import specification
from unrolled.errors import GradientError, InputError, OptionError

T, B, I, H = 9, 3, 5, 70


def loss(outputs: Tensor, state: Any) -> Tensor:
    return outputs.square().mean()


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def values(strip: Any) -> np.ndarray:
    levels = np.frombuffer(base64.b64decode(strip["levels"]), np.uint8).reshape(-1, strip["entries"])
    shares = levels.astype(float) / 127 - 1
    if strip["decades"]:
        shares = np.sign(shares) * 10 ** (strip["decades"] * (np.abs(shares) - 1))
    return shares * strip["scale"]


@pytest.fixture
def network() -> tuple[ur.Unrolled, Tensor]:
    torch.manual_seed(0)
    return ur.unroll(ur.LSTMCell(I, H)), torch.randn(T, B, I)


def test_strips_are_the_copies_tensors_in_eight_bits(network: Any, tmp_path: Path) -> None:
    rnn, inputs = network
    ur.draw(rnn, inputs, tmp_path / "page.html", loss=loss, row=1)
    copies = ur.copies(rnn, inputs)
    copies.backward(loss(copies.outputs, copies.state))
    wanted = {
        "x": [copy.input for copy in copies],
        "h": [copy.state[0] for copy in copies],
        "c": [copy.state[1] for copy in copies],
        "o": [copy.output for copy in copies],
        "dL/dx": [copy.input_grad for copy in copies],
        "dL/dh": [copy.total_state_grad[0] for copy in copies],
        "dL/dc": [copy.total_state_grad[1] for copy in copies],
        "dL/do": [copy.output_grad for copy in copies],
    }
    strips = data_of((tmp_path / "page.html").read_text())["layers"][0]["strips"]
    assert [strip["name"] for strip in strips] == list(wanted)
    for strip in strips:
        true = torch.stack(wanted[strip["name"]])[:, 1].detach().numpy()
        assert (strip["of"], strip["entries"]) == (true.shape[1], min(true.shape[1], 64))
        shown = true[:, : strip["entries"]]
        assert strip["scale"] == pytest.approx(float(abs(shown).max()))
        assert strip["decades"] == (12 if "gradient" in strip["role"] else 0)
        near = abs(shown) * 10 ** (12 / 127) - abs(shown) if strip["decades"] else strip["scale"] / 127
        assert (abs(values(strip) - shown) <= near * 0.52 + 1e-11 * strip["scale"]).all()


def test_what_is_not_finite_or_not_there_is_blank() -> None:
    class Odd(torch.nn.Module):
        def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return torch.where(input > 0, input, torch.inf), state

        def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
            return torch.zeros(batch_size, 1)

    inputs = torch.tensor([[[1.0, -1.0]], [[-1.0, 2.0]]])
    (strip,) = (s for s in portrait(ur.unroll(Odd()), inputs).layers[0].strips if s.role == "output")
    assert list(strip.levels) == [190, MISSING, MISSING, 254]
    assert strip.scale == 2.0


def test_charts_hold_the_figures_of_the_diagnosis(network: Any) -> None:
    rnn, inputs = network
    found, shown = ur.diagnose(rnn, inputs, loss).layers[0], portrait(rnn, inputs, loss).layers[0]
    charts = {chart.key: chart for chart in shown.charts}
    assert set(charts) == {"flow", "lag", "jacobian", "shares", "saturation", "states"}
    assert charts["jacobian"].series[0].y == pytest.approx(found.jacobian.median)
    assert charts["flow"].series[0].y == pytest.approx(found.flow.norms)
    assert charts["lag"].x == found.lag.lags
    assert charts["lag"].series[0].y == pytest.approx(found.lag.median)
    by_name = {one.name: one.norms for one in found.weights}
    assert {s.name: s.y for s in charts["shares"].series} == {n: pytest.approx(y) for n, y in by_name.items()}
    plan = rnn.plan(inputs)
    assert [(o.name, o.place, o.reason) for o in shown.operations] == [
        (o.name, o.place, o.reason) for o in plan.operations
    ]


def test_a_row_that_has_ended_is_blank(network: Any, tmp_path: Path) -> None:
    rnn, inputs = network
    lengths, resets = [T, 4, 6], torch.arange(T * B).view(T, B) % 5 == 3
    options = {"lengths": lengths, "resets": resets}
    ur.draw(rnn, inputs, tmp_path / "page.html", loss=loss, row=1, **options)
    outputs, _ = rnn(inputs, **options)
    strips = data_of((tmp_path / "page.html").read_text())["layers"][0]["strips"]
    (shown,) = (strip for strip in strips if strip["name"] == "o")
    levels = np.frombuffer(base64.b64decode(shown["levels"]), np.uint8).reshape(T, -1)
    assert (levels[4:] == MISSING).all()
    assert not (levels[:4] == MISSING).any()
    off = values(shown)[:4] - outputs[:4, 1, : shown["entries"]].detach().numpy()
    assert abs(off).max() <= shown["scale"] / 127 * 0.51


def test_the_memory_chart_marks_what_the_network_goes_by() -> None:
    rnn = ur.unroll(ur.LSTMCell(8, 16), memory=0.2)
    inputs = torch.randn(500, 2, 8)
    plan, (_, chart) = ur.plan_memory(rnn, inputs), portrait(rnn, inputs).charts
    assert chart.x == tuple(option["bytes"] for option in plan.to_dict()["options"])
    assert chart.labels[chart.chosen] == plan.chosen.name


def test_the_schedule_chart_walks_every_step_forward_and_back() -> None:
    rnn, inputs = ur.unroll(ur.LSTMCell(8, 16), memory=0.2), torch.randn(500, 2, 8)
    schedule, (chart, _) = ur.plan_memory(rnn, inputs).chosen.schedule, portrait(rnn, inputs).charts
    lines = {series.name: [y for y in series.y if y is not None] for series in chart.series}
    walked = {name: [abs(b - a) for a, b in zip(ys[::2], ys[1::2], strict=True)] for name, ys in lines.items()}
    assert sum(walked["forward, no tape"]) == schedule.extra_advances
    assert sum(walked["forward, taped"]) == sum(walked["backward"]) == 500
    assert max(walked["forward, taped"]) == schedule.length
    assert chart.x[-1] == 3 * 500 + schedule.extra_advances
    assert f"{schedule.extra_advances:,} steps are run once more" in chart.sentence
    whole = portrait(ur.unroll(ur.LSTMCell(8, 16)), inputs).charts[0]
    assert [series.y for series in whole.series] == [(0, 500, None, None, None, None), (None, None, None, 500, 0, None)]


def test_the_page_stands_alone_and_escapes_names(network: Any, tmp_path: Path) -> None:
    rnn, inputs = network
    hostile = "</script><script>alert(1)</script>\"'&"
    rnn.cell.__class__ = type(hostile, (ur.LSTMCell,), {})
    ur.draw(rnn, inputs, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page.split('<script id="vega"')[0])
    seen: list[str] = []

    class Scripts(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            seen.extend([tag] if tag == "script" else [])

    Scripts().feed(page)
    assert seen == ["script"] * 3
    assert data_of(page)["layers"][0]["cell"] == hostile
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in page


MAGIC = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}


@pytest.mark.parametrize("ending", MAGIC)
def test_pictures_of_the_network_and_of_a_chart(network: Any, ending: str, tmp_path: Path) -> None:
    rnn, inputs = network
    for chart in (None, "lag"):
        target = tmp_path / f"picture{ending}"
        ur.draw(rnn, inputs, target, chart=chart, loss=loss if chart else None)
        assert target.read_bytes().startswith((MAGIC[ending], b"<svg"))
        assert len(target.read_bytes()) > 2000


@pytest.fixture(scope="module")
def charts() -> dict[str, Chart]:
    torch.manual_seed(0)
    rnn = ur.unroll(ur.LSTMCell(3, 5), memory=0.3)
    shown = portrait(rnn, torch.randn(200, 2, 3), loss)
    return {chart.key: chart for chart in (*shown.layers[0].charts, *shown.charts)}


KEYS = ("flow", "lag", "jacobian", "shares", "saturation", "states", "schedule", "memory")


@pytest.mark.parametrize("key", KEYS)
def test_a_picture_of_a_chart_has_its_numbers(charts: dict[str, Chart], key: str) -> None:
    chart = charts[key]
    (axes,) = figure_of(chart).axes
    drawn = np.concatenate([np.asarray(line.get_data(), float).reshape(2, -1).T for line in axes.lines])
    wanted = [
        (x, np.nan if y is None else y) for series in chart.series for x, y in zip(chart.x, series.y, strict=True)
    ]
    np.testing.assert_array_equal(drawn, np.array(wanted, float))
    assert (axes.get_xscale(), axes.get_yscale()) == tuple("log" if x else "linear" for x in (chart.log_x, chart.log_y))
    assert chart_picture(chart, ".svg") == chart_picture(chart, ".svg")


@pytest.mark.parametrize("key", KEYS)
def test_nothing_written_in_a_picture_overlaps_or_is_cut(charts: dict[str, Chart], key: str) -> None:
    figure = figure_of(charts[key])
    figure.draw_without_rendering()
    texts = written(figure)
    assert len(texts) >= 8
    boxes = [text.get_window_extent() for text in texts]
    for n, (text, box) in enumerate(zip(texts, boxes, strict=True)):
        assert -1 <= box.x0 <= box.x1 <= figure.bbox.x1 + 1, text
        assert -1 <= box.y0 <= box.y1 <= figure.bbox.y1 + 1, text
        assert not any(box.padded(-1).overlaps(other.padded(-1)) for other in boxes[:n]), text


def written(figure: Any) -> list[Any]:
    """All text that is seen in a figure of one chart."""
    axes = figure.axes[0]
    texts = [text for text in figure.findobj(Text) if text.get_text() == figure.get_suptitle()]
    texts += [axes._left_title, axes.xaxis.label, *axes.texts]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))):
        texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [text for text in texts if text.get_text()]


def test_one_copy_has_a_page_and_complex_states_both_their_parts(tmp_path: Path) -> None:
    rnn = ur.unroll(ur.GRUCell(I, 4))
    ur.draw(rnn, torch.randn(1, B, I), tmp_path / "page.html", loss=loss)
    assert "need at least two copies" in (tmp_path / "page.html").read_text()

    class Turning(torch.nn.Module):
        def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
            return torch.full((batch_size, 1), 1 - 2j)

        def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return input, state * 1j

    (strip,) = (s for s in portrait(ur.unroll(Turning()), torch.randn(2, 1, 1)).layers[0].strips if s.role == "state")
    shown = (np.frombuffer(strip.levels, np.uint8).reshape(2, 2) / 127 - 1) * strip.scale
    np.testing.assert_allclose(shown, [[1, -2], [2, 1]], atol=2 / 127)


def test_the_inside_of_a_cell_is_what_was_recorded() -> None:
    plan = ur.unroll(ur.LSTMCell(I, 4)).plan(torch.randn(T, B, I))
    root = ElementTree.fromstring(inside("LSTMCell", plan.operations, plan.results))
    nodes = {int(node.get("data-node")): node for node in root.iter("{http://www.w3.org/2000/svg}g")}
    recorded = {n: node.get("data-operation") for n, node in nodes.items()}
    places = {int(number): nodes[n].get("class") for n, number in recorded.items() if number is not None}
    assert places == {n: f"node {operation.place}" for n, operation in enumerate(plan.operations)}
    names = {n: node[0].text for n, node in nodes.items() if recorded[n] is None}
    made = [name for name, _ in plan.results]
    assert {"input", "h", "weight_hh"} <= set(names.values())
    assert list(names.values())[-3:] == made == ["output", "next h", "next c"]
    edges = {(int(e.get("data-from")), int(e.get("data-to"))) for e in root.iter("{http://www.w3.org/2000/svg}path")}
    first = len(names) - len(made)
    at = {name: n for n, name in names.items()} | {n: first + n for n in range(len(plan.operations))}
    wanted = {(at[source], at[n]) for n, operation in enumerate(plan.operations) for source in operation.reads}
    assert edges == wanted | {(at[source], at[name]) for name, source in plan.results}


@given(st.data())
def test_nodes_of_a_graph_stand_apart_and_edges_lead_to_the_right(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    pairs = [(a, b) for b in range(count) for a in range(b)]
    edges = data.draw(st.lists(st.sampled_from(pairs), unique=True, max_size=20)) if pairs else []
    widths = data.draw(st.lists(st.floats(10, 90), min_size=count, max_size=count))
    found = placed(widths, edges)
    boxes = [(x, x + width, y - 11, y + 11) for (x, y), width in zip(found.nodes, widths, strict=True)]
    for n, (left, right, top, bottom) in enumerate(boxes):
        assert 0 <= left <= right <= found.width + 1e-6
        assert 0 <= top <= bottom <= found.height
        assert all(right < b[0] or b[1] < left or bottom < b[2] or b[3] < top for b in boxes[:n])
    for (a, b), points in zip(edges, found.edges, strict=True):
        xs = [x for x, _ in points]
        assert xs == sorted(xs)
        assert points[0] == (pytest.approx(boxes[a][1]), found.nodes[a][1])
        assert points[-1] == (pytest.approx(boxes[b][0]), found.nodes[b][1])


def test_layers_have_charts_of_their_own(tmp_path: Path) -> None:
    rnn = ur.stack([ur.GRUCell(I, H), ur.RNNCell(H, 4)])
    ur.draw(rnn, torch.randn(T, B, I), tmp_path / "flow.svg", loss=loss, chart="flow 1")
    ur.draw(ur.LSTM(I, 4, num_layers=2, bidirectional=True), torch.randn(T, B, I), tmp_path / "page.html", loss=loss)
    layers = data_of((tmp_path / "page.html").read_text())["layers"]
    assert [layer["name"] for layer in layers] == [
        f"layer {n}, {way}" for n in (0, 1) for way in ("forwards", "backwards")
    ]
    assert [layer["reverse"] for layer in layers] == [False, True] * 2


def test_what_is_refused_leaves_the_file_as_it_was(network: Any, tmp_path: Path) -> None:
    rnn, inputs = network
    target = tmp_path / "page.html"
    target.write_text("the good one")
    refusals: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
        (OptionError, r"must end in \.html, \.svg", tmp_path / "page.htm", {}),
        (OptionError, "directory that exists", tmp_path / "none" / "page.html", {}),
        (InputError, "row must be one of the batch's 3", target, {"row": 3}),
        (
            OptionError,
            "chart must be one of 'schedule', 'memory', got 'flow'; those of gradients need loss=",
            tmp_path / "a.svg",
            {"chart": "flow"},
        ),
        (OptionError, r"chart= draws a picture .* got a \.txt file", tmp_path / "a.txt", {"chart": "memory"}),
        (GradientError, "does not depend", target, {"loss": lambda outputs, state: torch.ones((), requires_grad=True)}),
    ]
    refusals += [
        (OptionError, "chart= draws a picture", target, {"chart": "lag", "loss": loss}),
        (OptionError, "chart= draws a picture .* got no path", None, {"chart": "lag", "loss": loss}),
        (OptionError, "shows nothing of row=", tmp_path / "a.svg", {"row": 1}),
        (OptionError, "shows nothing of lengths=", None, {"lengths": [1, 2, 3]}),
        (OptionError, "loss must be a function", target, {"loss": "sum"}),
        (InputError, r"row must be an integer, got 0\.5", target, {"row": 0.5}),
        (InputError, "lengths that are all 0", target, {"lengths": [0, 0, 0]}),
        (OptionError, "path must be a name that the system takes", tmp_path / f"{'x' * 300}.html", {}),
    ]
    for error, told, path, options in refusals:
        with pytest.raises(error, match=told):
            ur.draw(rnn, inputs, path, **options)
    with pytest.raises(OptionError, match="up to 4000 copies, got 4001"):
        ur.draw(ur.unroll(ur.RNNCell(1, 1)), torch.zeros(4001, 1, 1), target)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert target.read_text() == "the good one"


def test_without_the_packages_it_says_how_to_get_them(network: Any, tmp_path: Path, monkeypatch: Any) -> None:
    rnn, inputs = network
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    for name in ("page.html", "net.png"):
        with pytest.raises(OptionError, match=r"pip install 'unrolled\[draw\]'"):
            ur.draw(rnn, inputs, tmp_path / name)
    ur.draw(rnn, inputs, tmp_path / "net.svg")


def test_results_are_told_in_notebooks_and_as_json() -> None:
    rnn, inputs = ur.unroll(ur.GRUCell(I, 4)), torch.randn(T, B, I)
    copies = ur.copies(rnn, inputs)
    copies.backward(copies.outputs.sum())
    results = [rnn.plan(inputs), ur.verify(rnn, inputs), ur.plan_memory(rnn, inputs), copies.truncated(3)]
    for result in [*results, ur.diagnose(rnn, inputs, loss)]:
        assert json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert html.escape(str(result)).splitlines()[0] in result._repr_html_()


def test_a_chart_is_drawn_as_it_was(regenerate: bool) -> None:
    band = Series("median", (1.0, 0.1, None), (0.5, 0.05, None), (2.0, 0.2, None))
    chart = Chart("lag", "A title", "lag", "norm", (1.0, 2.0, 3.0), (band,), "A sentence.", by_copy=True, log_y=True)
    told = json.dumps(specification(chart), indent=1) + "\n"
    golden = Path(__file__).parent / "golden" / "chart.json"
    if regenerate:
        golden.write_text(told, encoding="utf-8")
    assert told == golden.read_text(encoding="utf-8")
