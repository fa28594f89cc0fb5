"""The backbone of Stable Diffusion: one diffusers pipeline spoken to in hdb's language.

Families differ in how prompts become what the UNet reads, `condition`, and in nothing else here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from registry.checkpoints.ldm import canonical
from registry.checkpoints.safetensors import read_tensors, save_tensors
from registry.errors import HdbError, UsageError
from registry.pixels import to_pixels
from registry.seeds import generator_of, noise_of
from registry.spec import SampleSettings, shifted
from registry.stable_diffusion.uncompiled import quiet, without_compiler

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    Pipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline

# What a command line calls a scheduler, and what diffusers does.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
LCM_STEPS = 50
ENCODED = 2**20  # pixels that the autoencoder reads in one pass: 4 pictures of 512 px


@dataclass(frozen=True)
class Conditions:
    """What the UNet reads beside latents and times."""

    states: Tensor  # (B, T, width)
    added: dict[str, Tensor] | None = None


# (pipeline, prompts, pixels (H, W)) -> conditions, with gradients to the text encoders' residuals
Condition: TypeAlias = Callable[["Pipeline", Sequence[str], tuple[int, int]], Conditions]


def tokens(pipeline: Pipeline, suffix: str, prompts: Sequence[str]) -> Tensor:
    """Return the token numbers (B, T) of prompts for the text encoder of that suffix."""
    tokenizer = getattr(pipeline, f"tokenizer{suffix}")
    ids = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids.to(pipeline.device)


def last_states(pipeline: Pipeline, prompts: Sequence[str], _pixels: tuple[int, int]) -> Conditions:
    """Read the text encoder's last states, as Stable Diffusion 1.x and 2.x do."""
    return Conditions(pipeline.text_encoder(tokens(pipeline, "", prompts)).last_hidden_state)


def two_encoders(pipeline: Pipeline, prompts: Sequence[str], pixels: tuple[int, int]) -> Conditions:
    """Read as Stable Diffusion XL does: the states of both encoders before their last layer, side
    by side, and what is added to the time: the second one's pooled state and sizes.

    The sizes say that the picture was never scaled nor cropped, as the pipeline does by default.
    """
    first = pipeline.text_encoder(tokens(pipeline, "", prompts), output_hidden_states=True)
    second = pipeline.text_encoder_2(tokens(pipeline, "_2", prompts), output_hidden_states=True)
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    sizes = torch.tensor([[*pixels, 0, 0, *pixels]], dtype=states.dtype, device=states.device)
    return Conditions(
        states, {"text_embeds": second.text_embeds, "time_ids": sizes.expand(len(states), -1)}
    )


def text_of(tokenizer: Any, words: Sequence[str]) -> str:
    """Return what tokens stand for as text: they spell bytes, not characters. Bytes of a character
    whose others are missing are left out."""
    text = tokenizer.convert_tokens_to_string(list(words))
    return text.replace("</w>", " ").replace("\ufffd", "").strip()


