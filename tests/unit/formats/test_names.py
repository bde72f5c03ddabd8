"""Official names: every published spelling gives the same parts, and other models are refused."""

import random
import re

import numpy as np
import pytest

from zquant.errors import CheckpointError
from zquant.formats.gguf_file import gguf_header, open_gguf
from zquant.formats.names import (
    Part,
    components_in,
    dit_file_names,
    dit_parts,
    text_encoder_file_names,
    text_encoder_parts,
    vae_file_names,
    vae_file_shape,
    vae_parts,
)
from zquant.formats.safetensors_file import open_safetensors, safetensors_header
from zquant.quant.qtypes import QTYPES

F32, Q8_0 = QTYPES["F32"], QTYPES["Q8_0"]
DIM = 4


def dit_shapes():
    """Diffusers name -> shape of a tiny DiT: 2 layers, 1 block in each refiner."""
    shapes = {
        "all_x_embedder.2-1.weight": (DIM, 8),
        "all_x_embedder.2-1.bias": (DIM,),
        "t_embedder.mlp.0.weight": (8, 8),
        "t_embedder.mlp.2.bias": (DIM,),
        "cap_embedder.0.weight": (6,),
        "cap_embedder.1.weight": (DIM, 6),
        "x_pad_token": (1, DIM),
        "cap_pad_token": (1, DIM),
        "all_final_layer.2-1.linear.weight": (8, DIM),
        "all_final_layer.2-1.adaLN_modulation.1.bias": (DIM,),
    }
    for block in ("layers.0", "layers.10", "layers.2", "noise_refiner.0", "context_refiner.0"):
        for name in ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"):
            shapes[f"{block}.{name}.weight"] = (DIM, DIM)
        for name in ("attention.norm_q", "attention.norm_k", "attention_norm1", "ffn_norm2"):
            shapes[f"{block}.{name}.weight"] = (DIM,)
        shapes[f"{block}.feed_forward.w2.weight"] = (DIM, 12)
        if block != "context_refiner.0":
            shapes[f"{block}.adaLN_modulation.0.weight"] = (4 * DIM, DIM)
    return shapes


def text_encoder_shapes():
    shapes = {"model.embed_tokens.weight": (9, DIM), "model.norm.weight": (DIM,)}
    for i in (0, 1, 11):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"):
            shapes[f"model.layers.{i}.{name}.weight"] = (8, DIM)
        for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            shapes[f"model.layers.{i}.{name}.weight"] = (DIM, 8)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{name}.weight"] = (DIM,)
        for name in ("self_attn.q_norm", "self_attn.k_norm"):
            shapes[f"model.layers.{i}.{name}.weight"] = (2,)
    return shapes


def vae_shapes(n_levels):
    shapes = {}
    for half, side, sampler in (
        ("encoder", "down_blocks", "downsamplers"),
        ("decoder", "up_blocks", "upsamplers"),
    ):
        for name in ("conv_in", "conv_out", *(f"mid_block.resnets.{i}.conv1" for i in (0, 1))):
            shapes[f"{half}.{name}.weight"] = (3, 3, 3, 3)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes[f"{half}.mid_block.attentions.0.{name}.weight"] = (3, 3)
        shapes[f"{half}.mid_block.attentions.0.group_norm.bias"] = (3,)
        shapes[f"{half}.conv_norm_out.weight"] = (3,)
        for i in range(n_levels):
            shapes[f"{half}.{side}.{i}.resnets.1.conv2.bias"] = (3 + i,)
            shapes[f"{half}.{side}.{i}.{sampler}.0.conv.bias"] = (4 + i,)
            shapes[f"{half}.{side}.{i}.resnets.0.conv_shortcut.weight"] = (5 + i, 3, 1, 1)
    return shapes


@pytest.fixture
def source_of(tmp_path):
    """Writes F32 tensors of ascending numbers under given names and shapes, and opens the file."""

    def make(shapes, file="model.safetensors"):
        path = tmp_path / file
        tensors = [(name, F32, shape) for name, shape in shapes.items()]
        data = [np.arange(np.prod(s), dtype=np.float32) + i for i, (*_, s) in enumerate(tensors)]
        path.write_bytes(safetensors_header(tensors).header + b"".join(d.tobytes() for d in data))
        return open_safetensors(path)

    return make


def shapes_of(parts):
    return {name: part.shape for name, part in parts.items()}


def in_file(file_names, shapes):
    """Shapes under file names: fused weights have the rows of all their parts."""
    return {
        file: (sum(shapes[name][0] for name in names), *shapes[names[0]][1:])
        for file, names in file_names
    }


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_dit_spellings_agree(prefix, source_of):
    shapes = dit_shapes()
    fused = in_file(dit_file_names(shapes), shapes)
    assert shapes_of(dit_parts(source_of({prefix + n: s for n, s in shapes.items()}))) == shapes
    parts = dit_parts(source_of({prefix + n: s for n, s in fused.items()}))
    assert shapes_of(parts) == shapes
    assert len(fused) == len(shapes) - 2 * 5


