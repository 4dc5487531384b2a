"""A mailbox as a pair of trio channels. Import this module only where trio is installed."""

from __future__ import annotations

from typing import Generic, TypeVar

import anyio
import msgspec
import trio

from .mailbox import Mailbox
from .streams import MailboxReceiveStream, MailboxSendStream, open_streams

M = TypeVar("M", bound=msgspec.Struct)


def open_channels(mailbox: Mailbox[M]) -> tuple[MailboxSendChannel[M], MailboxReceiveChannel[M]]:
    """Return both ends of a mailbox. Closing either end closes the mailbox."""
    sending, receiving = open_streams(mailbox)
    return MailboxSendChannel(sending), MailboxReceiveChannel(receiving)


class MailboxSendChannel(trio.abc.SendChannel[M], Generic[M]):
    """`MailboxSendStream` with trio's names for what goes wrong."""

    def __init__(self, stream: MailboxSendStream[M]) -> None:
        self._stream = stream

    async def send(self, value: M) -> None:
        try:
            await self._stream.send(value)
        except anyio.ClosedResourceError:
            raise trio.ClosedResourceError from None
        except anyio.BrokenResourceError:
            raise trio.BrokenResourceError from None

    async def aclose(self) -> None:
        await self._stream.aclose()


class MailboxReceiveChannel(trio.abc.ReceiveChannel[M], Generic[M]):
    """`MailboxReceiveStream` with trio's names for what goes wrong."""

    def __init__(self, stream: MailboxReceiveStream[M]) -> None:
        self._stream = stream

    async def receive(self) -> M:
        try:
            return await self._stream.receive()
        except anyio.ClosedResourceError:
            raise trio.ClosedResourceError from None
        except anyio.EndOfStream:
            raise trio.EndOfChannel from None
        except anyio.BusyResourceError:
            raise trio.BusyResourceError from None

    async def aclose(self) -> None:
        await self._stream.aclose()
