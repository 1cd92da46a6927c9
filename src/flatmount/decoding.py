"""JSON back into frozen dataclasses, every field checked; what all results with a schema name share."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from enum import Enum
from typing import Any, TypeVar

from flatmount.errors import UsageError

T = TypeVar("T")


def decode(kind: type[T], value: object, where: str) -> T:
    """`value`, as `json.load` returned it, as the frozen dataclass `kind`; every field checked against its annotation.

    Knows strings, numbers of 0 and more, booleans, tuples, other dataclasses, string enums, and `X | None` of them.
    Fields that `kind` does not have are left out, and those that a file lacks have their default where `kind` gives
    one: schemas grow by additions.

    Args:
        where: what the value is called in a message.

    Raises: UsageError naming the field: missing, of the wrong type, negative or not finite.
    """
    if not isinstance(value, dict):
        raise _wrong(where, "an object", value)
    decoded = {}
    later = {
        field.name for field in dataclasses.fields(typing.cast(Any, kind)) if field.default is not dataclasses.MISSING
    }
    for name, annotation in typing.get_type_hints(kind).items():
        if name not in value:
            if name in later:
                continue
            raise UsageError(f"{where} lacks {name!r}", hint="the file is cut short or was changed by hand")
        decoded[name] = _as(annotation, value[name], f"{where}.{name}")
    return kind(**decoded)


def _as(annotation: Any, value: object, where: str) -> Any:
    if isinstance(annotation, types.UnionType):
        if value is None:
            return None
        (annotation,) = (option for option in annotation.__args__ if option is not types.NoneType)
    if dataclasses.is_dataclass(annotation):
        return decode(typing.cast(type, annotation), value, where)
    if typing.get_origin(annotation) is tuple:
        return _tuple(typing.get_args(annotation), value, where)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        if value not in [member.value for member in annotation]:
            raise _wrong(where, f"one of {', '.join(str(member.value) for member in annotation)}", value)
        return annotation(value)
    if annotation in (int, float):
        return _number(annotation, value, where)
    if not isinstance(value, annotation):
        raise _wrong(where, {str: "a string", bool: "true or false"}[annotation], value)
    return value


def _tuple(kinds: tuple[Any, ...], value: object, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(where, "a list", value)
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        raise _wrong(where, f"a list of {len(kinds)}", value)
    return tuple(_as(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _number(kind: type[int] | type[float], value: object, where: str) -> float:
    # A JSON writer may give a whole float as an integer. To Python, true is an integer too.
    allowed: Any = (int, float) if kind is float else int
    if not isinstance(value, allowed) or isinstance(value, bool):
        raise _wrong(where, "a number" if kind is float else "a whole number", value)
    number = typing.cast(float, value)
    if not (math.isfinite(number) and number >= 0):
        raise _wrong(where, "finite and not negative", value)
    return kind(number)


def _wrong(where: str, expected: str, value: object) -> UsageError:
    shown = repr(value)
    shown = shown if len(shown) <= 40 else shown[:37] + "..."
    return UsageError(f"{where} is not {expected}: {shown}", hint="the file is damaged or was changed by hand")
