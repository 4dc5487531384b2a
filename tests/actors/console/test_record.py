"""`penumbra trace record`: with a stand-in that writes canned logs, then with valgrind."""

from __future__ import annotations

import getpass
import importlib.util
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from penumbra.actors.console.record import described
from penumbra.guest.traces import read_recording

Penumbra = Callable[..., tuple[int, str, str]]

# Told by the variable SCENE what to do; pids are those of the canned logs.
_VALGRIND = """\
#!{python}
import json, os, signal, sys, time

LOG = '''\\
==7== Using Valgrind-3.19.0 and LibVEX; rerun with -h for copyright info
==7== Command: /somewhere/secret
==7== Parent PID: 6
I  00001000,4
SYSCALL[7,1](2) sys_fork ( )   fork: process 7 created child 8
 --> [pre-success] Success(0x8)
 S fec84a94,4
'''
CHILD = '''\\
==8== Parent PID: 7
 --> [pre-success] Success(0x0)
I  00001004,4
SYSCALL[8,1](252) exit_group( 0 ) --> [pre-success] Success(0x0)
'''
THREAD = 'SYSCALL[7,2](3) sys_close ( 3 )[sync] --> Success(0x0)\\n'

def write(pid, text):
    pattern = next(word for word in sys.argv if word.startswith('--log-file='))
    path = pattern.partition('=')[2].replace('%%', '%').replace('%p', str(pid))
    with open(path, 'w') as file:
        file.write(text)

open({marks!r} + '/ran', 'w').write(json.dumps([os.getpid(), *sys.argv[1:]]))
scene = os.environ['SCENE']
if scene == 'nothing':
    sys.exit(127)
if scene == 'threads':
    write(7, LOG + THREAD)
elif scene == 'fatal':
    write(7, 'valgrind:  Fatal error at startup: a function redirection\\n')
elif scene == 'endless':
    write(7, LOG)
    signal.pause()
elif scene == 'interrupted':
    write(7, LOG)
    os.kill(os.getppid(), signal.SIGINT)
    signal.pause()
else:
    first = os.getpid()
    if not os.fork():
        while os.getppid() == first:  # outlive it: nothing but the pipe tells of us
            time.sleep(0.01)
        write(8, CHILD)
        os._exit(0)
    print('what the program says')
    write(7, LOG)
    sys.exit(3)
"""


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a stand-in for valgrind on PATH and say what it shall do."""
    tools, temporary = tmp_path / "50% tools", tmp_path / "50% tmp"
    tools.mkdir()
    temporary.mkdir()
    script = tools / "valgrind"
    script.write_text(_VALGRIND.format(python=sys.executable, marks=str(tmp_path)))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    return lambda name: monkeypatch.setenv("SCENE", name)


def leftovers(tmp_path: Path) -> list[str]:
    """What a recording left behind, but for its marks and tools."""
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    return sorted(found - {"50% tools", "50% tools/valgrind", "50% tmp", "ran"})


Scene = Callable[[str], None]


@pytest.mark.shows("G9")
def test_a_command_is_recorded_with_all_that_it_leaves_in_the_background(
    scene: Scene, penumbra: Penumbra, tmp_path: Path
) -> None:
    scene("two processes")
    code, out, err = penumbra("trace", "record", "--", "sh", "-c", "exit 3")
    assert (code, err) == (0, "sh ended with code 3; recorded all the same\n")
    assert "what the program says" not in out
    assert "processes  2 of 32 bits" in out
    recording = read_recording(Path("sh.trace"))
    assert recording.n_references == 3
    assert recording.provenance.startswith("sh -c exit 3 (recorded by penumbra ")
    assert recording.provenance.endswith(") [valgrind 3.19.0 lackey]")
    assert leftovers(tmp_path) == ["sh.trace"]


@pytest.mark.shows("G9")
def test_the_command_gets_its_words_as_they_are_with_or_without_dashes(
    scene: Scene, penumbra: Penumbra, tmp_path: Path
) -> None:
    scene("two processes")
    words = ["sh", "-o", "--json", "--", "--out", "x y"]
    for dashes in (["--"], []):
        code, out, err = penumbra(
            "trace", "record", "--json", "-o", "a.trace", "--force", *dashes, *words
        )
        assert (code, err) == (0, "")
        assert json.loads(out)["processes"] == 2
        ran = json.loads((tmp_path / "ran").read_text())
        assert ran[ran.index("--") + 1 :] == words
        assert {"--tool=lackey", "--trace-children=yes", "--trace-syscalls=yes"} < set(ran[1:])


def test_the_raw_logs_can_be_kept_in_a_folder_that_holds_nothing_else(
    scene: Scene, penumbra: Penumbra, tmp_path: Path
) -> None:
    scene("two processes")
    assert penumbra("trace", "record", "--quiet", "--keep-logs", "logs", "sh") == (
        0,
        "sh.trace: 2 processes, 3 references\n",
        "sh ended with code 3; recorded all the same\n",
    )
    assert leftovers(tmp_path) == ["logs", "logs/log.7", "logs/log.8", "sh.trace"]
    again = penumbra("trace", "record", "--force", "--keep-logs", "logs", "sh")
    assert again == (2, "", "penumbra: logs: --keep-logs: the folder is not empty\n")


@pytest.mark.parametrize(
    ("name", "options", "cause"),
    [
        (
            "threads",
            (),
            (
                "sh: process 7, line 8: a second thread: threads sharing an address space cannot "
                "be replayed, as references carry no thread number"
            ),
        ),
        ("nothing", (), "sh: record: valgrind did not run it (it ended with code 127)"),
        (
            "fatal",
            (),
            (
                "sh: process 7, line 1: valgrind gave up: 'Fatal error at startup: a function "
                "redirection'; a 32-bit program needs the package libc6-dbg:i386"
            ),
        ),
        ("endless", ("--max-mib", "0"), "sh: record: its logs take more than 0 MiB (--max-mib)"),
    ],
)
def test_what_cannot_be_recorded_is_one_line_and_leaves_nothing(
    name: str,
    options: tuple[str, ...],
    cause: str,
    scene: Scene,
    penumbra: Penumbra,
    tmp_path: Path,
) -> None:
    scene(name)
    assert penumbra("trace", "record", *options, "sh") == (2, "", f"penumbra: {cause}\n")
    assert leftovers(tmp_path) == []
    assert not is_alive(json.loads((tmp_path / "ran").read_text())[0])


def test_ctrl_c_ends_the_command_and_leaves_nothing(
    scene: Scene, penumbra: Penumbra, tmp_path: Path
) -> None:
    scene("interrupted")
    assert penumbra("trace", "record", "sh") == (130, "", "penumbra: interrupted\n")
    assert leftovers(tmp_path) == []
    assert not is_alive(json.loads((tmp_path / "ran").read_text())[0])


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("nonesuch",), "nonesuch: record: no such command, or not one that can be run"),
        (("-o", "no/folder.trace", "sh"), "no/folder.trace: write: there is no such folder"),
        (("-o", "there.trace", "sh"), "there.trace: write: exists already and is not overwritten"),
        (
            (),
            (
                "command line: penumbra trace record: the following arguments are required: "
                "COMMAND (--help says what there is)"
            ),
        ),
    ],
)
def test_what_is_wrong_from_the_start_is_said_before_anything_runs(
    words: tuple[str, ...], line: str, scene: Scene, penumbra: Penumbra, tmp_path: Path
) -> None:
    scene("two processes")
    Path("there.trace").write_text("precious")
    assert penumbra("trace", "record", *words) == (2, "", f"penumbra: {line}\n")
    assert leftovers(tmp_path) == ["there.trace"]
    assert not (tmp_path / "ran").exists()


def test_a_missing_valgrind_is_named_with_its_package(
    penumbra: Penumbra, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    cause = "not installed; on Debian and Ubuntu it is the package valgrind"
    assert penumbra("trace", "record", "sh") == (2, "", f"penumbra: valgrind: record: {cause}\n")


def test_a_wrong_engine_in_the_environment_is_one_line(
    penumbra: Penumbra, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENUMBRA_ENGINE", "steam")
    line = "penumbra: environment: PENUMBRA_ENGINE: 'steam' is neither numba nor plain\n"
    assert penumbra("trace", "info", "pipeline") == (2, "", line)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sort", "-n", "words.txt"], "sort -n words.txt"),
        (["/usr/bin/sort", "/home/ann/words.txt"], "sort words.txt"),
        (["./a.out", "../x/y", "~bob/z", "--in=/tmp/deep/er/file.c"], "a.out y z --in=file.c"),
        (["sh", "-c", "cat /etc/passwd | wc >/dev/null"], "sh -c cat passwd | wc >null"),
        (["ls", "/"], "ls /"),
        (["ls", "/var/"], "ls var/"),
        (["echo", "two\nlines"], "echo two lines"),
    ],
)
def test_provenance_keeps_the_command_and_no_path(
    words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "nobody-here")
    assert described(words) == expected


def test_provenance_names_neither_user_nor_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "ann")
    monkeypatch.setattr(socket, "gethostname", lambda: "box.lan")
    words = ["mail", "ann@box.lan", "/home/ann/annual", "ann"]
    assert described(words) == "mail USER@HOST annual USER"


@pytest.mark.shows("G9")
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="too slow without numba")
def test_a_real_program_is_recorded_and_replays_alike_under_every_scheme(
    penumbra: Penumbra, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PENUMBRA_ENGINE", "numba")
    script = tmp_path / "script.sh"
    script.write_text("( n=1; : $((n + 1)) )\nexit 4\n")
    code, out, err = penumbra("trace", "record", "--json", "--", "sh", str(script))
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert (said["processes"], said["calls"]["fork"], said["calls"]["wait"]) == (2, 1, 1)
    assert said["references"] > 50_000
    assert str(tmp_path) not in said["provenance"]
    assert said["provenance"].startswith("sh script.sh (recorded by penumbra ")
    code, out, err = penumbra("compare", "sh.trace", "--json", "--jobs", "1")
    assert (code, err) == (0, "")
    assert "coherent" in out
