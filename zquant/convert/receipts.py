"""The receipt inside every GGUF file that a conversion writes: what from, how, and how well.

    zquant.version           of the program that wrote it
    zquant.policy            name of the policy, or "mixed" where an allocation was followed
    zquant.tensor_types      "REGEX=QTYPE" of every --tensor-type; absent without any
    zquant.source.files      names of the source's files, in the order of their tensors
    zquant.source.sizes      u64, their bytes
    zquant.source.sum64      u64 for every tensor, see below
    zquant.tensor_error      f32 for every tensor: relative RMS error, to four digits
    zquant.tensor_crc32      u32 for every tensor: CRC-32 of its stored bytes

    sum64 = sum of the 64-bit little-endian words that hold the tensor's source bytes, mod 2^64

Every part of a fused tensor begins a word of its own. The sum does not depend on the order of
reading and costs next to nothing, unlike a cryptographic hash of 20 GB; it tells sources apart and
is no protection against forgery. The sha256 of the whole file is in `model.json`, since a file
cannot hold its own. Errors are cut to four digits because later ones depend on where sums are made,
and the file should not. Lists follow the order of tensors in the file.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zquant.errors import FormatError
from zquant.formats.source import WeightSource
from zquant.quant.qtypes import QType

__all__ = ["Receipt", "made_pairs", "measured_pairs", "read_receipt", "rounded", "sum64"]

WORD = 8  # bytes
_MADE = ("zquant.version", "zquant.policy", "zquant.source.files")
_MEASURED = {
    "zquant.tensor_error": np.float32,
    "zquant.tensor_crc32": np.uint32,
    "zquant.source.sum64": np.uint64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a file says of its making; the mappings are by tensor name in the file.

    `imatrix` names the importance files it was quantized with.
    """

    version: str
    policy: str
    source_files: tuple[str, ...]
    imatrix: str
    errors: Mapping[str, float]
    crc32: Mapping[str, int]
    source_sum64: Mapping[str, int]


def made_pairs(
    version: str, policy: str, tensor_types: Iterable[tuple[str, QType]], source: WeightSource
) -> dict[str, Any]:
    """What is known before the work starts, as metadata of the file."""
    types = [f"{pattern}={qtype}" for pattern, qtype in tensor_types]
    return {
        "zquant.version": version,
        "zquant.policy": policy,
        **({"zquant.tensor_types": types} if types else {}),
        "zquant.source.files": [Path(reader.name).name for reader in source.readers],
        "zquant.source.sizes": np.array([r.size for r in source.readers], np.uint64),
    }


def measured_pairs(
    errors: Sequence[float], crc32: Sequence[int], source_sum64: Sequence[int]
) -> dict[str, Any]:
    """What is known when all tensors are written; zeros hold its place until then."""
    lists = ([rounded(error) for error in errors], crc32, source_sum64)
    pairs = zip(_MEASURED.items(), lists, strict=True)
    return {key: np.array(values, dtype) for (key, dtype), values in pairs}


def rounded(error: float) -> float:
    """`error` as receipts have it."""
    return float(np.float32(f"{error:.3e}"))


def sum64(data: npt.NDArray[np.uint8], start: int) -> int:
    """Sum of the words that hold some bytes of a tensor, mod 2^64.

    Args:
        data: contiguous uint8 `[n]`.
        start: where they lie in their part of the tensor; sums of its pieces add up to its own.
    """
    lead = start % WORD
    tail = -(lead + len(data)) % WORD
    if lead or tail:
        data = np.pad(data, (lead, tail))
    return int(np.add.reduce(data.view("<u8"), dtype=np.uint64))


def read_receipt(source: WeightSource) -> Receipt | None:
    """The receipt of a file; None if it has none, as files of other programs.

    Raises:
        FormatError: it is incomplete, or its lists do not fit the tensors.
    """
    said, n = source.metadata, len(source.tensors)
    if "zquant.tensor_crc32" not in said:
        return None
    lists = {key: said.get(key) for key in _MEASURED}
    for key, values in lists.items():
        if not isinstance(values, list) or len(values) != n or type(values[0]) not in (int, float):
            raise FormatError(
                f"{source.path}: {key} is {values!r:.80}; expected {n} numbers, one for each "
                f"tensor. The file was changed after it was made; convert or download it again."
            )
    absent = [key for key in _MADE if key not in said]
    if absent:
        raise FormatError(
            f"{source.path}: the receipt lacks {', '.join(absent)}. The file was changed after it "
            f"was made; convert or download it again."
        )
    errors, crc32, sums = (dict(zip(source.tensors, v or (), strict=True)) for v in lists.values())
    return Receipt(
        version=str(said["zquant.version"]),
        policy=str(said["zquant.policy"]),
        source_files=tuple(map(str, said["zquant.source.files"])),
        imatrix=str(said.get("quantize.imatrix.file", "")),
        errors=errors,
        crc32=crc32,
        source_sum64=sums,
    )
