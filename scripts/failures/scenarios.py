"""All scenarios, in the order of the page."""

from __future__ import annotations

from .absences import ABSENT, ENDING
from .calls import MISMATCHING, TRICKY
from .programs import IN_FLIGHT, SURVIVING, THREADED

SCENARIOS = (*MISMATCHING, *TRICKY, *ABSENT, *ENDING, *IN_FLIGHT, *THREADED, *SURVIVING)
