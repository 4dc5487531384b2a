"""Event columns, summaries and the run folder.

Passive: knows nobody who runs. Reading order: `events` (what happened), `summary` (bytes that do
not depend on the day), `folder` (what a run leaves behind).
"""

from penumbra.actors.observe.events import COLUMNS as COLUMNS
from penumbra.actors.observe.events import Columns as Columns
from penumbra.actors.observe.events import EventKind as EventKind
from penumbra.actors.observe.events import EventLog as EventLog
from penumbra.actors.observe.folder import FolderDiffers as FolderDiffers
from penumbra.actors.observe.folder import FolderError as FolderError
from penumbra.actors.observe.folder import Results as Results
from penumbra.actors.observe.folder import RunFolder as RunFolder
from penumbra.actors.observe.folder import is_whole as is_whole
from penumbra.actors.observe.folder import read_columns as read_columns
from penumbra.actors.observe.summary import canonical_json as canonical_json
from penumbra.actors.observe.summary import digest as digest
from penumbra.actors.observe.summary import toml_text as toml_text
from penumbra.actors.observe.summary import write_npz as write_npz

__all__ = [
    "COLUMNS",
    "Columns",
    "EventKind",
    "EventLog",
    "FolderDiffers",
    "FolderError",
    "Results",
    "RunFolder",
    "canonical_json",
    "digest",
    "is_whole",
    "read_columns",
    "toml_text",
    "write_npz",
]
