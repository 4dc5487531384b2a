"""A cell: what surrounds one actor, and the only thing that ever calls its handler.

A handler is called from two places: from the actor's task, which serves what is queued, a whole
box per wake, and inline, on the stack of whoever asks. Either way it is called through here, one
call at a time: an ask back to an actor on the stack raises `Reentered`. Messages are served in the
order in which they came, except that the control lane goes first; an inline ask serves what is
queued before it.

When a handler raises, whoever asked gets `HandlerFailed`, and the exception goes to the actor's
supervisor, wherever the handler ran. Without one, or if that gives up, the exception ends the
actor's task and with it the system. If it restarts the actor, what was not yet served stays queued
for its successor, except questions, which are answered `Restarting`.

A supervised actor's life in one line: IDLE ⇄ SERVING, at a failure RESTARTING until its recovery's
leader, after a delay, restarts all members of the recovery, then IDLE. All changes but the delay
are made at once, on the stack on which the handler failed; so, whoever is concerned and on the
stack below is restarted when its handler has returned.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, cast

import anyio

from .actor import Actor, AsyncActor, M, R
from .box import FULL, SHOT_DOWN, Box, Outcome, Settle
from .codec import Codec
from .envelope import Answer, Envelope
from .errors import Closed, HandlerFailed, Reentered, Restarting
from .keyed_box import KeyedBox
from .overflow import SHOOT_DOWN, Coalesce
from .reports import Ended, Failed, Restarted, Undelivered
from .setting import ActorState, ActorStatistics, Decision, Setting
from .supervise import Dismissal, Recovery
from .waits import Party, current

# As globals: looking a member up on its enum costs more than the comparison itself.
_IDLE, _SERVING = ActorState.IDLE, ActorState.SERVING
_RESTARTING = ActorState.RESTARTING
_CLOSING, _FAILED, _CLOSED = ActorState.CLOSING, ActorState.FAILED, ActorState.CLOSED


class Cell(Generic[M, R]):
    """Own one actor's box, type checks, state and task.

    Invariant: the state is SERVING exactly while a handler of the actor runs; a FAILED or CLOSED
    actor is never served again; one that is to be restarted has a `recovery` that holds it.

    Args:
        make: Returns who handles the messages, at the start and at each restart.
        name: As errors and traces name it.
        bound: How many messages each lane of the box holds at most.
        decide: What a failure leads to; None: to the end of the system.
    """

    queued_only = False

    def __init__(
        self,
        actor: Actor[M, R] | AsyncActor[M, R],
        name: str,
        bound: int,
        setting: Setting,
        make: Callable[[], Any] | None = None,
        decide: Callable[[Cell[Any, Any]], Decision] | None = None,
    ) -> None:
        self.name = name
        self.actor_type = type(actor).__qualname__
        self.party = Party(setting.system, name)
        self.box = self._make_box(actor, name, bound, setting.settle)
        self.box.served_by = self.party
        self.setting = setting
        self.settle = setting.settle
        # True if an ask never runs on the caller's stack by itself.
        self.by_queue = self.queued_only or setting.settle is not None
        self.state = _IDLE
        self._receive: Callable[[M], Any] = actor.receive
        self._make = make
        self._decide = decide
        self.messages: Codec[M] = Codec.of(actor.accepts)
        # What to queue for a message that is told.
        self.seal: Callable[[M], M | Envelope[M]] = (
            self.messages.seal if setting.tracer is None else self._seal_traced
        )
        self._replies: Codec[R] = Codec.of(actor.replies)
        self._tracer = setting.tracer
        self._rest = _IDLE  # what to be when a handler has returned
        self._unserved: Iterator[M | Envelope[M]] = iter(())  # of the batch being served
        self.recovery: Recovery[Cell[Any, Any]] | None = None
        self.failure: Exception | None = None
        self._cause = ""
        self._verdict = ""  # "failed" or "cancelled": the end comes before the mail is served
        self.ended: Ended | None = None
        self._on_end: list[Callable[[Ended], None]] = []
        self._scope = anyio.CancelScope()
        self._nudge: anyio.Event | None = None
        self._n_inline = 0
        self._n_restarts = 0
        # The box never replaces its lanes, so looking into them needs no call.
        self._items = self.box.items
        self._control = self.box.control

    def _make_box(
        self,
        actor: Actor[M, R] | AsyncActor[M, R],
        name: str,
        bound: int,
        settle: Settle | None,
    ) -> Box[M | Envelope[M]]:
        policy = actor.overflow
        box: Box[M | Envelope[M]]
        if isinstance(policy, Coalesce):
            box = KeyedBox(name, bound, _key_of(policy.key), settle)
            policy = policy.full
        else:
            box = Box(name, bound, settle)
        if policy is SHOOT_DOWN:
            box.spill = self._shoot_down
        return box

    @property
    def has_mail(self) -> bool:
        """True if something is queued that can be served now."""
        return (
            bool(self._items or self._control)
            and self.state in (_IDLE, _CLOSING)
            and not self._verdict
        )

    @property
    def busy(self) -> bool:
        """True if there is something to do for the actor, now or when it has been restarted."""
        if self.ended is not None or self._verdict:
            return False
        return self.recovery is not None or self.has_mail

    @property
    def ready(self) -> bool:
        """Under a conductor: True if `step_nowait` can be called."""
        if self.ended is not None or self.state is _SERVING:
            return False
        recovery = self.recovery
        if recovery is not None and not self._verdict:
            return recovery.leader is self and not _is_any_serving(recovery)
        return self.has_mail

    @property
    def is_over(self) -> bool:
        """True if nothing will be served any more, as soon as no handler runs."""
        if self.failure is not None or self._verdict:
            return True
        return self.box.closed and not self.box.depth and self.recovery is None

    def statistics(self) -> ActorStatistics:
        return ActorStatistics(self.box.statistics(), self._n_inline, self._n_restarts)

    # At the senders' door.

    def envelope(self, message: M, answer: Answer | None) -> Envelope[M]:
        """Return what to queue for a message that is asked, or traced."""
        sealed, encoded = self.messages.seal_with_bytes(message)
        sender = "" if self._tracer is None else self._tracer.sender
        return Envelope(sealed, encoded, sender, answer)

    def _seal_traced(self, message: M) -> Envelope[M]:
        return self.envelope(message, None)

    @property
    def takes_questions(self) -> bool:
        return self.state is _IDLE

    def refusal(self) -> Exception:
        """Return why a question cannot be put to this actor; it does not take any."""
        if self.state is _RESTARTING or self._rest is _RESTARTING:
            return Restarting(self.name)
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
        self._n_inline += 1
        self._serve_now(envelope)
        return cast(R, answer.take())

    # From the box.

    def serve_nowait(self) -> None:
        """Serve all that is queued now; what handlers add meanwhile comes next time."""
        self._serve(self.box.take_all())

    def step_nowait(self) -> None:
        """Do the next thing there is to do: restart, or serve one message. Must be ready."""
        if self.recovery is not None and not self._verdict:
            mend(self.recovery)
        else:
            self._serve([self.box.take_one()])

    def _serve(self, batch: list[M | Envelope[M]]) -> None:
        assert self.state in (_IDLE, _CLOSING)
        receive, control = self._receive, self._control
        self.state = _SERVING
        self._unserved = unserved = iter(batch)
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
            self._hand_back()
            self._return()

    def _hand_back(self) -> None:
        if rest := list(self._unserved):
            self.box.hand_back(rest)

    def _shoot_down(self, item: M | Envelope[M]) -> Outcome:
        """Serve what is queued, then this, on the sender's stack; FULL if that cannot be now."""
        box = self.box
        if self.state is not _IDLE:
            return FULL
        self.serve_nowait()
        if self.state is not _IDLE or self._items:
            return box.put_nowait(item)  # behind what came while we served
        box.count_shot_down()
        self._serve_now(item)
        return SHOT_DOWN

    def _serve_now(self, item: M | Envelope[M]) -> None:
        self.state = _SERVING
        try:
            if isinstance(item, Envelope):
                self._open(item)
            else:
                self._receive(item)
        except Exception as failure:
            self._fail(failure)
        finally:
            self._return()

    def _serve_control(self) -> None:
        for _ in range(len(self._control)):  # not more, or a handler could keep us here for ever
            if self._rest is _RESTARTING or self._verdict:
                return
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

    def _return(self) -> None:
        if self.state is _SERVING:
            self.state = self._rest

    # Failing and coming back.

    def _fail(self, failure: Exception) -> None:
        self.state = _FAILED
        self._cause = _text(failure)
        if self.recovery is not None or self._verdict:
            # Struck while its restart, or its end, was decided: by whom it was waiting for.
            self.state = _RESTARTING if self.recovery is not None else _FAILED
            self._report_failure(failure, self.recovery)
            return
        decision = None if self._decide is None else self._decide(self)
        if self._decide is not None:
            self._report_failure(failure, decision)
        if isinstance(decision, Recovery):
            for cell in decision.members:
                cell.suspend(decision)
        elif isinstance(decision, Dismissal):
            for cell in decision.members:
                cell.dismiss(self._cause)
        else:
            self.failure = failure
        self.box.rouse()

    def _report_failure(self, failure: Exception, decision: Decision) -> None:
        names = () if decision is None else tuple(cell.name for cell in decision.members)
        if isinstance(decision, Recovery):
            self.setting.tell(Failed(self.name, failure, names, (), decision.delay))
        else:
            self.setting.tell(Failed(self.name, failure, (), names, 0.0))

    def suspend(self, recovery: Recovery[Cell[Any, Any]]) -> None:
        """Serve nothing until restarted; answer the questions that are queued `Restarting`."""
        self.recovery = recovery
        self._hand_back()
        if self.state is _SERVING:
            self._rest = _RESTARTING
            self._interrupt()
        else:
            self.state = _RESTARTING
        self._give_up(_is_question, "restarting", Restarting(self.name))
        self.box.rouse()

    def restart(self) -> None:
        """Serve again, by a new actor. If it cannot be made, that is a failure of its own."""
        assert self._make is not None and self.state is _RESTARTING
        self.recovery = None
        try:
            self._receive = self._make().receive
        except Exception as failure:
            self._fail(failure)
            return
        self._n_restarts += 1
        self._rest = self.state = _CLOSING if self.box.closed else _IDLE
        self.setting.tell(Restarted(self.name, self._n_restarts))
        self.nudge()

    def dismiss(self, cause: str) -> None:
        """End as failed, without ending the system."""
        self._verdict, self._cause = "failed", cause
        self._hand_back()
        if self.state is _SERVING:
            self._rest = _FAILED
            self._interrupt()
        else:
            self.state = _FAILED
        self.box.rouse()
        self.nudge()

    def _interrupt(self) -> None:
        """Stop the handler that runs, if that can be."""

    def _give_up(
        self, unwanted: Callable[[M | Envelope[M]], bool], reason: str, error: Exception
    ) -> int:
        gone = self.box.withdraw(unwanted)
        for item in gone:
            self._report_undelivered(item, reason, error)
        return len(gone)

    def _report_undelivered(
        self, item: M | Envelope[M], reason: str, error: Exception | None
    ) -> None:
        message, asked = item, False
        if isinstance(item, Envelope):
            message, asked = item.message, item.answer is not None
            if item.answer is not None and error is not None:
                item.answer.fail(error)
        self.setting.tell(Undelivered(self.name, cast(Any, message), reason, asked))

    # The task.

    async def run(self, served: Callable[[], None]) -> None:
        """Serve the actor until it is closed, cancelled or fails: the body of its task.

        Args:
            served: Called after each time it served.

        Raises:
            Exception: What a handler raised, on whichever stack, if no supervisor took care of it.
        """
        current.set(self.party)
        try:
            with self._scope:
                while not self.is_over:
                    if self.setting.conduct is not None:
                        await self._take_turn(self.setting.conduct)
                    elif self.recovery is not None:
                        await self._recover(self.recovery)
                    else:
                        await self._serve_own()
                    served()
        finally:
            if self.setting.sweep is not None:
                self.setting.sweep()
            self.end()
            self.setting.release(self)
            if self.failure is not None:  # even if we are being cancelled: it must not get lost
                raise self.failure

    async def _serve_own(self) -> None:
        await self.box.wait()
        if self.state in (_IDLE, _CLOSING):
            self.serve_nowait()

    async def _take_turn(self, conduct: Callable[[], bool]) -> None:
        """Let the conductor choose; wait until there is something to choose from."""
        await self.box.wait()
        if conduct() or self.is_over or self.setting.is_granted(self):
            return
        if self.box.depth or self.recovery is not None:
            await self.nudged()  # an async handler runs, or this one waits to be restarted

    async def _recover(self, recovery: Recovery[Cell[Any, Any]]) -> None:
        """Wait to be restarted; the leader waits for the delay, then restarts all."""
        if recovery.leader is not self:
            await self.nudged()
            return
        with anyio.move_on_after(recovery.delay):
            await self.nudged()  # another recovery may include this one, and come first
        for cell in recovery.members:
            await cell.wait_returned()
        mend(recovery)

    async def wait_returned(self) -> None:
        """Wait until no handler of this actor runs. Without an async one that is always so."""

    async def nudged(self) -> None:
        if self._nudge is None:
            self._nudge = anyio.Event()
        await self._nudge.wait()

    def nudge(self) -> None:
        if self._nudge is not None:
            self._nudge.set()
            self._nudge = None

    def close(self) -> None:
        self.box.close()
        self._rest = _CLOSING
        if self.state is _IDLE:
            self.state = _CLOSING

    def cancel(self) -> None:
        self._verdict = self._verdict or "cancelled"
        if self.setting.conduct is None or self.state is _SERVING:
            self._scope.cancel()
        else:
            self.box.rouse()
            self.nudge()

    def on_end(self, tell: Callable[[Ended], None]) -> None:
        """Have this called when the actor has ended; at once if it has."""
        if self.ended is not None:
            tell(self.ended)
        else:
            self._on_end.append(tell)

    def end(self) -> None:
        """Report what is left, and the end. Does nothing the second time."""
        if self.ended is not None:
            return
        recovery, self.recovery = self.recovery, None
        is_failed = self.failure is not None or self._verdict == "failed"
        is_orderly = self.box.closed and not self.box.depth and not self._verdict
        reason = "failed" if is_failed else "closed" if is_orderly else "cancelled"
        self.box.close()
        self.state = _FAILED if is_failed else _CLOSED
        n_left = self._give_up(lambda _item: True, reason, Closed(self.name))
        self.ended = Ended(self.name, reason, self._cause if is_failed else "", n_left)
        self.setting.tell(self.ended)
        for tell in self._on_end:
            tell(self.ended)
        if recovery is not None and recovery.leader is self:
            _lead_instead(recovery)
        self.nudge()

    def check(self) -> None:
        self.box.check()
        assert self.failure is None or self.state is _FAILED
        assert self.state is not _CLOSED or (self.box.closed and self.ended is not None)
        assert self.recovery is None or self in self.recovery.members
        assert self.state is not _RESTARTING or self.recovery is not None


def mend(recovery: Recovery[Cell[Any, Any]]) -> None:
    """Restart all who wait for this recovery and no other."""
    for cell in recovery.members:
        if cell.recovery is recovery and cell.ended is None:
            cell.restart()


def _lead_instead(recovery: Recovery[Cell[Any, Any]]) -> None:
    """Give a recovery, whose leader is no more, to the first of the others, to be made at once."""
    waiting = [cell for cell in recovery.members if cell.recovery is recovery]
    if waiting:
        successor = Recovery(waiting[0], 0.0, tuple(waiting))
        for cell in waiting:
            cell.recovery = successor
            cell.nudge()


def _is_any_serving(recovery: Recovery[Cell[Any, Any]]) -> bool:
    return any(cell.state is _SERVING for cell in recovery.members)


def _is_question(item: object) -> bool:
    return isinstance(item, Envelope) and item.answer is not None


def _key_of(key: Callable[[Any], Hashable | None]) -> Callable[[Any], Hashable | None]:
    """Return the key of what is queued for a message; a question has none."""

    def key_of(item: Any) -> Hashable | None:
        if not isinstance(item, Envelope):
            return key(item)
        return None if item.answer is not None else key(item.message)

    return key_of


def _text(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}"
