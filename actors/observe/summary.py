"""Bytes that are the same whenever the content is: JSON, TOML, npz and digests."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first date that a zip entry can carry
_REGULAR_FILE = 0o600 << 16
_UNIX = 3


def canonical_json(value: Any) -> bytes:
    """Return `value` as JSON: keys sorted, floats by their shortest exact form, one final newline.

    Raises:
        ValueError: A float is not finite.
        TypeError: A value is not JSON-able, nor a msgspec Struct, nor of numpy.
    """
    text = json.dumps(
        value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False, default=_plain
    )
    return (text + "\n").encode()


def digest(value: Any, n_digits: int = 10) -> str:
    """Return the first hex digits of the hash of `value`'s canonical JSON."""
    return hashlib.blake2b(canonical_json(value)).hexdigest()[:n_digits]


def write_npz(path: Path, columns: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write what `np.savez` would, but of the same bytes on every system and at any time.

    Entries are stored uncompressed, dated 1980, as little-endian arrays of npy format 1.0.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, column in columns.items():
            entry = zipfile.ZipInfo(f"{name}.npy", _EPOCH)
            entry.create_system, entry.external_attr = _UNIX, _REGULAR_FILE
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(
                    file, np.ascontiguousarray(column), version=(1, 0), allow_pickle=False
                )


def toml_text(tables: Mapping[str, Any]) -> str:
    """Return `tables` as TOML: first what stands at the top, then a section per sub-table.

    Values are strings, booleans, integers, finite floats, lists of them, and mappings of such;
    None is left out, as TOML has no word for it.
    """
    return "\n".join(_section((), tables)).lstrip("\n") + "\n"


def _section(path: tuple[str, ...], table: Mapping[str, Any]) -> list[str]:
    lines = ["", f"[{'.'.join(map(_key, path))}]"] if path else []
    for key, value in table.items():
        if value is not None and not isinstance(value, Mapping):
            lines.append(f"{_key(key)} = {_value(value)}")
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += _section((*path, key), value)
    return lines


def _key(key: str) -> str:
    bare = key.isascii() and key.replace("-", "").replace("_", "").isalnum()
    return key if bare else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # A JSON string is a TOML string but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    raise TypeError(f"no TOML for {type(value).__name__}")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, msgspec.Struct):
        return msgspec.to_builtins(value)
    raise TypeError(f"{type(value).__name__} in a summary")
