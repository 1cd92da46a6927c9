"""`flatmount containerd prove`: containers through containerd's own door and through Kubernetes'."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from flatmount.cli.main import main
from flatmount.kernel.mounts import mount_count
from flatmount.kernel.namespaces import enter_private_mounts
from flatmount.observe.tiny_image import write_tiny_image
from flatmount.snapshotter import containerd, proof

# Another containerd than the machine's: a directory with containerd, its shim and ctr.
PROGRAMS = os.environ.get("FLATMOUNT_CONTAINERD", "")


def image(path: str, layers: int) -> None:
    write_tiny_image(path, layers, waits=True)


@pytest.mark.parametrize("form", ["overlay", "bind", "helper"])
def test_a_container_and_a_pod_start_from_our_snapshots(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enter_private_mounts()
    before = mount_count()
    root = str(tmp_path / "root")
    command = ["containerd", "prove", "--root", root, "--form", form, "--engine", PROGRAMS, "--json"]
    code = main(command)
    proofs = json.loads(capsys.readouterr().out)["proofs"]
    assert [one["problem"] for one in proofs] == [""] * len(proofs)
    assert code == 0
    assert mount_count() == before
    one, pod = {"overlay": (1, 2), "bind": (2, 4), "helper": (1, 2)}[form]
    shared = 1 if form == "overlay" else 0
    seen = {(found["door"], found["mapped"]): found["mounts"] for found in proofs}
    wanted = {("ctr", False): one, ("ctr", True): one + shared, ("cri", False): pod}
    if ("cri", True) in seen:  # where the engine has user namespaces for pods: from 1.7 on
        wanted["cri", True] = pod + shared
    assert seen == wanted
    # The record is what `status` shows.
    assert main(["containerd", "status", "--root", root, "--config", str(tmp_path / "none"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["proofs"] == proofs


def test_a_pod_from_another_snapshotter_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    enter_private_mounts()
    install = containerd.install
    monkeypatch.setattr(containerd, "install", lambda text, socket, *, cri: install(text, socket, cri=False))
    (plain, *_) = proof.prove(("cri",), image, programs=PROGRAMS)
    assert "overlayfs" in plain.problem


def test_a_damaged_record_counts_as_none_and_is_written_anew(tmp_path: Path) -> None:
    one = proof.Proof("ctr", "containerd 1.6.20", "overlay", True, 2, "", "6.18", "2026-01-01T00:00:00Z")
    proof.record_proofs(str(tmp_path), [one])
    assert proof.read_proofs(str(tmp_path)) == [one]
    newer = proof.Proof("ctr", "containerd 1.6.20", "overlay", True, 3, "why", "6.18", "2026-01-02T00:00:00Z")
    proof.record_proofs(str(tmp_path), [newer])
    assert proof.read_proofs(str(tmp_path)) == [newer]
    (tmp_path / "proofs.json").write_text('{"schema": "flatmount.containerd.proofs/1", "proofs": [{}]}')
    assert proof.read_proofs(str(tmp_path)) == []
    proof.record_proofs(str(tmp_path), [one])
    assert proof.read_proofs(str(tmp_path)) == [one]
