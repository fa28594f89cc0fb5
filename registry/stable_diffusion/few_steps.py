"""Recognise models and LoRA files that draw in few steps by their names, and how each is sampled.

Nothing in the weights shows it. Sources: the model cards of SDXL-Lightning (Lin et al. 2024),
Hyper-SD (Ren et al. 2024), SD and SDXL Turbo (Sauer et al. 2023), LCM-LoRA (Luo et al. 2023) and
DMD2 (Yin et al. 2024).
"""

from __future__ import annotations

import re
from dataclasses import replace

from registry.spec import FewSteps

OFF = 1.0  # the guidance that changes nothing: such models have learned it
_STEPS = r"\d+[-_ ]?steps?"
_MODEL = r"(?:(?<![a-z])sd|xl|stable[-_ ]?diffusion)"
# Sign in a name -> preset. A word that also means a bolt, a car or excitement counts beside a
# model's name or a number of steps only.
_KINDS = (
    (
        rf"{_MODEL}.*lightning|lightning.*(?:{_MODEL}|{_STEPS})",
        FewSteps("Lightning", 4, OFF, "euler"),
    ),
    (rf"hyper[-_ ]?{_MODEL}", FewSteps("Hyper", 8, OFF, "ddim")),
    (rf"{_MODEL}.*turbo|turbo.*(?:{_MODEL}|{_STEPS}|lora)", FewSteps("Turbo", 4, OFF, "euler")),
    (r"(?<![a-z])lcm(?![a-z])|latent[-_ ]consistency", FewSteps("LCM", 4, OFF, "lcm")),
    (r"(?<![a-z])dmd2?(?![a-z])", FewSteps("DMD", 4, OFF, "lcm")),
)


def few_steps(name: str) -> FewSteps | None:
    """Return how what has this name is sampled, None where the name says nothing of few steps."""
    name = name.casefold()
    found = next((preset for sign, preset in _KINDS if re.search(sign, name)), None)
    if found is None:
        return None
    if said := re.search(r"(?<!\d)(\d{1,2})[-_ ]?steps?(?![a-z])", name):
        found = replace(found, steps=max(1, int(said[1])))
    if re.search(r"(?<![a-z])cfg(?![a-z])", name):  # distilled to be guided still
        found = replace(found, guidance=None)
    return found
