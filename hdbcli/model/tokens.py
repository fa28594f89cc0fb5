"""A word of one's own: each sample reads its own vectors where the prompt says [V].

Textual Inversion (Gal et al. 2022): nothing of the model changes but what one token means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from registry.spec import Backbone


@dataclass(frozen=True)
class Tokens:
    """What `word` means to B samples: vectors (B, width), one tensor for each text encoder."""

    word: str
    vectors: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.vectors[0])

    def __getitem__(self, samples: slice | list[int] | Tensor) -> Tokens:
        return Tokens(self.word, tuple(v[samples] for v in self.vectors))

    @contextmanager
    def on(self, backbone: Backbone) -> Iterator[None]:
        """Read these vectors inside the block."""
        with ExitStack() as hooks:
            embeddings = backbone.token_embeddings(self.word)
            for (module, index), vectors in zip(embeddings, self.vectors, strict=True):
                hooks.callback(module.register_forward_hook(_reader(index, vectors)).remove)
            yield


def own_tokens(backbone: Backbone, word: str, batch: int) -> Tokens:
    """Start from what the word means to the model, once for each of `batch` samples."""
    return Tokens(
        word,
        tuple(
            module.weight[index].detach().float().expand(batch, -1).clone()
            for module, index in backbone.token_embeddings(word)
        ),
    )


def _reader(index: int, vectors: Tensor) -> Callable[..., Tensor]:
    """Return a hook that puts row i of `vectors` where sample i, (k B) in all, has the token."""

    def read(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        ids = inputs[0]
        own = vectors.to(output.dtype).repeat(len(ids) // len(vectors), 1).unsqueeze(1)
        return torch.where((ids == index).unsqueeze(-1), own, output)

    return read
