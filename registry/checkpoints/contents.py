"""Read what a checkpoint is made of, from safetensors headers alone: a diffusers folder or an
original single file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.checkpoints.ldm import LAYOUTS, UNET, VAE, original_names
from registry.checkpoints.safetensors import LARGEST, TensorInfo, read_header
from registry.errors import HdbError

INDEX = "model_index.json"
INDEXED = ".safetensors.index"
VARIANT = "fp16"
PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}

# Where an original single file keeps the components of a pipeline.
_TEXT = {
    text.prefix: component for layout in LAYOUTS.values() for component, text in layout.text.items()
}
_REFINER = {"conditioner.embedders.0.model.": "text_encoder_2"}  # which has no first
PREFIXES = {UNET: "unet", VAE: "vae", **_TEXT, **_REFINER}
_SD2 = LAYOUTS["sd2"].text["text_encoder"]
UNUSED = f"{_SD2.prefix}transformer.resblocks.{_SD2.layers}."  # Stable Diffusion 2.x stops before

# Tensors by which single files, and ComfyUI, tell what a UNet was trained for.
PREDICTS_V = "v_pred"
PREDICTS = {PREDICTS_V: "v", "edm_mean": "EDM", "edm_vpred.sigma_max": "EDM"}  # Playground, CosXL
ZERO_SNR = "ztsnr"  # its noise goes to the very end


@dataclass(frozen=True)
class Checkpoint:
    """A model's tensors by component and name, and the files that it is read from."""

    path: Path  # a folder, or the single file
    components: Mapping[str, Mapping[str, TensorInfo]]
    files: tuple[Path, ...]
    metadata: Mapping[str, str]  # of a single file
    called: str = ""  # what a folder calls its pipeline

    @property
    def single(self) -> bool:
        return self.files == (self.path,)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a folder or a file; HdbError for what is missing, damaged or no safetensors."""
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise HdbError(f"no such file or folder: {path}")
    return _read_single(path)


def read_config(path: Path) -> dict[str, Any]:
    """Read one of diffusers' JSON files; HdbError names it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
        raise HdbError(f"{path} {reason}; download the model in full") from error
    if not isinstance(values, dict):
        raise HdbError(f"{path} holds no settings; download the model in full")
    return values


def _read_single(path: Path) -> Checkpoint:
    _refuse_pickle(path)
    if path.suffix != ".safetensors":  # diffusers opens every other one as a pickle
        raise HdbError(f"{path} does not end in .safetensors; rename it if it is one")
    header = read_header(path, LARGEST)
    components: dict[str, dict[str, TensorInfo]] = {}
    names = original_names(header.tensors)
    for stored, info in header.tensors.items():
        name = names[stored]
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if prefix and not name.startswith(UNUSED):
            components.setdefault(PREFIXES[prefix], {})[name.removeprefix(prefix)] = info
    if not components:  # for whoever asks what this is
        components[""] = header.tensors
    told = (("modelspec.prediction_type", PREDICTS[n]) for n in PREDICTS if n in names.values())
    return Checkpoint(path, components, (path,), {**dict(told), **header.metadata})


def _read_folder(path: Path) -> Checkpoint:
    if not (path / INDEX).is_file():
        raise HdbError(
            f"{path} has no {INDEX}, so it is not a diffusers folder; give the folder that has "
            "one, or a single .safetensors file"
        )
    called = str(read_config(path / INDEX).get("_class_name", ""))
    components: dict[str, dict[str, TensorInfo]] = {}
    files = [path / INDEX]
    for component, stem in WEIGHTS.items():
        if (path / component).is_dir():
            weights = weight_files(path / component, stem)
            components[component] = {}
            for file in weights:
                components[component] |= read_header(file, LARGEST).tensors
            read_config(path / component / "config.json")
            files += [path / component / "config.json", *weights]
    for part in ("scheduler", "tokenizer", "tokenizer_2"):
        files += sorted(file for file in (path / part).glob("*") if file.is_file())
    return Checkpoint(path, components, tuple(files), {}, called)


def weight_files(folder: Path, stem: str) -> list[Path]:
    """Return a component's weights, one file or all shards of its index: the plain ones, or those
    of the variant fp16 where there is no other."""
    for ending in ("", f".{VARIANT}"):
        whole, index = (
            folder / f"{stem}{ending}.safetensors",
            folder / f"{stem}{INDEXED}{ending}.json",
        )
        if whole.is_file():
            return [whole]
        if index.is_file():
            return _shards(index)
    for other in sorted(folder.iterdir()):
        _refuse_pickle(other)
    raise HdbError(f"{folder} has no {stem}.safetensors; download the model in full")


def variant_of(*components: Path) -> str | None:
    """Return the variant that diffusers has to be asked for, if one of these folders has no other;
    components without it are read as they are."""
    for folder in components:
        if folder.is_dir():
            files = weight_files(folder, WEIGHTS[folder.name])
            if f".{VARIANT}" in files[0].name:
                return VARIANT
    return None


def _shards(index: Path) -> list[Path]:
    folder, shards = index.parent, read_config(index).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) else set()
    if not names or any(type(name) is not str or Path(name).name != name for name in names):
        raise HdbError(f"{index} names no shards; download the model in full")
    files = [folder / name for name in sorted(names)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise HdbError(
            f"{folder} lacks {len(missing)} of {len(files)} shards, such as {missing[0]!r}; "
            "download the model in full"
        )
    return files


def _refuse_pickle(path: Path) -> None:
    """Raise HdbError for a pickle, whatever it is called, and say how it is converted."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        first = file.read(9)
    if first[:4] == b"GGUF":
        raise HdbError(
            f"{path} is a GGUF, whose weights are quantised; look for the .safetensors file of "
            "this model"
        )
    zipped = first[:2] == b"PK"
    pickled = first[:1] == b"\x80" and first[1:2] in b"\x01\x02\x03\x04\x05" and first[8:] != b"{"
    if zipped or pickled or path.suffix.casefold() in PICKLES:
        raise HdbError(
            f"{path} is a pickle, which can run code when it is opened; look for the .safetensors "
            'file of this model, or convert it: python -c "import torch, safetensors.torch as s; '
            "d = torch.load('IN.ckpt', weights_only=True); d = d.get('state_dict', d); "
            "s.save_file({k: v.contiguous() for k, v in d.items() if hasattr(v, 'dtype')}, "
            "'OUT.safetensors')\""
        )
