"""Worker processes of one app: derived values kept coherent, and typed messages, by shared words.

`fabric`: primary words that all share, values that each derives. `line`: messages from one process
to another. Who finds nothing sleeps at a doorbell (`runtime.doorbell`); no sender ever waits.
"""

from penumbra.actors.processes.fabric import N_POLLS as N_POLLS
from penumbra.actors.processes.fabric import Derive as Derive
from penumbra.actors.processes.fabric import Plan as Plan
from penumbra.actors.processes.fabric import Seat as Seat
from penumbra.actors.processes.fabric import SeatTaken as SeatTaken
from penumbra.actors.processes.fabric import Worker as Worker
from penumbra.actors.processes.fabric import WorkerFabric as WorkerFabric
from penumbra.actors.processes.line import Line as Line
from penumbra.actors.processes.line import LineEnd as LineEnd
from penumbra.actors.processes.line import Receiver as Receiver
from penumbra.actors.processes.line import Sender as Sender

__all__ = [
    "N_POLLS",
    "Derive",
    "Line",
    "LineEnd",
    "Plan",
    "Receiver",
    "Seat",
    "SeatTaken",
    "Sender",
    "Worker",
    "WorkerFabric",
]
