"""The allowed-set oracle: which translations an access may use, and its verdicts."""

from .oracle import Oracle as Oracle
from .verdicts import Allowed as Allowed
from .verdicts import EntryHistory as EntryHistory
from .verdicts import Hazard as Hazard
from .verdicts import Value as Value
from .verdicts import Verdict as Verdict
from .verdicts import Violation as Violation

__all__ = ["Allowed", "EntryHistory", "Hazard", "Oracle", "Value", "Verdict", "Violation"]
