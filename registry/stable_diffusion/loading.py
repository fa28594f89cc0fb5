"""Load a checkpoint as a backbone, from its files alone: a diffusers folder or a single file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from registry.checkpoints.contents import (
    INDEX,
    WEIGHTS,
    ZERO_SNR,
    read_config,
    variant_of,
    weight_files,
)
from registry.checkpoints.ldm import (
    LAYOUTS,
    UNET,
    VAE,
    Layout,
    Renamed,
    canonical,
    original_names,
    rename,
)
from registry.checkpoints.safetensors import LARGEST, read_floats, read_header
from registry.errors import HdbError
from registry.stable_diffusion.backbone import StableDiffusion, last_states, two_encoders
from registry.stable_diffusion.uncompiled import quiet, without_compiler

if TYPE_CHECKING:
    from registry.stable_diffusion.families import Family

# It warns, as soon as diffusers imports it, of kernels that it looked for on the network.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def load_folder(folder: Path, device: str, dtype: str, double: bool = False) -> StableDiffusion:
    """Load a diffusers folder, `double` for Stable Diffusion XL; HdbError if files are missing
    or damaged."""
    number = getattr(torch, dtype)
    options = {"torch_dtype": number, "local_files_only": True, "use_safetensors": True}
    networks = {}
    with _reading(folder):
        for part in ("unet", "text_encoder", "text_encoder_2")[: 3 if double else 2]:
            stored = read_floats(weight_files(folder / part, WEIGHTS[part]), "", number)
            named = {canonical(part, name): tensor for name, tensor in stored.items()}
            networks[part] = _network(part, folder, named)
        pipeline = _class(double).from_pretrained(
            folder,
            **networks,
            variant=variant_of(*(folder / component for component in WEIGHTS)),
            **options,
            **_unused(double),
        )
    vae = folder / "vae"
    again = partial(type(pipeline.vae).from_pretrained, vae, variant=variant_of(vae), **options)
    return _backbone(pipeline, folder, device, dtype, double, again)


def load_single(
    file: Path, family: Family, prediction: str, device: str, dtype: str
) -> StableDiffusion:
    """Load an original single file with the family's configuration and CLIP's tokenizer, which
    ship; HdbError if it does not fit or is damaged."""
    from registry.stable_diffusion.tokenizer import clip_tokenizer

    names = ("tokenizer", "tokenizer_2")
    parts: dict[str, Any] = {
        n: clip_tokenizer(pad) for n, pad in zip(names, family.pads, strict=False)
    }
    configs, layout = family.configs(prediction), LAYOUTS[family.name]

    def read(part: str, prefix: str) -> Any:
        stored = read_floats([file], prefix, getattr(torch, dtype), original_names)
        return _network(part, configs, stored, layout)

    again = partial(read, "vae", VAE)
    with _reading(file):
        # Text encoders first: some of their tensors are there twice for a moment.
        for component, text in layout.text.items():
            parts[component] = read(component, text.prefix)
        parts |= {"unet": read("unet", UNET), "vae": again()}
        parts["scheduler"] = _scheduler_of(file, configs, prediction)
        pipeline = _class(family.double)(**parts, **_unused(family.double))
    return _backbone(pipeline, file, device, dtype, family.double, again)


def empty_network(part: str, configs: Path) -> Any:
    """Build a component from its configuration, the weights without memory, on the meta device."""
    import diffusers
    import transformers
    from accelerate import init_empty_weights

    with init_empty_weights():
        if part.startswith("text_encoder"):
            config = transformers.CLIPTextConfig.from_pretrained(configs / part)
            return getattr(transformers, read_config(configs / INDEX)[part][1])(config)
        kind = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[part]
        return kind.from_config(kind.load_config(configs / part))


def _network(
    part: str, configs: Path, stored: Mapping[str, Tensor], layout: Layout | None = None
) -> Any:
    """Build a component around tensors that were read, by diffusers' names, or by those of single
    files of a layout: without the file beside it in memory, and without all that the libraries do
    for other models. What is not there stays on the meta device."""
    network, found = empty_network(part, configs), {}
    for own in network.state_dict():
        name = canonical(part, own)
        place = rename(part, name, layout) if layout else Renamed(name)
        if place and place.key in stored:
            found[own] = _unpacked(stored[place.key], place)
    network.load_state_dict(found, strict=False, assign=True)
    return network


def _unpacked(whole: Tensor, place: Renamed) -> Tensor:
    """Return what the diffusers layout has, of the tensor that a single file keeps it in."""
    if place.parts > 1:
        return whole.chunk(place.parts)[place.part].clone()
    if place.transposed:
        return whole.T.contiguous()
    return whole.flatten(1) if place.conv else whole


def _scheduler_of(file: Path, configs: Path, prediction: str) -> Any:
    """Make the family's scheduler, for what the UNet predicts, up to the very end if the file
    says that."""
    import diffusers

    config = read_config(configs / "scheduler" / "scheduler_config.json")
    own: dict[str, Any] = {"prediction_type": prediction}
    if ZERO_SNR in original_names(read_header(file, LARGEST).tensors).values():
        own["rescale_betas_zero_snr"] = True
    return getattr(diffusers, config["_class_name"]).from_config(config, **own)


def _class(double: bool) -> Any:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    return StableDiffusionXLPipeline if double else StableDiffusionPipeline


def _unused(double: bool) -> dict[str, Any]:
    """Tell diffusers not to load what an index may list, and hdb neither uses nor downloads."""
    unused = {"feature_extractor": None, "image_encoder": None}
    return unused if double else unused | {"safety_checker": None, "requires_safety_checker": False}


def _backbone(
    pipeline: Any,
    source: Path,
    device: str,
    dtype: str,
    double: bool,
    autoencoder: Callable[[], Any],
) -> StableDiffusion:
    """Check that every weight was there, and move the pipeline where it is wanted; `autoencoder`
    reads that part once more."""

    def again() -> Any:
        with _reading(source):
            return _prepare(autoencoder().to(device).eval())

    backbone = StableDiffusion(pipeline, two_encoders if double else last_states, again)
    for name, module in {**backbone.components, "vae": pipeline.vae}.items():
        missing = [key for key, value in module.named_parameters() if value.is_meta]
        if missing:
            raise HdbError(
                f"{source} lacks {len(missing)} tensors of {name}, such as {missing[0]}; download "
                "the model in full"
            )
        module.eval()
    _prepare(pipeline.vae)
    with quiet():
        pipeline.to(device, getattr(torch, dtype))
    return backbone


def _prepare(vae: Any) -> Any:
    """Freeze an autoencoder, and let the large kind work picture by picture: many at once need a
    GB each and are no faster."""
    if type(vae).__name__ == "AutoencoderKL":
        vae.enable_slicing()
    return vae.requires_grad_(False)


def out_of_memory(error: BaseException) -> bool:
    """Say whether this is how torch, a device or Python says that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Turn what the libraries raise for a bad model into one line; keep their advice off
    the terminal."""
    try:
        with without_compiler(), quiet():
            yield
    except NotImplementedError as error:  # moved from the meta device, where nothing was read
        raise HdbError(
            f"{source} lacks tensors that the model needs; download it in full"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise HdbError(
            f"the model in {source} is missing or damaged ({reason}); install it again"
        ) from error
