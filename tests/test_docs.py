"""The code of the documentation runs, block after block."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(page: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page, with the lines that they begin on."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.name)
def test_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where what a page writes is left
    before, names = torch.get_default_dtype(), dict[str, Any](__name__="docs")
    torch.manual_seed(0)
    for line, block in blocks_of(page):
        exec(compile("\n" * line + block, str(page), "exec"), names)
    assert torch.get_default_dtype() == before


def test_the_teaching_page_has_code_and_its_pictures_exist() -> None:
    page = Path(__file__).parent.parent / "docs" / "unrolling.md"
    assert len(blocks_of(page)) >= 8
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert len(pictures) >= 5
    assert all(ElementTree.parse(page.parent / name).getroot().tag.endswith("}svg") for name in pictures)


def test_the_picture_of_the_rooms_is_made_from_the_import_contract_as_it_is() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_rooms.py"))["picture"]()
    assert drawn == (ROOT / "docs" / "rooms.svg").read_text(encoding="utf-8"), "run: python docs/draw_rooms.py"
    assert ElementTree.fromstring(drawn).tag.endswith("}svg")
