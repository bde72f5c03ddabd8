"""The policy tables, row by row, and what overrides may and may not do."""

import pytest

from zquant.errors import PlanError
from zquant.quant.policy import POLICIES, assign, policy_by_name
from zquant.quant.qtypes import QTYPES

DIT_SHAPES = {
    "x_pad_token": (1, 3840),
    "cap_pad_token": (1, 3840),
    "x_embedder.weight": (3840, 64),
    "x_embedder.bias": (3840,),
    "t_embedder.mlp.0.weight": (1024, 256),
    "cap_embedder.0.weight": (2560,),
    "cap_embedder.1.weight": (3840, 2560),
    "final_layer.linear.weight": (64, 3840),
    "final_layer.adaLN_modulation.1.weight": (3840, 256),
    "noise_refiner.0.adaLN_modulation.0.weight": (15360, 256),
    "noise_refiner.1.attention.qkv.weight": (11520, 3840),
    "context_refiner.0.feed_forward.w2.weight": (3840, 10240),
    "layers.0.attention.qkv.weight": (11520, 3840),
    "layers.0.attention.out.weight": (3840, 3840),
    "layers.0.attention.q_norm.weight": (128,),
    "layers.0.feed_forward.w1.weight": (10240, 3840),
    "layers.0.feed_forward.w2.weight": (3840, 10240),
    "layers.0.adaLN_modulation.0.weight": (15360, 256),
    "layers.0.adaLN_modulation.0.bias": (15360,),
}
TEXT_SHAPES = {
    "token_embd.weight": (151936, 2560),
    "output_norm.weight": (2560,),
    "blk.0.attn_q.weight": (4096, 2560),
    "blk.0.attn_k_norm.weight": (128,),
    "blk.0.attn_v.weight": (1024, 2560),
    "blk.0.attn_output.weight": (2560, 4096),
    "blk.0.ffn_gate.weight": (9728, 2560),
    "blk.0.ffn_down.weight": (2560, 9728),
}
COLUMNS = ["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q4_0"]
ALL_F32 = "F32 F32 F32 F32 F32 F32 F32 F32 F32"
EMBEDDER = "F32 F32 BF16 F32 F32 F32 F32 F32 F32"
CAPTION = "F32 BF16 BF16 BF16 BF16 BF16 BF16 BF16 BF16"
MODULATION = "F32 BF16 BF16 Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 Q8_0"
REFINER = "F32 F16 BF16 Q8_0 Q6_K Q6_K Q6_K Q5_K Q8_0"
BASE = "F32 F16 BF16 Q8_0 Q6_K Q5_K Q4_K Q4_K Q4_0"
DOWN = "F32 F16 BF16 Q8_0 Q6_K Q6_K Q6_K Q5_K Q4_0"
DIT_TABLE = {
    **dict.fromkeys(DIT_SHAPES, ALL_F32),
    "x_embedder.weight": EMBEDDER,
    "t_embedder.mlp.0.weight": EMBEDDER,
    "final_layer.linear.weight": EMBEDDER,
    "final_layer.adaLN_modulation.1.weight": EMBEDDER,
    "cap_embedder.1.weight": CAPTION,
    "noise_refiner.0.adaLN_modulation.0.weight": MODULATION,
    "layers.0.adaLN_modulation.0.weight": MODULATION,
    "noise_refiner.1.attention.qkv.weight": REFINER,
    "context_refiner.0.feed_forward.w2.weight": REFINER,
    "layers.0.attention.qkv.weight": "F32 F16 BF16 Q8_0 Q6_K Q6_K Q5_K Q4_K Q4_0",
    "layers.0.attention.out.weight": BASE,
    "layers.0.feed_forward.w1.weight": BASE,
    "layers.0.feed_forward.w2.weight": DOWN,
}
TEXT_TABLE = {
    **dict.fromkeys(TEXT_SHAPES, BASE),
    "output_norm.weight": ALL_F32,
    "blk.0.attn_k_norm.weight": ALL_F32,
    "token_embd.weight": "F32 F16 BF16 Q8_0 Q6_K Q6_K Q6_K Q6_K Q6_K",
    "blk.0.attn_v.weight": "F32 F16 BF16 Q8_0 Q6_K Q6_K Q6_K Q4_K Q4_0",
    "blk.0.ffn_down.weight": DOWN,
}


