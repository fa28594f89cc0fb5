"""Train the base model of `tiny`: UNet and text encoder on the latents of captioned renders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hdbcli.model.device import short_attention
from hdbcli.training.loop import Plan, Step, averages_of, fit, settle
from registry.tiny.recipe.autoencoder import CHANNELS, decode, encode
from registry.tiny.recipe.pictures import STYLES, Pictures, half, read_pictures, sheet
from registry.tiny.recipe.styles import CAPTIONS
from registry.tiny.recipe.vocabulary import LENGTH, write_tokenizer

IDENTIFIER = "sks"
WIDTH = 128  # of the text encoder
SHOWN = 12  # samples a style in the sheet
ATTENDED = 8  # side of the largest grid with attention
EMPTY = 0.1  # share of captions left out, for classifier-free guidance
PORTRAIT_WORDS = ("A [V] face", "a photo of a [V] face", "a portrait of a [V] face", "[V] face")


def new_unet() -> UNet2DConditionModel:
    """Build the untrained UNet: three levels, attention at 8 x 8 and 4 x 4, none at 16 x 16."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(96, 128, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
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


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def train_base(build: Path, plan: Plan, batch: int, device: str, compiled: bool) -> Iterator[Step]:
    """Train on every picture and its mirror image; save a pipeline folder and a sheet of
    samples."""
    pictures = read_pictures(build / "people")
    vae = AutoencoderTiny.from_pretrained(build / "vae").to(memory_format=torch.channels_last)
    latents = _latents(vae.eval().to(device), pictures)
    tokenizer = write_tokenizer(build / "vocabulary", _words())
    tokens = _tokens(tokenizer)
    torch.manual_seed(plan.seed)
    unet, text_encoder = new_unet().to(device), new_text_encoder(tokenizer).to(device)
    scheduler = new_scheduler()
    signal = scheduler.alphas_cumprod.to(device)
    randomness = torch.Generator(device)
    forward = torch.compile(unet) if compiled else unet

    def loss(generator: torch.Generator) -> Tensor:
        pick = torch.randint(len(pictures.pixels), (batch,), generator=generator)
        ids = _captions(tokens, pictures.styles[pick], generator).to(device)
        # Drawn where it is needed: a GPU would wait for the numbers.
        randomness.manual_seed(int(torch.randint(1 << 62, (), generator=generator)))
        mirrored = torch.randint(2, (batch,), generator=randomness, device=device)
        clean = latents[mirrored, pick.to(device)].float()
        noise = torch.randn(clean.shape, generator=randomness, device=device)
        t = torch.randint(len(signal), (batch,), generator=randomness, device=device)
        a, s = signal[t].sqrt().view(-1, 1, 1, 1), (1 - signal[t]).sqrt().view(-1, 1, 1, 1)
        with half(unet.device), short_attention(device, ATTENDED**2):
            states = text_encoder(ids).last_hidden_state
            velocity = forward(a * clean + s * noise, t, states).sample
        return F.mse_loss(velocity.float(), a * noise - s * clean)

    parameters = {f"unet.{k}": p for k, p in unet.named_parameters()}
    parameters |= {f"text_encoder.{k}": p for k, p in text_encoder.named_parameters()}
    averages = averages_of(parameters)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=plan.lr, weight_decay=0.01, betas=(0.9, 0.99)
    )
    yield from fit(parameters, loss, optimizer, plan, averages, build / "base.safetensors")
    settle(parameters, averages)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    _show(pipeline, build / "sheets/base.png")
    pipeline.to("cpu").save_pretrained(build / "pipeline")


def _latents(vae: AutoencoderTiny, pictures: Pictures) -> Tensor:
    """Encode all pictures and their mirror images: (2, N, c, h, w) float16, on the device."""
    both = [
        torch.cat([encode(vae, part.to(vae.device)).half() for part in pixels.split(200)])
        for pixels in (pictures.pixels, pictures.pixels.flip(-1))
    ]
    return torch.stack(both)


def _words() -> set[str]:
    texts = [*CAPTIONS.values(), *PORTRAIT_WORDS]
    return {w for text in texts for w in text.replace("[V]", IDENTIFIER).split()}


def _tokens(tokenizer: CLIPTokenizer) -> Tensor:
    """Tokenise every caption: (styles, variants, with or without identifier, LENGTH); the last row
    is empty."""
    rows = []
    for style in STYLES:
        texts = PORTRAIT_WORDS if style == "portrait" else (CAPTIONS[style],) * len(PORTRAIT_WORDS)
        rows += [t.replace("[V]", IDENTIFIER) for t in texts]
        rows += [t.replace("[V] ", "") for t in texts]
    rows += [""] * (2 * len(PORTRAIT_WORDS))
    ids = tokenizer(rows, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids.view(len(STYLES) + 1, 2 * len(PORTRAIT_WORDS), LENGTH)


def _captions(tokens: Tensor, styles: Tensor, generator: torch.Generator) -> Tensor:
    count = len(styles)
    empty = torch.rand(count, generator=generator) < EMPTY
    row = torch.where(empty, torch.tensor(len(tokens) - 1), styles)
    variant = torch.randint(tokens.shape[1], (count,), generator=generator)
    return tokens[row, variant]


@torch.no_grad()
def _show(pipeline: StableDiffusionPipeline, path: Path) -> None:
    """Draw every style with the same seeds."""
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    for caption in CAPTIONS.values():
        prompt = caption.replace("[V]", IDENTIFIER)
        latents = pipeline(
            [prompt] * SHOWN,
            num_inference_steps=30,
            guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(i) for i in range(SHOWN)],
            output_type="latent",
        ).images
        rows.append(decode(pipeline.vae, latents).cpu())
    sheet(rows, path)
