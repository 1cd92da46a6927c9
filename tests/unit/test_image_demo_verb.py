"""`flatmount image demo` with packages and a store that are not there: what it makes, says and leaves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from merged import image_of

from flatmount.cli import image_demo
from flatmount.cli.main import main
from flatmount.image.demo_busybox import Busybox
from flatmount.image.demo_packages import PackagesUnavailable


class _Store:
    """Takes note of what is imported, and that it is an image at that moment."""

    def __init__(self) -> None:
        self.imported: list[tuple[str, int]] = []
        self.flattened: list[tuple[str, str, str]] = []

    def __enter__(self) -> _Store:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def import_image(self, source: str, *, name: str, progress: Any) -> str:
        self.imported.append((name, len(image_of(source)[1])))
        return "stored"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> _Store:
    def no_packages(*arguments: object) -> None:
        raise PackagesUnavailable("there are no packages in this test")

    store = _Store()
    busybox = Busybox(b"\x7fELF", "BusyBox v1", ("ls",))
    monkeypatch.setattr("flatmount.image.demo_packages.fetch_packages", no_packages)
    monkeypatch.setattr("flatmount.image.demo_busybox.find_busybox", lambda: busybox)
    monkeypatch.setattr(image_demo, "open_store", lambda args, *, create: store)
    monkeypatch.setattr(
        image_demo, "flatten_when", lambda when, store, image, form: store.flattened.append((when, image, str(form)))
    )
    return store


def test_image_goes_into_the_store_and_nothing_else_stays(
    store: _Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["image", "demo", "--layers", "7", "--cache", str(tmp_path / "cache")]) == 0
    assert store.imported == [("demo", 7)]
    assert store.flattened == [("background", "stored", "hardlink")]
    assert os.listdir(tmp_path / "cache") == []
    out, err = capsys.readouterr()
    assert out.startswith("demo: 7 layers, 5 of them generated, 1 packages, ")
    assert err == (
        "flatmount: the demo image is made of busybox, not of packages: there are no packages in this test\n"
    )


def test_out_alone_leaves_the_store_alone(store: _Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, cache = str(tmp_path / "out"), str(tmp_path / "cache")
    assert main(["image", "demo", "--layers", "5", "--cache", cache, "--out", out, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["schema"], facts["path"], facts["source"]) == ("flatmount.image-demo/1", out, "busybox")
    assert facts["why_not_packages"] and facts["layers"] == len(image_of(out)[1]) == 5
    assert store.imported == []
    assert main(["image", "demo", "--layers", "6", "--cache", cache, "--out", out, "--name", "both"]) == 0
    assert (store.imported, len(store.flattened)) == ([("both", 6)], 1)


def test_other_verbs_get_an_image(store: Any, tmp_path: Path) -> None:
    lines: list[str] = []
    cache = str(tmp_path / "cache")
    stored: Any = image_demo.import_demo(store, layers=9, name="mine", progress=lines.append, cache=cache)
    assert stored == "stored" and store.imported == [("mine", 9)]
    assert lines[-1] == "" and "demo image: layers written 9/9" in lines


@pytest.mark.parametrize("layers", ["4", "1001", "many", "-5", "٦"])
def test_a_number_that_cannot_be_meant_is_usage(
    store: _Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], layers: str
) -> None:
    assert main(["image", "demo", f"--layers={layers}", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert os.listdir(tmp_path) == []