def test_fused_rows_are_views_of_q_then_k_then_v(source_of):
    shapes = dit_shapes()
    source = source_of(in_file(dit_file_names(shapes), shapes))
    parts = dit_parts(source)
    whole = source.raw("layers.2.attention.qkv.weight")
    for i, name in enumerate("qkv"):
        part = parts[f"layers.2.attention.to_{name}.weight"]
        assert part.rows == (i * DIM, (i + 1) * DIM)
        assert part.nbytes == DIM * DIM * 4
        assert part.raw().ctypes.data == whole.ctypes.data + i * part.nbytes
        assert part.raw().nbytes == part.nbytes


def test_fused_quantized_rows_are_whole_qblocks(write):
    shapes = dit_shapes() | {"layers.0.attention.qkv.weight": (6, 64)}
    for name in ("to_q", "to_k", "to_v"):
        del shapes[f"layers.0.attention.{name}.weight"]
    kinds = {"layers.0.attention.qkv.weight": Q8_0}
    tensors = [(name, kinds.get(name, F32), shape) for name, shape in shapes.items()]
    plan = gguf_header("lumina2", {}, tensors)
    data = np.random.default_rng(0).integers(0, 255, plan.total_size, dtype=np.uint8).tobytes()
    path = write("dit.gguf", plan.header + data[len(plan.header) :])
    part = dit_parts(open_gguf(path))["layers.0.attention.to_k.weight"]
    start = plan.offsets[list(shapes).index("layers.0.attention.qkv.weight")] + 2 * 68
    assert part.qtype is Q8_0
    assert part.shape == (2, 64)
    assert part.raw().tobytes() == data[start : start + 2 * 68]


def test_pad_tokens_get_their_leading_dimension(source_of):
    parts = dit_parts(source_of(dit_shapes() | {"x_pad_token": (DIM,)}))
    assert parts["x_pad_token"].shape == parts["cap_pad_token"].shape == (1, DIM)
    assert parts["x_pad_token"].raw().nbytes == 4 * DIM


def test_stray_final_norm_is_ignored_and_unknown_names_are_kept(source_of):
    parts = dit_parts(source_of(dit_shapes() | {"norm_final.weight": (DIM,), "extra": (1,)}))
    assert set(parts) - set(dit_shapes()) == {"extra"}


def test_all_in_one_file_has_three_components(source_of):
    shapes = {"model.diffusion_model." + n: s for n, s in dit_shapes().items()}
    shapes |= {
        "text_encoders.qwen3_4b.transformer." + n: s for n, s in text_encoder_shapes().items()
    }
    shapes |= {"vae." + n: s for n, s in vae_shapes(2).items()}
    source = source_of(shapes)
    assert components_in(source) == ("dit", "text_encoder", "vae")
    assert shapes_of(dit_parts(source)) == dit_shapes()
    assert shapes_of(text_encoder_parts(source)) == text_encoder_shapes()
    assert shapes_of(vae_parts(source)) == vae_shapes(2)


def test_components_of_single_files(source_of):
    assert components_in(source_of(dit_shapes())) == ("dit",)
    assert components_in(source_of(text_encoder_shapes())) == ("text_encoder",)
    assert components_in(source_of(vae_shapes(3))) == ("vae",)
    assert components_in(source_of({"w": (1,)})) == ()


def test_text_encoder_spellings_agree(source_of):
    shapes = text_encoder_shapes()
    short = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    llama = in_file(text_encoder_file_names(shapes), shapes)
    assert "blk.11.attn_output.weight" in llama
    for spelled in (
        shapes | {"lm_head.weight": (9, DIM)},
        short,
        llama | {"output.weight": (9, DIM)},
    ):
        assert shapes_of(text_encoder_parts(source_of(spelled))) == shapes


@pytest.mark.parametrize("n_levels", [1, 2, 4, 11])
@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_vae_spellings_agree(prefix, n_levels, source_of):
    shapes = vae_shapes(n_levels)
    files = vae_file_names(shapes)
    ldm = {n: vae_file_shape(n, s) for n, s in in_file(files, shapes).items()}
    assert ldm["decoder.mid.attn_1.proj_out.weight"] == (3, 3, 1, 1)
    assert ldm["decoder.up.0.block.1.conv2.bias"] == (3 + n_levels - 1,)
    for spelled in (ldm, shapes):
        assert (
            shapes_of(vae_parts(source_of({prefix + n: s for n, s in spelled.items()}))) == shapes
        )


def test_vae_names_are_those_of_the_published_file():
    assert dict(vae_file_names(vae_shapes(4))).keys() >= {
        "encoder.down.0.block.1.conv2.bias",
        "encoder.down.2.downsample.conv.bias",
        "decoder.up.3.upsample.conv.bias",
        "decoder.up.1.block.0.nin_shortcut.weight",
        "decoder.mid.attn_1.norm.bias",
        "decoder.mid.block_2.conv1.weight",
        "decoder.norm_out.weight",
    }


def test_weight_that_is_split_and_fused_is_refused(source_of):
    shapes = dit_shapes() | {"layers.0.attention.qkv.weight": (3 * DIM, DIM)}
    with pytest.raises(CheckpointError, match=r"'layers.0.attention.to_q.weight' is stored twice"):
        dit_parts(source_of(shapes))


