"""A plan as the executor takes it: fixed records and a table of strings (native/program.c reads them)."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, fields

from flatmount.errors import UsageError
from flatmount.plan import operations as op
from flatmount.plan.operations import LENT, MountPlan, Operation, Parameter, RunIds, Slot, Text

_RECORD = struct.Struct("<BBhhhIIIIQ")
_NO_STRING = 0xFFFFFFFF
_PARAMETER_MARK = b"\x01"

_CODES: dict[type[Operation], int] = {
    op.Mkdir: 0,
    op.Rmdir: 1,
    op.Chown: 2,
    op.Utimes: 3,
    op.ReadFile: 4,
    op.Open: 5,
    op.OpenTree: 6,
    op.MountSetattr: 7,
    op.MoveMount: 8,
    op.FsOpen: 9,
    op.FsConfigFlag: 10,
    op.FsConfigString: 11,
    op.FsConfigFd: 12,
    op.FsConfigCreate: 13,
    op.FsMount: 14,
    op.Mount: 15,
    op.Unmount: 16,
    op.Fchdir: 17,
    op.Chdir: 18,
    op.Setns: 19,
    op.AssumeIds: 20,
    op.Close: 21,
}

_TOLERATE = 1
_COUNTS = 2
_RUN_IDS = 4
_KEEP_GOING = 1
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000


@dataclass(frozen=True, slots=True)
class EncodedPlan:
    """`lent` and `parameters` are in the order in which a run gives them."""

    records: bytes
    strings: bytes
    slots: int
    lent: tuple[Slot, ...]
    parameters: tuple[Parameter, ...]
    outputs: tuple[int, ...]
    flags: int


class _Strings:
    """The string table; equal strings are stored once."""

    def __init__(self) -> None:
        self.table = bytearray(b"\0")
        self.parameters: list[Parameter] = []
        self._places: dict[Text, int] = {"": 0}

    def place(self, text: Text | None) -> int:
        if text is None:
            return _NO_STRING
        known = self._places.get(text)
        if known is None:
            known = self._places[text] = len(self.table)
            for part in (text,) if isinstance(text, str) else text:
                self.table += self._parameter(part) if isinstance(part, Parameter) else _literal(part)
            self.table.append(0)
        return known

    def _parameter(self, parameter: Parameter) -> bytes:
        if parameter not in self.parameters:
            self.parameters.append(parameter)
        return _PARAMETER_MARK + bytes((ord("0") + self.parameters.index(parameter),))


def _literal(text: str) -> bytes:
    raw = os.fsencode(text)
    if b"\0" in raw or _PARAMETER_MARK in raw:
        raise UsageError(f"the path {text!r} holds a control character that a mount plan cannot carry")
    return raw


def encode(plan: MountPlan) -> EncodedPlan:
    """Encode a plan. Raises: UsageError for a string no kernel call can carry, ValueError for a slot nobody fills."""
    strings = _Strings()
    named = _slots(plan)
    lent = tuple(slot for slot in LENT if slot in named)
    numbers = {slot: i for i, slot in enumerate((*lent, *(slot for slot in named if slot not in LENT)))}
    records = b"".join(_record(operation, strings, numbers) for operation in plan.operations)
    filled = set(lent)
    for operation in plan.operations:
        out = getattr(operation, "out", None)
        if out is not None:
            filled.add(out)
        missing = [s for s in _slots_of(operation) if s not in filled]
        if missing:
            raise ValueError(f"{operation} uses {missing[0]} before anything fills it")
    return EncodedPlan(
        records=records,
        strings=bytes(strings.table),
        slots=len(numbers),
        lent=lent,
        parameters=tuple(strings.parameters),
        outputs=tuple(numbers[slot] for slot in plan.outputs),
        flags=_KEEP_GOING if plan.keep_going else 0,
    )


def _slots_of(operation: Operation) -> list[Slot]:
    values = (getattr(operation, field.name) for field in fields(operation))
    return [value for value in values if isinstance(value, Slot)]


def _slots(plan: MountPlan) -> dict[Slot, None]:
    return dict.fromkeys(slot for operation in plan.operations for slot in _slots_of(operation))


def _record(operation: Operation, strings: _Strings, numbers: dict[Slot, int]) -> bytes:
    def text(value: Text | None) -> int:
        return strings.place(value)

    out = a = b = -1
    s1 = s2 = s3 = _NO_STRING
    flags = x = y = 0
    if op.is_mount_operation(operation):
        flags |= _COUNTS
    match operation:
        case op.Mkdir(path, mode):
            s1, x = text(path), mode
        case op.Chdir(path):
            s1 = text(path)
        case op.Rmdir(path, if_empty):
            s1, flags = text(path), flags | (_TOLERATE if if_empty else 0)
        case op.ReadFile(root, path):
            s1, s2, flags = text(root), text(path), flags | _TOLERATE
        case op.Chown(path, RunIds()):
            s1, flags = text(path), flags | _RUN_IDS
        case op.Chown(path, (uid, gid)):
            s1, x, y = text(path), uid, gid
        case op.Utimes(path, mtime_ns):
            s1, y = text(path), mtime_ns & 0xFFFFFFFFFFFFFFFF
        case op.Open(slot, path, at):
            out, s1, a = numbers[slot], text(path), -1 if at is None else numbers[at]
        case op.OpenTree(slot, path, at, recursive):
            out, s1, a = numbers[slot], text(path), -1 if at is None else numbers[at]
            x = (_AT_EMPTY_PATH if path == "" else 0) | (_AT_RECURSIVE if recursive else 0)
        case op.MountSetattr(tree, attributes, userns, recursive):
            a, b, y = numbers[tree], -1 if userns is None else numbers[userns], int(attributes)
            x = _AT_RECURSIVE if recursive else 0
        case op.MoveMount(tree, target):
            a, s1 = numbers[tree], text(target)
        case op.FsOpen(slot, fstype):
            out, s1 = numbers[slot], text(fstype)
        case op.FsConfigFlag(context, key):
            a, s1 = numbers[context], text(key)
        case op.FsConfigString(context, key, value):
            a, s1, s2 = numbers[context], text(key), text(value)
        case op.FsConfigFd(context, key, value):
            a, s1, b = numbers[context], text(key), numbers[value]
        case op.FsConfigCreate(context):
            a = numbers[context]
        case op.FsMount(slot, context, attributes):
            out, a, y = numbers[slot], numbers[context], int(attributes)
        case op.Mount(source, target, fstype, mount_flags, data):
            s1, s2, s3, x, y = text(source), text(target), text(data), text(fstype), int(mount_flags)
        case op.Unmount(target, unmount_flags, expect_gone):
            s1, x = text(target), int(unmount_flags)
            flags |= _TOLERATE if expect_gone else 0
        case op.Fchdir(directory):
            a = numbers[directory]
        case op.Setns(namespace):
            a = numbers[namespace]
        case op.AssumeIds():
            pass
        case op.Close(slot):
            a = numbers[slot]
    return _RECORD.pack(_CODES[type(operation)], flags, out, a, b, s1, s2, s3, x, y)
