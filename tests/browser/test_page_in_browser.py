"""The page in a real browser: opened from disk, unfolded, walked through, its views linked (`make test-browser`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page, sync_playwright

import unrolled as ur

pytestmark = pytest.mark.browser
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
SHOTS = Path(os.environ.get("UNROLLED_SCREENSHOTS", "build/screenshots"))
WIDE, NARROW = {"width": 1200, "height": 900}, {"width": 360, "height": 740}
HOSTILE = "<script>window.hacked = 1</script>\"'&" + "x" * 200


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = shutil.which("chromium")
    assert found, "these tests need chromium; install Debian's package"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    folder, hostile = tmp_path_factory.mktemp("pages"), ur.LSTMCell(8, 32)
    hostile.__class__ = type(HOSTILE, (ur.LSTMCell,), {})
    made = {
        "lstm": (ur.unroll(ur.LSTMCell(8, 32)), 120, 0),
        "long": (ur.stack([ur.GRUCell(8, 16), ur.RNNCell(16, 8)]), 1000, 1),
        "hostile": (ur.unroll(hostile), 12, 0),
    }
    for name, (rnn, T, row) in made.items():
        inputs = torch.randn(T, 2, 8)
        ur.draw(rnn, inputs, folder / f"{name}.html", loss=lambda outputs, state: outputs.square().mean(), row=row)
    ur.draw(ur.unroll(ur.RNNCell(8, 4)), torch.randn(1, 1, 8), folder / "bare.html")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture
def opened(browser: Browser, pages: dict[str, Path]) -> Iterator[Callable[..., Page]]:
    """Opens a page; fails at the end if it said or asked for anything."""
    said: list[str] = []
    contexts = []

    def opening(name: str, size: dict[str, int] = WIDE, scheme: str = "light") -> Page:
        context = browser.new_context(viewport=size, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or said.append(request.url)
        )
        page.goto(pages[name].as_uri())
        return page

    yield opening
    for context in contexts:
        context.close()
    assert said == []


def chosen(page: Page) -> list[int]:
    """The copy that each view shows as the chosen one: the slider, the lattice, the first film, a chart."""
    return page.evaluate(
        """() => [Number(byId("time").value), Number(document.querySelector("g.copy.chosen").dataset.copy),
                 Math.round(parseFloat(document.querySelector(".reel i").style.left.slice(5)) / 100 * told.T - 0.5),
                 ...views.filter((view) => view.by_copy).slice(0, 1).map((view) => view.signal("copy"))]"""
    )


def see_all_charts(page: Page) -> None:
    """Charts are drawn as they come into sight."""
    for plot in page.locator(".plot").all():
        plot.scroll_into_view_if_needed()
        plot.locator("svg.marks").wait_for()


def test_it_opens_unfolded_at_the_last_copy(opened: Callable[..., Page]) -> None:
    page = opened("lstm")
    assert chosen(page)[:3] == [119] * 3
    copies = [int(x) for x in page.locator("g.copy").evaluate_all("all => all.map((copy) => copy.dataset.copy)")]
    assert copies == list(range(120 - len(copies), 120))
    assert 5 <= len(copies) <= 60
    assert not page.locator("#operations").is_visible()


def test_a_click_folds_and_unfolds(opened: Callable[..., Page]) -> None:
    page = opened("lstm")
    page.click("#fold")
    assert page.locator("g.copy").count() == 1
    page.click("g.copy")
    assert page.locator("g.copy").count() >= 5


def test_gradients_that_vanish_are_seen(opened: Callable[..., Page]) -> None:
    """On their logarithmic scale the strip of a gradient has colour farther back than a thousandth of the largest."""
    page = opened("lstm")
    strip = page.evaluate("layer().strips.find((strip) => strip.role === 'state gradient')")
    assert strip["decades"] == 12
    film = page.locator(".film", has_text="state gradient").first
    assert "logarithmic" in film.text_content()


def test_copies_are_dragged_through_time(opened: Callable[..., Page]) -> None:
    page = opened("lstm")
    before = int(page.locator("g.copy").first.get_attribute("data-copy"))
    box = page.locator("#lattice").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 900, box["y"] + 20, steps=8)
    page.mouse.up()
    first = int(page.locator("g.copy").first.get_attribute("data-copy"))
    assert first == before - round(800 / 130)
    assert page.evaluate("now.unfolded")


def test_choosing_a_copy_anywhere_chooses_it_everywhere(opened: Callable[..., Page]) -> None:
    page = opened("lstm")
    see_all_charts(page)
    page.click("g.copy[data-copy='117']")
    assert chosen(page) == [117] * 4
    reel = page.locator(".reel").nth(1).bounding_box()
    page.locator(".reel").nth(1).click(position={"x": reel["width"] * (77.5 / 120), "y": 10})
    assert chosen(page) == [77] * 4
    plot = page.locator(".plot[data-key='states'] svg").first
    find = "const view = views.find((view) => view.key === 'states');"
    where = page.evaluate(
        f"(() => {{ {find} return view.scale('x')(40) + view.origin()[0] + view.padding().left; }})()"
    )
    plot.click(position={"x": where, "y": 60})
    assert chosen(page) == [40] * 4


def test_an_operation_is_chosen_in_the_graph_and_in_the_list(opened: Callable[..., Page]) -> None:
    page = opened("lstm")
    page.click("summary")
    operations = page.locator("#operations li")
    assert page.locator("#inside [data-operation]").count() == operations.count()
    page.locator("#inside g[data-operation='3']").click()
    assert page.locator("#operations li.chosen").evaluate_all("all => all.map((one) => one.dataset.operation)") == ["3"]
    assert page.locator("#inside .edge.chosen").count() >= 2
    operations.nth(5).click()
    assert page.locator("#inside g.chosen").evaluate_all("all => all.map((one) => one.dataset.operation)") == ["5"]
    operations.nth(5).click()
    assert page.locator(".chosen[data-operation]").count() == 0


def test_keys_walk_through_the_copies(opened: Callable[..., Page]) -> None:
    page = opened("lstm")
    page.focus("#lattice")
    for key, copy in (("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 119), ("+", 119)):
        page.keyboard.press(key)
        assert page.evaluate("now.copy") == copy
        assert chosen(page)[:3] == [copy] * 3
    page.keyboard.press("-")
    assert page.locator("g.copy").count() == 1


def test_layers_are_chosen_and_keep_the_copy(opened: Callable[..., Page]) -> None:
    page = opened("long")
    page.locator("#time").fill("500")
    page.click("button.layer >> nth=1")
    assert "RNNCell" in page.locator("g.copy title").first.text_content()
    assert chosen(page)[:3] == [500] * 3
    assert page.locator("button.layer[aria-pressed='true']").text_content() == "layer 1"


def test_a_thousand_copies_are_never_all_in_the_page(opened: Callable[..., Page], pages: dict[str, Path]) -> None:
    page = opened("long")
    assert pages["long"].stat().st_size < 3_000_000
    for copy in range(0, 1000, 50):
        page.evaluate("(copy) => choose({ copy })", copy)
        assert page.locator("g.copy").count() <= 60
        assert page.evaluate("document.querySelectorAll('*').length") < 1500
        assert chosen(page)[:3] == [copy] * 3


def test_hostile_names_stay_text(opened: Callable[..., Page]) -> None:
    page = opened("hostile", NARROW)
    assert HOSTILE in page.locator("h1").text_content()
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_one_copy_without_a_loss_says_what_a_loss_would_show(opened: Callable[..., Page]) -> None:
    page = opened("bare")
    assert "need a loss" in page.locator(".note").text_content()
    assert page.locator(".verdict").count() == 0
    assert page.locator("g.copy").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("name", ["lstm", "long", "bare"])
def test_it_is_readable_in_every_size_and_light(
    opened: Callable[..., Page], name: str, size: dict[str, int], scheme: str
) -> None:
    page = opened(name, size, scheme)
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    see_all_charts(page)
    page.evaluate("window.scrollTo(0, 0)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("section").count() >= 4
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}-{scheme}-{size['width']}.png", full_page=True)
