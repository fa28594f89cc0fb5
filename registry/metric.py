"""What a measure of pictures must offer: a spec that loads nothing, and one call after loading.

Measures come through the entry-point group `hdb.metrics`, by the door that base models use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from registry.errors import RegistryError

if TYPE_CHECKING:
    import numpy as np

REFERENCES = ("person", "text")


class Metric(Protocol):
    """A loaded measure."""

    def score(self, pictures: Sequence[np.ndarray], references: Sequence[Any]) -> list[list[float]]:
        """Score every picture (H, W, 3) uint8 against every reference, higher is closer.

        References are photos of people or texts, as the spec says; a row for each picture.
        """


@dataclass(frozen=True)
class MetricSpec:
    """One measure; `load` may raise RegistryError where its weights cannot be had."""

    name: str
    summary: str
    against: str  # "person": photos of people; "text": prompts
    families: tuple[str, ...]  # of base models it can judge; empty for any
    load: Callable[[], Metric]

    def __post_init__(self) -> None:
        """Raise RegistryError for a spec that could not work."""
        if not isinstance(self.name, str) or not self.name.strip():
            raise RegistryError(f"metric name {self.name!r} is no word")
        if self.against not in REFERENCES:
            raise RegistryError(
                f"metric {self.name}: against is {self.against!r}; choose {' or '.join(REFERENCES)}"
            )
        if not callable(self.load):
            raise RegistryError(f"metric {self.name}: load must be callable")

    def judges(self, family: str) -> bool:
        return not self.families or family in self.families
