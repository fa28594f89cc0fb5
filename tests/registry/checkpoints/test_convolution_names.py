"""The convolutions of Stable Diffusion as targets: how many, and their names in both layouts."""

from __future__ import annotations

import pytest

from hdbcli.bench.random_model import empty_networks
from hdbcli.method.inject import find_targets
from hdbcli.method.lidb import shape_of
from registry.checkpoints.ldm import Place, canonical, layers_of, layout_of, rename
from registry.stable_diffusion.families import FAMILIES

# Two to a residual block; a shortcut where its width changes; samplers; before and after attention.
COUNTS = {
    "sd1": 192 + 2 * 22 + 14 + 6 + 2 * 16,
    "sd2": 236 + 2 * 22 + 14 + 6 + 2 * 16,
    "sdxl": 806 + 2 * 17 + 11 + 4 + 2 * 11,
}


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_every_target_is_found_again_in_a_single_file(name: str) -> None:
    family, layout = FAMILIES[name], layout_of(name)
    targets = find_targets(empty_networks(family), family.target_sets["all"], canonical)
    assert len(targets) == COUNTS[name] > family.count
    for component, path, layer in targets:
        n, m = shape_of(layer)
        assert n >= family.b and m >= family.a
        own = canonical(component, path)
        place = rename(component, f"{own}.weight", layout)
        assert place is not None
        found = layers_of(place.key, layout)
        assert Place(component, own, place.part, place.parts) in found and len(found) == place.parts
    for key in ("input_blocks.0.0", "out.2", "time_embed.0", "input_blocks.1.0.in_layers.0"):
        paths = [each.path for each in layers_of(f"model.diffusion_model.{key}.weight", layout)]
        assert paths == (["down_blocks.0.resnets.0.norm1"] if "layers" in key else [])
