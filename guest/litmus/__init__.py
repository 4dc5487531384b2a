"""TLB litmus tests as guests: the file's tests, their memory, one thread per CPU.

Reading order: `format` (the file), `barriers` (which interleavings there are), `image` (memory),
`guest` (what runs).
"""

from penumbra.guest.litmus.barriers import Interleaving as Interleaving
from penumbra.guest.litmus.format import LitmusError as LitmusError
from penumbra.guest.litmus.format import LitmusTest as LitmusTest
from penumbra.guest.litmus.format import Outcome as Outcome
from penumbra.guest.litmus.format import read_tests as read_tests
from penumbra.guest.litmus.guest import LitmusGuest as LitmusGuest
from penumbra.guest.litmus.image import MemoryImage as MemoryImage
from penumbra.guest.litmus.image import image_of as image_of

__all__ = [
    "Interleaving",
    "LitmusError",
    "LitmusGuest",
    "LitmusTest",
    "MemoryImage",
    "Outcome",
    "image_of",
    "read_tests",
]
