"""`flatmount containerd`: our snapshotter into containerd's configuration, looked at, and out again."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from flatmount.cli.common import (
    interruptible,
    json_option,
    print_json,
    root_directory,
    run_directory,
    store_root_option,
    verbs_of,
)
from flatmount.config import SNAPSHOT_FORMS
from flatmount.errors import EXIT_FAILED, EXIT_FINE, FlatmountError, MissingFeature, UsageError
from flatmount.kernel.namespaces import enter_private_mounts
from flatmount.observe.tiny_image import write_tiny_image
from flatmount.rootfs.image import require_root
from flatmount.snapshotter import containerd

_BACKUP = ".before-flatmount"
_VERSION = re.compile(r"\bv?(\d+)\.(\d+)\.(\d+)")


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    actions = verbs_of(
        verbs,
        "containerd",
        summary="put the snapshotter into containerd's configuration, and take it out",
        description="Add the snapshotter to containerd's configuration (versions 2 and 3), show what is there, or put "
        "it back as it was. Nothing is restarted unless told.",
    )
    install = actions.add_parser(
        "install",
        help="add the section",
        description="Add [proxy_plugins.flatmount]; with --cri make it the snapshotter of Kubernetes' door as well. A "
        "copy of the file is kept beside it. Restart containerd afterwards, or say --restart.",
        epilog="example: flatmount containerd install --cri --dry-run",
    )
    _file_option(install)
    install.add_argument("--socket", metavar="PATH", help="of the snapshotter (default: RUN/snapshotter.sock)")
    install.add_argument("--cri", action="store_true", help="CRI takes it as its snapshotter")
    install.add_argument("--print", action="store_true", help="only print the section, to be added by hand")
    install.add_argument("--dry-run", action="store_true", help="only show the difference")
    install.add_argument("--restart", action="store_true", help="restart containerd with systemctl")
    install.set_defaults(run=_install)
    status = actions.add_parser(
        "status",
        help="say whether it is in, and whether it answers",
        description="Say whether the section is in containerd's configuration and complete, whether the snapshotter "
        "answers, and what this machine lacks. Exit 1 when something is amiss.",
    )
    _file_option(status)
    store_root_option(status)
    json_option(status)
    status.set_defaults(run=_status)
    prove = actions.add_parser(
        "prove",
        help="start a container of a tiny image through each door, and write down what was seen",
        description="Start a containerd and a snapshotter of their own beside the machine's, start a container and a "
        "pod with and without a user namespace, look at them from outside, and remove everything. What was seen is "
        "kept in the store, where `status` finds it. Exit 1 when something was not right.",
        epilog="example: flatmount containerd prove --engine /opt/containerd-2.1/bin",
    )
    prove.add_argument(
        "--door",
        default="ctr,cri",
        metavar="DOOR,...",
        help="of ctr, cri, cni (pods in networks of their own, by CNI's bridge plugin), docker and nerdctl "
        "(default: %(default)s)",
    )
    prove.add_argument(
        "--engine", default="", metavar="DIR", help="where containerd, its shim and ctr are, before PATH"
    )
    prove.add_argument("--form", choices=SNAPSHOT_FORMS, default="auto", help="of the snapshotter (default: auto)")
    store_root_option(prove)
    json_option(prove)
    prove.set_defaults(run=_prove)
    uninstall = actions.add_parser(
        "uninstall",
        help="put the configuration back",
        description="Take our section out. A file that nobody has edited since is put back byte by byte; one that did "
        "not exist goes. Containers and images of the snapshotter stay where they are.",
    )
    _file_option(uninstall)
    uninstall.add_argument("--dry-run", action="store_true", help="only show the difference")
    uninstall.add_argument("--restart", action="store_true", help="restart containerd with systemctl")
    uninstall.set_defaults(run=_uninstall)


def _file_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", default=containerd.DEFAULT_PATH, metavar="FILE", help="containerd's (default: %(default)s)"
    )


def _install(args: argparse.Namespace) -> int:
    socket = os.path.abspath(args.socket or os.path.join(run_directory(), "snapshotter.sock"))
    before = _read(args.config)
    text = before if before is not None else f"version = {_file_version()}\n"
    if args.print:
        sys.stdout.write(containerd.section(text, socket, cri=args.cri))
        return EXIT_FINE
    after = containerd.install(text, socket, cri=args.cri)
    if after == before:
        print(f"{args.config} has it already")
        return EXIT_FINE
    if args.dry_run:
        return _show(args.config, before or "", after)
    # An install over an install keeps the copy of what was there before the first.
    if before is not None and not containerd.inspect(before).socket:
        _write(args.config + _BACKUP, before)
    _write(args.config, after)
    print(f"{args.config} has the snapshotter now")
    return _restart(args)


def _uninstall(args: argparse.Namespace) -> int:
    before = _read(args.config)
    if before is None:
        print(f"there is no {args.config}")
        return EXIT_FINE
    backup = _read(args.config + _BACKUP)
    after = containerd.uninstall(before)
    found = containerd.inspect(before)
    if backup is not None and containerd.install(backup, found.socket, cri=found.cri) == before:
        after = backup
    if args.dry_run:
        return _show(args.config, before, after)
    if backup is None and after.split() == ["version", "=", str(found.version)]:
        os.unlink(args.config)
        print(f"{args.config} is gone, as it was not there before")
    else:
        _write(args.config, after)
        print(f"{args.config} is as it was")
    if backup is not None:
        os.unlink(args.config + _BACKUP)
    return _restart(args)


def _status(args: argparse.Namespace) -> int:
    text = _read(args.config)
    found = None if text is None else containerd.inspect(text)
    findings = []
    if found is None or not found.socket:
        findings.append(f"{args.config} does not have the snapshotter; `flatmount containerd install` adds it")
    if found is not None and found.socket and not found.remap_ids:
        findings.append('capabilities = ["remap-ids"] is missing: containerd 2.x would change owners file by file')
    if found is not None and found.socket and not found.unpacks:
        findings.append(
            "the transfer service's unpack_config does not name the snapshotter: CRI and `ctr` of containerd 2.1 and"
            f" later pull no image for it; {containerd.adding_it(args.config, cri=found.cri)}"
        )
    socket = found.socket if found is not None and found.socket else os.path.join(run_directory(), "snapshotter.sock")
    answers = _answers(socket)
    if not answers:
        findings.append(f"nobody answers at {socket}; `systemctl start flatmount-snapshotter` or see its journal")
    version = _engine_version()
    if version is None:
        findings.append("containerd is not installed here, or does not tell its version")
    proofs = _proofs(root_directory(args))
    facts = {
        "config": args.config,
        "installed": asdict(found) if found is not None else None,
        "socket": socket,
        "answers": answers,
        "containerd": ".".join(map(str, version)) if version else None,
        "mount_fuse3": shutil.which("mount.fuse3"),
        "proofs": proofs,
        "findings": findings,
    }
    if args.json:
        print_json("containerd.status", facts)
    else:
        print(f"{args.config}: {'has' if found and found.socket else 'does not have'} the snapshotter")
        print(f"{socket}: {'answers' if answers else 'does not answer'}")
        print(f"containerd {facts['containerd'] or 'unknown'}; mount.fuse3 {facts['mount_fuse3'] or 'missing'}")
        for proof in proofs:
            print(f"proven here: {_proof_line(proof)}")
        if not proofs:
            print("nothing was proven here yet; `flatmount containerd prove` does it")
        for finding in findings:
            print(f"finding: {finding}")
    return EXIT_FAILED if findings else EXIT_FINE


def _prove(args: argparse.Namespace) -> int:
    require_root("containerd prove")
    try:
        from flatmount.snapshotter.proof import DOORS, prove, record_proofs
    except ModuleNotFoundError as error:
        raise MissingFeature(f"a proof needs the package {error.name}", hint="install flatmount[snapshotter]") from None
    doors = tuple(dict.fromkeys(args.door.split(",")))
    if unknown := set(doors) - set(DOORS):
        raise UsageError(f"there is no door {sorted(unknown)[0]!r}", hint=f"there are {', '.join(DOORS)}")
    root = root_directory(args)
    enter_private_mounts()
    with interruptible():
        proofs = prove(
            doors, lambda path, layers: write_tiny_image(path, layers, waits=True), form=args.form, programs=args.engine
        )
    record_proofs(root, proofs)
    if args.json:
        print_json("containerd.prove", {"proofs": [asdict(proof) for proof in proofs]})
    else:
        for proof in proofs:
            print(_proof_line(asdict(proof)))
    return EXIT_FAILED if any(proof.problem for proof in proofs) else EXIT_FINE


def _proof_line(proof: Mapping[str, Any]) -> str:
    what = f"{proof['engine']} by {proof['door']}, form {proof['form']}, "
    what += "own user range" if proof["mapped"] else "no user range"
    seen = f"does not work: {proof['problem']}" if proof["problem"] else f"works, {proof['mounts']} mounts"
    return f"{what}: {seen} ({proof['proven_at']}, Linux {proof['kernel']})"


def _proofs(root: str) -> list[dict[str, Any]]:
    try:
        from flatmount.snapshotter.proof import read_proofs
    except ModuleNotFoundError:
        return []
    return [asdict(proof) for proof in read_proofs(root)]


def _answers(socket: str) -> bool:
    try:
        from flatmount.snapshotter.health import answers
    except ModuleNotFoundError:
        return False
    return answers(socket)


def _engine_version() -> tuple[int, int, int] | None:
    try:
        said = subprocess.run(["containerd", "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    numbers = _VERSION.search(said.stdout)
    return None if numbers is None else (int(numbers[1]), int(numbers[2]), int(numbers[3]))


def _file_version() -> int:
    version = _engine_version()
    return 3 if version is not None and version[0] >= 2 else 2


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None


def _write(path: str, text: str) -> None:
    """Whole or not at all, and durable: containerd does not start with half a configuration."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    mode = os.stat(path).st_mode & 0o7777 if os.path.exists(path) else 0o644
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
    os.replace(path + ".new", path)


def _show(path: str, before: str, after: str) -> int:
    sys.stdout.writelines(
        difflib.unified_diff(before.splitlines(keepends=True), after.splitlines(keepends=True), path, f"{path} (new)")
    )
    return EXIT_FINE


def _restart(args: argparse.Namespace) -> int:
    if not args.restart:
        print("containerd reads it when it is restarted: systemctl restart containerd")
        return EXIT_FINE
    done = subprocess.run(["systemctl", "restart", "containerd"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise FlatmountError(
            f"systemctl restart containerd: {done.stderr.strip()}", hint="see `journalctl -u containerd`"
        )
    return EXIT_FINE
