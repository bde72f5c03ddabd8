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
OUT = "layers.0.attention.out.weight"
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
COLUMNS = ["F32", "F16", "BF16"]
ALL_F32 = "F32 F32 F32"
EMBEDDER = "F32 F32 BF16"
SAME = "F32 F16 BF16"
# what differs between the quantized policies, in the order of `QUANTIZED_TABLE`
REFINER, W2, QKV, DIT_BASE, EMBEDDING, DOWN, VALUE, TEXT_BASE = range(8)
QUANTIZED_TABLE = {
    "Q8_0": "Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 Q8_0",
    "Q6_K": "Q6_K Q6_K Q6_K Q6_K Q6_K Q6_K Q6_K Q6_K",
    "Q5_K_M": "Q6_K Q6_K Q6_K Q5_K Q6_K Q6_K Q6_K Q5_K",
    "Q5_K_S": "Q6_K Q6_K Q5_K Q5_K Q6_K Q6_K Q5_K Q5_K",
    "Q5_1": "Q8_0 Q6_K Q5_1 Q5_1 Q6_K Q6_K Q6_K Q5_1",
    "Q5_0": "Q8_0 Q5_1 Q5_0 Q5_0 Q6_K Q5_1 Q5_1 Q5_0",
    "Q4_K_M": "Q6_K Q6_K Q5_K Q4_K Q6_K Q6_K Q6_K Q4_K",
    "Q4_K_S": "Q5_K Q5_K Q4_K Q4_K Q6_K Q5_K Q4_K Q4_K",
    "Q4_1": "Q8_0 Q5_1 Q4_1 Q4_1 Q6_K Q5_1 Q5_1 Q4_1",
    "Q4_0": "Q8_0 Q4_0 Q4_0 Q4_0 Q6_K Q4_0 Q4_0 Q4_0",
    "IQ4_NL": "Q5_K Q5_K IQ4_NL IQ4_NL Q6_K Q5_K Q5_K IQ4_NL",
    "IQ4_XS": "Q5_K Q5_K IQ4_XS IQ4_XS Q6_K Q5_K Q5_K IQ4_XS",
    "Q3_K_M": "Q5_K Q4_K Q4_K Q3_K Q6_K Q4_K Q5_K Q3_K",
    "Q3_K_S": "Q4_K Q4_K Q3_K Q3_K Q6_K Q4_K Q4_K Q3_K",
    "Q2_K": "Q4_K Q3_K Q3_K Q2_K Q6_K Q3_K Q4_K Q2_K",
}
# per tensor: its qtype in the float policies, and in the quantized ones or where to find it
DIT_TABLE = {
    **dict.fromkeys(DIT_SHAPES, (ALL_F32, "F32")),
    "x_embedder.weight": (EMBEDDER, "F32"),
    "t_embedder.mlp.0.weight": (EMBEDDER, "F32"),
    "final_layer.linear.weight": (EMBEDDER, "F32"),
    "final_layer.adaLN_modulation.1.weight": (EMBEDDER, "F32"),
    "cap_embedder.1.weight": ("F32 BF16 BF16", "BF16"),
    "noise_refiner.0.adaLN_modulation.0.weight": ("F32 BF16 BF16", "Q8_0"),
    "layers.0.adaLN_modulation.0.weight": ("F32 BF16 BF16", "Q8_0"),
    "noise_refiner.1.attention.qkv.weight": (SAME, REFINER),
    "context_refiner.0.feed_forward.w2.weight": (SAME, REFINER),
    "layers.0.attention.qkv.weight": (SAME, QKV),
    "layers.0.attention.out.weight": (SAME, DIT_BASE),
    "layers.0.feed_forward.w1.weight": (SAME, DIT_BASE),
    "layers.0.feed_forward.w2.weight": (SAME, W2),
}
TEXT_TABLE = {
    **dict.fromkeys(TEXT_SHAPES, (SAME, TEXT_BASE)),
    "output_norm.weight": (ALL_F32, "F32"),
    "blk.0.attn_k_norm.weight": (ALL_F32, "F32"),
    "token_embd.weight": (SAME, EMBEDDING),
    "blk.0.attn_v.weight": (SAME, VALUE),
    "blk.0.ffn_down.weight": (SAME, DOWN),
}


def expected(table, policy):
    """The column of a table for one policy."""
    column = {}
    for name, (floats, quantized) in table.items():
        if policy in COLUMNS:
            column[name] = floats.split()[COLUMNS.index(policy)]
        elif isinstance(quantized, str):
            column[name] = quantized
        else:
            column[name] = QUANTIZED_TABLE[policy].split()[quantized]
    return column


def names(qtypes):
    return {name: qtype.name for name, qtype in qtypes.items()}


def test_every_policy_has_a_row_or_column():
    assert sorted(POLICIES) == sorted([*COLUMNS, *QUANTIZED_TABLE])


@pytest.mark.parametrize("policy", POLICIES)
def test_dit_table(policy):
    assert names(assign("dit", DIT_SHAPES, policy, ())) == expected(DIT_TABLE, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_text_encoder_table(policy):
    assert names(assign("text_encoder", TEXT_SHAPES, policy, ())) == expected(TEXT_TABLE, policy)


@pytest.mark.parametrize("policy", QUANTIZED_TABLE)
def test_nothing_is_narrower_than_the_rest_of_its_network(policy):
    """And a token embedding has four bits at least, whatever the others have."""
    row = [QTYPES[name].bpw for name in QUANTIZED_TABLE[policy].split()]
    assert min(row[:TEXT_BASE]) == row[DIT_BASE] == row[TEXT_BASE]
    assert row[EMBEDDING] >= QTYPES["Q4_K"].bpw


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
        ("Q2_K", 96, "Q8_0"),
        ("IQ4_XS", 96, "Q8_0"),
        ("IQ4_NL", 96, "IQ4_NL"),
        ("F16", 100, "F16"),
    ],
)
def test_rows_that_do_not_divide_fall_back(policy, row, expected):
    assert names(assign("dit", {OUT: (8, row)}, policy)) == {OUT: expected}


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
