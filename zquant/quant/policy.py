"""Which tensor gets which qtype: ordered rules per policy, first match wins.

Names are those written to the file: ComfyUI's fused names for the DiT, llama.cpp's for the text
encoder. Every policy keeps small or sensitive tensors wider.

DiT (`layers`, `noise_refiner` and `context_refiner` are stacks of blocks):

    tensor                    F32   F16   BF16  other policies
    1-D, norms, biases, pads  F32   F32   F32   F32
    x_embedder, t_embedder,
      final_layer             F32   F32   BF16  F32
    cap_embedder.1            F32   BF16  BF16  BF16
    adaLN_modulation.0        F32   BF16  BF16  Q8_0
    matrices of blocks        F32   F16   BF16  see below

Text encoder: 1-D, norms and biases are F32, matrices as in the DiT's blocks. Quantized ones:

                                             text encoder:
    policy   refiners  w2     qkv    others  token_embd  ffn_down  attn_v  others
    Q8_0     Q8_0      Q8_0   Q8_0   Q8_0    Q8_0        Q8_0      Q8_0    Q8_0
    Q6_K     Q6_K      Q6_K   Q6_K   Q6_K    Q6_K        Q6_K      Q6_K    Q6_K
    Q5_K_M   Q6_K      Q6_K   Q6_K   Q5_K    Q6_K        Q6_K      Q6_K    Q5_K
    Q5_K_S   Q6_K      Q6_K   Q5_K   Q5_K    Q6_K        Q6_K      Q5_K    Q5_K
    Q5_1     Q8_0      Q6_K   Q5_1   Q5_1    Q6_K        Q6_K      Q6_K    Q5_1
    Q5_0     Q8_0      Q5_1   Q5_0   Q5_0    Q6_K        Q5_1      Q5_1    Q5_0
    Q4_K_M   Q6_K      Q6_K   Q5_K   Q4_K    Q6_K        Q6_K      Q6_K    Q4_K
    Q4_K_S   Q5_K      Q5_K   Q4_K   Q4_K    Q6_K        Q5_K      Q4_K    Q4_K
    Q4_1     Q8_0      Q5_1   Q4_1   Q4_1    Q6_K        Q5_1      Q5_1    Q4_1
    Q4_0     Q8_0      Q4_0   Q4_0   Q4_0    Q6_K        Q4_0      Q4_0    Q4_0
    IQ4_NL   Q5_K      Q5_K   IQ4_NL IQ4_NL  Q6_K        Q5_K      Q5_K    IQ4_NL
    IQ4_XS   Q5_K      Q5_K   IQ4_XS IQ4_XS  Q6_K        Q5_K      Q5_K    IQ4_XS
    Q3_K_M   Q5_K      Q4_K   Q4_K   Q3_K    Q6_K        Q4_K      Q5_K    Q3_K
    Q3_K_S   Q4_K      Q4_K   Q3_K   Q3_K    Q6_K        Q4_K      Q4_K    Q3_K
    Q2_K     Q4_K      Q3_K   Q3_K   Q2_K    Q6_K        Q3_K      Q4_K    Q2_K

Why: vectors and embedders are a thousandth of the file; timestep and modulation scale whole
channels, so their error reaches every token; w2, ffn_down and values feed the residual stream
directly and have the largest activations; the refiners' four blocks see every token once; a row of
the token embedding is all that is known of a token. BF16 where F16 could overflow: the caption
projection and the modulation have large outputs. The BF16 policy keeps the published matrices as
they are. Below four bits every bit counts, so the steps are larger there; values are a fortieth of
the text encoder and get two.

A row that is not whole qblocks falls back: 256-weight types to Q8_0, then (and 32-weight types at
once) to BF16. A user's override is not replaced: an impossible one is an error. Overrides to a
quantized qtype leave 1-D tensors alone, so that `layers[.]0[.]` can name a whole block.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from zquant.errors import PlanError
from zquant.quant.qtypes import QTYPES, QType

__all__ = ["POLICIES", "Component", "Override", "assign", "policy_by_name"]

Component = Literal["dit", "text_encoder"]
Override = tuple[str, QType]  # regular expression searched in the name, qtype
Rules = tuple[tuple[str, str], ...]  # regular expression, qtype name


def _dit(base: str, *, refiners: str = "", w2: str = "", qkv: str = "") -> Rules:
    """Rules of a DiT whose matrices are `base` where nothing else is said."""
    quantized = base not in ("F16", "BF16")
    return (
        (r"_pad_token$|norm|\.bias$", "F32"),
        (r"^(x_embedder|t_embedder|final_layer)\.", "BF16" if base == "BF16" else "F32"),
        (r"^cap_embedder\.1\.", "BF16"),
        (r"adaLN_modulation\.0\.", "Q8_0" if quantized else "BF16"),
        (r"^(noise|context)_refiner\.", refiners or base),
        (r"\.feed_forward\.w2\.", w2 or base),
        (r"\.attention\.qkv\.", qkv or base),
        ("", base),
    )


def _text_encoder(base: str, *, embedding: str = "", down: str = "", value: str = "") -> Rules:
    """Rules of a text encoder whose matrices are `base` where nothing else is said."""
    return (
        (r"norm|\.bias$", "F32"),
        (r"^token_embd\.", embedding or base),
        (r"\.ffn_down\.", down or base),
        (r"\.attn_v\.", value or base),
        ("", base),
    )


_RULES: dict[str, dict[Component, Rules]] = {
    "F32": {"dit": (("", "F32"),), "text_encoder": (("", "F32"),)},
    "BF16": {"dit": _dit("BF16"), "text_encoder": _text_encoder("BF16")},
    "F16": {"dit": _dit("F16"), "text_encoder": _text_encoder("F16")},
    "Q8_0": {"dit": _dit("Q8_0"), "text_encoder": _text_encoder("Q8_0")},
    "Q6_K": {"dit": _dit("Q6_K"), "text_encoder": _text_encoder("Q6_K")},
    "Q5_K_M": {
        "dit": _dit("Q5_K", refiners="Q6_K", w2="Q6_K", qkv="Q6_K"),
        "text_encoder": _text_encoder("Q5_K", embedding="Q6_K", down="Q6_K", value="Q6_K"),
    },
    "Q5_K_S": {
        "dit": _dit("Q5_K", refiners="Q6_K", w2="Q6_K"),
        "text_encoder": _text_encoder("Q5_K", embedding="Q6_K", down="Q6_K"),
    },
    "Q5_1": {
        "dit": _dit("Q5_1", refiners="Q8_0", w2="Q6_K"),
        "text_encoder": _text_encoder("Q5_1", embedding="Q6_K", down="Q6_K", value="Q6_K"),
    },
    "Q5_0": {
        "dit": _dit("Q5_0", refiners="Q8_0", w2="Q5_1"),
        "text_encoder": _text_encoder("Q5_0", embedding="Q6_K", down="Q5_1", value="Q5_1"),
    },
    "Q4_K_M": {
        "dit": _dit("Q4_K", refiners="Q6_K", w2="Q6_K", qkv="Q5_K"),
        "text_encoder": _text_encoder("Q4_K", embedding="Q6_K", down="Q6_K", value="Q6_K"),
    },
    "Q4_K_S": {
        "dit": _dit("Q4_K", refiners="Q5_K", w2="Q5_K"),
        "text_encoder": _text_encoder("Q4_K", embedding="Q6_K", down="Q5_K"),
    },
    "Q4_1": {
        "dit": _dit("Q4_1", refiners="Q8_0", w2="Q5_1"),
        "text_encoder": _text_encoder("Q4_1", embedding="Q6_K", down="Q5_1", value="Q5_1"),
    },
    "Q4_0": {
        "dit": _dit("Q4_0", refiners="Q8_0"),
        "text_encoder": _text_encoder("Q4_0", embedding="Q6_K"),
    },
    "IQ4_NL": {
        "dit": _dit("IQ4_NL", refiners="Q5_K", w2="Q5_K"),
        "text_encoder": _text_encoder("IQ4_NL", embedding="Q6_K", down="Q5_K", value="Q5_K"),
    },
    "IQ4_XS": {
        "dit": _dit("IQ4_XS", refiners="Q5_K", w2="Q5_K"),
        "text_encoder": _text_encoder("IQ4_XS", embedding="Q6_K", down="Q5_K", value="Q5_K"),
    },
    "Q3_K_M": {
        "dit": _dit("Q3_K", refiners="Q5_K", w2="Q4_K", qkv="Q4_K"),
        "text_encoder": _text_encoder("Q3_K", embedding="Q6_K", down="Q4_K", value="Q5_K"),
    },
    "Q3_K_S": {
        "dit": _dit("Q3_K", refiners="Q4_K", w2="Q4_K"),
        "text_encoder": _text_encoder("Q3_K", embedding="Q6_K", down="Q4_K", value="Q4_K"),
    },
    "Q2_K": {
        "dit": _dit("Q2_K", refiners="Q4_K", w2="Q3_K", qkv="Q3_K"),
        "text_encoder": _text_encoder("Q2_K", embedding="Q6_K", down="Q3_K", value="Q4_K"),
    },
}

POLICIES = tuple(_RULES)


def policy_by_name(name: str) -> str:
    """The policy called `name` in any case, as it is spelled in `POLICIES`.

    Raises:
        ValueError: there is none.
    """
    if name.upper() not in _RULES:
        raise ValueError(f"unknown policy {name!r}; known: {', '.join(POLICIES)}")
    return name.upper()


def assign(
    component: Component,
    shapes: Mapping[str, tuple[int, ...]],
    policy: str,
    overrides: Sequence[Override] = (),
) -> dict[str, QType]:
    """The qtype of every tensor of one network.

    Args:
        component: whose rules to use.
        shapes: name in the file -> shape, `[out, in]` for a matrix.
        policy: one of `POLICIES`, in any case.
        overrides: (regular expression, qtype); the first that is found in a name wins over the
            policy. A quantized qtype applies to matrices only.

    Returns:
        name -> qtype, in the order of `shapes`.

    Raises:
        ValueError: the policy is unknown, or an expression is not a valid one.
        PlanError: an override matches no tensor, or cannot store a matrix it matches.
    """
    rules = _RULES[policy_by_name(policy)][component]
    patterns = [(_compile(text), qtype) for text, qtype in overrides]
    for pattern, qtype in patterns:
        _check_used(pattern, qtype, shapes, component)
    return {name: _choose(name, shape, rules, patterns) for name, shape in shapes.items()}


def _choose(
    name: str, shape: tuple[int, ...], rules: Rules, overrides: list[tuple[re.Pattern[str], QType]]
) -> QType:
    """The qtype of one tensor."""
    for pattern, qtype in overrides:
        if pattern.search(name) and _applies(qtype, shape):
            if shape and shape[-1] % qtype.qblock:
                raise PlanError(
                    f"--tensor-type gives {qtype} to {name!r}, whose rows of {shape[-1]} weights"
                    f" are not whole qblocks of {qtype.qblock}. Narrow the expression or use BF16."
                )
            return qtype
    if len(shape) < 2:
        return QTYPES["F32"]
    wanted = next(qtype for pattern, qtype in rules if re.search(pattern, name))
    return _fitting(QTYPES[wanted], shape[-1])


def _applies(qtype: QType, shape: tuple[int, ...]) -> bool:
    """Whether an override concerns a tensor: vectors are never quantized."""
    return qtype.is_float or len(shape) >= 2


def _fitting(qtype: QType, row: int) -> QType:
    """`qtype`, or what replaces it when a row of `row` weights is not whole qblocks."""
    if row % qtype.qblock == 0:
        return qtype
    q8_0 = QTYPES["Q8_0"]
    return q8_0 if row % q8_0.qblock == 0 else QTYPES["BF16"]


def _check_used(
    pattern: re.Pattern[str],
    qtype: QType,
    shapes: Mapping[str, tuple[int, ...]],
    component: Component,
) -> None:
    """Raise PlanError when an override changes nothing."""
    found = [name for name in shapes if pattern.search(name)]
    if not found:
        raise PlanError(
            f"--tensor-type {pattern.pattern!r} matches none of the {len(shapes)} tensors of the"
            f" {component}. Names look like {next(iter(shapes), '(none)')!r}."
        )
    if not any(_applies(qtype, shapes[name]) for name in found):
        raise PlanError(
            f"--tensor-type gives {qtype} only to tensors that are not matrices (first:"
            f" {found[0]!r}, shape {list(shapes[found[0]])}); they can be F32, F16 or BF16."
        )


def _compile(text: str) -> re.Pattern[str]:
    """A regular expression of an override."""
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"--tensor-type {text!r} is not a regular expression: {error}") from None
