"""Options of the write-buffer scheme: what is refused, and that each fault has a name."""

from __future__ import annotations

import msgspec
import pytest

from penumbra.actors.vmm.buffer_faults import BUFFER_FAULTS, BufferFault, buffer_fault_named
from penumbra.actors.vmm.compose import compose_buffer
from penumbra.actors.vmm.schemes import (
    PATCH,
    WRITE_BUFFER,
    Scheme,
    SchemeOptions,
    WriteBufferOptions,
)
from penumbra.hw.write_buffer import NO_BUFFER, BufferSpec


def with_buffer(**options: object) -> Scheme:
    buffer = msgspec.convert(options, WriteBufferOptions)
    return msgspec.structs.replace(WRITE_BUFFER, options=SchemeOptions(buffer=buffer))


@pytest.mark.shows("S1", "S2")
@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"records": 0}, "options.buffer.records must be 1 .. 65536"),
        ({"records": 65537}, "options.buffer.records must be 1 .. 65536"),
        ({"fault": "luck"}, "options.buffer.fault: no write buffer fault 'luck'"),
        ({"fault": "logged_late+luck"}, "options.buffer.fault: no write buffer fault 'luck'"),
    ],
)
def test_buffers_that_cannot_be_say_why(options: dict[str, object], problem: str) -> None:
    said = with_buffer(**options).problem()
    assert said is not None
    assert said.startswith(f"scheme 'write-buffer': {problem}")


@pytest.mark.shows("S1")
def test_the_hardware_has_the_buffer_that_the_scheme_says_and_none_under_others() -> None:
    assert compose_buffer(PATCH) == NO_BUFFER
    assert compose_buffer(with_buffer(records=3, combines=False)) == BufferSpec(3, combines=False)
    assert compose_buffer(with_buffer(overflow="lost")) == BufferSpec(64, loses=True)
    assert compose_buffer(with_buffer(fault="logged_late")) == BufferSpec(64, late=True)


def test_there_is_one_fault_for_each_erratum_and_names_join() -> None:
    assert [row.erratum for row in BUFFER_FAULTS.values()] == [f"EG{i}" for i in range(1, 8)]
    assert [name for name, row in BUFFER_FAULTS.items() if row.printed] == ["own_buffer_only"]
    joined = buffer_fault_named("+".join(BUFFER_FAULTS))
    assert joined == BufferFault((1 << len(BUFFER_FAULTS)) - 1)
    assert buffer_fault_named("") == BufferFault.NONE
