"""When Ctrl-C may come.

Not while modules are imported or kernels loaded: both run Python code from callbacks in which a
KeyboardInterrupt is printed and forgotten. Where the system cannot hold signals back (no
`pthread_sigmask`), nothing here does anything.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

CAN_DEFER = hasattr(signal, "pthread_sigmask")


@contextmanager
def deferred() -> Iterator[None]:
    """Hold SIGINT back meanwhile; a process started meanwhile starts so.

    Raises:
        KeyboardInterrupt: At the end, if one has come.
    """
    if not CAN_DEFER:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def admitted() -> Iterator[None]:
    """Let SIGINT through meanwhile, one that has been held back at once; then hold it back."""
    if not CAN_DEFER:
        yield
        return
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
