"""States made for real, which the doctor has to name with their owner."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flatmount.kernel.executor import run_once
from flatmount.kernel.mounts import mount_count
from flatmount.observe.doctor import software
from flatmount.observe.doctor.checks import diagnose
from flatmount.observe.doctor.findings import Finding, Severity
from flatmount.observe.doctor.gather import gather, largest_peers
from flatmount.observe.doctor.snapshotters import containerd_here, find_snapshotter
from flatmount.observe.doctor.software import try_idmap
from flatmount.observe.processes import scan
from flatmount.observe.tiny_image import write_tiny_image
from flatmount.plan.operations import Mount, MountFlag, MountPlan
from flatmount.store import Store
from tests.waiting import until, until_named

MANY = 20_000
MANY_MORE = 50_000 if os.environ.get("FLATMOUNT_SOAK") else 5_000


def found() -> dict[str, Finding]:
    return {finding.id: finding for finding in diagnose(gather())}


@pytest.fixture
def kubelet() -> Iterator[Path]:
    """A /var/lib/kubelet that only this test's namespace has."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "lib", "/var/lib"], check=True)
    directory = Path("/var/lib/kubelet/pods")
    directory.mkdir(parents=True)
    yield directory
    subprocess.run(["umount", "-l", "/var/lib"], check=True)


def test_twenty_thousand_mounts_and_whose_they_are(kubelet: Path) -> None:
    # From a mount of its own: cloning one looks at all that is mounted on it.
    source = Path("/var/lib/source")
    source.mkdir()
    operations = [Mount("source", str(source), "tmpfs")]
    for number in range(MANY):
        (kubelet / str(number)).mkdir()
        operations.append(Mount(str(source), f"{kubelet}/{number}", None, MountFlag.BIND))
    run_once(MountPlan(tuple(operations)))
    finding = found()["table-large"]
    assert (finding.severity, finding.owner) == (Severity.CRITICAL, "kubelet")
    assert "kubelet 20,000" in finding.evidence[0]


def test_leaked_mounts_that_a_foreign_namespace_holds(ram: Path) -> None:
    points = [ram / f"ovl-idmapped{number}" for number in range(50)]
    for point in points:
        point.mkdir()
        subprocess.run(["mount", "--bind", ram, point], check=True)
    with subprocess.Popen(["unshare", "-m", "sleep", "60"]) as holder:
        until_named(holder.pid, "sleep")
        for point in points:
            subprocess.run(["umount", point], check=True)
        try:
            finding = found()["leaked-mounts"]
        finally:
            holder.kill()
    assert finding.owner == "containerd"
    assert finding.title.startswith("50 temporary mounts of containerd")
    assert f"sleep [{holder.pid}] (50)" in finding.evidence[1]


def test_a_busy_watcher() -> None:
    program = "import os\nf = os.open('/proc/self/mountinfo', 0)\nwhile True: os.lseek(f, 0, 0), os.read(f, 1 << 20)"
    with subprocess.Popen([sys.executable, "-c", program]) as watcher:
        try:
            until(lambda: scan(deadline_s=5, wanted=[watcher.pid])[0][0].watches)
            findings = diagnose(gather())
        finally:
            watcher.kill()
    assert any(f"[{watcher.pid}]" in finding.evidence[0] for finding in findings if finding.id == "watcher-busy")


def test_a_directory_that_is_shared_with_itself(ram: Path) -> None:
    base = ram / "base"
    base.mkdir()
    subprocess.run(["mount", "--bind", base, base], check=True)
    subprocess.run(["mount", "--make-shared", base], check=True)
    for number in range(8):
        target = ram / f"copy{number}"
        target.mkdir()
        subprocess.run(["mount", "--bind", base, target], check=True)
    finding = found()["propagation-loop"]
    assert finding.title == f"each mount below {base} is made 9 times"


def test_a_per_layer_storm_under_way(ram: Path) -> None:
    image, root = str(ram / "image"), str(ram / "store")
    write_tiny_image(image, 30)
    with Store.open(root, create=True) as store:
        store.import_image(image, name="tiny")
    command = [sys.executable, "-m", "flatmount", "storm", "tiny", "--root", root, "--strategies", "per-layer"]
    command += ["--containers", "40", "--concurrency", "2", "--repeats", "1000"]
    environment = {**os.environ, "FLATMOUNT_RUN": str(ram / "run")}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as storm:
        try:
            # While it prepares, and between two rounds, there is nothing to see.
            until(lambda: assembling(storm.pid))
            assert storm.poll() is None
        finally:
            storm.terminate()
            storm.communicate(timeout=60)


def assembling(pid: int) -> bool:
    """Whether the doctor sees that process mount layer by layer in one look."""
    findings = diagnose(gather())
    named = [one for one in findings if one.id == "per-layer-assembly" and f"[{pid}]" in one.evidence[0]]
    assert len(named) <= 1
    assert all(one.severity is Severity.CRITICAL for one in named)
    return bool(named)


