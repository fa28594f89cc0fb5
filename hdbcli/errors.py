"""The one error of hdb and the one warning; they live below, so that plug-ins raise them too."""

from registry.errors import HdbError, HdbWarning

__all__ = ["HdbError", "HdbWarning"]
