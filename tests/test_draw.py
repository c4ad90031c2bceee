"""Drawings: what they say, that they fit, and that drawing changes nothing but the file asked for."""

from __future__ import annotations

import io
import itertools
import os
import re
import sys
import xml.etree.ElementTree as ET
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn

import unrolled as ur
from unrolled.drawing.draw import draw
from unrolled.drawing.lettering import columns, shortened
from unrolled.drawing.probe import sketches_of
from unrolled.drawing.sketch import Parameter, Sketch, TensorLabel
from unrolled.drawing.svg import svg
from unrolled.drawing.text import text

GOLDEN = Path(__file__).parent / "golden"
SVG = "{http://www.w3.org/2000/svg}"
LENGTHS = [1, 2, 3, 5, 6, 7, 100, 100_000]
HOSTILE = '<script>alert("x")&\'</script>' + "W" * 200 + "\x00\x1b\u202e\ud800]]>"

Memory = namedtuple("Memory", ["fast", "slow"])


class Nested(nn.Module):
    """Integer inputs in a dict, a nested state with a learned part, frozen weights, a buffer, randomness."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 6)
        self.start = nn.Parameter(torch.zeros(6))
        self.unread = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def initial_state(self, batch_size, device=None, dtype=None):
        memory = Memory(self.start.expand(batch_size, 6), torch.rand(batch_size, 6))
        return {"memory": memory, "clock": torch.zeros(batch_size, dtype=torch.int64)}

    def forward(self, input, state):
        self.steps += 1
        fast, slow = state["memory"]
        fast = fast + torch.randn_like(fast)
        read = self.embedding(input["tokens"])
        state = {"memory": Memory(fast + read, slow + fast), "clock": state["clock"] + 1}
        return {"logits": fast, "clock": state["clock"]}, state


def _sketched(*given) -> Sketch:
    (sketch,) = sketches_of(*given)
    return sketch


def rule(x, s):
    return s + x, s + x


def leaf(name: str, *shape: int) -> TensorLabel:
    return TensorLabel(name, "", shape, "float32")


def sketches(T: int) -> dict[str, Sketch]:
    plain = {"T": T, "B": 32, "input": (leaf("x", 32, 28),), "output": (leaf("o", 32, 128),)}
    pair = leaf("h", 32, 128), leaf("c", 32, 128)
    many = tuple(leaf(f"s['layer'][{n}]['gate'].{'deep' * 9}", *range(1, 14)) for n in range(20))
    frozen = Parameter("重み" * 30, (2**60, 3), shared=False, trained=False)
    hostile = (leaf(HOSTILE, 32, 2**40),)
    return {
        "lstm": Sketch("LSTMCell", **plain, state=pair, parameters=(Parameter("weight_ih", (512, 28)),)),
        "rule": Sketch("rule", **plain, state=(leaf("s", 32, 128),)),
        "stateless": Sketch("f", T=T, B=1, input=(leaf("x", 1),), state=(), output=()),
        "nested": Sketch("Nested", **plain, state=many, parameters=(Parameter("start", (6,), False),) * 40),
        "context": Sketch("Attend", **plain, state=pair[:1], context=many, origin="learned"),
        "broad": Sketch("漢字" * 30, **plain, state=pair, parameters=(frozen,)),
        "hostile": Sketch(HOSTILE, T=T, B=10**9, input=hostile, state=hostile * 2, output=hostile, context=hostile,
                          parameters=(Parameter(HOSTILE, (1,)), Parameter("\n".join("abc"), (), False, False))),
    }  # fmt: skip


MATRIX = [pytest.param(sketch, id=f"{name}-{T}") for T in [*LENGTHS, 10**12] for name, sketch in sketches(T).items()]


# What the pictures look like.

PICTURES = {
    "lstm_100": (lambda: ur.unroll(ur.LSTMCell(28, 128)), lambda: torch.zeros(100, 32, 28)),
    "gru_layer_1": (lambda: ur.GRU(3, 4, batch_first=True), lambda: torch.zeros(2, 1, 3)),
    "nested_7": (lambda: ur.unroll(Nested()), lambda: {"tokens": torch.ones(7, 4, dtype=torch.int64)}),
}


@pytest.mark.parametrize("suffix", [".txt", ".svg"])
@pytest.mark.parametrize("name", PICTURES)
def test_golden(name, suffix, tmp_path, regenerate):
    make, inputs = PICTURES[name]
    written = draw(make(), inputs(), tmp_path / f"{name}{suffix}")
    golden = GOLDEN / written.name
    if regenerate:
        golden.write_bytes(written.read_bytes())
    assert written.read_bytes() == golden.read_bytes()


def test_the_sketch_says_what_the_network_is():
    sketch = _sketched(ur.unroll(Nested()), {"tokens": torch.ones(7, 4, dtype=torch.int64)}, None, None)
    assert sketch == Sketch(
        cell="Nested",
        T=7,
        B=4,
        input=(TensorLabel("x['tokens']", "['tokens']", (4,), "int64"),),
        state=(
            TensorLabel("s['clock']", "['clock']", (4,), "int64"),
            TensorLabel("s['memory'].fast", "['memory'].fast", (4, 6), "float32"),
            TensorLabel("s['memory'].slow", "['memory'].slow", (4, 6), "float32"),
        ),
        output=(
            TensorLabel("o['clock']", "['clock']", (4,), "int64"),
            TensorLabel("o['logits']", "['logits']", (4, 6), "float32"),
        ),
        parameters=(
            Parameter("start", (6,), shared=False),
            Parameter("unread", (3,), trained=False),
            Parameter("embedding.weight", (50, 6)),
        ),
        origin="learned",
    )
    assert sketch.count == 309
    assert sketch.sharing == "one set of weights, shared by all 7 copies: 303 parameters"


def test_a_weight_that_initial_state_and_step_both_read_is_shared():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3), requires_grad=False)

        def initial_state(self, batch_size, device=None, dtype=None):
            return (2 * self.weight).expand(batch_size, 3)

        def forward(self, input, state):
            return input, state * self.weight

    sketch = _sketched(ur.unroll(Tied()), torch.ones(2, 4, 3), None, None)
    assert (sketch.origin, sketch.parameters) == ("learned", (Parameter("weight", (3,), trained=False),))


def test_where_the_initial_state_comes_from():
    inputs, state = torch.ones(2, 4, 3), (torch.zeros(4, 5), torch.zeros(4, 5))
    own, learned = ur.LSTMCell(3, 5), ur.LSTMCell(3, 5, learn_initial_state=True)
    assert _sketched(ur.unroll(own), inputs, None, None).origin == "own"
    assert _sketched(ur.unroll(learned), inputs, None, None).origin == "learned"
    assert _sketched(ur.unroll(learned), inputs, state, None).origin == "passed"
    apart = [p.name for p in _sketched(ur.unroll(learned), inputs, None, None).parameters if not p.shared]
    assert apart == ["initial_h", "initial_c"]


@pytest.mark.parametrize("batch_first", [False, True])
def test_layers_and_adapted_cells_go_by_their_public_names(batch_first):
    layer = _sketched(ur.LSTM(3, 5, batch_first=batch_first), torch.ones(2, 4, 3), None, None)
    assert (layer.T, layer.B)[:: -1 if batch_first else 1] == (2, 4)
    assert [p.name for p in layer.parameters] == ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    assert layer.state_symbols == ("h", "c")
    adapted = _sketched(ur.unroll(nn.GRUCell(3, 5)), torch.ones(2, 4, 3), None, None)
    assert [p.name for p in adapted.parameters] == ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    assert (adapted.cell, adapted.state_symbols) == ("GRUCell", ("s",))


def test_a_context_is_drawn():
    def attend(input, state, context):
        return state + context["keys"].sum(1), state

    cell = ur.as_cell(attend, state=lambda B, **_: torch.zeros(B, 3))
    sketch = _sketched(ur.unroll(cell), torch.ones(2, 4, 3), None, {"keys": torch.ones(4, 9, 3)})
    assert sketch.context == (TensorLabel("context['keys']", "['keys']", (4, 9, 3), "float32"),)


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_layer_takes_one_sequence_without_a_batch(batch_first):
    state = torch.zeros(1, 5), torch.zeros(1, 5)
    sketch = _sketched(ur.LSTM(3, 5, batch_first=batch_first), torch.ones(7, 3), state, None)
    assert (sketch.T, sketch.B, sketch.origin) == (7, 1, "passed")
    assert sketch.input[0].shape == (1, 3)


def test_layers_and_directions_are_drawn_one_after_the_other():
    rnn = ur.LSTM(3, 5, num_layers=2, bidirectional=True, batch_first=True)
    state = torch.zeros(4, 4, 5), torch.zeros(4, 4, 5)
    found = sketches_of(rnn, torch.ones(4, 7, 3), state, None)
    ways = "forwards", "backwards"
    assert [s.place for s in found] == [f"layer {n}, {way}" for n in (0, 1) for way in ways]
    assert [s.input[0].shape for s in found] == [(4, 3), (4, 3), (4, 10), (4, 10)]
    assert [s.parameters[0].name for s in found][1::2] == ["weight_ih_l0_reverse", "weight_ih_l1_reverse"]
    assert [s.reverse for s in found] == [False, True, False, True]
    assert {(s.T, s.B, s.origin, s.state_symbols, len(s.parameters)) for s in found} == {
        (7, 4, "passed", ("h", "c"), 4)
    }


def test_a_stack_of_other_cells_is_drawn_and_nothing_changes(tmp_path, capsys):
    cells = [ur.GRUCell(3, 4, learn_initial_state=True), ur.as_cell(nn.LSTMCell(4, 2))]
    rnn, random = ur.stack(cells, dropout=0.5), torch.get_rng_state()
    assert [s.cell for s in sketches_of(rnn, torch.ones(2, 4, 3), None, None)] == ["GRUCell", "LSTMCell"]
    draw(rnn, torch.ones(2, 4, 3))
    printed = capsys.readouterr().out
    assert printed.index("GRUCell, layer 0") < printed.index("LSTMCell, layer 1")
    drawn = ET.fromstring(draw(rnn, torch.ones(2, 4, 3), tmp_path / "a.svg").read_text(encoding="utf-8"))
    height = int(drawn.get("height"))
    (below,) = drawn.findall(f"{SVG}g")
    assert 0 < int(below.get("transform").split()[1].rstrip(")")) < height
    texts = ["".join(label.itertext()) for label in drawn.iter(f"{SVG}text")]
    assert {"GRUCell, layer 0", "LSTMCell, layer 1"} <= set(texts)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_reversed_network_is_drawn_from_its_last_copy(tmp_path):
    rnn = ur.unroll(ur.RNNCell(3, 4), reverse=True)
    drawn = draw(rnn, torch.ones(9, 2, 3), tmp_path / "a.txt").read_text(encoding="utf-8")
    assert "T = 9 time steps, from the last to the first" in drawn
    copies = next(line for line in drawn.splitlines() if "x8" in line)
    assert re.findall(r"x\d", copies)[0] == "x8"
    assert re.findall(r"x\d", copies)[-1] == "x0"
    handed = next(line for line in drawn.splitlines() if "h9" in line)
    assert re.findall(r"h\d", handed)[0] == "h9"
    assert re.findall(r"h\d", handed)[-1] == "h0"
    root = ET.fromstring(draw(rnn, torch.ones(9, 2, 3), tmp_path / "a.svg").read_text(encoding="utf-8"))
    assert "copies 8 to 0 from left to right" in root.find(f"{SVG}desc").text


# Drawing changes nothing.


def test_nothing_changes_but_the_file(tmp_path):
    rnn, inputs = ur.unroll(Nested()), {"tokens": torch.ones(7, 4, dtype=torch.int64)}
    state = rnn.cell.initial_state(4)
    state["memory"] = Memory(torch.zeros(4, 6), state["memory"].slow)
    before = {name: tensor.clone() for name, tensor in rnn.state_dict().items()}
    random, version = torch.get_rng_state(), state["memory"].fast._version
    draw(rnn, inputs, tmp_path / "a.svg")
    draw(rnn, inputs, tmp_path / "b.svg", state=state)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in rnn.state_dict().items())
    assert [p.requires_grad for p in rnn.parameters()] == [True, False, True]
    assert all(p.grad is None for p in rnn.parameters())
    assert state["memory"].fast._version == version
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "b.svg"]


def test_drawing_works_in_inference_mode(capsys):
    with torch.inference_mode():
        assert draw(ur.unroll(ur.GRUCell(3, 4, learn_initial_state=True)), torch.ones(2, 4, 3)) is None
    assert "initial state: learned with the weights" in capsys.readouterr().out


# Files and what is refused.


def test_a_picture_is_written_whole_and_its_path_returned(tmp_path):
    path = tmp_path / "Größe.SVG"
    path.write_text("old")
    assert draw(ur.RNN(3, 4), torch.ones(2, 4, 3), str(path)) == path
    assert path.read_text(encoding="utf-8").startswith("<svg ")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a.gif", "must end in .html, .svg, .png, .pdf or .txt"),
        ("a", "must end in .html, .svg, .png, .pdf or .txt"),
        ("missing/a.svg", "directory that exists"),
        ("directory.svg", "must be a file"),
    ],
)
def test_impossible_paths_are_refused_before_the_network_runs(name, told, tmp_path):
    (tmp_path / "directory.svg").mkdir()
    with pytest.raises(ur.OptionError, match=re.escape(told)):
        draw(ur.RNN(3, 4), None, tmp_path / name)


def test_what_is_no_path_is_refused():
    with pytest.raises(ur.OptionError, match=r"str or a Path.*got 3"):
        draw(ur.RNN(3, 4), torch.ones(2, 4, 3), 3)


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(ur.OptionError, match="disk full"):
        draw(ur.RNN(3, 4), torch.ones(2, 4, 3), tmp_path / "a.txt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="links need rights elsewhere")
def test_a_link_is_written_through(tmp_path):
    (tmp_path / "link.svg").symlink_to(tmp_path / "real.svg")
    draw(ur.RNN(3, 4), torch.ones(2, 4, 3), tmp_path / "link.svg")
    assert (tmp_path / "link.svg").is_symlink()
    assert (tmp_path / "real.svg").is_file()


def test_what_the_call_refuses_is_refused_and_nothing_written(tmp_path):
    rnn, path = ur.unroll(ur.RNNCell(3, 4)), tmp_path / "a.svg"
    for error, arguments in [
        (ur.InputError, {"inputs": torch.ones(3)}),
        (ur.InputError, {"inputs": "text"}),
        (ur.InputError, {"inputs": torch.ones(2, 4, 3), "context": torch.ones(4)}),
        (ur.InputError, {"inputs": torch.ones(2, 4, 3), "context": "text"}),
        (ur.StateError, {"inputs": torch.ones(2, 4, 3), "state": torch.ones(1)}),
        (ur.InputError, {"inputs": torch.ones(2, 4, 9)}),
    ]:
        with pytest.raises(error):
            draw(rnn, path=path, **arguments)
    with pytest.raises(ur.InputError, match="PackedSequence"):
        draw(ur.GRU(3, 4), nn.utils.rnn.pack_sequence([torch.ones(2, 3)]), path)
    with pytest.raises(ur.OptionError, match="draw takes what unroll or stack made, got a RNN"):
        draw(nn.RNN(3, 4), torch.ones(2, 4, 3), path)
    assert list(tmp_path.iterdir()) == []


# Text.


@pytest.mark.parametrize("ascii", [False, True])
@pytest.mark.parametrize("sketch", MATRIX)
def test_text_fits_in_80_columns(sketch, ascii):
    lines = text(sketch, ascii=ascii).splitlines()
    assert max(map(columns, lines)) <= 80
    assert not ascii or "\n".join(lines).isascii()
    assert not [c for line in lines for c in line if not c.isprintable()]


@pytest.mark.parametrize("T", LENGTHS)
def test_copies_are_left_out_only_where_they_do_not_fit(T):
    drawn = text(sketches(T)["lstm"])
    assert ("more …" in drawn) == (T > 7)
    assert f"o{T - 1}" in drawn


def test_a_long_name_is_told_in_full_once():
    name = "Bidirectional" * 12
    drawn = text(Sketch(name, 3, 2, (leaf("x", 2),), (leaf("s", 2),), (leaf("o", 2),)))
    assert drawn.replace("\n", "").startswith(name)
    assert name[:39] + "…" in drawn


@pytest.mark.parametrize(("encoding", "box"), [("utf-8", "┌"), ("ascii", "+"), ("cp1252", "+"), (None, "┌")])
def test_a_terminal_without_box_characters_gets_ascii(encoding, box, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n") if encoding else io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    draw(ur.LSTM(3, 4), torch.ones(20, 4, 3))
    stream.seek(0)
    assert box in stream.read()


def test_lettering():
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdefg", 6) == "abcde…"
    assert shortened("abcdefg", 5, middle=True) == "ab…fg"
    assert columns(shortened("漢字漢字", 5)) <= 5
    assert columns(shortened("x" * 10**6, 40)) == 40


# SVG: bounding boxes are computed here anew from the file, by a measure of its own.


def wide(text: str, size: float) -> float:
    """At least as wide as common fonts draw a text; DejaVu Sans, the widest of them, needs 0.6 em on average."""
    return sum(
        size * (0.34 if c in "ijl.,:;'|![]() " else 0.95 if c in "mwMW" or not c.isascii() else 0.6) for c in text
    )


def texts(root: ET.Element) -> list[tuple[str, float, float, float, float]]:
    found = []
    for element in root.iter(f"{SVG}text"):
        size, x, y = (float(element.get(name)) for name in ("font-size", "x", "y"))
        parts = [(element.text or "", size)]
        for child in element:
            small = float(child.get("font-size", size))
            parts += [(child.text if child.tag == f"{SVG}tspan" else "", small), (child.tail or "", size)]
        parts = [(part.strip("\n"), small) for part, small in parts]
        width = sum(wide(part, small) for part, small in parts)
        left = x - width * {"middle": 0.5, "end": 1.0}.get(element.get("text-anchor"), 0)
        found.append(("".join(part for part, _ in parts), left, y - 0.8 * size, left + width, y + 0.22 * size))
    return found


def boxes(root: ET.Element) -> list[tuple[str, float, float, float, float]]:
    places = [
        (r.get("class"), *(float(r.get(name)) for name in ("x", "y", "width", "height")))
        for r in root.iter(f"{SVG}rect")
    ]
    return [(name, x, y, x + width, y + height) for name, x, y, width, height in places]


def lines(root: ET.Element) -> list[tuple[str, float, float, float, float]]:
    """The straight ones, a stroke's width thick."""
    straight = [path for path in root.iter(f"{SVG}path") if re.fullmatch(r"M[^A-Za-z]+L[^A-Za-z]+", path.get("d"))]
    ends = [(path.get("class"), *map(float, re.findall(r"[-\d.]+", path.get("d")))) for path in straight]
    return [(name, min(a, c) - 1, min(b, d) - 1, max(a, c) + 1, max(b, d) + 1) for name, a, b, c, d in ends]


