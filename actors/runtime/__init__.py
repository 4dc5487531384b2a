"""Actors on anyio: mailboxes, inline asks, supervision, wait-for graph, the conductor.

Knows nothing of virtual machines. Messages are msgspec Structs, always encoded and decoded; the
price of a message is the turn of the event loop, so nothing here spends one per message.

Reading order: `errors`, `codec`, `waits`, `overflow`, `box`, `keyed_box`, `mailbox`, `actor`,
`supervise`, `reports`, `setting`, `cell`, `async_cell`, `reference`, `system`, `conductor`; then
`envelope` (answers, traces), `streams` and `trio_channels` (other people's interfaces; the latter
imports trio and is therefore imported by nobody here).
"""

from .actor import Actor as Actor
from .actor import AsyncActor as AsyncActor
from .box import MailboxStatistics as MailboxStatistics
from .box import Outcome as Outcome
from .conductor import Candidate as Candidate
from .conductor import Chooser as Chooser
from .conductor import Conductor as Conductor
from .conductor import Listed as Listed
from .conductor import LowestKey as LowestKey
from .conductor import Orders as Orders
from .conductor import SeededDraw as SeededDraw
from .envelope import Observer as Observer
from .errors import ActorError as ActorError
from .errors import AskTimeout as AskTimeout
from .errors import Closed as Closed
from .errors import Deadlock as Deadlock
from .errors import HandlerFailed as HandlerFailed
from .errors import MustQueue as MustQueue
from .errors import NotAccepted as NotAccepted
from .errors import Reentered as Reentered
from .errors import Restarting as Restarting
from .errors import ScheduleMismatch as ScheduleMismatch
from .mailbox import DEFAULT_BOUND as DEFAULT_BOUND
from .mailbox import Mailbox as Mailbox
from .overflow import SHOOT_DOWN as SHOOT_DOWN
from .overflow import WAIT as WAIT
from .overflow import Coalesce as Coalesce
from .overflow import Full as Full
from .overflow import Overflow as Overflow
from .reference import ActorRef as ActorRef
from .reports import Ended as Ended
from .reports import Failed as Failed
from .reports import Listener as Listener
from .reports import Report as Report
from .reports import Restarted as Restarted
from .reports import Undelivered as Undelivered
from .setting import ActorState as ActorState
from .setting import ActorStatistics as ActorStatistics
from .streams import MailboxReceiveStream as MailboxReceiveStream
from .streams import MailboxSendStream as MailboxSendStream
from .streams import open_streams as open_streams
from .supervise import DEFAULT_POLICY as DEFAULT_POLICY
from .supervise import Exhausted as Exhausted
from .supervise import RestartPolicy as RestartPolicy
from .supervise import Strategy as Strategy
from .system import ActorRecord as ActorRecord
from .system import ActorSystem as ActorSystem
from .system import Supervisor as Supervisor
from .system import SystemTree as SystemTree
from .waits import WaitRecord as WaitRecord

__all__ = [
    "DEFAULT_BOUND",
    "DEFAULT_POLICY",
    "SHOOT_DOWN",
    "WAIT",
    "Actor",
    "ActorError",
    "ActorRecord",
    "ActorRef",
    "ActorState",
    "ActorStatistics",
    "ActorSystem",
    "AskTimeout",
    "AsyncActor",
    "Candidate",
    "Chooser",
    "Closed",
    "Coalesce",
    "Conductor",
    "Deadlock",
    "Ended",
    "Exhausted",
    "Failed",
    "Full",
    "HandlerFailed",
    "Listed",
    "Listener",
    "LowestKey",
    "Mailbox",
    "MailboxReceiveStream",
    "MailboxSendStream",
    "MailboxStatistics",
    "MustQueue",
    "NotAccepted",
    "Observer",
    "Orders",
    "Outcome",
    "Overflow",
    "Reentered",
    "Report",
    "RestartPolicy",
    "Restarted",
    "Restarting",
    "ScheduleMismatch",
    "SeededDraw",
    "Strategy",
    "Supervisor",
    "SystemTree",
    "Undelivered",
    "WaitRecord",
    "open_streams",
]
