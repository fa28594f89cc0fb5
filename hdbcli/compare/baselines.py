"""The methods beside HyperDreamBooth: one loop, different trainable parts.

LoRA DreamBooth (Hu et al. 2021; also the paper's relaxation outside the basis), Textual Inversion
(Gal et al. 2022) and DreamBooth (Ruiz et al. 2022). P is the number of people side by side;
DreamBooth changes the base itself, so it takes one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hdbcli.config import PROMPTS, Tell, unnamed
from hdbcli.method.lidb import Factors, Theta
from hdbcli.model.base import Base
from hdbcli.model.sample import generate
from hdbcli.model.tokens import Tokens, own_tokens
from hdbcli.training.questions import Samples
from hdbcli.training.refine import Trainable
from registry.spec import SampleSettings

CLASS_PROMPTS = tuple(unnamed(prompt) for prompt in PROMPTS)  # "a face", and it in styles


def trainable_lora(base: Base, people: int, rank: int, beneath: Theta | None = None) -> Trainable:
    """Train plain factors of every target, on top of a LiDB if one is given.

    As in LoRA, D is random, the same for all people, and U is 0: the start is the base (or what
    lies beneath), and not dead.
    """
    generator = torch.Generator().manual_seed(0)
    down, up = [], []
    for n, m in base.injected.shapes.values():
        first = torch.randn((1, rank, m), generator=generator) / m**0.5
        down.append(first.expand(people, -1, -1).clone().to(base.device).requires_grad_(True))
        up.append(torch.zeros((people, n, rank), device=base.device, requires_grad=True))
    own = Factors(tuple(down), tuple(up))
    fixed = None if beneath is None else base.injected.factors(beneath)
    parameters = {f"down.{i}": tensor for i, tensor in enumerate(down)}
    parameters |= {f"up.{i}": tensor for i, tensor in enumerate(up)}
    numbers = sum(tensor[0].numel() for tensor in parameters.values())
    return Trainable(people, parameters, lambda: own if fixed is None else fixed.plus(own), numbers)


def trainable_inversion(base: Base, people: int) -> Trainable:
    """Train what the rare token means, nothing else."""
    start = own_tokens(base.backbone, base.spec.identifier, people)
    vectors = tuple(vector.to(base.device).requires_grad_(True) for vector in start.vectors)
    parameters = {f"vector.{i}": vector for i, vector in enumerate(vectors)}
    numbers = sum(vector.shape[1] for vector in vectors)
    return Trainable(people, parameters, lambda: Tokens(start.word, vectors), numbers)


def class_prior(
    base: Base, count: int, prompts: Sequence[str], tell: Tell
) -> Callable[[torch.Generator, int], Samples]:
    """Draw `count` pictures by the base itself, of the prompts in turn, none of which has [V]: what
    they show must not change while a person is learned (DreamBooth §3.3).

    Return what picks as many of them as a step's batch has.
    """
    asked = [prompts[i % len(prompts)] for i in range(count)]
    pictures = generate(base, None, asked, range(count), SampleSettings(guidance=1.0), tell)
    prior = base.backbone.encode_images(base.images([picture.image for picture in pictures]))

    def keep(generator: torch.Generator, batch: int) -> Samples:
        pick = torch.randint(count, (batch,), generator=generator)
        clean = prior[pick.to(prior.device)]
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        t = torch.rand(batch, generator=generator).to(clean)
        return Samples(clean, [asked[i] for i in pick.tolist()], noise, t)

    return keep


@contextmanager
def trainable_dreambooth(
    base: Base, prior: Callable[[torch.Generator, int], Samples]
) -> Iterator[Trainable]:
    """Train all weights of every component for one person, with samples of a `class_prior`; the
    base is put back at the end."""
    modules = base.backbone.components
    before = {name: _copied(module) for name, module in modules.items()}
    for module in modules.values():
        module.requires_grad_(True)
    parameters = {
        f"{name}.{path}": parameter
        for name, module in modules.items()
        for path, parameter in module.named_parameters()
    }

    numbers = sum(parameter.numel() for parameter in parameters.values())
    try:
        yield Trainable(1, parameters, lambda: None, numbers, prior=prior)
    finally:
        for name, module in modules.items():
            module.load_state_dict(before[name])
            module.requires_grad_(False).zero_grad()


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
