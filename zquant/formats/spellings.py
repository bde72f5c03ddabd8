"""One tensor, several spellings: official names <-> the names in other publishers' files.

    DiT           layers.0.attention.qkv  <->  layers.0.attention.to_q, to_k, to_v  (row thirds)
    text encoder  blk.0.attn_q            <->  model.layers.0.self_attn.q_proj
    VAE           decoder.up.3.block.0    <->  decoder.up_blocks.0.resnets.0    (order reversed)

Strings only; `names.py` applies them to tensors. Reading recognises names one by one, so any
spelling may occur in any container, and leaves unknown names as they are.

Source: the published checkpoints (ComfyUI, llama.cpp and latent-diffusion spellings).
"""

import re
from collections.abc import Iterable

__all__ = [
    "dit_file_names",
    "dit_official",
    "text_encoder_file_names",
    "text_encoder_official",
    "vae_file_names",
    "vae_official",
]

FileNames = list[tuple[str, tuple[str, ...]]]
OfficialNames = dict[str, tuple[str, ...]]

_DIT_BLOCK = re.compile(r"((?:layers|(?:noise|context|siglip)_refiner)\.\d+\.)(.+)")
_DIT_TOP = {"all_x_embedder.2-1.": "x_embedder.", "all_final_layer.2-1.": "final_layer."}
_DIT_IN_BLOCK = {
    "attention.to_out.0.weight": "attention.out.weight",
    "attention.norm_q.weight": "attention.q_norm.weight",
    "attention.norm_k.weight": "attention.k_norm.weight",
}
_DIT_IN_BLOCK_BACK = {theirs: ours for ours, theirs in _DIT_IN_BLOCK.items()}
_FUSED = "attention.qkv.weight"
_SPLIT = ("attention.to_q.weight", "attention.to_k.weight", "attention.to_v.weight")

