"""How a value crosses from one actor to another: encoded, decoded, never shared.

`seal` is the crossing in one process: it returns an equal value that shares no mutable object with
the one given. Encoding *and* decoding happen at the sender's door. So a value whose fields break
the declared types fails there, at the caller's line, and whatever lies in a mailbox is known to be
good. One decoder per class serves as the type check as well: one dictionary lookup does both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import NoneType, UnionType
from typing import Any, Generic, TypeVar, Union, get_args, get_origin

import msgspec

from .errors import NotAccepted

T = TypeVar("T")


class Codec(Generic[T]):
    """Encode and decode the values of one declared type.

    Args:
        declared: A msgspec Struct class or a union of such classes, each with its own tag; None
            may be a member. Anything else is refused, as is a subclass of a member at `seal`.
    """

    __slots__ = ("_decoders", "_encode", "declared")

    def __init__(self, declared: Any) -> None:
        msgspec.msgpack.Decoder(declared)  # refuses a union whose members have no distinct tags
        self.declared = declared
        self._encode: Callable[[Any], bytes] = msgspec.msgpack.Encoder().encode
        self._decoders: dict[type, Callable[[bytes], T]] = {
            kind: msgspec.msgpack.Decoder(kind).decode for kind in members_of(declared)
        }

    @staticmethod
    @cache
    def of(declared: Any) -> Codec[Any]:
        """Return the one codec of a declared type: it has no state, and costs more than a task."""
        return Codec(declared)

    def seal(self, value: T) -> T:
        """Return the value as its receiver sees it.

        Raises:
            NotAccepted: The value's class, or the type of one of its fields, is not as declared.
        """
        try:
            return self._decoders[value.__class__](self._encode(value))
        except _REFUSALS as refusal:
            raise self._refused(value, refusal) from None

    def seal_with_bytes(self, value: T) -> tuple[T, bytes]:
        """Return what `seal` returns and the bytes that crossed; raises as `seal` does."""
        try:
            encoded = self._encode(value)
            return self._decoders[value.__class__](encoded), encoded
        except _REFUSALS as refusal:
            raise self._refused(value, refusal) from None

    def _refused(self, value: object, refusal: Exception) -> NotAccepted:
        if value.__class__ not in self._decoders:
            return NotAccepted(value, f"declared is {self.declared}")
        return NotAccepted(value, str(refusal))


# KeyError: no decoder. TypeError: no encoding for a field. OverflowError: an integer beyond 64
# bits. ValidationError: decoded, but not to the declared type.
_REFUSALS = (KeyError, TypeError, OverflowError, msgspec.ValidationError)


def members_of(declared: Any) -> tuple[type, ...]:
    """Return the classes of a declared type: msgspec Structs, and None's."""
    declared = getattr(declared, "__value__", declared)  # `type X = ...` of Python 3.12
    members = get_args(declared) if get_origin(declared) in (Union, UnionType) else (declared,)
    kinds = tuple(NoneType if member is None else member for member in members)
    for kind in kinds:
        if not isinstance(kind, type) or not issubclass(kind, (msgspec.Struct, NoneType)):
            raise TypeError(f"{kind!r} is not a msgspec Struct: messages and replies must be")
    return kinds
