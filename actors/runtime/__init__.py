"""Actors on anyio: mailboxes, inline asks, statistics, the conductor.

Knows nothing of virtual machines. Messages are msgspec Structs, always encoded and decoded; the
price of a message is the turn of the event loop, so nothing here spends one per message.

Reading order: `errors`, `codec`, `box`, `mailbox`, `actor`, `cell`, `reference`, `system`,
`conductor`; then `envelope` (answers, traces), `streams` and `trio_channels` (other people's
interfaces; the latter imports trio and is therefore imported by nobody here).
"""

from .actor import Actor as Actor
from .box import MailboxStatistics as MailboxStatistics
from .cell import ActorState as ActorState
from .cell import ActorStatistics as ActorStatistics
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
from .errors import HandlerFailed as HandlerFailed
from .errors import NotAccepted as NotAccepted
from .errors import Reentered as Reentered
from .errors import ScheduleMismatch as ScheduleMismatch
from .mailbox import DEFAULT_BOUND as DEFAULT_BOUND
from .mailbox import Mailbox as Mailbox
from .mailbox import Outcome as Outcome
from .reference import ActorRef as ActorRef
from .streams import MailboxReceiveStream as MailboxReceiveStream
from .streams import MailboxSendStream as MailboxSendStream
from .streams import open_streams as open_streams
from .system import ActorRecord as ActorRecord
from .system import ActorSystem as ActorSystem
from .system import SystemTree as SystemTree

__all__ = [
    "DEFAULT_BOUND",
    "Actor",
    "ActorError",
    "ActorRecord",
    "ActorRef",
    "ActorState",
    "ActorStatistics",
    "ActorSystem",
    "AskTimeout",
    "Candidate",
    "Chooser",
    "Closed",
    "Conductor",
    "HandlerFailed",
    "Listed",
    "LowestKey",
    "Mailbox",
    "MailboxReceiveStream",
    "MailboxSendStream",
    "MailboxStatistics",
    "NotAccepted",
    "Observer",
    "Orders",
    "Outcome",
    "Reentered",
    "ScheduleMismatch",
    "SeededDraw",
    "SystemTree",
    "open_streams",
]
