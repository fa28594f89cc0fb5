"""The hypernetwork: a face in, the theta of that person out.

HyperDreamBooth §3.3. A ViT encodes the face once into tokens. Each target has one weight token;
face tokens and weight tokens are concatenated and a transformer decoder refines the weights over k
iterations with additive deltas, theta_i = theta_(i-1) + T(f, theta_(i-1)), through a linear head of
the target's own.

Not in the paper: the ViT reads the base model's own latents of the crop rather than its colours,
since hair, glasses and complexion are laid out there as the base draws them. And one more face
token comes from face recognisers, and every weight token gets it. The paper's encoder was trained
on far more pictures than a hypernetwork sees; recognisers bring that knowledge of what tells people
apart, and of real photos where the training has renders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hdbcli.method.lidb import Theta, first_theta

# Adam moves each weight of a head by the learning rate, and theta by `width` times that: without
# this brake theta runs off before the faces have a say in it, and all people get the same.
HEAD_SCALE = 4.0

TRAITS = 256  # numbers of the face recognisers, 128 each

# Two people's embeddings differ by 0.04 a number, or 0.09: made to be about 1.
TRAIT_SCALE = 25.0


class Faces(NamedTuple):
    """B aligned crops (B, 3, S, S) in -1..1, what face recognisers say of each (B, traits), and the
    base model's latents of each (B, c, h, w)."""

    crops: Tensor
    traits: Tensor
    latents: Tensor


@dataclass(frozen=True)
class HyperConfig:
    """The shape of a hypernetwork; stored in its file, so that the file describes itself."""

    targets: int
    a: int
    b: int
    targets_digest: str  # of the ordered target names: token i is target i
    base: str
    basis_digest: str
    rank: int = 1
    resolution: int = 64  # px of the face crop
    patch: int = 8  # px of a face token's side
    scale: int = 1  # px of a cell: 1 where it reads the crop itself, 8 of latents
    channels: int = 3  # of a cell
    width: int = 192
    heads: int = 4
    encoder_layers: int = 4
    decoder_layers: int = 2
    iterations: int = 3
    traits: int = TRAITS  # the recognisers' first numbers, which it reads; 0: the picture alone


class HyperNetwork(nn.Module):
    """Predict a LiDB from aligned face crops."""

    start: Tensor

    def __init__(self, config: HyperConfig) -> None:
        super().__init__()
        self.config = c = config
        numbers = c.rank * (c.a + c.b)
        cells = c.patch // c.scale // 2
        patches = (c.resolution // c.scale // (2 * cells)) ** 2
        self.stem = nn.Sequential(  # a convolutional stem trains faster than one patch projection
            nn.Conv2d(c.channels, c.width // 4, cells, cells),
            nn.GELU(),
            nn.Conv2d(c.width // 4, c.width, 2, 2),
        )
        self.face_position = nn.Parameter(torch.randn(1, patches, c.width) * 0.02)
        self.encoder = _transformer(c, c.encoder_layers)
        if c.traits:
            self.trait_in = nn.Linear(c.traits, c.width)
        self.face_norm = nn.LayerNorm(c.width)
        self.weights_in = nn.Linear(numbers, c.width)
        self.target_position = nn.Parameter(torch.randn(1, c.targets, c.width) * 0.02)
        self.decoder = _transformer(c, c.decoder_layers)
        self.weight_norm = nn.LayerNorm(c.width)
        # A head for each target, small: the first prediction is close to theta_0 but not dead.
        self.heads = nn.Parameter(torch.randn(c.targets, c.width, numbers) * 0.05)
        start = first_theta(c.targets, c.a, c.b, c.rank)
        self.register_buffer("start", _tokens(start), persistent=False)  # (1, L, R(a+b))

    @property
    def reads_latents(self) -> bool:
        """Say whether it reads the latents of a face, or the crop itself."""
        return self.config.scale > 1

    def encode_face(self, faces: Faces) -> Tensor:
        """Encode faces into tokens (B, F, width); one more before them is the recogniser's, where
        it is read."""
        seen = faces.latents if self.reads_latents else faces.crops
        patches = self.stem(seen).flatten(2).transpose(1, 2)
        encoded = self.encoder(patches + self.face_position)
        if self.config.traits:
            known = faces.traits[:, : self.config.traits]
            traits = self.trait_in(TRAIT_SCALE * known)[:, None]
            encoded = torch.cat([traits, encoded], dim=1)
        return self.face_norm(encoded)

    def decode(self, face: Tensor, iterations: int | None = None) -> Theta:
        """Refine theta from theta_0 for the tokens of faces (B, F, width), the recogniser's among
        them; 0 iterations give theta_0."""
        tokens = self.start.expand(len(face), -1, -1)
        who = face[:, :1] if self.config.traits else 0.0
        for _ in range(self.config.iterations if iterations is None else iterations):
            weights = self.weights_in(tokens) + self.target_position + who
            both = self.decoder(torch.cat([face, weights], dim=1))
            refined = self.weight_norm(both[:, face.shape[1] :])
            delta = torch.einsum("blw,lwp->blp", refined, self.heads.to(refined.dtype))
            tokens = tokens + HEAD_SCALE / self.config.width * delta.float()
        return _theta(tokens, self.config)

    def forward(self, faces: Faces) -> Theta:
        """Predict the theta of each face."""
        return self.decode(self.encode_face(faces))

    @torch.no_grad()
    def predict(self, photos: Faces, iterations: int | None = None) -> Theta:
        """Predict one theta from N photos of one person: their face tokens are averaged, not
        their thetas.

        A core is defined up to (c up, down / c), so averaged factors would mean nothing.
        """
        return self.decode(self.encode_face(photos).mean(0, keepdim=True), iterations)


def _transformer(config: HyperConfig, layers: int) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        config.width,
        config.heads,
        2 * config.width,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def _tokens(theta: Theta) -> Tensor:
    """Lay theta out as one token a target: (B, L, R(a+b))."""
    return torch.cat([theta.down.flatten(2), theta.up.flatten(2)], dim=2)


def _theta(tokens: Tensor, config: HyperConfig) -> Theta:
    down, up = tokens.split([config.rank * config.a, config.rank * config.b], dim=2)
    batch = len(tokens), config.targets
    return Theta(down.view(*batch, config.rank, config.a), up.view(*batch, config.b, config.rank))
