"""Configs, tensor names and shapes of the published Z-Image checkpoints, folder and ComfyUI files.

Written out here and not taken from zquant: tests use this as an oracle, and an oracle must not
share a mistake. `make_checkpoint.py` fills the tensors; this file only says which there are.

Source: the files of Tongyi-MAI/Z-Image-Turbo and Comfy-Org/z_image_turbo.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

__all__ = ["COMPONENTS", "CONFIGS", "PRESETS", "SHAPES", "Shape"]
__all__ += ["comfy_files", "scheduler_config", "tokenizer_files"]

Shape = tuple[int, ...]
Config = Mapping[str, Any]

COMPONENTS = ("transformer", "text_encoder", "vae")

CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": {
        "_class_name": "ZImageTransformer2DModel",
        "_diffusers_version": "0.36.0.dev0",
        "all_f_patch_size": [1],
        "all_patch_size": [2],
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
        "cap_feat_dim": 2560,
        "dim": 3840,
        "in_channels": 16,
        "n_heads": 30,
        "n_kv_heads": 30,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "norm_eps": 1e-05,
        "qk_norm": True,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
    },
    "text_encoder": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2560,
        "initializer_range": 0.02,
        "intermediate_size": 9728,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.36.0.dev0",
        "_name_or_path": "flux-dev",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": 16,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": 2,
        "mid_block_add_attention": True,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    },
}

# what a preset changes; rows stay multiples of 256, so that K-quants apply as in the original
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "full": {"transformer": {}, "text_encoder": {}, "vae": {}},
    "wide": {
        "transformer": {"n_layers": 1, "n_refiner_layers": 1},
        "text_encoder": {"num_hidden_layers": 3},
        "vae": {},
    },
    "tiny": {
        "transformer": {
            "dim": 768,
            "n_heads": 6,
            "n_kv_heads": 6,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "cap_feat_dim": 256,
        },
        "text_encoder": {
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        "vae": {"block_out_channels": [32, 64, 64, 64], "layers_per_block": 1},
    },
}


def scheduler_config(variant: str) -> dict[str, Any]:
    """scheduler_config.json of `turbo` or `base`."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": "0.36.0.dev0",
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": False,
        "shift": {"turbo": 3.0, "base": 6.0}[variant],
    }


