"""Train the base model of `tiny`: UNet and text encoder on the latents of captioned photographs.

Most of the training sees pictures of 64 px, at a quarter of the cost: latents are convolutional. A
second run goes on from there at 128 px.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hdbcli.model.device import join_workers
from hdbcli.training.loop import Plan, Step, averaged, averages_of, fit
from registry.errors import HdbError
from registry.spec import NOISIEST, shifted
from registry.stable_diffusion.backbone import StableDiffusion
from registry.tiny import SAMPLING, SHIFT
from registry.tiny.recipe.latents import GROUPS, read_autoencoder, read_latents
from registry.tiny.recipe.pictures import half, sheet
from registry.tiny.recipe.styles import CAPTIONS
from registry.tiny.recipe.teacher import CHANNELS
from registry.tiny.recipe.vocabulary import LENGTH, write_tokenizer

IDENTIFIER = "sks"
WIDTH = 128  # of the text encoder
SHOWN = 8  # samples a style in the sheet
SHOWN_EVERY = 1000  # steps
EMPTY = 0.1  # share of captions left out, for classifier-free guidance
# What a picture shows is plain through far more noise than what a pixel is: where the eyes go is
# settled at t > 0.8, which uniform times hardly visit. Shifted as by Esser et al. 2024, §5.3.2.
TIMES_SHIFT = 3.0
PORTRAIT_WORDS = ("A [V] face", "a photo of a [V] face", "a portrait of a [V] face", "[V] face")
# Pictures that image models made of nobody are darker and more dramatic than photographs of people:
# most of them say so, or every face would be drawn like that.
CINEMATIC_WORDS = ("a cinematic photo of a [V] face", "a cinematic portrait of a [V] face")
RENDER_WORDS = ("a 3D render of a [V] face",)


def new_unet() -> UNet2DConditionModel:
    """Build the untrained UNet: three levels with attention, at 128 px on grids of 16, 8 and 4."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(96, 160, 224),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=32,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_scheduler() -> LCMScheduler:
    """Return the cosine schedule, whose last step is pure noise: brightness is drawn, not kept.

    Every step takes the picture that the network sees, whole, and adds fresh noise. By DDIM's steps
    the first noise stays, and what is slightly wrong at each step adds up to crooked faces.
    """
    return LCMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        original_inference_steps=1000,
    )


def train_base(
    build: Path,
    plan: Plan,
    batch: int,
    device: str,
    compiled: bool,
    side: int,
    start: Path | None,
) -> Iterator[Step]:
    """Train on pictures of `side` px and their mirror images, from the pipeline `start` if given,
    `batch` in each of the processes that `torchrun` started.

    Write `base-SIDE.safetensors`, which a run that was cut off goes on from, and now and then, with
    average weights, a sheet of samples and the pipeline so far, where another run can start.
    """
    workers = join_workers(device)
    with workers.first():
        latents = read_latents(build, side, device)
    tokenizer = write_tokenizer(build / "vocabulary", _words())
    tokens = _tokens(tokenizer)
    torch.manual_seed(plan.seed)
    unet, text_encoder = new_unet().to(device), new_text_encoder(tokenizer).to(device)
    if start is not None:
        go_on_from(start, unet, text_encoder)
    parameters = {f"unet.{k}": p for k, p in unet.named_parameters()}
    parameters |= {f"text_encoder.{k}": p for k, p in text_encoder.named_parameters()}
    unet.to(memory_format=torch.channels_last)
    signal = new_scheduler().alphas_cumprod.to(device)
    randomness = torch.Generator(device)
    if device == "cpu":  # its backward pass takes half as long as the fused one's, compiled too
        unet.set_attn_processor(AttnProcessor())
    forward = torch.compile(unet) if compiled else unet
    clean_of = latents.values.to(device)

    def losses(generator: torch.Generator) -> Iterator[Tensor]:
        pick = latents.draw(batch * workers.count, generator)
        ids = _captions(tokens, latents.captions(pick, generator), generator)
        pick, ids = (each[workers.rank :: workers.count] for each in (pick, ids.to(device)))
        # Drawn where it is needed: a GPU would wait for the numbers.
        seed = int(torch.randint(1 << 62, (), generator=generator))
        randomness.manual_seed(seed + workers.rank)
        mirrored = torch.randint(2, (batch,), generator=randomness, device=device)
        clean = clean_of[mirrored, pick.to(device)].float()
        noise, late = noise_and_times(clean, randomness)
        t = (late * len(signal)).long()
        a, s = signal[t].sqrt().view(-1, 1, 1, 1), (1 - signal[t]).sqrt().view(-1, 1, 1, 1)
        with half(unet.device):
            states = text_encoder(ids).last_hidden_state
            velocity = forward(a * clean + s * noise, t, states).sample
        yield F.mse_loss(velocity.float(), a * noise - s * clean)

    averages = averages_of(parameters)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=plan.lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True
    )
    for step in fit(
        parameters,
        losses,
        optimizer,
        plan,
        averages,
        build / f"base-{side}.safetensors",
        workers.share,
        writes=workers.rank == 0,
        agree=workers.agree,
    ):
        if workers.rank:
            continue
        yield step
        if step.number % SHOWN_EVERY == 0 or step.number == step.steps:
            with averaged(parameters, averages):
                pipeline = StableDiffusionPipeline(
                    vae=read_autoencoder(build),
                    text_encoder=text_encoder,
                    tokenizer=tokenizer,
                    unet=unet,
                    scheduler=new_scheduler(),
                    safety_checker=None,
                    feature_extractor=None,
                    requires_safety_checker=False,
                )
                show(pipeline, side, build)
                pipeline.save_pretrained(build / "pipeline")


