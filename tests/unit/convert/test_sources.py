"""Every form of the same weights gives the same tensors; GGUF only when asked for."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from zquant.errors import CheckpointError
from zquant.formats.detect import open_source
from zquant.formats.names import vae_parts
from zquant.models.config import VAEConfig

FILES = ("dit-Q4_K_M.gguf", "text_encoder-Q4_K_M.gguf")


@pytest.mark.parametrize("form", ["fused", "prefixed", "stray", "split", "all-in-one"])
def test_same_weights_in_every_form_give_the_same_bytes(form, forms, q4, run, look, tmp_path):
    run(**forms[form], out=tmp_path)
    for name in FILES:
        assert look.data_of(tmp_path / name) == look.data_of(q4 / name)
    ours, theirs = (look.data_of(folder / "vae.safetensors") for folder in (tmp_path, q4))
    assert {n: shape for n, (_, shape, _) in ours.items()} == {
        n: shape for n, (_, shape, _) in theirs.items()
    }


def test_official_f32_is_not_rounded_first(official_f32, official, run, look, tmp_path):
    for name, source in (("f32", official_f32), ("bf16", official)):
        run(source=str(source), out=tmp_path / name, qtype="F32")
    exact, rounded = (look.data_of(tmp_path / n / "dit-F32.gguf") for n in ("f32", "bf16"))
    assert exact.keys() == rounded.keys()
    for name, (_, shape, data) in exact.items():
        weights = torch.frombuffer(bytearray(data), dtype=torch.float32)
        expected = torch.frombuffer(bytearray(rounded[name][2]), dtype=torch.float32)
        assert rounded[name][1] == shape
        assert torch.equal(weights.bfloat16().float(), expected)
        assert weights.numel() < 1000 or not torch.equal(weights, expected)


def test_f32_holds_the_source_weights_fused_by_rows(official, run, look, tmp_path):
    run(source=str(official), out=tmp_path, qtype="F32")
    written = look.data_of(tmp_path / "dit-F32.gguf")
    source = {}
    for shard in (official / "transformer").glob("*.safetensors"):
        source |= load_file(shard)
    attention = "layers.0.attention."
    q, k, v = (source[f"{attention}to_{p}.weight"] for p in "qkv")
    expected = {
        f"{attention}qkv.weight": torch.cat([q, k, v]),
        f"{attention}out.weight": source[f"{attention}to_out.0.weight"],
        f"{attention}q_norm.weight": source[f"{attention}norm_q.weight"],
        "x_embedder.weight": source["all_x_embedder.2-1.weight"],
        "final_layer.linear.bias": source["all_final_layer.2-1.linear.bias"],
    }
    for name, weights in expected.items():
        assert written[name] == ("F32", tuple(weights.shape), weights.float().numpy().tobytes())


def test_the_vae_keeps_its_type_and_gets_latent_diffusion_names(official, comfy, q4, look):
    written, theirs = load_file(q4 / "vae.safetensors"), load_file(comfy["vae"])
    assert written.keys() == theirs.keys()
    for name, weights in written.items():
        assert weights.dtype == torch.bfloat16
        torch.testing.assert_close(weights.float(), theirs[name], rtol=0, atol=0)


def test_a_quantized_source_needs_permission(q4, run, tmp_path):
    message = (
        r"dit-Q4_K_M\.gguf: \d+ of \d+ tensors are quantized already \(first: '.+', \w+\); .* "
        "accept the loss with --allow-requantize"
    )
    with pytest.raises(CheckpointError, match=message):
        run(source=str(q4), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_requantizing_with_the_same_policy_changes_nothing(q4, run, look, tmp_path):
    result = run(source=str(q4), out=tmp_path, allow_requantize=True)
    for name in (*FILES, "vae.safetensors"):
        assert look.data_of(tmp_path / name) == look.data_of(q4 / name)
    vae = "vae.safetensors"  # the others have a receipt, which names the source
    assert (tmp_path / vae).read_bytes() == (q4 / vae).read_bytes()
    errors = [
        t["relative_rms_error"] for ts in result.manifest["tensors"].values() for t in ts.values()
    ]
    assert set(errors) == {0.0}


def test_requantizing_gives_other_types_and_their_error(q4, run, look, tmp_path):
    files = {"dit": q4 / FILES[0], "text_encoder": q4 / FILES[1], "vae": q4 / "vae.safetensors"}
    result = run(**files, out=tmp_path, qtype="Q4_0", allow_requantize=True)
    name = "layers.0.attention.qkv.weight"
    assert look.data_of(tmp_path / "dit-Q4_0.gguf")[name][0] == "Q4_0"
    assert 0.01 < result.manifest["tensors"]["dit"][name]["relative_rms_error"] < 0.2


def test_a_conversion_never_replaces_its_own_source(q4, run, look):
    before = look.contents(q4)
    with pytest.raises(CheckpointError, match=r"is a source and would be replaced. Choose another"):
        run(source=str(q4), out=q4, qtype="Q8_0", allow_requantize=True)
    assert look.contents(q4) == before


def test_a_given_file_goes_before_the_source(official, forms, run, tmp_path):
    sdxl = tmp_path / "sdxl.safetensors"
    save_file({"input_blocks.0.weight": torch.zeros(1)}, sdxl)
    with pytest.raises(CheckpointError, match=r"sdxl\.safetensors: not a Z-Image DiT"):
        run(source=str(official), dit=sdxl, out=tmp_path / "out")
    run(source=str(official), dit=forms["stray"]["dit"], out=tmp_path / "out", qtype="BF16")


def test_a_missing_component_is_named(comfy, run, tmp_path):
    message = "no source for text_encoder, vae. Give --text-encoder, --vae"
    with pytest.raises(CheckpointError, match=message):
        run(dit=comfy["dit"], out=tmp_path / "out")
    with pytest.raises(CheckpointError, match=rf"z_image_bf16\.safetensors: {message}"):
        run(source=str(comfy["dit"]), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_does_not_fit_is_refused(official, comfy, run, tmp_path):
    tensors = load_file(comfy["text_encoder"])
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:100].clone()
    few = tmp_path / "few.safetensors"
    save_file(tensors, few)
    message = r"few\.safetensors: the embedding has 100 rows, the vocabulary 326 tokens"
    with pytest.raises(CheckpointError, match=message):
        run(dit=official / "transformer", text_encoder=few, vae=comfy["vae"], out=tmp_path / "out")


def test_the_vae_says_its_norm_groups_unless_they_are_flux(official, run, look, tmp_path):
    folder = tmp_path / "official"
    shutil.copytree(official, folder)
    config = folder / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"norm_num_groups": 8}))
    run(source=str(official), out=tmp_path / "32", qtype="BF16")
    run(source=str(folder), out=tmp_path / "8", qtype="BF16")
    run(source=str(tmp_path / "8"), out=tmp_path / "again", qtype="BF16")
    told = {n: open_source(tmp_path / n / "vae.safetensors") for n in ("32", "8", "again")}
    assert told["32"].metadata == {"format": "pt"}
    assert told["8"].metadata == {"format": "pt", "norm_num_groups": "8"}
    shapes = {name: part.shape for name, part in vae_parts(told["8"]).items()}
    assert VAEConfig.from_shapes(shapes, told["8"].metadata).norm_groups == 8
    paths = {n: source.path for n, source in told.items()}
    assert look.data_of(paths["32"]) == look.data_of(paths["8"])
    assert paths["again"].read_bytes() == paths["8"].read_bytes()


def test_norm_groups_that_cannot_be_are_refused_with_the_file(official, run, tmp_path):
    folder = tmp_path / "official"
    shutil.copytree(official, folder)
    config = folder / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"norm_num_groups": 0}))
    message = (
        r"_model\.safetensors: metadata 'norm_num_groups' is 0; expected a whole number from 1"
    )
    with pytest.raises(CheckpointError, match=message):
        run(source=str(folder), out=tmp_path / "out")
