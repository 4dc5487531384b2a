"""A mailbox as a pair of anyio object streams, for code that speaks streams.

The streams are views: the mailbox may still be offered to directly, and its statistics count
everything. They run on trio and asyncio alike.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import anyio
import anyio.lowlevel
import msgspec
from anyio.abc import ObjectReceiveStream, ObjectSendStream

from .errors import Closed
from .mailbox import Mailbox

M = TypeVar("M", bound=msgspec.Struct)
M_contra = TypeVar("M_contra", bound=msgspec.Struct, contravariant=True)
M_co = TypeVar("M_co", bound=msgspec.Struct, covariant=True)


def open_streams(mailbox: Mailbox[M]) -> tuple[MailboxSendStream[M], MailboxReceiveStream[M]]:
    """Return both ends of a mailbox. Closing either end closes the mailbox."""
    return MailboxSendStream(mailbox), MailboxReceiveStream(mailbox)


class MailboxSendStream(ObjectSendStream[M_contra], Generic[M_contra]):
    """The sending end; any number of tasks may send."""

    def __init__(self, mailbox: Mailbox[M_contra]) -> None:
        self._mailbox = mailbox
        self._closed = False

    async def send(self, item: M_contra) -> None:
        """Queue a copy of the item, waiting while the mailbox is full; see `Mailbox.send`.

        Raises:
            anyio.ClosedResourceError: This stream was closed.
            anyio.BrokenResourceError: The mailbox was closed from elsewhere.
            NotAccepted: The item is not of the mailbox's type.
        """
        if self._closed:
            raise anyio.ClosedResourceError
        try:
            await self._mailbox.send(item)
        except Closed:
            raise anyio.BrokenResourceError from None

    async def aclose(self) -> None:
        """Close the mailbox; what is queued can still be received."""
        self._closed = True
        self._mailbox.close()
        await anyio.lowlevel.checkpoint()


class MailboxReceiveStream(ObjectReceiveStream[M_co], Generic[M_co]):
    """The receiving end, for one task. It drains the mailbox and hands out one message at a time.

    Cancelling `receive` loses nothing: what was drained stays here.
    """

    def __init__(self, mailbox: Mailbox[M_co]) -> None:
        self._mailbox = mailbox
        self._closed = False
        self._batch: list[M_co] = []  # last first

    async def receive(self) -> M_co:
        """Return the next message; always a checkpoint.

        Raises:
            anyio.ClosedResourceError: This stream was closed.
            anyio.EndOfStream: The mailbox was closed and has nothing left.
            anyio.BusyResourceError: Another task is receiving.
        """
        if self._closed:
            raise anyio.ClosedResourceError
        if self._batch:
            await anyio.lowlevel.checkpoint()
        else:
            batch = await self._mailbox.drain()
            self._batch[:0] = reversed(batch)
        if not self._batch:
            raise anyio.EndOfStream
        return self._batch.pop()

    async def aclose(self) -> None:
        """Close the mailbox; senders waiting for room get an error."""
        self._closed = True
        self._mailbox.close()
        await anyio.lowlevel.checkpoint()