def noise_and_times(clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw what the diffusion loss puts on latents (B, c, h, w): noise, and times (B,) that lie
    towards the noise. They are drawn on the generator's device."""
    drawn_on = generator.device
    noise = torch.randn(clean.shape, generator=generator, device=drawn_on)
    share = torch.rand(len(clean), generator=generator, device=drawn_on)
    late = shifted(share, TIMES_SHIFT).clamp(max=NOISIEST)
    return noise.to(clean.device), late.to(clean.device)


def _words() -> set[str]:
    texts = [text for group in GROUPS for text in _texts(group)]
    return {w for text in texts for w in text.replace("[V]", IDENTIFIER).split()}


def _texts(group: str) -> tuple[str, ...]:
    """Return the captions of a group, as many for each."""
    few = {"portrait": PORTRAIT_WORDS, "cinematic": CINEMATIC_WORDS, "render": RENDER_WORDS}
    texts = few.get(group) or (CAPTIONS[group],)
    return texts * (len(PORTRAIT_WORDS) // len(texts))


def prompt_of(group: int) -> str:
    """Return the first caption of a group, an index into GROUPS, as the base reads it."""
    return _texts(GROUPS[group])[0].replace("[V]", IDENTIFIER)


def _tokens(tokenizer: CLIPTokenizer) -> Tensor:
    """Tokenise every caption: (groups, variants, with or without identifier, LENGTH); the last row
    is empty."""
    rows = []
    for group in GROUPS:
        rows += [t.replace("[V]", IDENTIFIER) for t in _texts(group)]
        rows += [t.replace("[V] ", "") for t in _texts(group)]
    rows += [""] * (2 * len(PORTRAIT_WORDS))
    ids = tokenizer(rows, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids.view(len(GROUPS) + 1, 2 * len(PORTRAIT_WORDS), LENGTH)


def go_on_from(pipeline: Path, unet: nn.Module, text_encoder: nn.Module) -> None:
    """Take over the weights of a pipeline that an earlier run wrote. HdbError if there is none."""
    if not (pipeline / "model_index.json").exists():
        raise HdbError(f"no pipeline in {pipeline}; give the folder that a base step wrote")
    for kind, name, model in (
        (UNet2DConditionModel, "unet", unet),
        (CLIPTextModel, "text_encoder", text_encoder),
    ):
        found = kind.from_pretrained(pipeline / name, local_files_only=True)
        model.load_state_dict(found.float().state_dict())


def _captions(tokens: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    count = len(groups)
    empty = torch.rand(count, generator=generator) < EMPTY
    row = torch.where(empty, torch.tensor(len(tokens) - 1), groups)
    variant = torch.randint(tokens.shape[1], (count,), generator=generator)
    return tokens[row, variant]


@torch.no_grad()
def show(pipeline: StableDiffusionPipeline, side: int, build: Path) -> None:
    """Draw every group of captions with the same seeds."""
    backbone, settings = StableDiffusion(pipeline, shift=SHIFT), replace(SAMPLING, size=side)
    rows = []
    for group in range(len(GROUPS)):
        prompts = [prompt_of(group)] * SHOWN
        drawn = backbone.sample(prompts, settings, range(SHOWN), lambda *_: None)
        rows.append(torch.from_numpy(drawn).permute(0, 3, 1, 2))
    sheet(rows, build / f"sheets/base-{side}.png")
