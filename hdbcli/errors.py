"""The one error of hdb: something the user can put right."""

from __future__ import annotations


class HdbError(Exception):
    """What was wrong, with the values, and what to do next; the command line prints it and exits
    1."""