def test_only_binaries_that_nobody_else_can_have_put_there_are_executed(
    kubelet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, open_to_all, ours = (kubelet / name / "podman" for name in ("theirs", "open", "ours"))
    for program in (theirs, open_to_all, ours):
        program.parent.mkdir()
        shutil.copy("/bin/sleep", program)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(software, "_PROGRAMS", ("podman",))
    executed: list[str] = []

    def run(command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        executed.append(command[0])
        return subprocess.CompletedProcess(command, 0, "podman version 4.3.1\n")

    def asked(program: Path, user: int) -> list[str]:
        executed.clear()
        with subprocess.Popen([program, "60"], user=user) as running:
            try:
                until_named(running.pid, "podman")
                processes, _ = scan(deadline_s=5, wanted=[running.pid])
                assert [process.name for process in processes] == ["podman"]
                with monkeypatch.context() as patched:
                    patched.setattr(subprocess, "run", run)
                    software.engines(processes)
            finally:
                running.kill()
        return [path for path in executed if path.startswith(f"{kubelet}/")]

    assert asked(ours, 0) == [str(ours)]
    assert asked(ours, 65534) == [], "anybody may start it, but it is not the node's engine"
    os.chown(theirs, 65534, 65534)
    assert asked(theirs, 0) == asked(theirs, 65534) == []
    open_to_all.parent.chmod(0o1777)
    assert asked(open_to_all, 0) == []


def test_the_containerd_whose_configuration_is_read(kubelet: Path) -> None:
    program = kubelet / "containerd"
    shutil.copy("/bin/sleep", program)
    os.mkfifo(kubelet / "fifo")
    (kubelet / "own.toml").write_text("version = 2\n")

    def found(user: int, *before: str) -> bool:
        with subprocess.Popen([*before, program, "60"], user=user, stdout=subprocess.DEVNULL) as running:
            try:
                until_named(running.pid, "containerd")
                return containerd_here(scan(deadline_s=5, wanted=[running.pid])[0]) == running.pid
            finally:
                running.kill()

    assert found(0)
    assert not found(65534)
    assert not found(0, "unshare", "-m")
    script = kubelet / "script"
    script.write_text("import sys\nprint(flush=True)\nsys.stdin.read()")
    for named, word in (("own.toml", ""), ("fifo", "it is no regular file")):
        command = [sys.executable, str(script), "--config", named]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=kubelet, stdin=pipe, stdout=pipe) as running:
            assert running.stdout
            running.stdout.readline()
            snapshotter, why = find_snapshotter(running.pid)
            running.kill()
        assert why.endswith(word) and (snapshotter is not None) == (word == "")
        assert snapshotter is None or snapshotter.path == f"{kubelet}/own.toml"


@pytest.mark.parametrize(("program", "package"), [("containerd", "containerd"), ("runc", "runc")])
def test_real_engines_are_asked_for_their_version_and_judged_by_it(program: str, package: str) -> None:
    shown = subprocess.run(
        ["dpkg-query", "-W", "-f", "${source:Upstream-Version}", package], capture_output=True, text=True, check=False
    ).stdout
    assert shown, "tools/setup --tests installs it"
    known = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", shown)
    assert known
    (engine,) = [one for one in software.engines(()) if one.name == program]
    assert engine.version == tuple(int(number or 0) for number in known.groups())
    expected = {"containerd": ("containerd-copies", (2, 0, 0)), "runc": ("runc-self-bind", (1, 2, 0))}[program]
    state = gather(look_s=0.1)
    named = [one for one in diagnose(state) if one.id == expected[0]]
    assert bool(named) is (engine.version < expected[1])
    assert all(engine.said in one.evidence[0] for one in named)


def test_fifty_thousand_mounts_are_looked_at_and_nothing_is_left(kubelet: Path) -> None:
    source = Path("/var/lib/source")
    source.mkdir()
    operations = [Mount("source", str(source), "tmpfs")]
    for number in range(MANY_MORE):
        (kubelet / str(number)).mkdir()
        operations.append(Mount(str(source), f"{kubelet}/{number}", None, MountFlag.BIND))
    run_once(MountPlan(tuple(operations)))
    before = mount_count()
    state = gather()
    assert state.table.mounts == before >= MANY_MORE
    assert mount_count() == before


def test_a_quiet_table_has_no_loop_and_an_ordinary_file_system_can_be_id_mapped(ram: Path) -> None:
    assert try_idmap(str(ram)) == ""
    assert "EINVAL" in try_idmap("/proc")
    assert largest_peers(()) == (0, "")


def test_without_root_it_works_and_says_what_it_did_not_see() -> None:
    # Everything is loaded first: the interpreter itself may be where only root can read.
    program = "import codecs, os\nfrom flatmount.cli.main import main, parser\nparser(), codecs.lookup('ascii')\n"
    program += "os.setgroups([])\nos.setgid(65534)\nos.setuid(65534)\nraise SystemExit(main(['doctor', '--json']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode in (0, 1), done.stderr
    said = json.loads(done.stdout)
    assert said["mounts"] > 0
    assert any("run as root" in what for what in said["unseen"])
    assert any("who makes mount calls" in what for what in said["unseen"])
