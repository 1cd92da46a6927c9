"""Mount plans: the kernel operations that build one root file system, as plain data."""

from flatmount.plan.encode import EncodedPlan, encode
from flatmount.plan.explain import as_data, describe, explain, kernel_name, subject
from flatmount.plan.mapping import IdRange, Mapping, parse_ranges
from flatmount.plan.operations import MountPlan, Operation, Parameter, Slot, is_mount_operation
from flatmount.plan.undo import undo

__all__ = [
    "EncodedPlan",
    "IdRange",
    "Mapping",
    "MountPlan",
    "Operation",
    "Parameter",
    "Slot",
    "as_data",
    "describe",
    "encode",
    "explain",
    "is_mount_operation",
    "kernel_name",
    "parse_ranges",
    "subject",
    "undo",
]
