"""Running a mount plan: the one place that gives plans to the kernel."""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping
from typing import NamedTuple

from flatmount.errors import OperationFailed
from flatmount.kernel import _native
from flatmount.plan.encode import encode
from flatmount.plan.explain import kernel_name, subject
from flatmount.plan.operations import MountPlan, Parameter, Slot
from flatmount.plan.undo import undo

NO_IDS = (0, 0, 0, 0)

# What one run of a plan is given: lent descriptors and parameters in the plan's order, and ids of the host.
Job = tuple[tuple[int, ...], tuple[bytes, ...], tuple[int, int, int, int]]


class Outcome(NamedTuple):
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

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The strings a run must be given."""
        return self._parameters

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
            OperationFailed: an operation failed; what the plan had done before is undone (`not_undone` says what
                stood in the way). A plan that keeps going does not raise: its outcome carries the first failure.
            OSError: no thread could be had to run it on; nothing was done.

        Kernel: 5.2 for the mount API (each operation names its own first version), CAP_SYS_ADMIN.
        """
        return self.run_in_order(*self.job(lent, parameters, ids))

    def job(
        self,
        lent: Mapping[Slot, int],
        parameters: Mapping[Parameter, str],
        ids: tuple[int, int, int, int] = NO_IDS,
    ) -> Job:
        """The arguments of a run in the order of `needs` and `parameters`, for `run_many`."""
        descriptors = tuple([lent[slot] for slot in self._lent])
        return descriptors, tuple([os.fsencode(parameters[name]) for name in self._parameters]), ids

    def run_in_order(
        self, lent: tuple[int, ...], parameters: tuple[bytes, ...], ids: tuple[int, int, int, int]
    ) -> Outcome:
        """As `run`, for a caller that runs the plan often: arguments in the order of `needs` and `parameters`."""
        outcome = self._outcome((lent, parameters, ids), self._program.run(lent, parameters, ids))
        if outcome.failure is None or self.plan.keep_going:
            return outcome
        try:
            raise outcome.failure
        finally:
            # The failure's traceback holds this frame: with the outcome in it, a cycle would keep all of the callers'
            # descriptors open until the collector comes by.
            del outcome

    def run_many(self, jobs: list[Job], *, at_once: int) -> list[Outcome]:
        """Run the plan once for each job, `at_once` at a time, on threads of the executor's own.

        Python is out of the way until the last one is done: two Python threads that start containers wait for each
        other's turns at the interpreter, these do not. Outcomes come in the order of the jobs; one that failed is
        undone and carries its failure, and whether its undoing failed as well.

        Raises: OSError where not one thread could begin; nothing was done then.
        """
        return [
            self._outcome(job, answer) for job, answer in zip(jobs, self._program.run_many(jobs, at_once), strict=True)
        ]

    def _outcome(self, job: Job, answer: tuple[int, int, int, int, str, tuple[int, ...], bytes]) -> Outcome:
        done, counted, failed_at, code, message, outputs, raw = answer
        if not code:
            return Outcome(done, counted, outputs, raw)
        lent, parameters, ids = job
        strings = dict(zip(self._parameters, map(os.fsdecode, parameters), strict=True))
        if self.plan.keep_going:
            return Outcome(done, counted, outputs, raw, self._failure(failed_at, code, message, strings))
        left = self._take_back(done, dict(zip(self._lent, lent, strict=True)), strings, ids)
        return Outcome(done, counted, (), raw, self._failure(failed_at, code, message, strings, left))

    def _take_back(
        self, done: int, lent: Mapping[Slot, int], strings: Mapping[Parameter, str], ids: tuple[int, int, int, int]
    ) -> str:
        """Undo the first `done` operations; what stood in the way, or ""."""
        try:
            left = Executable(undo(self.plan, done)).run(lent, strings, ids).failure
        except OSError as error:
            return str(error)
        return "" if left is None else str(left)

    def _failure(
        self, at: int, code: int, message: str, parameters: Mapping[Parameter, str], not_undone: str = ""
    ) -> OperationFailed:
        operations = self.plan.operations
        if at >= len(operations):
            # The executor's own calls around the plan; the message is the call's name.
            subject_of_ours = "for a thread of the executor"
            return OperationFailed(
                message, subject_of_ours, code, position=at, total=len(operations), not_undone=not_undone
            )
        operation = operations[at]
        return OperationFailed(
            kernel_name(operation),
            subject(operation, parameters),
            code,
            position=at,
            total=len(operations),
            kernel_message=message,
            not_undone=not_undone,
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
