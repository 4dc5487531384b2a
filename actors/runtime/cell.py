"""A cell: what surrounds one actor, and the only thing that ever calls its handler.

A handler is called from two places: from the actor's task, which serves what is queued, a whole
box per wake, and inline, on the stack of whoever asks. Either way it is called through here, one
call at a time: an ask back to an actor on the stack raises `Reentered`. Messages are served in the
order in which they came, except that the control lane goes first; an inline ask serves what is
queued before it.

When a handler raises, whoever asked gets `HandlerFailed` and the actor is served no more; the
exception itself goes to the actor's own task, wherever the handler ran. `run` is the one place
where a failure is met, and what was not yet served is then still in the box.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, cast

import anyio

from .actor import Actor, M, R
from .box import Box, MailboxStatistics
from .codec import Codec
from .envelope import Answer, Envelope, Tracer
from .errors import Closed, HandlerFailed, Reentered


class ActorState(enum.Enum):
    """IDLE can be asked. SERVING is on the stack. CLOSING serves what is queued, then is CLOSED."""

    IDLE = "idle"
    SERVING = "serving"
    CLOSING = "closing"
    FAILED = "failed"
    CLOSED = "closed"


# As globals: looking a member up on its enum costs more than the comparison itself.
_IDLE, _SERVING = ActorState.IDLE, ActorState.SERVING
_CLOSING, _FAILED, _CLOSED = ActorState.CLOSING, ActorState.FAILED, ActorState.CLOSED


@dataclass(frozen=True)
class ActorStatistics:
    """How an actor was reached: by its mailbox, and by asks on a caller's stack."""

    mailbox: MailboxStatistics
    inline: int


