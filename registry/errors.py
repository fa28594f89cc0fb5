"""The one error of hdb, something the user can put right, its one kind, and the one warning."""

from __future__ import annotations


class HdbError(Exception):
    """What was wrong, with the values, and what to do next; the command line prints it and
    exits 1."""


class UsageError(HdbError):
    """What a command line, or the arguments of a call, show to be wrong without a look at anything
    else; the command line exits 2."""


class HdbWarning(UserWarning):
    """What works otherwise than was asked, said once; the command line prints it on stderr."""
