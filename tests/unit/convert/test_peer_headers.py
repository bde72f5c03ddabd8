"""What other programs demand of a GGUF file, as data, held against every header that we write.

Each demand is a fact about a loader: a file that breaks it is refused or, worse, read wrongly.

Source: ggml `gguf.cpp` (which llama.cpp and stable-diffusion.cpp read with), llama.cpp
`llama-model-loader.cpp`, `llama-vocab.cpp` and `models/qwen3.cpp`; stable-diffusion.cpp
`model_loader.cpp` and `z_image.hpp`; ComfyUI-GGUF `loader.py` and `dequant.py`; diffusers
`quantizers/gguf` and its Z-Image converter of names; transformers `integrations/ggml.py`.
"""

import re
from dataclasses import dataclass

import gguf
import pytest

from zquant.convert.plan import ConvertRequest, plan_conversion
from zquant.quant.policy import POLICIES

ALIGNMENT = 32
MAX_NAME = 63  # ggml keeps names in 64 bytes
WIDE = {"F32", "F16"}
QUANTIZED = {
    *("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"),
    *("Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS"),
}


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a loader wants of a file.

    Attributes:
        component: whose file.
        architectures: what `general.architecture` may be.
        types: storage types it can decode.
        wide: pattern of names that it takes only as one of `wide_types`, since it uses their bytes
            as they are.
        metadata: key -> GGUF type, strictly; arrays as "ARRAY of" their elements'.
        names: patterns, all of which must be there.
    """

    component: str
    architectures: frozenset[str]
    types: frozenset[str]
    wide: str
    wide_types: frozenset[str]
    metadata: dict[str, str]
    names: tuple[str, ...]


def demand(component, architectures, types, wide, *, wide_types=WIDE, metadata=None, names=()):
    return Demand(
        component=component,
        architectures=frozenset(architectures),
        types=frozenset(types),
        wide=wide,
        wide_types=frozenset(wide_types),
        metadata=metadata or {},
        names=names,
    )


VECTORS = r"norm|\.bias$"
DIT_VECTORS = rf"{VECTORS}|_pad_token$"
FUSED = (
    r"^x_embedder\.weight$",
    r"^cap_embedder\.0\.weight$",
    r"^cap_pad_token$",
    r"^x_pad_token$",
    r"^t_embedder\.mlp\.0\.weight$",
    r"^final_layer\.linear\.weight$",
    r"^layers\.0\.attention\.qkv\.weight$",
    r"^layers\.0\.attention\.q_norm\.weight$",
    r"^layers\.0\.adaLN_modulation\.0\.weight$",
    r"^noise_refiner\.0\.attention\.out\.weight$",
    r"^context_refiner\.0\.feed_forward\.w3\.weight$",
)
BLK = (
    r"^token_embd\.weight$",
    r"^output_norm\.weight$",
    *(rf"^blk\.0\.attn_{part}\.weight$" for part in ("q", "k", "v", "output", "norm")),
    *(rf"^blk\.0\.attn_{part}_norm\.weight$" for part in "qk"),
    *(rf"^blk\.0\.ffn_{part}\.weight$" for part in ("gate", "up", "down", "norm")),
)
SIZES = {
    "qwen3.block_count": "UINT32",
    "qwen3.context_length": "UINT32",
    "qwen3.embedding_length": "UINT32",
    "qwen3.feed_forward_length": "UINT32",
    "qwen3.attention.head_count": "UINT32",
    "qwen3.attention.head_count_kv": "UINT32",
    "qwen3.attention.layer_norm_rms_epsilon": "FLOAT32",
    "qwen3.rope.freq_base": "FLOAT32",
}
TOKENIZER = {
    "tokenizer.ggml.model": "STRING",
    "tokenizer.ggml.pre": "STRING",
    "tokenizer.ggml.tokens": "ARRAY of STRING",
    "tokenizer.ggml.token_type": "ARRAY of INT32",
    "tokenizer.ggml.merges": "ARRAY of STRING",
    "tokenizer.ggml.eos_token_id": "UINT32",
    "tokenizer.ggml.padding_token_id": "UINT32",
    "tokenizer.ggml.add_bos_token": "BOOL",
    "tokenizer.chat_template": "STRING",
}
GGML = {"general.architecture": "STRING", "general.quantization_version": "UINT32"}

PEERS = {
    # pads are plain parameters, whose bytes it uses; so are norms
    "diffusers": demand("dit", {"lumina2"}, {*WIDE, "BF16", *QUANTIZED}, DIT_VECTORS, names=FUSED),
    # a BF16 pad token of two dimensions is taken for bytes
    "ComfyUI-GGUF's model": demand(
        "dit",
        {"lumina2"},
        {*WIDE, "BF16", *QUANTIZED},
        DIT_VECTORS,
        metadata={"general.architecture": "STRING"},
        names=FUSED,
    ),
    "ComfyUI-GGUF's text encoder": demand(
        "text_encoder",
        {"qwen3"},
        {*WIDE, "BF16", *QUANTIZED},
        VECTORS,
        metadata={"general.architecture": "STRING"},
        names=BLK,
    ),
    # vectors are added and multiplied by operations that know F32
    "stable-diffusion.cpp's model": demand(
        "dit",
        {"lumina2"},
        {*WIDE, "BF16", *QUANTIZED},
        DIT_VECTORS,
        wide_types={"F32"},
        names=FUSED,
    ),
    "stable-diffusion.cpp's text encoder": demand(
        "text_encoder",
        {"qwen3"},
        {*WIDE, "BF16", *QUANTIZED},
        VECTORS,
        wide_types={"F32"},
        names=BLK,
    ),
    "llama.cpp": demand(
        "text_encoder",
        {"qwen3"},
        {*WIDE, "BF16", *QUANTIZED},
        VECTORS,
        wide_types={"F32"},
        metadata={
            **GGML,
            **SIZES,
            **TOKENIZER,
            "qwen3.attention.key_length": "UINT32",
            "qwen3.attention.value_length": "UINT32",
        },
        names=BLK,
    ),
    "transformers": demand(
        "text_encoder",
        {"qwen3"},
        {*WIDE, "BF16", *QUANTIZED},
        "^$",
        metadata={**SIZES, **TOKENIZER, "general.name": "STRING"},
        names=BLK,
    ),
}


@pytest.fixture(scope="module")
def readers(official, tmp_path_factory):
    """`readers(policy)`: gguf-py's view of each file's header, the data zeros that take no disk."""
    done = {}

    def read(policy):
        if policy not in done:
            folder = tmp_path_factory.mktemp("headers")
            request = ConvertRequest(source=str(official), out=folder, qtype=policy)
            done[policy] = {
                output.component: reader_of(output, folder / output.path.name)
                for output in plan_conversion(request).outputs
                if output.component != "vae"
            }
        return done[policy]

    return read


def reader_of(output, path):
    with path.open("wb") as file:
        file.write(output.header)
        file.truncate(output.total_size)
    return gguf.GGUFReader(path)


def type_of(field):
    names = [each.name for each in field.types]
    return names[0] if len(names) == 1 else f"{names[0]} of {names[1]}"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_finds_what_it_demands(peer, policy, readers):
    wants = PEERS[peer]
    reader = readers(policy)[wants.component]
    assert reader.fields["general.architecture"].contents() in wants.architectures
    found = {key: type_of(field) for key, field in reader.fields.items()}
    assert {key: found.get(key) for key in wants.metadata} == wants.metadata
    names = [tensor.name for tensor in reader.tensors]
    assert [p for p in wants.names if not any(re.search(p, name) for name in names)] == []
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert set(types.values()) <= wants.types
    assert {t for n, t in types.items() if re.search(wants.wide, n)} <= wants.wide_types


@pytest.mark.parametrize("policy", ["Q4_K_M", "BF16"])
@pytest.mark.parametrize("component", ["dit", "text_encoder"])
def test_ggml_takes_the_layout(component, policy, readers):
    """Tensors lie one after the other in the order of the header, every one aligned."""
    reader = readers(policy)[component]
    assert reader.alignment == ALIGNMENT
    assert type_of(reader.fields["GGUF.version"]) == "UINT32"
    at = reader.tensors[0].data_offset
    assert at % ALIGNMENT == 0
    for tensor in reader.tensors:
        assert tensor.data_offset == at, tensor.name
        assert len(tensor.name.encode()) <= MAX_NAME
        qblock = gguf.GGML_QUANT_SIZES[tensor.tensor_type][0]
        assert int(tensor.shape[0]) % qblock == 0
        assert 1 <= len(tensor.shape) <= 4
        at += -(-int(tensor.n_bytes) // ALIGNMENT) * ALIGNMENT


def test_dimensions_are_reversed_and_pads_have_two(readers):
    dims = {t.name: [int(n) for n in t.shape] for t in readers("Q4_K_M")["dit"].tensors}
    assert dims["layers.0.attention.qkv.weight"] == [256, 3 * 256]
    assert dims["x_pad_token"] == dims["cap_pad_token"] == [256, 1]  # ggml's one, diffusers' two
    assert dims["layers.0.attention.q_norm.weight"] == [128]


def test_no_key_makes_another_reader_reshape_or_translate(readers):
    """ComfyUI-GGUF reshapes by one key; transformers renames what starts with the architecture."""
    for component, reader in readers("Q4_K_M").items():
        ours = {"general.", "zquant.", "tokenizer.", "GGUF."}
        ours |= {f"{reader.fields['general.architecture'].contents()}."}
        assert {k for k in reader.fields if not k.startswith(tuple(ours))} == set(), component
        assert len({t.name for t in reader.tensors}) == len(reader.tensors)


def test_the_vocabulary_has_a_row_for_every_token(readers):
    reader = readers("Q8_0")["text_encoder"]
    rows = {t.name: int(t.shape[1]) for t in reader.tensors if t.name == "token_embd.weight"}
    fields = {key: field.contents() for key, field in reader.fields.items() if "tokenizer" in key}
    assert rows["token_embd.weight"] == len(fields["tokenizer.ggml.tokens"])
    assert len(fields["tokenizer.ggml.token_type"]) == len(fields["tokenizer.ggml.tokens"])
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")


def test_no_receipt_array_is_of_a_type_that_a_reader_lacks(readers):
    reader = readers("Q4_K_M")["dit"]
    types = {key: type_of(f) for key, f in reader.fields.items() if key.startswith("zquant.")}
    assert types["zquant.tensor_error"] == "ARRAY of FLOAT32"
    assert types["zquant.tensor_crc32"] == "ARRAY of UINT32"
    assert types["zquant.source.sum64"] == "ARRAY of UINT64"
    sizes = {key: len(reader.fields[key].contents()) for key in types if "tensor_" in key}
    assert set(sizes.values()) == {len(reader.tensors)}
