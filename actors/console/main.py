"""The command `penumbra`: what can be asked, and what becomes of an answer or a failure.

Exit codes: 0 every verdict is coherent, or checking was declined; 1 a verdict is not, or schemes
disagree about memory, or a case of a check failed; 2 the input cannot be used; 130 interrupted.

Nothing heavy is imported before a command is known: `--help` and `--version` answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from penumbra.actors.console.errors import COMMAND_LINE, UsageError
from penumbra.actors.console.interrupts import deferred

USAGE, INTERRUPTED, READER_GONE = 2, 130, 141

_WORKLOAD = "a recording (.trace), a configuration (.toml), a run folder, or a listed name"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        arguments = _parser().parse_args(argv)
        code = _command(arguments)
        sys.stdout.flush()
    except UsageError as error:
        print(f"penumbra: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt as interrupt:
        print(f"penumbra: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Who read our output has enough; keep the interpreter from flushing into it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(COMMAND_LINE, self.prog, f"{message} (--help says what there is)")


class _Version(argparse.Action):
    def __call__(self, *unused: object) -> None:
        from penumbra.actors.console.version import version

        print(f"penumbra {version()}")
        raise SystemExit(0)


def _command(arguments: argparse.Namespace) -> int:
    with deferred():
        action = _load(arguments.command)
    return action(arguments)


def _load(command: str) -> Callable[[argparse.Namespace], int]:
    """Import what a command needs, and nothing else."""
    match command:
        case "run":
            from penumbra.actors.console.run import run as action
        case "compare":
            from penumbra.actors.console.compare import compare as action
        case "replay":
            from penumbra.actors.console.replay import replay as action
        case "trace":
            from penumbra.actors.console.trace import trace as action
        case "litmus":
            from penumbra.actors.console.litmus import litmus as action
        case "paper":
            from penumbra.actors.console.paper import paper as action
        case "check":
            from penumbra.actors.console.check import check as action
        case "list":
            from penumbra.actors.console.listing import listing as action
        case _:
            from penumbra.actors.console.listing import schema as action
    return action


def _parser() -> argparse.ArgumentParser:
    every = _Parser(add_help=False)
    every.add_argument("--json", action="store_true", help="print JSON and nothing else on stdout")
    every.add_argument("--quiet", action="store_true", help="print one line per result")
    every.add_argument("--seed", type=int, metavar="N", help="seed of every choice (default 0)")

    parser = _Parser(
        prog="penumbra",
        description="Virtual machines whose derived page tables are kept coherent in several ways,"
        " side by side and under a checker.",
        epilog="exit code: 0 coherent or unchecked by wish, 1 not coherent, 2 unusable input,"
        " 130 interrupted",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and end")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    one = commands.add_parser("run", parents=[every], help="run a workload under one scheme")
    one.add_argument("--scheme", metavar="NAME", help="a listed scheme, or the configuration's own")
    _simulation(one)

    several = commands.add_parser(
        "compare", parents=[every], help="run a workload under several schemes, side by side"
    )
    several.add_argument(
        "--schemes", metavar="A,B,...", help="the schemes, in order (default: all that are listed)"
    )
    several.add_argument("--base", metavar="NAME", help="scheme to which costs relate (the first)")
    several.add_argument(
        "--jobs", type=int, metavar="N", help="schemes at a time, each in a process (at most 2)"
    )
    several.add_argument(
        "--fresh", action="store_true", help="run again what an earlier comparison has completed"
    )
    _simulation(several)

    again = commands.add_parser(
        "replay", parents=[every], help="run once more what a run folder holds, and compare bytes"
    )
    again.add_argument("what", metavar="FOLDER|TOKEN", help="a run folder, or its name in DIR")
    _way(again)

    _trace(commands.add_parser("trace", help="make a recording, or say what one holds"), every)

    tests = commands.add_parser(
        "litmus", parents=[every], help="run TLB litmus tests in every order under some schemes"
    )
    tests.add_argument("file", metavar="FILE.json", help="the tests")
    tests.add_argument("--scheme", metavar="A,B,...", help="the schemes (default: all presets)")
    tests.add_argument(
        "--schedules",
        default="all",
        metavar="all|N",
        help="all orders of a test's operations (default), or so many drawn with the seed",
    )

    _check(
        commands.add_parser("check", help="check the MMU against a file of known results"), every
    )

    published = commands.add_parser(
        "paper", parents=[every], help="published ratios beside what the model says of them"
    )
    published.add_argument("--rows", metavar="R5,R7,...", help="these rows only")
    published.add_argument("--jobs", type=int, metavar="N", help="runs at a time (at most 2)")
    _running(published)

    listed = commands.add_parser("list", parents=[every], help="list what can be named")
    listed.add_argument(
        "what",
        nargs="?",
        choices=("workloads", "recordings", "schemes", "costs", "profiles", "faults"),
        help="one of them only",
    )
    _scheme_files(listed)
    commands.add_parser(
        "schema", parents=[every], help="print the JSON schema of the configuration file"
    )
    return parser


def _simulation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workload", metavar="WORKLOAD", help=_WORKLOAD)
    parser.add_argument("--vcpus", type=int, metavar="N", help="the same as --set machine.vcpus=N")
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        help="override the configuration, e.g. scheme.options.capacity=1",
    )
    _scheme_files(parser)
    _running(parser)
    parser.add_argument(
        "--hazards",
        choices=("report", "fail"),
        default="report",
        help="whether the guest's own mistakes in flushing fail the run (report)",
    )


def _running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-check", dest="check", action="store_false", help="run UNCHECKED")
    _way(parser)


def _way(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", metavar="DIR", default="runs", help="where run folders go (runs)")
    parser.add_argument("--engine", choices=("numba", "plain"), help="how the CPUs are executed")
    parser.add_argument("--loop", choices=("trio", "asyncio"), default="trio", help="event loop")


def _scheme_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scheme-file",
        dest="scheme_files",
        action="append",
        default=[],
        metavar="FILE",
        help="schemes of your own beside the listed ones (.toml with [[schemes]]); repeatable",
    )


def _trace(parser: argparse.ArgumentParser, every: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    imported = actions.add_parser(
        "import", parents=[every], help="make a recording from the logs of a recorded program"
    )
    imported.add_argument(
        "--lackey",
        nargs="+",
        required=True,
        metavar="LOG",
        help="logs of valgrind --tool=lackey --trace-mem=yes --basic-counts=no"
        " --trace-syscalls=yes --trace-children=yes --log-file=LOG.%%p, one per process",
    )
    imported.add_argument("-o", "--out", required=True, metavar="FILE", help="the recording")
    imported.add_argument("--provenance", default="", metavar="TEXT", help="what was recorded")
    imported.add_argument("--force", action="store_true", help="replace FILE if it exists")
    recorded = actions.add_parser(
        "record",
        parents=[every],
        allow_abbrev=False,
        help="run a command under valgrind and make a recording of it",
        usage="%(prog)s [options] -- COMMAND ...",
    )
    recorded.add_argument("-o", "--out", metavar="FILE", help="the recording (COMMAND.trace)")
    recorded.add_argument("--provenance", default="", metavar="TEXT", help="what was recorded")
    recorded.add_argument("--force", action="store_true", help="replace FILE if it exists")
    recorded.add_argument("--keep-logs", metavar="DIR", help="keep valgrind's logs in this folder")
    recorded.add_argument(
        "--max-mib", type=int, default=4096, metavar="N", help="most room for the logs (4096)"
    )
    recorded.add_argument(
        "words", nargs=argparse.PARSER, metavar="COMMAND", help="its output goes to stderr"
    )
    info = actions.add_parser("info", parents=[every], help="say what a recording holds")
    info.add_argument("file", metavar="FILE", help="a recording, or the name of a shipped one")


def _check(parser: argparse.ArgumentParser, every: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="action", metavar="WHAT", required=True)
    accesses = what.add_parser(
        "mmu", parents=[every], help="single IA-32 accesses: faults, addresses, A and D bits, data"
    )
    accesses.add_argument(
        "--scheme",
        metavar="NAME",
        default="native",
        help="what the accesses go through: bare hardware (native) or a scheme's shadow tables",
    )
    walks = what.add_parser(
        "walk", parents=[every], help="a kernel's page tables: the complete list of its mappings"
    )
    for one in (accesses, walks):
        one.add_argument("file", metavar="FILE", help="an .npz file")


if __name__ == "__main__":
    sys.exit(main())
