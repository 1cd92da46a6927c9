"""The snapshotter's part of the configuration, and files that say what is in force."""

from __future__ import annotations

from pathlib import Path

import pytest

from flatmount.cli.main import main
from flatmount.config import Config, Pull, Registry, Snapshotter, dump, parse
from flatmount.errors import UsageError


def test_what_is_said_is_in_force_and_can_be_dumped() -> None:
    config = Config(
        Pull(7),
        {"registry.example:5000": Registry(("mirror.example",), True, "/ca.pem")},
        Snapshotter("bind", 5, "[::1]:9400", "debug"),
    )
    assert parse(dump(config).encode(), "file") == config
    assert parse(dump(Config()).encode(), "file") == Config()


@pytest.mark.parametrize(
    "line",
    ['form = "fastest"', "form = 1", "deadline_s = 0", "deadline_s = true", "metrics = 9400", 'metrics = "9400"',
     'log_level = "loud"', 'fomr = "bind"'],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_with_its_place(line: str) -> None:
    with pytest.raises(UsageError, match=r"file: \[snapshotter\]"):
        parse(f"version = 1\n[snapshotter]\n{line}\n".encode(), "file")


def test_the_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["config", "default"]) == 0
    file = tmp_path / "config.toml"
    file.write_text(capsys.readouterr().out.replace('form = "auto"', 'form = "helper"'))
    monkeypatch.setenv("FLATMOUNT_CONFIG", str(file))
    assert main(["config", "dump"]) == 0
    assert 'form = "helper"' in capsys.readouterr().out
    assert main(["config", "check"]) == 0
    file.write_text("version = 1\n[snapshoter]\n")
    assert main(["config", "check", str(file)]) == 2
    assert "unknown key 'snapshoter'" in capsys.readouterr().err