def _linear(name: str, n: int, k: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (n, k)
    yield f"{name}.bias", (n,)


def _conv(name: str, n: int, k: int, kernel: int = 3) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (n, k, kernel, kernel)
    yield f"{name}.bias", (n,)


def _norm(name: str, n: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (n,)
    yield f"{name}.bias", (n,)


def _dit_block(name: str, c: Config, *, modulated: bool) -> Iterator[tuple[str, Shape]]:
    dim, hidden = c["dim"], int(c["dim"] / 3 * 8)
    for projection in ("to_q", "to_k", "to_v", "to_out.0"):
        yield f"{name}.attention.{projection}.weight", (dim, dim)
    for norm in ("norm_q", "norm_k"):
        yield f"{name}.attention.{norm}.weight", (dim // c["n_heads"],)
    for linear, shape in (("w1", (hidden, dim)), ("w2", (dim, hidden)), ("w3", (hidden, dim))):
        yield f"{name}.feed_forward.{linear}.weight", shape
    for norm in ("attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2"):
        yield f"{name}.{norm}.weight", (dim,)
    if modulated:
        yield from _linear(f"{name}.adaLN_modulation.0", 4 * dim, min(dim, 256))


def _transformer(c: Config) -> Iterator[tuple[str, Shape]]:
    dim, cond, patch = c["dim"], min(c["dim"], 256), 4 * c["in_channels"]
    yield from (("x_pad_token", (1, dim)), ("cap_pad_token", (1, dim)))
    yield from _linear("all_x_embedder.2-1", dim, patch)
    yield from _linear("all_final_layer.2-1.linear", patch, dim)
    yield from _linear("all_final_layer.2-1.adaLN_modulation.1", dim, cond)
    for group in ("noise_refiner", "context_refiner"):
        for i in range(c["n_refiner_layers"]):
            yield from _dit_block(f"{group}.{i}", c, modulated=group == "noise_refiner")
    yield from _linear("t_embedder.mlp.0", 1024, 256)
    yield from _linear("t_embedder.mlp.2", cond, 1024)
    yield "cap_embedder.0.weight", (c["cap_feat_dim"],)
    yield from _linear("cap_embedder.1", dim, c["cap_feat_dim"])
    for i in range(c["n_layers"]):
        yield from _dit_block(f"layers.{i}", c, modulated=True)


def _text_encoder(c: Config) -> Iterator[tuple[str, Shape]]:
    hidden, inner, head = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield f"{layer}.self_attn.q_proj.weight", (q, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (kv, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (kv, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, q)
        yield f"{layer}.self_attn.q_norm.weight", (head,)
        yield f"{layer}.self_attn.k_norm.weight", (head,)
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)


def _resnet(name: str, k: int, n: int) -> Iterator[tuple[str, Shape]]:
    yield from _norm(f"{name}.norm1", k)
    yield from _conv(f"{name}.conv1", n, k)
    yield from _norm(f"{name}.norm2", n)
    yield from _conv(f"{name}.conv2", n, n)
    if k != n:
        yield from _conv(f"{name}.conv_shortcut", n, k, kernel=1)


def _vae_mid(name: str, n: int) -> Iterator[tuple[str, Shape]]:
    yield from _norm(f"{name}.attentions.0.group_norm", n)
    for linear in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from _linear(f"{name}.attentions.0.{linear}", n, n)
    for i in range(2):
        yield from _resnet(f"{name}.resnets.{i}", n, n)


def _vae_blocks(
    name: str, sampler: str, widths: list[int], depth: int
) -> Iterator[tuple[str, Shape]]:
    for i, n in enumerate(widths):
        for j in range(depth):
            yield from _resnet(f"{name}.{i}.resnets.{j}", widths[max(i - 1, 0)] if j == 0 else n, n)
        if i < len(widths) - 1:
            yield from _conv(f"{name}.{i}.{sampler}.0.conv", n, n)


def _vae(c: Config) -> Iterator[tuple[str, Shape]]:
    widths, depth, latent = c["block_out_channels"], c["layers_per_block"], c["latent_channels"]
    yield from _conv("encoder.conv_in", widths[0], c["in_channels"])
    yield from _vae_blocks("encoder.down_blocks", "downsamplers", widths, depth)
    yield from _vae_mid("encoder.mid_block", widths[-1])
    yield from _norm("encoder.conv_norm_out", widths[-1])
    yield from _conv("encoder.conv_out", 2 * latent, widths[-1])
    yield from _conv("decoder.conv_in", widths[-1], latent)
    yield from _vae_blocks("decoder.up_blocks", "upsamplers", widths[::-1], depth + 1)
    yield from _vae_mid("decoder.mid_block", widths[-1])
    yield from _norm("decoder.conv_norm_out", widths[0])
    yield from _conv("decoder.conv_out", c["out_channels"], widths[0])


# in the order of the modules' state dict, which decides the shards
SHAPES = {"transformer": _transformer, "text_encoder": _text_encoder, "vae": _vae}


def comfy_files(*, prefix: str = "") -> dict[str, tuple[str, Any]]:
    """ComfyUI's file for each component and the function that names its tensors.

    The function takes official names and gives `(file name, official names)`; where there are
    several official names, their rows follow each other in the file's tensor.
    """
    return {
        "transformer": ("z_image_bf16.safetensors", lambda names: _comfy_dit(names, prefix)),
        "text_encoder": ("qwen_3_4b.safetensors", lambda names: [(n, [n]) for n in names]),
        "vae": ("ae.safetensors", lambda names: [(_ldm_name(n, list(names)), [n]) for n in names]),
    }


def _comfy_dit(names: Iterable[str], prefix: str) -> list[tuple[str, list[str]]]:
    def fused(name: str) -> str:
        for old, new in (
            *((f".attention.to_{p}.", ".attention.qkv.") for p in "qkv"),
            *((".attention.to_out.0.", ".attention.out."), ("all_x_embedder.2-1.", "x_embedder.")),
            *((".norm_q.", ".q_norm."), (".norm_k.", ".k_norm.")),
            ("all_final_layer.2-1.", "final_layer."),
        ):
            name = name.replace(old, new)
        return prefix + name

    return [(name, list(group)) for name, group in itertools.groupby(names, key=fused)]


def _ldm_name(name: str, names: list[str]) -> str:
    last = max(int(n.split(".")[2]) for n in names if n.startswith("decoder.up_blocks."))
    parts = name.split(".")
    if parts[1] == "up_blocks":
        parts[2] = str(last - int(parts[2]))
    name = ".".join(parts)
    for old, new in (
        *(
            (".down_blocks.", ".down."),
            (".up_blocks.", ".up."),
            (".conv_shortcut.", ".nin_shortcut."),
        ),
        *((".mid_block.resnets.0.", ".mid.block_1."), (".mid_block.resnets.1.", ".mid.block_2.")),
        *((".mid_block.attentions.0.", ".mid.attn_1."), (".group_norm.", ".norm.")),
        *((".to_q.", ".q."), (".to_k.", ".k."), (".to_v.", ".v."), (".to_out.0.", ".proj_out.")),
        *((".resnets.", ".block."), (".downsamplers.0.", ".downsample.")),
        *((".upsamplers.0.", ".upsample."), (".conv_norm_out.", ".norm_out.")),
    ):
        name = name.replace(old, new)
    return name


SPECIAL_TOKENS = (  # in the order of their ids, from 151643
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
ADDED_TOKENS = (  # tokens that a decoder must not skip
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>"),
)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# the part of Qwen3's template that one user message meets
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


def tokenizer_files(tokens: list[str], merges: list[str]) -> dict[str, Any]:
    """Content of the JSON files of the tokenizer folder; `tokens` are the ordinary ones, by id."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, **flags, "special": token in SPECIAL_TOKENS}
        for i, token in enumerate((*SPECIAL_TOKENS, *ADDED_TOKENS), start=len(tokens))
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    byte_level["use_regex"] = False
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": ""}
    model |= {"end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False}
    return {
        "vocab.json": vocabulary,
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": byte_level,
            "decoder": byte_level,
            "model": {**model, "vocab": vocabulary, "merges": [m.split(" ") for m in merges]},
        },
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(a["id"]): {k: a[k] for k in a if k != "id"} for a in added
            },
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 131072,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    }
