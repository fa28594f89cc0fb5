"""One photo in, an identity out: crop, predict, relax, refine, measure, in this order.

HyperDreamBooth, figure 2: the hypernetwork's prediction, then rank-relaxed fast fine-tuning.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from hdbcli.config import (
    DIFFUSION_LR,
    PORTRAIT,
    UNPREDICTED_LR,
    UNPREDICTED_STEPS,
    RefineConfig,
    Tell,
)
from hdbcli.faces.embedding import embed, found
from hdbcli.faces.photo import Crop, crop_face
from hdbcli.identity.file import Identity, facts_of, moved, rank_within, theta_for
from hdbcli.method.algebra import relax
from hdbcli.method.hypernet import Faces
from hdbcli.method.lidb import Theta
from hdbcli.model import sample
from hdbcli.model.base import Base, load_predictor
from hdbcli.model.contact_sheet import contact_sheet
from hdbcli.model.device import wait_for
from hdbcli.model.memory import Work
from hdbcli.training.likeness_loss import portraits_of
from hdbcli.training.refine import portrait_loss, refine, weight_of
from registry.errors import HdbError
from registry.identity_facts import Facts
from registry.spec import BaseSpec, passes_of

LIKENESS_SEEDS = (1, 2, 3, 4)


@dataclass(frozen=True, eq=False)
class Created:
    """A new identity and what making it took; seconds by stage, losses on the same pairs; a crop
    and a portrait (S, S, 3) uint8 of those that were compared."""

    identity: Identity
    seconds: dict[str, float]
    loss_start: float
    loss_end: float
    base_likeness: float
    warnings: tuple[str, ...]
    crop: np.ndarray
    portrait: np.ndarray

    def preview(self) -> np.ndarray:
        """Return crop and portrait side by side."""
        return contact_sheet([[self.crop, self.portrait]], ("photo", "portrait"))


def crop_photos(photos: Sequence[Path], spec: BaseSpec, face: int | None, tell: Tell) -> list[Crop]:
    """Crop the face of every photo as the base's template wants it."""
    crops: list[Crop] = []
    for photo in photos:
        tell("crop", len(crops), len(photos))
        several, template = len(photos) > 1, np.array(spec.template)
        crops.append(crop_face(photo, template, spec.resolution, face, several))
    if crops and face is not None and all(crop.count == 1 for crop in crops):
        unused = f"--face {face} changes nothing: there is one face in every photo"
        crops[0] = replace(crops[0], warnings=(*crops[0].warnings, unused))
    return crops


def work_of(spec: BaseSpec, refines: bool, likeness: float | None) -> Work:
    """Say what making an identity asks of a base: all losses of a step are asked in one pass, where
    no plan can part what is drawn for likeness."""
    count = min(len(LIKENESS_SEEDS), spec.portraits)
    portraits = sample.work_of(count, spec.resolution, spec.sampling.guidance)
    alike = refines and weight_of(spec, likeness)
    drawn = passes_of(spec.guidance) * portraits_of(spec.batch) if alike else 0
    samples = spec.batch + drawn + refines  # the last is of prior preservation
    return Work(samples, spec.resolution, trains=refines, least=max(1, drawn), then=portraits)


def settle(
    base: Base,
    steps: int | None,
    rank: int | None,
    seed: int,
    optimizer: str,
    likeness: float | None = None,
    goes_on: bool = False,
) -> RefineConfig:
    """Fill in what the user left open: what suits a start from a prediction, from an
    identity whose refinement `goes_on`, or from scratch; and the base's budget of bytes."""
    spec = base.spec
    predicted = goes_on or spec.hypernetwork is not None
    rate = RefineConfig.lr if weight_of(spec, likeness) else DIFFUSION_LR
    return RefineConfig(
        steps=steps or (RefineConfig.steps if predicted else UNPREDICTED_STEPS),
        rank=rank or rank_within(spec.budget, len(base.injected.layers), spec.a, spec.b),
        lr=rate if predicted else UNPREDICTED_LR,
        seed=seed,
        optimizer=optimizer,
        likeness=likeness,
        predicted=predicted,
    )


