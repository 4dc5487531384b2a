"""The one error of this package."""

from __future__ import annotations


class TraceError(Exception):
    """A recording, or a log to import, that cannot be used.

    Attributes:
        file: The file as the caller named it.
        place: Where in the file: a line, or a section and byte offset.
        cause: What is wrong there.
    """

    def __init__(self, file: str, place: str, cause: str) -> None:
        super().__init__(f"{file}: {place}: {cause}")
        self.file, self.place, self.cause = file, place, cause
