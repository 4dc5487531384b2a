"""`penumbra trace record`: run a command under valgrind's lackey tool and keep what it did.

The command runs as it would from the shell, but for its standard output, which goes to stderr: ours
is for the report. Valgrind writes one log per process into a folder of ours, about fourteen bytes
per memory reference; the importer reads them once every process has ended.
"""

from __future__ import annotations

import getpass
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic

from penumbra.actors.console.errors import UsageError
from penumbra.actors.console.progress import is_live, working
from penumbra.actors.console.version import version
from penumbra.guest.traces import Recording, TraceError, import_lackey
from penumbra.guest.traces.container import refuse_existing

VALGRIND = "valgrind"
LACKEY = (
    "--tool=lackey",
    "--trace-mem=yes",
    "--basic-counts=no",
    "--trace-syscalls=yes",
    "--trace-children=yes",
    "--command-line-only=yes",  # no options from the user's files and environment
    "--vgdb=no",
)
_MIB = 1 << 20
_BYTES_PER_REFERENCE = 14
_POLL_SECONDS = 0.2
_REPORT_SECONDS = 5.0
_LOG = re.compile(r"log\.(\d+)")
# A path in a command line, be it a word or part of one; what is kept of it is its last name.
_PATH = re.compile(
    r"""(?:~[^\s/'"]*|\.{1,2})?/(?:[^\s/'"`;|&<>()=:,]+/+)*(?=[^\s/'"`;|&<>()=:,])"""
)


def record(
    words: Sequence[str],
    out: Path,
    *,
    provenance: str = "",
    overwrite: bool = False,
    keep_logs: Path | None = None,
    max_mib: int = 4096,
    quiet: bool = False,
) -> tuple[Recording, int]:
    """Run a command to its end and write its recording; return it with the command's exit code.

    Args:
        words: The command and its arguments.
        out: The recording to write; nothing is written when anything fails.
        provenance: What to say of the command instead of its words.
        overwrite: Replace `out` if it exists.
        keep_logs: An empty or new folder for the raw logs, which are removed otherwise.
        max_mib: Most room that the raw logs may take; the command is ended when they take more.
        quiet: Say nothing meanwhile.

    Raises:
        UsageError: Valgrind is missing, or the command cannot be run, is too long, or does what
            cannot be replayed.
        TraceError: `out` cannot be written.
    """
    valgrind = _find_valgrind()
    refuse_existing(out, overwrite)
    if not out.parent.is_dir():
        raise TraceError(str(out), "write", "there is no such folder")
    if shutil.which(words[0]) is None:
        raise UsageError(words[0], "record", "no such command, or not one that can be run")
    about = f"{provenance or described(words)} (recorded by penumbra {version()})"
    with _log_folder(keep_logs) as folder:
        code = _run(valgrind, words, folder, max_mib, quiet)
        logs = sorted(path for path in folder.iterdir() if _LOG.fullmatch(path.name))
        if not logs:
            cause = f"valgrind did not run it (it ended with code {code})"
            raise UsageError(words[0], "record", cause)
        try:
            with working(f"reading {len(logs)} logs", quiet):
                return import_lackey(logs, out, about, overwrite), code
        except TraceError as error:
            if Path(error.file).parent != folder:
                raise
            raise _refusal(words[0], error, keep_logs) from None


def described(words: Sequence[str]) -> str:
    """Return a command as provenance: no path but its last name, no user's or host's name."""
    text = " ".join(_PATH.sub("", word) if len(word) > 1 else word for word in words)
    for name, stand_in in ((_user(), "USER"), (socket.gethostname(), "HOST")):
        if name:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", stand_in, text)
    return " ".join(text.split())


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a user without a name
        return ""


def _find_valgrind() -> str:
    valgrind = shutil.which(VALGRIND)
    if valgrind is None:
        cause = "not installed; on Debian and Ubuntu it is the package valgrind"
        raise UsageError(VALGRIND, "record", cause)
    return valgrind


@contextmanager
def _log_folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="penumbra-record-") as folder:
            yield Path(folder).resolve()
        return
    keep.mkdir(parents=True, exist_ok=True)
    if any(keep.iterdir()):
        raise UsageError(str(keep), "--keep-logs", "the folder is not empty")
    yield keep.resolve()


def _run(valgrind: str, words: Sequence[str], folder: Path, max_mib: int, quiet: bool) -> int:
    """Run the command until all of its processes have ended, also those left in the background.

    Every process inherits the writing end of a pipe: at its end of file none is left, but for one
    that closed what it did not know.
    """
    pattern = str(folder).replace("%", "%%") + "/log.%p"
    ended, alive = os.pipe()
    # Ctrl-C reaches a foreground group as a whole. Otherwise the command gets a group of its own,
    # so that its processes can be ended together.
    own_group = not sys.stdin.isatty()
    try:
        child = subprocess.Popen(
            [valgrind, *LACKEY, f"--log-file={pattern}", "--", *words],
            stdout=_stderr_fd(),
            pass_fds=(alive,),
            process_group=0 if own_group else None,
        )
    except OSError as error:
        os.close(ended)
        raise UsageError(VALGRIND, "record", error.strerror or str(error)) from None
    finally:
        os.close(alive)
    try:
        _watch(child, ended, words[0], folder, max_mib, quiet)
        return child.wait()
    finally:
        os.close(ended)
        if own_group:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        if child.poll() is None:
            child.kill()
            child.wait()


def _stderr_fd() -> int:
    try:
        return sys.stderr.fileno()
    except OSError:  # not a file, as under a test
        return subprocess.DEVNULL


def _watch(
    child: subprocess.Popen[bytes], ended: int, name: str, folder: Path, max_mib: int, quiet: bool
) -> None:
    started, all_ended = monotonic(), False
    due = started + _REPORT_SECONDS
    while not all_ended or child.poll() is None:
        if all_ended:
            with suppress(subprocess.TimeoutExpired):
                child.wait(_POLL_SECONDS)
        else:
            all_ended = bool(select.select([ended], [], [], _POLL_SECONDS)[0])
        sizes = [path.stat().st_size for path in folder.iterdir()]
        if sum(sizes) > max_mib * _MIB:
            raise UsageError(name, "record", f"its logs take more than {max_mib} MiB (--max-mib)")
        if not quiet and is_live(sys.stderr) and monotonic() >= due:
            # Lines, not a spinner: the command writes to the same terminal.
            due = monotonic() + _REPORT_SECONDS
            references = sum(sizes) / _BYTES_PER_REFERENCE / 1e6
            text = f"recording: {monotonic() - started:.0f} s, {len(sizes)} processes, about"
            print(f"{text} {references:.1f} M references", file=sys.stderr)


def _refusal(name: str, error: TraceError, keep_logs: Path | None) -> UsageError:
    if keep_logs is not None:
        return UsageError(error.file, error.place, error.cause)
    match = _LOG.fullmatch(Path(error.file).name)
    process = f"process {match[1]}, " if match else ""
    return UsageError(name, f"{process}{error.place}", error.cause)