def overlap(a, b) -> bool:
    return a[1] < b[3] and b[1] < a[3] and a[2] < b[4] and b[2] < a[4]


def inside(a, b) -> bool:
    return b[1] <= a[1] and a[3] <= b[3] and b[2] <= a[2] and a[4] <= b[4]


def arrows(root: ET.Element) -> list[tuple[str, float, float]]:
    heads = [path for path in root.iter(f"{SVG}path") if path.get("class").startswith("head")]
    return [(p.get("class"), *map(float, re.match(r"M(\S+) (\S+?)L", p.get("d")).groups())) for p in heads]


@pytest.mark.parametrize("sketch", MATRIX)
def test_no_labels_overlap_and_all_is_within_the_picture(sketch):
    root = ET.fromstring(svg(sketch))
    _, _, width, height = map(float, root.get("viewBox").split())
    labels, rects = texts(root), boxes(root)
    for a, b in itertools.combinations(labels, 2):
        assert not overlap(a, b), f"{a} and {b}"
    for label, line in itertools.product(labels, lines(root)):
        assert not overlap(label, line), f"{label} and {line}"
    for label, rect in itertools.product(labels, rects):
        assert inside(label, rect) or not overlap(label, rect), f"{label} and {rect}"
    for name, left, top, right, bottom in labels + rects:
        assert left >= 0, name
        assert top >= 0, name
        assert right <= width, name
        assert bottom <= height, name