@dataclass(frozen=True, eq=False)
class StableDiffusion:
    """A loaded pipeline as a `Backbone`."""

    pipeline: Pipeline
    condition: Condition = last_states
    read_autoencoder: Callable[[], Any] | None = None  # from its files, onto the device
    shift: float = 1.0  # of the steps towards the noise, where every step renews it

    @property
    def autoencoder(self) -> Any:
        """Return the autoencoder, read again if it was let go of."""
        if self.pipeline.vae is None and self.read_autoencoder:
            with without_compiler():
                self.pipeline.register_modules(vae=self.read_autoencoder())
            _slice(self.pipeline.vae)
        return self.pipeline.vae

    def free_autoencoder(self) -> None:
        if self.read_autoencoder:
            with without_compiler():
                self.pipeline.register_modules(vae=None)

    def unread(self, prompt: str) -> str:
        tokenizer: Any = self.pipeline.tokenizer
        room = tokenizer.model_max_length - 2  # a token each says where a text starts and ends
        with quiet():
            words = tokenizer.tokenize(prompt)
        return text_of(tokenizer, words[room:])

    def save_memory(self, recompute: bool) -> None:
        _slice(self.pipeline.vae)
        if not recompute:
            return
        self.pipeline.unet.enable_gradient_checkpointing()
        encoders: list[Any] = [m for n, m in self.components.items() if n != "unet"]
        with quiet():
            for encoder in encoders:
                encoder.gradient_checkpointing_enable({"use_reentrant": False})
                _recompute(encoder)

    @property
    def components(self) -> Mapping[str, nn.Module]:
        names = ("unet", "text_encoder", "text_encoder_2")
        return {n: getattr(self.pipeline, n) for n in names if hasattr(self.pipeline, n)}

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        vae = self.autoencoder
        with _exact(vae):
            parts = images.to(vae.device, vae.dtype).split(max(1, ENCODED // images[0, 0].numel()))
            encoded = [vae.encode(part) for part in parts]
        latents = [
            e.latent_dist.mode() if hasattr(e, "latent_dist") else e.latents for e in encoded
        ]
        return torch.cat(latents).float() * vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> np.ndarray:
        vae = self.autoencoder
        with _exact(vae):
            decoded = self.decode(latents.to(vae.device))
        return to_pixels(decoded).permute(0, 2, 3, 1).cpu().numpy()

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.autoencoder
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample

    @property
    def halvings(self) -> int:
        """How often the UNet halves its grid before anything in it attends."""
        kinds = self.pipeline.unet.config.down_block_types
        return next((i for i, kind in enumerate(kinds) if "Attn" in kind), 0)

    def predict(self, latents: Tensor, prompts: Sequence[str], noise: Tensor, t: Tensor) -> Tensor:
        steps = self._steps(t)
        a, s = self._mix(steps, latents)
        return self._predict(a * latents + s * noise, steps, self._read(prompts, latents))

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        a, s = self._mix(self._steps(t), latents)
        return a * noise - s * latents if self._velocity else noise

    @property
    def renews(self) -> bool:
        return _renews(self.pipeline.scheduler)

    def times(self, steps: int) -> Tensor:
        even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        last = self.pipeline.scheduler.config.num_train_timesteps
        shift = self.shift if self.renews else 1.0
        shift = max(1.0, min(shift, 0.9 * last / steps))  # or many steps fall on one timestep
        return shifted(even, shift)

    def split(
        self, latents: Tensor, noise: Tensor, t: Tensor, answer: Tensor
    ) -> tuple[Tensor, Tensor]:
        a, s = self._mix(self._steps(t), latents)
        noisy = a * latents + s * noise
        if self._velocity:
            return a * noisy - s * answer, s * noisy + a * answer
        return (noisy - s * answer) / a, answer

    @property
    def _velocity(self) -> bool:
        return self.pipeline.scheduler.config.prediction_type == "v_prediction"

    def _steps(self, t: Tensor) -> Tensor:
        return (t * len(self.pipeline.scheduler.alphas_cumprod)).long()

    def _mix(self, steps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return how much signal and noise there is at the given steps of the schedule."""
        signal = self.pipeline.scheduler.alphas_cumprod.to(like.device)[steps].view(-1, 1, 1, 1)
        return signal.sqrt(), (1 - signal).sqrt()

    def _read(self, prompts: Sequence[str], latents: Tensor) -> Conditions:
        height, width = (side * self.pipeline.vae_scale_factor for side in latents.shape[-2:])
        read = self.condition(self.pipeline, prompts, (height, width))
        if self.pipeline.config.get("force_zeros_for_empty_prompt"):
            return _without_empty(read, prompts)
        return read

    def _predict(self, noisy: Tensor, steps: Tensor, read: Conditions) -> Tensor:
        unet = self.pipeline.unet
        states = read.states
        return unet(
            noisy.to(unet.dtype), steps, states, added_cond_kwargs=read.added
        ).sample.float()

    def token_embeddings(self, word: str) -> list[tuple[nn.Embedding, int]]:
        found = []
        for name in self.components:
            if name.startswith("text_encoder"):
                tokenizer = getattr(self.pipeline, name.replace("text_encoder", "tokenizer"))
                ids = tokenizer(word, add_special_tokens=False).input_ids
                if len(ids) != 1:
                    raise HdbError(
                        f"{word!r} is {len(ids)} tokens of this model; give a word of one"
                    )
                encoder = getattr(self.pipeline, name)
                found.append((encoder.get_input_embeddings(), ids[0]))
        return found

    @torch.no_grad()
    @without_compiler()
    def sample(
        self,
        prompts: Sequence[str],
        settings: SampleSettings,
        seeds: Sequence[int],
        progress: Callable[[int, int], None],
    ) -> np.ndarray:
        side = self._side(settings.size)
        _ = self.autoencoder  # read again if need be: the pipeline decodes with it
        schedule = self.pipeline.scheduler
        self.pipeline.scheduler = _spaced(
            _scheduler(settings, schedule.config) if settings.scheduler else schedule,
            settings.steps,
            settings.trailing,
        )
        self.pipeline.set_progress_bar_config(disable=True)
        spacing: dict[str, Any] = {"num_inference_steps": settings.steps}
        if self.renews and self.shift != 1:
            last = schedule.config.num_train_timesteps
            starts = (self.times(settings.steps)[:-1] * last - 1e-6).ceil().long() - 1
            spacing = {"timesteps": starts.tolist()}
        generators = [generator_of(seed) for seed in seeds]

        def told(_pipeline: Any, step: int, _t: Any, kept: dict[str, Any]) -> dict[str, Any]:
            progress(step + 1, settings.steps)
            return kept

        # None where there is none: Stable Diffusion XL then reads zeros, not "".
        negative = [settings.negative] * len(prompts) if settings.negative else None
        try:
            with quiet():  # of prompts that are too long hdb tells itself
                pictures = self.pipeline(
                    list(prompts),
                    height=side,
                    width=side,
                    **spacing,
                    guidance_scale=settings.guidance,
                    negative_prompt=negative,
                    generator=generators,
                    latents=self._noise(side, generators),
                    output_type="np",
                    callback_on_step_end=told,
                ).images
        finally:
            self.pipeline.scheduler = schedule
        if not np.isfinite(pictures).all():
            raise HdbError(
                "the model made numbers that are not a picture (NaN); try --device cpu or a "
                "smaller --strength"
            )
        return (pictures * 255).round().astype(np.uint8)

    def save(self, folder: Path) -> None:
        self.pipeline.save_pretrained(folder)
        for file in folder.glob("text_encoder*/model.safetensors"):
            tensors = {canonical(file.parent.name, k): v for k, v in read_tensors(file)[1].items()}
            save_tensors(tensors, file, {"format": "pt"})  # by names that old readers know too

    def _noise(self, side: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw what each picture starts from, in float32, so that a seed means the same in every
        number format."""
        unet, small = self.pipeline.unet, side // self.pipeline.vae_scale_factor
        noise = noise_of(generators, (unet.config.in_channels, small, small))
        return noise.to(unet.device, unet.dtype)

    def _side(self, size: int | None) -> int:
        """Return the side in pixels; HdbError unless the network can halve it often enough."""
        scale = self.pipeline.vae_scale_factor
        if size is None:
            return self.pipeline.unet.config.sample_size * scale
        multiple = scale * 2 ** (len(self.pipeline.unet.config.block_out_channels) - 1)
        if size < multiple or size % multiple:
            raise HdbError(f"--size {size} does not fit this model; use a multiple of {multiple}")
        return size


def _slice(vae: Any) -> None:
    """Decode pictures one by one, and what is larger than the model's own size in tiles.

    Not in an AutoencoderTiny: diffusers' tiles have four channels there, whatever the model has.
    """
    vae.enable_slicing()
    if type(vae).__name__ == "AutoencoderKL":
        vae.enable_tiling()


def _recompute(encoder: nn.Module) -> None:
    """Let the layers of a text encoder recompute: they do so in training mode only.

    Not what lies inside them, so that no dropout starts.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in encoder.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True


def _without_empty(read: Conditions, prompts: Sequence[str]) -> Conditions:
    """Put zeros in the place of empty prompts, as Stable Diffusion XL reads an absent one."""
    there = torch.tensor([bool(prompt) for prompt in prompts]).to(read.states)
    added = dict(read.added or {})
    added["text_embeds"] = added["text_embeds"] * there[:, None]
    return Conditions(read.states * there[:, None, None], added)


@contextmanager
def _exact(vae: Any) -> Iterator[None]:
    """Run an autoencoder that overflows in float16 in float32."""
    half = vae.dtype == torch.float16 and vae.config.force_upcast
    if half:
        vae.float()
    try:
        yield
    finally:
        if half:
            vae.half()


def _scheduler(settings: SampleSettings, config: Mapping[str, Any]) -> Any:
    import diffusers

    name = settings.scheduler or ""
    if name not in SCHEDULERS:
        raise UsageError(f"unknown scheduler {name!r}; choose one of {', '.join(SCHEDULERS)}")
    more: dict[str, Any] = {"clip_sample": False}  # latents are no pixels of -1 to 1
    if name == "lcm":  # draws its steps out of those that it was distilled on, and takes no more
        more["original_inference_steps"] = max(LCM_STEPS, settings.steps)
    return getattr(diffusers, SCHEDULERS[name]).from_config(config, **more)


def _renews(scheduler: Any) -> bool:
    """Say whether a scheduler adds fresh noise to what the network sees, whole, in every step."""
    return type(scheduler).__name__ == SCHEDULERS["lcm"]


def _spaced(scheduler: Any, steps: int, trailing: bool = False) -> Any:
    """Return a scheduler whose steps begin where the noise ends; HdbError for too many steps.

    "Leading" spacing takes the multiples of T // steps from below: 4 of 1000 steps begin at 751,
    600 at 600, and 1000 beyond the last. Where it begins before 95 % of T, "trailing" spacing
    takes its place and begins at T - 1 (Lin et al. 2024, table 2), as few-step models expect.
    """
    config = scheduler.config
    last = config.num_train_timesteps - 1
    if steps > last + 1:
        raise HdbError(
            f"--steps {steps} is more than the {last + 1} that this model was trained on; use fewer"
        )
    if _renews(scheduler):  # has a spacing of its own, from the last noise
        return scheduler
    if trailing and "timestep_spacing" in config:
        return scheduler.from_config(config, timestep_spacing="trailing")
    if config.get("timestep_spacing") != "leading":
        return scheduler
    probe = scheduler.from_config(config)
    probe.set_timesteps(steps)
    if 0.95 * last <= float(probe.timesteps[0]) <= last:
        return scheduler
    return scheduler.from_config(config, timestep_spacing="trailing")
