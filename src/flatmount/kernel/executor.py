"""Running a mount plan: the one place that gives plans to the kernel."""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping
from dataclasses import dataclass

from flatmount.errors import FlatmountError, OperationFailed
from flatmount.kernel import _native
from flatmount.plan.encode import encode
from flatmount.plan.explain import kernel_name, subject
from flatmount.plan.operations import MountPlan, Parameter, Slot
from flatmount.plan.undo import undo

NO_IDS = (0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did. `outputs` are descriptors that belong to the caller now, in the order of the plan's outputs."""

    done: int
    mount_operations: int
    outputs: tuple[int, ...]
    raw_nanoseconds: bytes
    failure: OperationFailed | None = None

    @property
    def nanoseconds(self) -> tuple[int, ...]:
        """How long each operation took, in the plan's order."""
        return tuple(array("I", self.raw_nanoseconds))


class Executable:
    """A plan that was encoded and checked; runs any number of times, on any number of threads at once."""

    __slots__ = ("_lent", "_parameters", "_program", "plan")

    def __init__(self, plan: MountPlan) -> None:
        """Encode and check `plan`. Raises: UsageError for a string no kernel call can carry."""
        encoded = encode(plan)
        self.plan = plan
        self._lent = encoded.lent
        self._parameters = encoded.parameters
        self._program = _native.Program(
            encoded.records,
            encoded.strings,
            encoded.slots,
            len(encoded.lent),
            len(encoded.parameters),
            encoded.flags,
            encoded.outputs,
        )

    @property
    def needs(self) -> tuple[Slot, ...]:
        """The descriptors a run must be lent."""
        return self._lent

    def run(
        self,
        lent: Mapping[Slot, int],
        parameters: Mapping[Parameter, str],
        ids: tuple[int, int, int, int] = NO_IDS,
    ) -> Outcome:
        """Run the plan's operations in the calling thread's mount namespace.

        Args:
            lent: descriptors by slot; they stay the caller's.
            parameters: strings by parameter.
            ids: host ids (fsuid, fsgid, uid, gid) for operations that take them from the run.

        Raises:
            OperationFailed: an operation failed; what the plan had done before is undone. A plan that keeps going
                does not raise: its outcome carries the first failure.

        Kernel: 5.2 for the mount API (each operation names its own first version), CAP_SYS_ADMIN.
        """
        done, counted, failed_at, code, message, outputs, raw = self._program.run(
            tuple([lent[slot] for slot in self._lent]),
            tuple([os.fsencode(parameters[name]) for name in self._parameters]),
            ids,
        )
        if not code:
            return Outcome(done, counted, outputs, raw)
        failure = self._failure(failed_at, code, message, parameters)
        if self.plan.keep_going:
            return Outcome(done, counted, outputs, raw, failure)
        left = Executable(undo(self.plan, done)).run(lent, parameters, ids).failure
        if left is not None:
            raise FlatmountError(f"{failure}; and undoing failed: {left}", hint=failure.hint) from failure
        raise failure

    def _failure(self, at: int, code: int, message: str, parameters: Mapping[Parameter, str]) -> OperationFailed:
        operations = self.plan.operations
        if at >= len(operations):
            return OperationFailed("chdir", "/", code, position=at, total=len(operations))
        operation = operations[at]
        return OperationFailed(
            kernel_name(operation),
            subject(operation, parameters),
            code,
            position=at,
            total=len(operations),
            kernel_message=message,
        )


def run_once(
    plan: MountPlan,
    lent: Mapping[Slot, int] | None = None,
    parameters: Mapping[Parameter, str] | None = None,
    ids: tuple[int, int, int, int] = NO_IDS,
) -> Outcome:
    """Encode, check and run a plan that is needed once. As Executable.run."""
    return Executable(plan).run(lent or {}, parameters or {}, ids)


def adopt_thread() -> None:
    """Give the calling thread a working directory of its own, so that plans with relative strings run on it directly.

    For threads that only assemble: `os.chdir` elsewhere in the process no longer reaches it. Kernel: any.
    """
    _native.adopt_thread()
