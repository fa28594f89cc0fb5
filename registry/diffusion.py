"""The backbone of Stable Diffusion 1.x and 2.x layouts: one diffusers pipeline spoken to in hdb's
language."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from registry.errors import RegistryError
from registry.spec import SampleSettings

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

# What a command line calls a scheduler, and what diffusers does.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}


@dataclass(frozen=True, eq=False)
class StableDiffusion:
    """A loaded pipeline as a `Backbone`."""

    pipeline: StableDiffusionPipeline

    @property
    def components(self) -> Mapping[str, nn.Module]:
        return {"unet": self.pipeline.unet, "text_encoder": self.pipeline.text_encoder}

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        vae = self.pipeline.vae
        encoded = vae.encode(images.to(vae.device, vae.dtype))
        distribution = getattr(encoded, "latent_dist", None)
        latents = encoded.latents if distribution is None else distribution.mode()
        return latents.float() * vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> np.ndarray:
        vae = self.pipeline.vae
        decoded = vae.decode(latents.to(vae.device, vae.dtype) / vae.config.scaling_factor).sample
        pictures = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return pictures.permute(0, 2, 3, 1).cpu().numpy()

    def loss(self, latents: Tensor, prompts: Sequence[str], noise: Tensor, t: Tensor) -> Tensor:
        scheduler = self.pipeline.scheduler
        signal = scheduler.alphas_cumprod.to(latents.device)
        steps = (t * len(signal)).long()
        a = signal[steps].sqrt().view(-1, 1, 1, 1)
        s = (1 - signal[steps]).sqrt().view(-1, 1, 1, 1)
        noisy = (a * latents + s * noise).to(self.pipeline.unet.dtype)
        predicted = self.pipeline.unet(noisy, steps, self.encode_prompts(prompts)).sample
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = a * noise - s * latents if velocity else noise
        return F.mse_loss(predicted.float(), target, reduction="none").mean((1, 2, 3))

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Return the text encoder's states (B, T, width), with gradients to its residuals."""
        tokenizer = self.pipeline.tokenizer
        ids = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return self.pipeline.text_encoder(ids.to(self.pipeline.device)).last_hidden_state

    def token_embeddings(self, word: str) -> list[tuple[nn.Embedding, int]]:
        ids = self.pipeline.tokenizer(word, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise RegistryError(f"{word!r} is {len(ids)} tokens of this model; give a word of one")
        return [(self.pipeline.text_encoder.get_input_embeddings(), ids[0])]

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        settings: SampleSettings,
        seeds: Sequence[int],
        progress: Callable[[int, int], None],
    ) -> np.ndarray:
        side = self._side(settings.size)
        schedule = self.pipeline.scheduler
        if settings.scheduler:
            self.pipeline.scheduler = _scheduler(settings.scheduler, schedule.config)
        self.pipeline.set_progress_bar_config(disable=True)

        def told(_pipeline: Any, step: int, _t: Any, kept: dict[str, Any]) -> dict[str, Any]:
            progress(step + 1, settings.steps)
            return kept

        try:
            pictures = self.pipeline(
                list(prompts),
                height=side,
                width=side,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                negative_prompt=[settings.negative] * len(prompts),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="np",
                callback_on_step_end=told,
            ).images
        finally:
            self.pipeline.scheduler = schedule
        if not np.isfinite(pictures).all():
            raise RegistryError(
                "the model made numbers that are no picture (NaN); try --device cpu or a smaller "
                "--strength"
            )
        return (pictures * 255).round().astype(np.uint8)

    def save(self, folder: Path) -> None:
        self.pipeline.save_pretrained(folder)

    def _side(self, size: int | None) -> int:
        """Return the side in pixels; RegistryError unless the network can halve it often enough."""
        scale = self.pipeline.vae_scale_factor
        if size is None:
            return self.pipeline.unet.config.sample_size * scale
        multiple = scale * 2 ** (len(self.pipeline.unet.config.block_out_channels) - 1)
        if size < multiple or size % multiple:
            raise RegistryError(
                f"--size {size} does not fit this model; use a multiple of {multiple}"
            )
        return size


def load_folder(folder: Path, device: str, dtype: str) -> StableDiffusion:
    """Load a diffusers folder, from its files alone; RegistryError if they are missing or
    damaged."""
    with quiet():
        from diffusers import StableDiffusionPipeline

        try:
            pipeline = StableDiffusionPipeline.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                safety_checker=None,
                requires_safety_checker=False,
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise RegistryError(
                f"the model in {folder} is missing or damaged ({error}); install it again"
            ) from error
        pipeline.to(device, getattr(torch, dtype))
    pipeline.unet.eval()
    pipeline.text_encoder.eval()
    return StableDiffusion(pipeline)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' bars and advice off the terminal while a model loads; errors still
    raise."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
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


def _scheduler(name: str, config: Mapping[str, Any]) -> Any:
    import diffusers

    if name not in SCHEDULERS:
        raise RegistryError(f"unknown scheduler {name!r}; choose one of {', '.join(SCHEDULERS)}")
    return getattr(diffusers, SCHEDULERS[name]).from_config(config)
