"""The one error of hdb, something the user can put right, and the one warning."""

from __future__ import annotations


class HdbError(Exception):
    """What was wrong, with the values, and what to do next; the command line prints it and
    exits 1."""


class HdbWarning(UserWarning):
    """What works otherwise than was asked, said once; the command line prints it on stderr."""