@pytest.mark.parametrize("T", LENGTHS)
def test_arrows_touch_the_copies_and_tell_the_sequence(T):
    root = ET.fromstring(svg(sketches(T)["lstm"]))
    cells = [box for box in boxes(root) if box[0] == "cell"]
    names = [label[0] for label in texts(root)]
    last = T if T <= 6 else 5
    assert len(cells) == 1 + last
    for _, left, _, right, bottom in cells:
        assert ("head input", (left + right) / 2, bottom) in arrows(root)
    for _, left, top, _, bottom in cells[1:]:
        assert ("head state", left, (top + bottom) / 2) in arrows(root)
    assert [name for name in (f"x{T - 1}", f"o{T - 1}", "h0", "c0", f"h{T}", f"c{T}") if name not in names] == []
    assert ("more" in names) == (T > 6)
    assert T <= 6 or f"{T - 5:,}" in names


def test_hostile_names_stay_text():
    root = ET.fromstring(svg(sketches(100)["hostile"]))
    assert {element.tag.removeprefix(SVG) for element in root.iter()} == {
        "svg", "title", "desc", "style", "rect", "path", "text", "tspan"
    }  # fmt: skip
    titles = [title.text for title in root.iter(f"{SVG}title")]
    assert any(title.startswith('<script>alert("x")&\'</script>WWW') and "\x00" not in title for title in titles)


def test_the_picture_needs_nothing_from_elsewhere_and_speaks():
    drawn = svg(sketches(100)["lstm"])
    root = ET.fromstring(drawn)
    assert not re.search(r"url\(|href|@import|<script|<image|https?://(?!www\.w3\.org/2000/svg)", drawn)
    assert root.get("role") == "img"
    assert "@media (prefers-color-scheme:dark)" in root.find(f"{SVG}style").text
    assert root.find(f"{SVG}title").text == "LSTMCell, unrolled over T = 100 time steps, batch B = 32"
    assert "copies 0 to 99 from left to right" in root.find(f"{SVG}desc").text
    assert "One set of weights, shared by all 100 copies: 14,336 parameters." in root.find(f"{SVG}desc").text
