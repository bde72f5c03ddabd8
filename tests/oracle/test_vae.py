"""An autoencoder of other norm groups than FLUX has, as diffusers knows it, from both our forms.

The number of groups leaves no trace in the tensors: taken wrong, every picture is, and no error is
raised.
"""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_layout import CONFIGS

from tests.oracle.conftest import relative_l2
from zquant.convert.execute import convert
from zquant.convert.plan import ConvertRequest, plan_conversion
from zquant.formats.detect import open_source
from zquant.formats.model_folder import source_metadata
from zquant.formats.names import vae_parts
from zquant.models.build import load, on_meta
from zquant.models.config import VAEConfig
from zquant.models.vae import VAE

pytestmark = pytest.mark.oracle

# float32 on both sides, the same weights
SAME = 1e-5
CONFIG = CONFIGS["vae"] | {
    "block_out_channels": [16, 32, 64, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
}


def ours(path: Path) -> VAE:
    """What the engine builds of a folder or file."""
    source = open_source(path)
    parts = vae_parts(source)
    shapes = {name: tuple(part.shape) for name, part in parts.items()}
    config = VAEConfig.from_shapes(shapes, source_metadata(source))
    assert config.norm_groups == 8
    module = on_meta(lambda: VAE(config))
    cpu = torch.device("cpu")
    return load(module, parts, label=str(path), device=cpu, dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs() -> Any:
    """diffusers' autoencoder with random weights, its norms far from 1 and 0."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL.from_config({k: v for k, v in CONFIG.items() if k[0] != "_"}).eval()
    with torch.no_grad():
        for name, p in vae.named_parameters():
            if "norm" in name:
                p.add_(0.5 * torch.randn_like(p))
    return vae


@pytest.fixture(scope="module")
def forms(theirs: Any, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The official folder with this autoencoder, and the file that a conversion makes of it."""
    folder = tmp_path_factory.mktemp("groups")
    model, out = folder / "model", folder / "out"
    model.mkdir()
    for part in tiny_folder.iterdir():
        if part.name != "vae":
            (model / part.name).symlink_to(part)
    theirs.save_pretrained(model / "vae")
    assert json.loads((model / "vae/config.json").read_text())["norm_num_groups"] == 8
    plan = plan_conversion(ConvertRequest(source=str(model), out=out))
    convert(replace(plan, outputs=plan.outputs[2:]))
    return [model / "vae", out / "vae.safetensors"]


@pytest.mark.parametrize("form", [0, 1], ids=["folder", "converted"])
def test_norm_groups_are_those_of_the_config(theirs: Any, forms: list[Path], form: int) -> None:
    vae = ours(forms[form])
    z, picture = torch.randn(1, 16, 6, 4), torch.randn(1, 3, 48, 32)
    with torch.inference_mode():
        expected = theirs.decode(z).sample
        assert relative_l2(vae.decode(z), expected) <= SAME
        assert relative_l2(vae.encode(picture), theirs.encode(picture).latent_dist.mean) <= SAME
        other = copy.deepcopy(theirs)
        for module in other.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.num_groups = 16
        assert relative_l2(other.decode(z).sample, expected) > 0.01  # the test would notice


def test_diffusers_reads_the_converted_file(theirs: Any, forms: list[Path]) -> None:
    from diffusers import AutoencoderKL

    folder, file = forms
    again = AutoencoderKL.from_single_file(str(file), config=str(folder), torch_dtype=torch.float32)
    for name, weights in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], weights), name
