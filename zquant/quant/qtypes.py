"""The one table of storage types: weights and bytes per qblock, GGUF spelling and id.

A qblock is the group of weights that shares a scale; it never crosses a row.

Source: ggml `ggml_type` and `ggml-common.h`.
"""

from dataclasses import dataclass

__all__ = ["EIGHT_BIT", "QTYPES", "UNSUPPORTED_IDS", "QType", "qtype_by_id", "qtype_by_name"]


@dataclass(frozen=True, slots=True)
class QType:
    """How weights are stored: `qblock` weights take `qblock_bytes` bytes."""

    name: str
    ggml_id: int
    qblock: int
    qblock_bytes: int

    @property
    def bpw(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.qblock_bytes / self.qblock

    @property
    def is_float(self) -> bool:
        """Plain F32, F16 or BF16."""
        return self.qblock == 1 and self.ggml_id >= 0

    @property
    def is_weight(self) -> bool:
        """Whether it can be decoded; integers and packed bytes of other containers cannot."""
        return self.ggml_id >= 0 or self.name in EIGHT_BIT

    def searched(self, *, importance: bool) -> bool:
        """Whether quantizing tries several scales per qblock: slow, and worth all cores.

        Args:
            importance: whether importance is given; most types that only round search then.
        """
        return self.name in (_SEARCHED_BY_IMPORTANCE if importance else _SEARCHED)

    def row_bytes(self, n_weights: int) -> int:
        """Bytes of a row of `n_weights`.

        Raises:
            ValueError: the row is not a whole number of qblocks.
        """
        n_qblocks, rest = divmod(n_weights, self.qblock)
        if rest:
            raise ValueError(
                f"{self.name} stores {self.qblock} weights together; "
                f"a row of {n_weights} does not divide"
            )
        return n_qblocks * self.qblock_bytes

    def __str__(self) -> str:
        return self.name


_SEARCHED = {"Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS"}
_SEARCHED_BY_IMPORTANCE = _SEARCHED | {"Q5_1", "Q5_0", "Q4_1", "Q4_0"}

QTYPES = {
    q.name: q
    for q in (
        QType("F32", 0, 1, 4),
        QType("F16", 1, 1, 2),
        QType("BF16", 30, 1, 2),
        QType("Q8_0", 8, 32, 34),
        QType("Q6_K", 14, 256, 210),
        QType("Q5_K", 13, 256, 176),
        QType("Q4_K", 12, 256, 144),
        QType("Q3_K", 11, 256, 110),
        QType("Q2_K", 10, 256, 84),
        QType("Q5_1", 7, 32, 24),
        QType("Q5_0", 6, 32, 22),
        QType("Q4_1", 3, 32, 20),
        QType("Q4_0", 2, 32, 18),
        QType("IQ4_NL", 20, 32, 18),
        QType("IQ4_XS", 23, 256, 136),
    )
}

# one number per byte, scaled by another tensor if at all; read, never written; GGUF has no number
EIGHT_BIT = {q.name: q for q in (QType(name, -1, 1, 1) for name in ("F8_E4M3", "F8_E5M2", "I8"))}

UNSUPPORTED_IDS = {  # known to ggml, not readable by zquant
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}

_BY_ID = {q.ggml_id: q for q in QTYPES.values()}


def qtype_by_name(name: str) -> QType:
    """The type called `name`, in any case.

    Raises:
        ValueError: zquant does not know the type.
    """
    try:
        return QTYPES[name.upper()]
    except KeyError:
        raise ValueError(f"unknown qtype {name!r}; known: {', '.join(QTYPES)}") from None


def qtype_by_id(ggml_id: int) -> QType | None:
    """The type with ggml's number `ggml_id`, or None when zquant cannot read it."""
    return _BY_ID.get(ggml_id)
