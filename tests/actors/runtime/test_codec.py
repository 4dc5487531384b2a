"""What crosses is an equal value that shares nothing, or an error at the sender's line."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from penumbra.actors.runtime import ActorError, NotAccepted
from penumbra.actors.runtime.codec import Codec


class Shelf(msgspec.Struct, array_like=True, tag=1):
    books: list[str]


class Row(msgspec.Struct, array_like=True, tag=2):
    shelves: list[Shelf]
    n: int = 0


class Untagged(msgspec.Struct):
    n: int


class AlsoUntagged(msgspec.Struct):
    n: int


class SubShelf(Shelf, tag=1):
    pass


@pytest.mark.shows("K2")
def test_what_is_sealed_is_equal_and_shares_no_object() -> None:
    row = Row([Shelf(["a"]), Shelf([])], 3)
    sealed = Codec[Row](Row | Shelf).seal(row)
    assert sealed == row
    row.shelves[0].books.append("b")
    row.shelves.clear()
    assert sealed == Row([Shelf(["a"]), Shelf([])], 3)


@pytest.mark.shows("K2")
def test_the_bytes_that_crossed_decode_to_what_was_sealed() -> None:
    sealed, encoded = Codec[Shelf | Row](Shelf | Row).seal_with_bytes(Shelf(["a"]))
    assert sealed == msgspec.msgpack.decode(encoded, type=Shelf | Row) == Shelf(["a"])


def test_none_is_sealed_only_where_it_is_declared() -> None:
    assert Codec[Shelf | None](Shelf | None).seal(None) is None
    with pytest.raises(NotAccepted, match="NoneType is not accepted"):
        Codec[Any](Shelf).seal(None)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (Untagged(1), "Untagged"),
        (SubShelf([]), "SubShelf"),
        (Row([], "three"), "Row"),  # type: ignore[arg-type]
        (Row([], 1 << 64), "Row"),
        (Row([], object()), "Row"),  # type: ignore[arg-type]
        (7, "int"),
    ],
)
def test_a_value_that_is_not_as_declared_is_refused_at_the_door(value: Any, kind: str) -> None:
    codec = Codec[Any](Shelf | Row)
    for seal in (codec.seal, codec.seal_with_bytes):
        with pytest.raises(NotAccepted) as refused:
            seal(value)
        assert refused.value.kind == kind
        assert isinstance(refused.value, ActorError)
        assert isinstance(refused.value, TypeError)


@pytest.mark.parametrize("declared", [Untagged | AlsoUntagged, int, list[Shelf], Shelf | str])
def test_only_structs_that_can_be_told_apart_are_accepted_as_a_type(declared: Any) -> None:
    with pytest.raises(TypeError):
        Codec[Any](declared)