class Cell(Generic[M, R]):
    """Own one actor's box, type checks, state and task.

    Invariant: the state is SERVING exactly while a handler of the actor is on the stack, and a
    FAILED or CLOSED actor is never served again.

    Args:
        actor: Who handles the messages.
        name: As tasks, errors and traces name it.
        bound: How many messages each lane of the box holds at most.
        tracer: Told of each message and reply; None if nobody traces.
        settle: What an outside task awaits before it waits for this actor; None: nothing.
    """

    def __init__(
        self,
        actor: Actor[M, R],
        name: str,
        bound: int,
        tracer: Tracer | None = None,
        settle: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.name = name
        self.actor_type = type(actor).__qualname__
        self.box: Box[M | Envelope[M]] = Box(name, bound, settle)
        self.settle = settle
        self.state = _IDLE
        self._receive = actor.receive
        self.messages: Codec[M] = Codec.of(actor.accepts)
        # What to queue for a message that is told.
        self.seal: Callable[[M], M | Envelope[M]] = (
            self.messages.seal if tracer is None else self._seal_traced
        )
        self._replies: Codec[R] = Codec.of(actor.replies)
        self._tracer = tracer
        self._rest = _IDLE  # what to be when a handler has returned
        self._failure: Exception | None = None
        self._cause = ""
        self._scope = anyio.CancelScope()
        self._n_inline = 0
        # The box never replaces its lanes, so looking into them needs no call.
        self._items = self.box.items
        self._control = self.box.control

    @property
    def has_mail(self) -> bool:
        """True if something is queued that will be served."""
        return bool(self._items or self._control) and self.state in (_IDLE, _CLOSING)

    def statistics(self) -> ActorStatistics:
        return ActorStatistics(self.box.statistics(), self._n_inline)

    # At the senders' door.

    def envelope(self, message: M, answer: Answer | None) -> Envelope[M]:
        """Return what to queue for a message that is asked, or traced."""
        sealed, encoded = self.messages.seal_with_bytes(message)
        sender = "" if self._tracer is None else self._tracer.running
        return Envelope(sealed, encoded, sender, answer)

    def _seal_traced(self, message: M) -> Envelope[M]:
        return self.envelope(message, None)

    def refusal(self) -> Exception:
        """Return why a question cannot be put to this actor; it is not IDLE."""
        if self.state is _SERVING:
            return Reentered(self.name)
        if self.state is _FAILED:
            return HandlerFailed(self.name, self._cause)
        return Closed(self.name)

    # Inline.

    def ask_nowait(self, message: M) -> R:
        """Serve what is queued, then this message, here and now; see `ActorRef.ask_nowait`."""
        if self.state is not _IDLE or self._items or self._control or self._tracer is not None:
            return self._ask_slowly(message)
        sealed = self.messages.seal(message)
        self.state = _SERVING
        try:
            reply = self._replies.seal(self._receive(sealed))
        except Exception as failure:
            self._fail(failure)
        except BaseException:
            self.state = self._rest
            raise
        else:
            self.state = self._rest
            self._n_inline += 1
            return reply
        # Raised here, not above, so that it does not carry the actor's exception as its context.
        raise HandlerFailed(self.name, self._cause)

    def _ask_slowly(self, message: M) -> R:
        if self.state is not _IDLE:
            raise self.refusal()
        answer = Answer()
        envelope = self.envelope(message, answer)
        self.serve_nowait()
        if self.state is not _IDLE:
            raise self.refusal()
        self.state = _SERVING
        try:
            self._open(envelope)
            self._n_inline += 1
        except Exception as failure:
            self._fail(failure)
        finally:
            self._return()
        return cast(R, answer.take())

    # From the box.

    def serve_nowait(self) -> None:
        """Serve all that is queued now; what handlers add meanwhile comes next time."""
        self._serve(self.box.take_all())

    def serve_one_nowait(self) -> None:
        """Serve one message; at least one must be queued."""
        self._serve([self.box.take_one()])

    def _serve(self, batch: list[M | Envelope[M]]) -> None:
        assert self.state in (_IDLE, _CLOSING)
        receive, control = self._receive, self._control
        self.state = _SERVING
        unserved = iter(batch)
        try:
            if control:
                self._serve_control()
            for item in unserved:
                if isinstance(item, Envelope):
                    self._open(item)
                else:
                    receive(item)
                if control:
                    self._serve_control()
        except Exception as failure:
            self._fail(failure)
        finally:
            if rest := list(unserved):
                self.box.hand_back(rest)
            self._return()

    def _serve_control(self) -> None:
        for _ in range(len(self._control)):  # not more, or a handler could keep us here for ever
            item = self.box.take_one()
            if isinstance(item, Envelope):
                self._open(item)
            else:
                self._receive(item)

    def _open(self, envelope: Envelope[M]) -> None:
        """Run the handler; trace both ways; give the reply, or `HandlerFailed`, to who waits."""
        tracer, answer = self._tracer, envelope.answer
        below = ""
        if tracer is not None:
            tracer.record(envelope.sender, self.name, envelope.encoded)
            below, tracer.running = tracer.running, self.name
        try:
            reply = self._receive(envelope.message)
            if answer is None:
                return
            sealed, encoded = self._replies.seal_with_bytes(reply)
        except Exception as failure:
            if answer is not None:
                answer.fail(HandlerFailed(self.name, _text(failure)))
            raise
        finally:
            if tracer is not None:
                tracer.running = below
        if tracer is not None:
            tracer.record(self.name, envelope.sender, encoded)
        answer.give(sealed)

    def _fail(self, failure: Exception) -> None:
        self._failure = failure
        self._cause = _text(failure)
        self.state = _FAILED
        self.box.rouse()

    def _return(self) -> None:
        if self.state is _SERVING:
            self.state = self._rest

    # The task.

    async def run(self, serve: Callable[[], None], served: Callable[[], None]) -> None:
        """Serve the actor until it is closed, cancelled or fails: the body of its task.

        Args:
            serve: What to do when there may be something to serve.
            served: Called after each time.

        Raises:
            Exception: What a handler raised, on whichever stack.
        """
        try:
            with self._scope:
                while self._failure is None and not (self.box.closed and not self.box.depth):
                    await self.box.wait()
                    if self._failure is None:
                        serve()
                    served()
        finally:
            self._end()
            if self._failure is not None:  # even if we are being cancelled: it must not get lost
                raise self._failure

    def close(self) -> None:
        self.box.close()
        self._rest = _CLOSING
        if self.state is _IDLE:
            self.state = _CLOSING

    def cancel(self) -> None:
        self._scope.cancel()

    def _end(self) -> None:
        self.box.close()
        if self.state is not _FAILED:
            self.state = _CLOSED
        for item in (*self._control, *self._items):
            if isinstance(item, Envelope) and item.answer is not None:
                item.answer.fail(Closed(self.name))

    def check(self) -> None:
        self.box.check()
        assert (self.state is _FAILED) == (self._failure is not None)
        assert self.state is not _CLOSED or self.box.closed


def _text(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}"
