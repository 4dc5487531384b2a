"""The write-buffer scheme with other options, for tests of whole machines."""

from __future__ import annotations

from typing import Any

import msgspec

from penumbra.actors.vmm.schemes import WRITE_BUFFER, Scheme, SchemeOptions, WriteBufferOptions


def buffer_scheme(**options: Any) -> Scheme:
    """Return the preset with options changed, those of the buffers among them."""
    names = WriteBufferOptions.__struct_fields__
    buffer = {name: options.pop(name) for name in names if name in options}
    chosen = msgspec.convert({"buffer": buffer, **options}, SchemeOptions)
    return msgspec.structs.replace(WRITE_BUFFER, options=chosen)
