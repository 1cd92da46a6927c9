"""A plan as a person reads it, and as data for programs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from enum import Enum
from typing import Any

from flatmount.plan import operations as op
from flatmount.plan.operations import MountPlan, Operation, Parameter, Slot, Text, is_mount_operation

# The kernel's own name where ours differs; the executor's errors and `strace` use it.
_KERNEL_NAMES: dict[type[Operation], str] = {
    op.ReadFile: "read",
    op.OpenTree: "open_tree",
    op.MountSetattr: "mount_setattr",
    op.MoveMount: "move_mount",
    op.FsConfigFlag: "fsconfig",
    op.FsConfigString: "fsconfig",
    op.FsConfigFd: "fsconfig",
    op.FsConfigCreate: "fsconfig create",
    op.Unmount: "umount2",
    op.AssumeIds: "setfsuid",
    op.Utimes: "utimensat",
}

Values = Mapping[Parameter, str]


def kernel_name(operation: Operation) -> str:
    """The system call an operation is, as errors and counts name it."""
    return _KERNEL_NAMES.get(type(operation)) or type(operation).__name__.lower()


def text(value: Text, values: Values | None = None) -> str:
    """A string of a plan, its parameters put in where `values` has them, else as {NAME}."""
    parts = (value,) if isinstance(value, str) else value
    known = values or {}
    return "".join(known.get(p, f"{{{p.value}}}") if isinstance(p, Parameter) else p for p in parts)


def subject(operation: Operation, values: Values | None = None) -> str:
    """What an operation works on, in one short string."""
    match operation:
        case op.FsConfigString(_, key, value):
            return f"{key}={text(value, values)}"
        case op.FsConfigFd(_, key, value):
            return f"{key}={value}"
        case op.FsConfigFlag(_, key):
            return key
        case op.ReadFile(root, path):
            return text(root, values) + path
        case op.Mount(source, target, fstype):
            return f"{fstype or 'bind'} {text(source, values)} on {text(target, values)}"
        case op.MoveMount(tree, target):
            return f"{tree} on {text(target, values)}"
        case op.Open(_, path, at) | op.OpenTree(_, path, at):
            return f"{at}/{text(path, values)}" if at is not None else text(path, values)
    for field in fields(operation):
        value = getattr(operation, field.name)
        if isinstance(value, str | tuple) and field.name != "owner":
            return text(value, values)
        if isinstance(value, Slot):
            return str(value)
    return ""


def _details(operation: Operation, values: Values | None) -> Iterator[str]:
    match operation:
        case op.Mkdir(_, mode):
            yield f"mode {mode:04o}"
        case op.Rmdir(_, True):
            yield "if it is empty"
        case op.Chown(_, owner):
            yield f"owner {owner[0]}:{owner[1]}" if isinstance(owner, tuple) else f"owner: {owner.value}"
        case op.MountSetattr(_, attributes, userns):
            if userns is not None:
                yield f"idmap by {userns}"
            if attributes:
                yield f"set {attributes.name}"
        case op.FsMount(out, _, _) | op.FsOpen(out, _) | op.Open(out, _, _) | op.OpenTree(out, _, _):
            yield f"-> {out}"
        case op.Mount(_, _, _, flags, data):
            if flags:
                yield f"flags {flags.name}"
            if data is not None:
                yield f"data {_shortened(text(data, values))}"
        case op.Unmount(_, flags, expect_gone):
            if flags:
                yield f"flags {flags.name}"
            if expect_gone:
                yield "once more, until nothing is left"


def _shortened(data: str, most: int = 160) -> str:
    layers = re.search(r"lowerdir=([^,]*)", data)
    if len(data) <= most or layers is None:
        return data
    paths = layers[1].split(":")
    return data.replace(layers[1], f"{paths[0]}:...{len(paths) - 2} more...:{paths[-1]}")


def describe(operation: Operation, values: Values | None = None) -> str:
    """One line for one operation."""
    return "  ".join(
        [f"{kernel_name(operation):<15} {subject(operation, values)}", *_details(operation, values)]
    ).rstrip()


def explain(plan: MountPlan, values: Values | None = None) -> str:
    """The plan, one line for each operation; a `*` marks the mount operations."""
    marks = ("*" if is_mount_operation(operation) else " " for operation in plan.operations)
    return "\n".join(
        f"{i:>4} {mark} {describe(operation, values)}"
        for i, (mark, operation) in enumerate(zip(marks, plan.operations, strict=True))
    )


def as_data(plan: MountPlan, values: Values | None = None) -> list[dict[str, Any]]:
    """The plan as plain data: a dictionary for each operation, for JSON."""
    return [_operation_data(operation, values) for operation in plan.operations]


def _operation_data(operation: Operation, values: Values | None) -> dict[str, Any]:
    data: dict[str, Any] = {"call": kernel_name(operation), "mount_operation": is_mount_operation(operation)}
    for field in fields(operation):
        value = getattr(operation, field.name)
        if field.name == "owner":
            data[field.name] = list(value) if isinstance(value, tuple) else value.value
        elif isinstance(value, str | tuple):
            data[field.name] = text(value, values)
        elif isinstance(value, (Slot, Enum)):
            data[field.name] = value.name
        elif value is not None:
            data[field.name] = value
    return data
