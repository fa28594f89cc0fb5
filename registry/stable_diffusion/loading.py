"""Load a checkpoint as a backbone, from its files alone: a diffusers folder or a single file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from registry.checkpoints.contents import (
    INDEX,
    WEIGHTS,
    ZERO_SNR,
    read_config,
    variant_of,
    weight_files,
)
from registry.checkpoints.ldm import LAYOUTS, UNET, VAE, canonical, original_names
from registry.checkpoints.safetensors import LARGEST, read_floats, read_header
from registry.errors import HdbError
from registry.stable_diffusion.backbone import StableDiffusion, last_states, two_encoders
from registry.stable_diffusion.uncompiled import light_transformers, without_compiler

if TYPE_CHECKING:
    from registry.stable_diffusion.families import Family

# It warns, as soon as diffusers imports it, of kernels that it looked for on the network.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def load_folder(folder: Path, device: str, dtype: str, double: bool = False) -> StableDiffusion:
    """Load a diffusers folder, `double` for Stable Diffusion XL; HdbError if files are missing
    or damaged."""
    options = {
        "torch_dtype": getattr(torch, dtype),
        "local_files_only": True,
        "use_safetensors": True,
    }
    with _reading(folder):
        pipeline = _class(double).from_pretrained(
            folder,
            **_read_networks(folder, options["torch_dtype"], double),
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
    configs, number = family.configs(prediction), getattr(torch, dtype)
    again = partial(_read_part, "vae", file, VAE, configs, number)
    with _reading(file):
        # Text encoders first: their tensors are there twice for a moment, others' are not.
        for component, text in LAYOUTS[family.name].text.items():
            parts[component] = _read_part(component, file, text.prefix, configs, number)
        parts |= {"unet": _read_part("unet", file, UNET, configs, number), "vae": again()}
        parts["scheduler"] = _scheduler_of(file, configs, prediction)
        pipeline = _class(family.double)(**parts, **_unused(family.double))
    return _backbone(pipeline, file, device, dtype, family.double, again)


def _read_networks(folder: Path, dtype: torch.dtype, double: bool) -> dict[str, Any]:
    """Read the UNet, most of a model, and the text encoders without their files beside them in
    memory, and without all that the libraries do for other models: half a second for a small one.
    """
    import transformers
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    index, found = read_config(folder / INDEX), {}
    for part in ("unet", "text_encoder", "text_encoder_2")[: 3 if double else 2]:
        with init_empty_weights():
            if part == "unet":
                config = UNet2DConditionModel.load_config(folder / part)
                network: Any = UNet2DConditionModel.from_config(config)
            else:
                text = transformers.CLIPTextConfig.from_pretrained(folder / part)
                network = getattr(transformers, index[part][1])(text)
        tensors = read_floats(weight_files(folder / part, WEIGHTS[part]), "", dtype)
        own = {canonical(part, name): name for name in network.state_dict()}
        named = {own.get(canonical(part, name), name): each for name, each in tensors.items()}
        network.load_state_dict(named, strict=False, assign=True)  # what it lacks is told below
        found[part] = network
    return found


def _read_part(part: str, file: Path, prefix: str, configs: Path, dtype: torch.dtype) -> Any:
    """Read a component of a single file in the same way; diffusers knows the names."""
    import transformers
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    tensors = read_floats([file], prefix, dtype, original_names)
    options = {"config": str(configs), "subfolder": part, "torch_dtype": dtype}
    options["local_files_only"] = True
    if part.startswith("text_encoder"):
        index = read_config(configs / INDEX)
        text: Any = getattr(transformers, index[part][1])
        return create_diffusers_clip_model_from_ldm(text, tensors, **options)
    kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part]
    return kind.from_single_file(tensors, **options)


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
    with without_compiler(), quiet():
        from diffusers.loaders.single_file_utils import SingleFileComponentError

    bad = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, SingleFileComponentError)
    try:
        with without_compiler(), quiet():
            yield
    except NotImplementedError as error:  # moved from the meta device, where nothing was read
        raise HdbError(
            f"{source} lacks tensors that the model needs; download it in full"
        ) from error
    except bad as error:
        if out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise HdbError(
            f"the model in {source} is missing or damaged ({reason}); install it again"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' bars and advice off the terminal while a model loads; errors
    still raise."""
    light_transformers()
    import diffusers.utils.logging as diffusers_log
    import transformers.utils.logging as transformers_log

    logs = (diffusers_log, transformers_log)
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
            log.enable_progress_bar()