def names(qtypes):
    return {name: qtype.name for name, qtype in qtypes.items()}


def test_every_policy_has_a_column():
    assert sorted(POLICIES) == sorted(COLUMNS)


@pytest.mark.parametrize("policy", COLUMNS)
def test_dit_table(policy):
    expected = {name: row.split()[COLUMNS.index(policy)] for name, row in DIT_TABLE.items()}
    assert names(assign("dit", DIT_SHAPES, policy, ())) == expected


@pytest.mark.parametrize("policy", COLUMNS)
def test_text_encoder_table(policy):
    expected = {name: row.split()[COLUMNS.index(policy)] for name, row in TEXT_TABLE.items()}
    assert names(assign("text_encoder", TEXT_SHAPES, policy, ())) == expected


def test_policy_names_ignore_case():
    assert policy_by_name("q4_k_m") == "Q4_K_M"
    assert assign("dit", DIT_SHAPES, "q4_k_m") == assign("dit", DIT_SHAPES, "Q4_K_M")


def test_unknown_policy_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown policy 'Q3_K'; known: F32, BF16, .*Q4_0"):
        assign("dit", DIT_SHAPES, "Q3_K")


@pytest.mark.parametrize(
    ("policy", "row", "expected"),
    [
        ("Q4_K_S", 512, "Q4_K"),
        ("Q4_K_S", 96, "Q8_0"),
        ("Q4_K_S", 100, "BF16"),
        ("Q8_0", 100, "BF16"),
        ("Q4_0", 100, "BF16"),
        ("F16", 100, "F16"),
    ],
)
def test_rows_that_do_not_divide_fall_back(policy, row, expected):
    name = "layers.0.attention.out.weight"
    assert names(assign("dit", {name: (8, row)}, policy)) == {name: expected}


def test_the_first_matching_override_wins_over_the_rules():
    overrides = [(r"layers\.0\.attention\.qkv", QTYPES["BF16"]), ("qkv", QTYPES["Q8_0"])]
    chosen = names(assign("dit", DIT_SHAPES, "Q4_K_M", overrides))
    assert chosen["layers.0.attention.qkv.weight"] == "BF16"
    assert chosen["noise_refiner.1.attention.qkv.weight"] == "Q8_0"
    assert chosen["layers.0.attention.out.weight"] == "Q4_K"


def test_override_to_a_quantized_qtype_leaves_vectors_alone():
    chosen = names(assign("dit", DIT_SHAPES, "Q4_K_M", [(r"^layers\.0\.", QTYPES["Q8_0"])]))
    assert chosen["layers.0.feed_forward.w2.weight"] == "Q8_0"
    assert chosen["layers.0.attention.q_norm.weight"] == "F32"
    assert chosen["layers.0.adaLN_modulation.0.bias"] == "F32"


def test_override_to_a_float_reaches_vectors():
    chosen = names(assign("dit", DIT_SHAPES, "Q4_K_M", [("q_norm", QTYPES["BF16"])]))
    assert chosen["layers.0.attention.q_norm.weight"] == "BF16"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("siglip", "Q8_0"), r"'siglip' matches none of the 19 tensors of the dit"),
        (("q_norm", "Q8_0"), r"gives Q8_0 only to tensors that are not matrices \(first: 'layers"),
        (
            ("x_embedder", "Q4_K"),
            r"Q4_K to 'x_embedder.weight', whose rows of 64 .* qblocks of 256",
        ),
    ],
    ids=["no_match", "only_vectors", "row"],
)
def test_impossible_overrides_are_errors(override, message):
    with pytest.raises(PlanError, match=message):
        assign("dit", DIT_SHAPES, "Q4_K_M", [(override[0], QTYPES[override[1]])])


def test_an_invalid_expression_is_named():
    with pytest.raises(ValueError, match=r"--tensor-type '\(' is not a regular expression"):
        assign("dit", DIT_SHAPES, "Q4_K_M", [("(", QTYPES["Q8_0"])])
