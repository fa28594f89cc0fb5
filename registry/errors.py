"""The registry's one error: a name, a file or a plug-in that the user can put right."""

from __future__ import annotations


class RegistryError(Exception):
    """What was wrong, with the values, and what to do next; the command line prints it and exits
    1."""
