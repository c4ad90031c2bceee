"""Every example in a docstring runs, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import unrolled as ur

WALKED = [module.name for module in pkgutil.walk_packages(ur.__path__, "unrolled.")]
MODULES = ["unrolled", *(name for name in WALKED if not name.endswith("__main__"))]

# Made by the library and handed out, never by the user: the functions that make them show them at work.
RESULTS = {"Cell", "Copies", "Copy", "Diagnosis", "Unrolled"}


def public() -> list[str]:
    names = [name for name in ur.__all__ if name not in RESULTS]
    things = {name: getattr(ur, name) for name in names}
    return [
        name
        for name, thing in things.items()
        if (inspect.isclass(thing) and not issubclass(thing, BaseException)) or inspect.isfunction(thing)
    ]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", public())
def test_a_public_name_has_an_example_in_its_docstring(name):
    assert ">>>" in (inspect.getdoc(getattr(ur, name)) or "")


@pytest.mark.parametrize("name", [name for name in ur.__all__ if not isinstance(getattr(ur, name), str)])
def test_a_public_name_says_what_it_is(name):
    thing = getattr(ur, name)
    assert thing.__doc__
    assert (thing.__name__ if inspect.ismodule(thing) else thing.__module__).startswith("unrolled")


def test_there_are_examples_to_run():
    finder = doctest.DocTestFinder()
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(found) >= len(public())
