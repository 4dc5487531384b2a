"""A cell whose actor waits in its handler: always served on its own task, never inline."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import anyio

from .actor import M, R
from .cell import Cell
from .envelope import Answer, Envelope
from .errors import Closed, HandlerFailed, MustQueue, Restarting
from .setting import ActorState

_IDLE, _SERVING = ActorState.IDLE, ActorState.SERVING


class AsyncCell(Cell[M, R]):
    """As `Cell`, for an `AsyncActor`.

    Under a conductor its handler runs only while it is granted: from when the conductor chose it,
    to its return or its next wait for another actor (`step_nowait`, `resumes_when`). Whatever else
    it waits for, everybody waits for with it.

    Attributes:
        resumes_when: What its handler waits for under a conductor; None: it does not wait so.
    """

    queued_only = True
    resumes_when: Callable[[], bool] | None = None
    _is_struck = False  # its handler is to be cancelled
    _handling: anyio.CancelScope | None = None
    _returned: anyio.Event | None = None

    def ask_nowait(self, message: M) -> NoReturn:
        raise MustQueue(self.name)

    @property
    def takes_questions(self) -> bool:
        return self.state is _IDLE or (self.state is _SERVING and self._rest is _IDLE)

    def refusal(self) -> Exception:
        if self._rest is ActorState.CLOSING:
            return Closed(self.name)
        if self._rest is ActorState.FAILED:
            return HandlerFailed(self.name, self._cause)
        return super().refusal()

    @property
    def busy(self) -> bool:
        return self.state is _SERVING or super().busy

    @property
    def ready(self) -> bool:
        if self.state is _SERVING:
            return self._is_struck or (self.resumes_when is not None and self.resumes_when())
        return super().ready

    @property
    def needs_grant(self) -> bool:
        """True if the next step is one of its handler, to be made by its own task."""
        return self.state is _SERVING or self.has_mail

    def granted(self) -> None:
        """Go on, now that the conductor has chosen this handler."""
        if self._is_struck and self._handling is not None:
            self._handling.cancel()
        else:
            self.nudge()
            self.box.rouse()

    async def _serve_own(self) -> None:
        await self.box.wait()
        if self.has_mail:
            await self._handle_one()

    async def _take_turn(self, conduct: Callable[[], bool]) -> None:
        await super()._take_turn(conduct)
        if self.setting.is_granted(self) and self.has_mail:
            await self._handle_one()
            self.setting.release(self)
            conduct()

    async def _handle_one(self) -> None:
        item = self.box.take_one()
        self.state = _SERVING
        try:
            with anyio.CancelScope() as self._handling:
                await self._handle(item)
        finally:
            self._handling, self._is_struck = None, False
            self._return()
            if self._returned is not None:
                self._returned.set()
                self._returned = None

    async def _handle(self, item: M | Envelope[M]) -> None:
        envelope = item if isinstance(item, Envelope) else Envelope(item, b"", "", None)
        answer, tracer = envelope.answer, self._tracer
        if tracer is not None:
            tracer.record(envelope.sender, self.name, envelope.encoded)
        try:
            reply = await self._receive(envelope.message)
            if answer is None:
                return
            sealed, encoded = self._replies.seal_with_bytes(reply)
        except Exception as failure:
            self._fail_answer(answer, failure)
            self._fail(failure)
            return
        except BaseException:
            self._report_interrupted(envelope)
            raise
        if tracer is not None:
            tracer.record(self.name, envelope.sender, encoded)
        answer.give(sealed)

    def _fail_answer(self, answer: Answer | None, failure: Exception) -> None:
        if answer is not None:
            answer.fail(HandlerFailed(self.name, f"{type(failure).__name__}: {failure}"))

    def _report_interrupted(self, item: Envelope[M]) -> None:
        is_back_soon = self.recovery is not None
        error = Restarting(self.name) if is_back_soon else Closed(self.name)
        self._report_undelivered(item, "interrupted", error)

    def _interrupt(self) -> None:
        if self.setting.conduct is not None:
            self._is_struck = True  # when it ends is the conductor's choice, too
        elif self._handling is not None:
            self._handling.cancel()

    async def wait_returned(self) -> None:
        while self.state is _SERVING:
            if self._returned is None:
                self._returned = anyio.Event()
            await self._returned.wait()