_TEXT_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
}
_TEXT_IN_BLOCK = {  # in the order of writing
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TEXT_TOP_BACK = {theirs: ours for ours, theirs in _TEXT_TOP.items()}
_TEXT_IN_BLOCK_BACK = {theirs: ours for ours, theirs in _TEXT_IN_BLOCK.items()}
_TEXT_HEADS = {"lm_head.weight", "output.weight"}

_VAE_WORDS = {  # diffusers -> latent-diffusion
    ".mid_block.resnets.0.": ".mid.block_1.",
    ".mid_block.resnets.1.": ".mid.block_2.",
    ".mid_block.attentions.0.group_norm.": ".mid.attn_1.norm.",
    ".mid_block.attentions.0.to_q.": ".mid.attn_1.q.",
    ".mid_block.attentions.0.to_k.": ".mid.attn_1.k.",
    ".mid_block.attentions.0.to_v.": ".mid.attn_1.v.",
    ".mid_block.attentions.0.to_out.0.": ".mid.attn_1.proj_out.",
    ".conv_shortcut.": ".nin_shortcut.",
    ".conv_norm_out.": ".norm_out.",
}
_VAE_STAGES = {"resnets": "block", "downsamplers.0": "downsample", "upsamplers.0": "upsample"}
_VAE_STAGES_BACK = {theirs: ours for ours, theirs in _VAE_STAGES.items()}
_VAE_OURS = re.compile(
    r"(encoder\.down|decoder\.up)_blocks\.(\d{1,4})\.(resnets|downsamplers\.0|upsamplers\.0)\.(.+)"
)
_VAE_THEIRS = re.compile(
    r"(encoder\.down|decoder\.up)\.(\d{1,4})\.(block|downsample|upsample)\.(.+)"
)

_DIT_ORDER = (
    *("t_embedder", "cap_embedder", "x_embedder", "siglip_embedder"),
    *("cap_pad_token", "x_pad_token", "siglip_pad_token"),
    *("context_refiner", "noise_refiner", "siglip_refiner", "layers", "final_layer"),
)
_DIT_BLOCK_ORDER = (
    *("attention_norm1", "attention.qkv", "attention.q_norm", "attention.k_norm", "attention.out"),
    *("attention_norm2", "ffn_norm1", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2"),
    *("ffn_norm2", "adaLN_modulation.0"),
)
_TEXT_ORDER = ("token_embd", "blk", "output_norm")
_VAE_ORDER = ("conv_in", "down", "mid", "up", "norm_out", "conv_out")
_BLOCKS = re.compile(r"(?:layers|blk|\w+_refiner)\.(\d+)\.(.+)")


def dit_official(names: Iterable[str]) -> OfficialNames:
    """Diffusers names for a DiT file's names: three for a fused weight."""
    return {name: _dit_official(name) for name in names}


def _dit_official(name: str) -> tuple[str, ...]:
    if block := _DIT_BLOCK.fullmatch(name):
        if block[2] == _FUSED:
            return tuple(block[1] + suffix for suffix in _SPLIT)
        return (block[1] + _DIT_IN_BLOCK_BACK.get(block[2], block[2]),)
    for ours, theirs in _DIT_TOP.items():
        if name.startswith(theirs):
            return (ours + name[len(theirs) :],)
    return (name,)


def dit_file_names(names: Iterable[str]) -> FileNames:
    """ComfyUI names for diffusers names, in the order of writing.

    Args:
        names: diffusers names of the whole DiT, in any order.

    Returns:
        (file name, official names whose rows are concatenated): embedders first, then block after
        block with the tensors of one block together, the final layer last.

    Raises:
        ValueError: a fused weight lacks its q, k or v.
    """
    groups: dict[str, set[str]] = {}
    for name in names:
        groups.setdefault(_dit_file_name(name), set()).add(name)
    result: FileNames = []
    for file, members in groups.items():
        whole = tuple(members)
        if file.endswith(_FUSED):
            whole = _dit_official(file)
            if members != set(whole):
                raise ValueError(f"{file!r} is made of {list(whole)}; got {sorted(members)}")
        result.append((file, whole))
    return sorted(result, key=lambda item: _order(item[0], _DIT_ORDER, _DIT_BLOCK_ORDER))


def _dit_file_name(name: str) -> str:
    if block := _DIT_BLOCK.fullmatch(name):
        return block[1] + (_FUSED if block[2] in _SPLIT else _DIT_IN_BLOCK.get(block[2], block[2]))
    for ours, theirs in _DIT_TOP.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def text_encoder_official(names: Iterable[str]) -> OfficialNames:
    """Hugging Face names for a Qwen3 file's names; none for the output head."""
    return {name: _text_encoder_official(name) for name in names}


def _text_encoder_official(name: str) -> tuple[str, ...]:
    if name in _TEXT_HEADS:
        return ()
    if name in _TEXT_TOP_BACK:
        return (_TEXT_TOP_BACK[name],)
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if block and block[2] in _TEXT_IN_BLOCK_BACK:
        return (f"model.layers.{block[1]}.{_TEXT_IN_BLOCK_BACK[block[2]]}.weight",)
    if name.startswith(("embed_tokens.", "layers.", "norm.")):
        return ("model." + name,)
    return (name,)


def text_encoder_file_names(names: Iterable[str]) -> FileNames:
    """llama.cpp names for Hugging Face names, in the order of writing (see `dit_file_names`).

    Raises:
        ValueError: a name is not one of Qwen3's.
    """
    result = [(_text_encoder_file_name(name), (name,)) for name in names]
    in_block = tuple(_TEXT_IN_BLOCK.values())
    return sorted(result, key=lambda item: _order(item[0], _TEXT_ORDER, in_block))


def _text_encoder_file_name(name: str) -> str:
    if name in _TEXT_TOP:
        return _TEXT_TOP[name]
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if not block or block[2] not in _TEXT_IN_BLOCK:
        raise ValueError(f"{name!r} is not a tensor name of a Qwen3 text encoder")
    return f"blk.{block[1]}.{_TEXT_IN_BLOCK[block[2]]}.weight"


def vae_official(names: Iterable[str]) -> OfficialNames:
    """Diffusers names for a VAE file's names; the file itself says how many levels there are."""
    names = list(names)
    last = _last_level(_VAE_THEIRS, names)
    return {name: (_vae_official(name, last),) for name in names}


def _vae_official(name: str, last: int) -> str:
    for ours, theirs in _VAE_WORDS.items():
        name = name.replace(theirs, ours)
    if level := _VAE_THEIRS.fullmatch(name):
        i = last - int(level[2]) if level[1] == "decoder.up" else int(level[2])
        return f"{level[1]}_blocks.{i}.{_VAE_STAGES_BACK[level[3]]}.{level[4]}"
    return name


def vae_file_names(names: Iterable[str]) -> FileNames:
    """Latent-diffusion names for diffusers names: encoder, then decoder (see `dit_file_names`)."""
    names = list(names)
    last = _last_level(_VAE_OURS, names)
    result: FileNames = [(_vae_file_name(name, last), (name,)) for name in names]
    return sorted(result, key=lambda item: _vae_order(item[0]))


def _vae_file_name(name: str, last: int) -> str:
    for ours, theirs in _VAE_WORDS.items():
        name = name.replace(ours, theirs)
    if level := _VAE_OURS.fullmatch(name):
        i = last - int(level[2]) if level[1] == "decoder.up" else int(level[2])
        return f"{level[1]}.{i}.{_VAE_STAGES[level[3]]}.{level[4]}"
    return name


def _last_level(pattern: re.Pattern[str], names: Iterable[str]) -> int:
    """Highest decoder level; the two spellings count levels from opposite ends."""
    matches = (pattern.fullmatch(name) for name in names)
    return max((int(m[2]) for m in matches if m and m[1] == "decoder.up"), default=0)


def _vae_order(name: str) -> tuple[bool, int, str]:
    half, _, rest = name.partition(".")
    return half == "decoder", _rank(rest, _VAE_ORDER), rest


def _order(
    name: str, groups: tuple[str, ...], in_block: tuple[str, ...]
) -> tuple[int, int, int, str]:
    """Sort key: group, block number, place inside the block, name."""
    group = _rank(name, groups)
    if block := _BLOCKS.fullmatch(name):
        return group, int(block[1]), _rank(block[2], in_block), name
    return group, 0, 0, name


def _rank(name: str, order: tuple[str, ...]) -> int:
    """Place of the entry that `name` starts with; unknown names come last."""
    matches = (i for i, entry in enumerate(order) if f"{name}.".startswith(entry + "."))
    return next(matches, len(order))
