"""`flatmount containerd prove`: containers through containerd's own door and through Kubernetes'."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from flatmount.cli.main import main
from flatmount.errors import FlatmountError
from flatmount.kernel.mounts import mount_count
from flatmount.kernel.namespaces import enter_private_mounts
from flatmount.observe.tiny_image import write_tiny_image
from flatmount.snapshotter import containerd, cri, proof
from flatmount.snapshotter import engine as engine_module
from flatmount.snapshotter.cri import Pods
from flatmount.snapshotter.engine import PAUSE_IMAGE, Engine, engine_place, running_engine
from flatmount.snapshotter.wire import cri_pb2 as wire
from tests import registries

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


# Sent from the engine's network: a pod that is reached says that nobody listens there.
REACHES = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
    line.settimeout(25)
    line.connect((sys.argv[1], 9))
    line.send(b"x")
    try:
        line.recv(1)
    except ConnectionRefusedError:
        sys.exit(0)
sys.exit(1)
"""


@contextmanager
def kubernetes(*, bridge: bool) -> Iterator[Engine]:
    """An engine with CRI and the image of a proof; with `bridge` in a network namespace of its own."""
    with engine_place() as place:
        image(f"{place}/image", 5)
        subprocess.run(["tar", "-C", f"{place}/image", "-cf", f"{place}/image.tar", "."], check=True)
        os.mkdir(f"{place}/engine", 0o711)
        with running_engine(f"{place}/engine", cri=True, bridge=bridge, programs=PROGRAMS) as engine:
            engine.take_image(f"{place}/image.tar", PAUSE_IMAGE, namespace="k8s.io")
            yield engine


def test_pods_are_connected_by_real_network_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    enter_private_mounts()
    host = os.listdir("/sys/class/net")
    with kubernetes(bridge=True) as engine, Pods(engine.socket) as pods:
        pods.wait_for_image(PAUSE_IMAGE)
        begun = []
        for name in ("one", "two"):
            pod, config = pods.run(name, own_network=True)
            pods.start(pod, config, PAUSE_IMAGE)
            begun.append(pod)
        addresses = engine.addresses()
        assert len(addresses) == 2
        for address in addresses:
            command = ["nsenter", f"--net=/proc/{engine.process}/ns/net", sys.executable, "-c", REACHES, address]
            subprocess.run(command, check=True, timeout=30)
        for pod in begun:
            pods.remove(pod)
        assert engine.addresses() == []
        monkeypatch.setattr(cri, "_TOLD_S", 1.0)
        with pytest.raises(FlatmountError, match="does not know of localhost/another"):
            pods.wait_for_image("localhost/another:latest")
    assert os.listdir("/sys/class/net") == host


def test_cri_pulls_an_image_into_our_snapshots(tmp_path: Path) -> None:
    """From 2.1 on it asks containerd's transfer service, which unpacks for those only whom its configuration names."""
    enter_private_mounts()
    with registries.registry_process(tmp_path) as host, kubernetes(bridge=False) as engine, Pods(engine.socket) as pods:
        reference = f"{host}/test/pulled:1"
        layout = f"oci:{os.path.dirname(engine.place)}/image"
        copy = ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"]
        subprocess.run([*copy, layout, f"docker://{reference}"], check=True, timeout=60)
        with grpc.insecure_channel(f"unix:{engine.socket}") as channel:
            # A request to pull begins like one for the status of an image, and its answer is one string.
            request = wire.ImageStatusRequest(image=wire.ImageSpec(image=reference))
            method = "/runtime.v1.ImageService/PullImage"
            call = channel.unary_unary(method, wire.ImageStatusRequest.SerializeToString, wire.Id.FromString)
            assert call(request, timeout=60).id
        pods.wait_for_image(PAUSE_IMAGE)
        pod, config = pods.run("pulled")
        container = pods.start(pod, config, reference)
        told = json.loads(engine.ctr("-n", "k8s.io", "containers", "info", container))
        assert (told["Image"], told["Snapshotter"]) == (reference, "flatmount")
        process = engine.tasks("k8s.io")[container]
        assert {f"layer-{number}" for number in range(5)} <= set(os.listdir(f"/proc/{process}/root/etc"))
        pods.remove(pod)


def test_the_door_of_connected_pods_is_proven(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    enter_private_mounts()
    before = mount_count()
    command = ["containerd", "prove", "--root", str(tmp_path), "--door", "cni", "--engine", PROGRAMS, "--json"]
    code = main(command)
    proofs = json.loads(capsys.readouterr().out)["proofs"]
    assert [(one["door"], one["problem"]) for one in proofs] == [("cni", "")] * len(proofs)
    assert code == 0
    seen = {one["mapped"]: one["mounts"] for one in proofs}
    assert seen in ({False: 2}, {False: 2, True: 3})
    assert mount_count() == before


def test_a_pod_whose_network_stays_empty_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    enter_private_mounts()
    monkeypatch.setattr(engine_module, "_write_bridge", lambda place, programs: engine_module._write_network(place))
    (plain, *_) = proof.prove(("cni",), image, programs=PROGRAMS)
    assert "its network has" in plain.problem