def create(crops: Sequence[Crop], base: Base, config: RefineConfig | None, tell: Tell) -> Created:
    """Make an identity from the crops of one person; `config` None keeps the prediction as it is.

    On a base without a hypernetwork it starts from theta_0, which all people share; HdbError if
    that should be kept.
    """
    if base.spec.hypernetwork is None and config is None:
        raise HdbError(
            f"{base.spec.name} has no hypernetwork, so there is no prediction; drop --no-refine"
        )
    seconds = {}
    start = time.perf_counter()
    tell("predict", 0, 1)
    faces = base.faces([crop.image for crop in crops])
    if base.spec.hypernetwork is None:
        theta, digest = base.first_theta(), ""
    else:
        predictor, digest = load_predictor(base)
        theta = predictor.predict(faces)
    wait_for(base.device)
    seconds["predict"] = time.perf_counter() - start
    facts = facts_of(base.spec, base.injected, digest)
    return _refined(facts, theta, crops, faces, base, config, tell, seconds)


def continue_refining(
    identity: Identity, crops: Sequence[Crop], base: Base, config: RefineConfig, tell: Tell
) -> Created:
    """Give an existing identity more iterations, from where it is; its rank may be raised first."""
    theta, warning = theta_for(base, identity)
    facts = moved(identity.facts, facts_of(base.spec, base.injected))  # it may be another base
    faces = base.faces([crop.image for crop in crops])
    created = _refined(facts, theta, crops, faces, base, config, tell, {"predict": 0.0})
    return replace(created, warnings=(*created.warnings, warning)) if warning else created


def _refined(
    facts: Facts,
    theta: Theta,
    crops: Sequence[Crop],
    faces: Faces,
    base: Base,
    config: RefineConfig | None,
    tell: Tell,
    seconds: dict[str, float],
) -> Created:
    latents = [faces.latents]
    base.free_autoencoder()
    start = time.perf_counter()
    if config is None:
        loss_start = loss_end = portrait_loss(base, theta, latents)
    else:
        if config.rank != theta.rank:
            relaxed = f"relaxed from rank {theta.rank} to {config.rank}"
            facts = replace(facts, lineage=(*facts.lineage, relaxed))
        result = refine(base, relax(theta, config.rank), latents, config, tell, [faces])
        theta, loss_start, loss_end = result.theta, result.loss_start, result.loss_end
        steps = facts.steps + config.steps
        facts = replace(facts, steps=steps, optimizer=result.optimizer)
    seconds["refine"] = time.perf_counter() - start
    mine, floor, portrait = likeness_of(base, theta, crops, faces, tell)
    facts = replace(facts, likeness=round(mine, 4))
    identity = Identity(facts, theta.down[0].cpu(), theta.up[0].cpu())
    losses = float(loss_start), float(loss_end)
    return Created(identity, seconds, *losses, floor, (), crops[0].image, portrait)


def likeness_of(
    base: Base, theta: Theta, crops: Sequence[Crop], faces: Faces, tell: Tell
) -> tuple[float, float, np.ndarray]:
    """Return the likeness of generated portraits to the crops, whose `faces` were read, that of
    the base's own beside it, and the first portrait.

    The mean over as many seeds as the base's spec says, two for `tiny` and one where a picture
    takes long, the same for both: 1 - distance of the face embeddings, 0 to 1; 0 where a portrait
    shows no face.
    """
    seeds = LIKENESS_SEEDS[: base.spec.portraits]
    # Aligned by the landmarks found in each crop, as portraits are by theirs: where the base's
    # template puts them embeddings lie 0.10 to 0.18 away (nine photos).
    reference = embed([crop.image for crop in crops])
    # A face that was found in the photo but not again in its crop: there it lies aligned.
    reference = reference.where(
        found(reference)[:, None], faces.traits[:, : reference.shape[1]].cpu()
    )
    scores, portraits, tell = [], [], sample.as_one(tell, 2)
    for adapter in (theta, None):
        drawn = sample.generate(base, adapter, PORTRAIT, seeds, base.spec.sampling, tell)
        near = 1 - torch.cdist(embed([picture.image for picture in drawn]), reference)
        scores.append(float(near.clamp(min=0).nan_to_num(0.0).mean()))
        portraits.append(drawn[0].image)
    return scores[0], scores[1], portraits[0]
