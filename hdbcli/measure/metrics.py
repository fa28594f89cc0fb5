"""The measures that ship: dlib's face embedding; FaceRes, CLIP and DINO where their weights can
be had.

CLIP-I, CLIP-T and DINO are the scores of HyperDreamBooth's table 1, with the encoders that
DreamBooth names (§4.1). Nothing else is called by those names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from registry.errors import HdbError
from registry.metric import Metric, MetricSpec, Recogniser
from registry.plugins import Registry

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

CLIP = "openai/clip-vit-large-patch14"
DINO = "facebook/dino-vits16"
FACE = "face"  # the measure that is called likeness everywhere


def register(add: Callable[[MetricSpec], None]) -> None:
    """Offer the measures to the registry."""
    add(MetricSpec(FACE, "dlib's face embedding, 1 - distance", "person", (), FaceMetric))
    add(MetricSpec("faceres", "FaceRes' cosine", "person", (), FaceResMetric, FaceResMetric.fetch))
    add(MetricSpec("clip-i", f"cosine of {CLIP}", "person", (), lambda: ClipMetric("person")))
    add(MetricSpec("clip-t", f"cosine of {CLIP}", "text", (), lambda: ClipMetric("text")))
    add(MetricSpec("dino", f"cosine of {DINO}", "person", (), DinoMetric))


class Judges(NamedTuple):
    """Loaded measures by name: of pictures against prompts, and against photos of the person."""

    texts: Mapping[str, Metric] = {}
    persons: Mapping[str, Metric] = {}
    missing: Sequence[str] = ()  # what could not be had, and why

    @property
    def recognisers(self) -> dict[str, Recogniser]:
        """Return those that know faces, dlib's first."""
        found = {k: v for k, v in self.persons.items() if isinstance(v, Recogniser)}
        return dict(sorted(found.items(), key=lambda item: item[0] != FACE))


def load_judges(registry: Registry[MetricSpec], family: str, fetch: bool = False) -> Judges:
    """Load every measure that can judge a family of base models, after downloading those that can
    be, if the user wants to `fetch` them."""
    loaded: dict[str, dict[str, Metric]] = {"text": {}, "person": {}}
    missing: dict[str, list[str]] = {}
    for spec in registry.specs():
        if spec.judges(family):
            if fetch and spec.fetch is not None:
                spec.fetch()
            try:
                loaded[spec.against][spec.name] = spec.load()
            except HdbError as error:
                missing.setdefault(str(error), []).append(spec.name)
    lines = [f"{', '.join(names)}: {why}" for why, names in missing.items()]
    return Judges(loaded["text"], loaded["person"], lines)


class FaceMetric:
    """Likeness of faces by dlib, 0 to 1: above 0.5 two pictures are taken for one person."""

    def embed(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        from hdbcli.faces.embedding import embed

        return embed(pictures).numpy()

    def likeness(self, mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        """Return 1 - distance of embeddings (..., D), at least 0; 0 without a face: (...)."""
        import numpy as np

        return np.nan_to_num(1 - np.linalg.norm(mine - theirs, axis=-1)).clip(min=0)

    def score(self, pictures: Sequence[np.ndarray], references: Sequence[Any]) -> list[list[float]]:
        mine, theirs = self.embed(pictures), self.embed(references)
        return self.likeness(mine[:, None], theirs[None]).tolist()


class FaceResMetric(FaceMetric):
    """Likeness of faces by FaceRes, a cosine: of one person .8, of two .4 (60 people's
    official portraits)."""

    def __init__(self) -> None:
        from hdbcli.measure.faceres import load_faceres

        load_faceres()

    @staticmethod
    def fetch() -> None:
        from hdbcli.measure.faceres import fetch_faceres

        fetch_faceres()

    def embed(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        from hdbcli.measure.faceres import embed

        return embed(pictures).numpy()

    def likeness(self, mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        """Return the cosine of embeddings (..., D), 0 without a face: (...)."""
        import numpy as np

        return np.nan_to_num((mine * theirs).sum(-1))


class ClipMetric:
    """CLIP's cosine between a picture and a photo of the person, or the prompt."""

    def __init__(self, against: str) -> None:
        from transformers import CLIPModel, CLIPProcessor

        self.against = against
        self.model = _from_hub(CLIPModel, CLIP).eval()
        self.processor = _from_hub(CLIPProcessor, CLIP)

    def score(self, pictures: Sequence[np.ndarray], references: Sequence[Any]) -> list[list[float]]:
        own = self._pictures(pictures)
        theirs = self._texts(references) if self.against == "text" else self._pictures(references)
        return (own @ theirs.T).tolist()

    def _pictures(self, pictures: Sequence[np.ndarray]) -> Tensor:
        inputs = self.processor(images=list(pictures), return_tensors="pt")
        return _unit(self.model.get_image_features, inputs)

    def _texts(self, texts: Sequence[str]) -> Tensor:
        inputs = self.processor(text=list(texts), padding=True, return_tensors="pt")
        return _unit(self.model.get_text_features, inputs)


class DinoMetric:
    """DINO's cosine between class tokens: the subject, whatever the caption says."""

    def __init__(self) -> None:
        from transformers import AutoImageProcessor, ViTModel

        self.model = _from_hub(ViTModel, DINO).eval()
        self.processor = _from_hub(AutoImageProcessor, DINO)

    def score(self, pictures: Sequence[np.ndarray], references: Sequence[Any]) -> list[list[float]]:
        return (self._embed(pictures) @ self._embed(references).T).tolist()

    def _embed(self, pictures: Sequence[np.ndarray]) -> Tensor:
        inputs = self.processor(images=list(pictures), return_tensors="pt")
        return _unit(lambda **kw: self.model(**kw).last_hidden_state[:, 0], inputs)


def _unit(encode: Callable[..., Any], inputs: Any) -> Tensor:
    import torch
    import torch.nn.functional as F

    with torch.no_grad():
        features = encode(**inputs)
    # Transformers 5 wraps the features of CLIP in an output, older ones do not.
    return F.normalize(getattr(features, "pooler_output", features), dim=1)


def _from_hub(kind: Any, name: str) -> Any:
    """Load from the hub's cache, never from the hub itself: a score is no reason to
    download gigabytes."""
    try:
        return kind.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise HdbError(
            f"{name} is not in the hub's cache; to have this metric too: hf download {name}"
        ) from error