@pytest.mark.parametrize("shape", [(3 * DIM + 1, DIM), (3 * DIM,), (0, DIM)], ids=str)
def test_fused_weight_needs_equal_thirds(shape, source_of):
    shapes = {n: s for n, s in dit_shapes().items() if "layers.0.attention.to_" not in n}
    with pytest.raises(CheckpointError, match="expected 2 dimensions with 3 weights"):
        dit_parts(source_of(shapes | {"layers.0.attention.qkv.weight": shape}))


OTHER_MODELS = {
    "diffusion_model.layers.0.attention.to_q.lora_A.weight": "a LoRA",
    "lora_unet_layers_0_attention_to_q.lora_down.weight": "a LoRA",
    "double_blocks.0.img_attn.qkv.weight": "FLUX",
    "model.diffusion_model.input_blocks.0.0.weight": "Stable Diffusion or SDXL",
    "time_embed.0.weight": "Stable Diffusion or SDXL",
    "down_blocks.1.attentions.0.proj_in.weight": "Stable Diffusion or SDXL",
    "joint_blocks.0.x": "Stable Diffusion 3",
    "transformer_blocks.0.norm1_context.linear.weight": "Stable Diffusion 3",
    "single_transformer_blocks.0.norm.linear.weight": "FLUX",
    "transformer_blocks.0.img_mod.1.weight": "Qwen-Image",
    "model.diffusion_model.transformer_blocks.0.txt_mod.1.bias": "Qwen-Image",
    "encoder.down_blocks.0.resnets.0.conv1.weight": "an unknown model",
    "control_layers.0.attention.to_q.weight": "a ControlNet",
    "layers.0.adaLN_modulation.1.weight": "Lumina-Image 2.0",
    "blk.0.attn_q.weight": "a language model",
    "decoder.conv_in.weight": "a VAE",
    "something": "an unknown model",
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_models_are_named(name, source_of):
    source = source_of({name: (2, 2)})
    for read, title in (
        (dit_parts, "not a Z-Image DiT"),
        (text_encoder_parts, "not a Qwen3 text encoder"),
        (vae_parts, "not a FLUX-type VAE"),
    ):
        expected = f"{source.path}: {title}: .* looks like {OTHER_MODELS[name]}; 1 tensors, first: "
        with pytest.raises(CheckpointError, match=f"{expected}{re.escape(repr(name))}. Give"):
            read(source)


def test_components_are_not_taken_for_each_other(source_of):
    for read, shapes, found in (
        (dit_parts, text_encoder_shapes(), "a language model"),
        (text_encoder_parts, vae_shapes(2), "a VAE"),
        (vae_parts, dit_shapes(), "a Z-Image DiT"),
    ):
        with pytest.raises(CheckpointError, match=f"looks like {found};"):
            read(source_of(shapes))


def test_one_shard_alone_is_called_incomplete(source_of):
    shapes = {n: s for n, s in dit_shapes().items() if not n.startswith("layers.0.")}
    with pytest.raises(
        CheckpointError, match=r"looks like an incomplete one;.*folder with its index"
    ):
        dit_parts(source_of(shapes))


def test_files_are_written_block_after_block():
    names = list(dit_shapes())
    random.Random(0).shuffle(names)
    files = [file for file, _ in dit_file_names(names)]
    blocks = [re.match(r"((?:layers|\w+_refiner)\.\d+)\.|", file)[1] for file in files]
    runs = [b for i, b in enumerate(blocks) if i == 0 or blocks[i - 1] != b]
    expected = ["context_refiner.0", "noise_refiner.0", "layers.0", "layers.2", "layers.10"]
    assert runs == [None, *expected, None]
    assert files[0].startswith("t_embedder")
    assert files[-1].startswith("final_layer")
    inside = [
        [f.split(".", 2)[2] for f, at in zip(files, blocks, strict=True) if at == b]
        for b in expected
    ]
    assert inside[1] == inside[2] == inside[3] == inside[4]
    assert dict(dit_file_names(names))["layers.2.attention.qkv.weight"] == tuple(
        f"layers.2.attention.to_{x}.weight" for x in "qkv"
    )


def test_text_encoder_is_written_block_after_block():
    names = list(text_encoder_shapes())
    random.Random(0).shuffle(names)
    files = [file for file, _ in text_encoder_file_names(names)]
    assert files[0] == "token_embd.weight"
    assert files[-1] == "output_norm.weight"
    numbers = [int(file.split(".")[1]) for file in files[1:-1]]
    assert numbers == sorted(numbers)


def test_names_that_cannot_be_written_are_refused():
    with pytest.raises(ValueError, match=r"'layers.0.attention.qkv.weight' is made of"):
        dit_file_names(["layers.0.attention.to_q.weight"])
    with pytest.raises(ValueError, match=r"'lm_head.weight' is not a tensor name of a Qwen3"):
        text_encoder_file_names(["lm_head.weight"])


def test_a_scalar_is_a_part(source_of):
    source = source_of({"scale": ()})
    assert Part(source.tensors["scale"], None, ()).raw().nbytes == 4
