"""What ends a command early, as one line."""

from __future__ import annotations

from collections.abc import Sequence

COMMAND_LINE = "command line"


class UsageError(Exception):
    """Something given to the command cannot be used; the text names file, place and cause.

    The command prints it as one line and ends with exit code 2, having written nothing over.
    """

    def __init__(self, file: str, place: str, cause: str) -> None:
        super().__init__(" ".join(f"{file}: {place}: {cause}".split()))
        self.file, self.place, self.cause = file, place, cause


class Interrupted(KeyboardInterrupt):
    """Ctrl-C has ended runs, cleanly; `folders` are those that it leaves PARTIAL."""

    def __init__(self, folders: Sequence[str]) -> None:
        kept = f"; kept and marked PARTIAL: {', '.join(folders)}" if folders else ""
        super().__init__(f"interrupted{kept}")
        self.folders = list(folders)
