"""Arrays out of a file that somebody else wrote: refused in one line, or as described."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
MAX_BYTES = 1 << 32  # unpacked; a few megabytes can be packed to hold more than memory does


class FileRefusedError(Exception):
    """A file cannot be used: `place` in it, and why."""

    def __init__(self, place: str, cause: str) -> None:
        super().__init__(f"{place}: {cause}")
        self.place, self.cause = place, cause


def read_arrays(path: Path, wanted: Callable[[str], bool]) -> dict[str, Array]:
    """Read the wanted arrays of an .npz file; no pickles, nothing that is not an integer.

    Raises:
        FileRefusedError: The file cannot be read, or an array is not what it should be.
    """
    name = "arrays"
    arrays: dict[str, Array] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise FileRefusedError("format", "one bare array, not an .npz of several")
            assert file.zip is not None, "it has just been opened"
            n_bytes = sum(int(member.file_size) for member in file.zip.infolist())
            if n_bytes > MAX_BYTES:
                raise FileRefusedError(name, f"unpack to {n_bytes} bytes, more than {MAX_BYTES}")
            for name in filter(wanted, file.files):
                arrays[name] = file[name]
    except FileRefusedError:
        raise
    except OSError as error:
        raise FileRefusedError("read", error.strerror or str(error)) from None
    except Exception as error:
        # zipfile, zlib and numpy's header parser raise a dozen kinds at damaged bytes.
        raise FileRefusedError(name, f"damaged or no .npz file ({error})") from None
    for name, array in arrays.items():
        if array.dtype.kind not in "ui":
            raise FileRefusedError(name, f"holds {array.dtype}, not integers")
    return arrays
