"""Importance of the inputs of every matrix, from the files of `--imatrix`.

    importance[k] = sum over files of squares[k] / sum over files of count

A quantizer weighs the error of weight `[n, k]` with `importance[k]`. Files may be of the DiT, of
the text encoder or of both; a matrix is found under its name in the file to write or its official
ones, with or without the prefix of an all-in-one file. q, k and v share an input, and with it one
vector.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zquant.convert.headers import Listed
from zquant.errors import CheckpointError
from zquant.formats.imatrix import Imatrix, InputSums, read_imatrix
from zquant.quant.qtypes import QType

__all__ = ["ImatrixFile", "Importances", "header_pairs", "read_importances", "weighs"]

Vector = npt.NDArray[np.float32]

PREFIXES = (  # of all-in-one files
    *("", "model.diffusion_model.", "text_encoders.llm."),
    "text_encoders.qwen3_4b.transformer.",
)


def weighs(qtype: QType) -> bool:
    """Whether a quantizer of that type has a choice that importance can guide."""
    return qtype.searched(importance=True)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImatrixFile:
    """An importance file and what identifies it."""

    path: Path
    sha256: str
    imatrix: Imatrix

    def find(self, names: Sequence[str]) -> InputSums | None:
        """The entry of a matrix that has any of these names."""
        for prefix in PREFIXES:
            for name in names:
                if (sums := self.imatrix.entries.get(prefix + name)) is not None:
                    return sums
        return None


@dataclass(frozen=True, slots=True)
class Importances:
    """All files of a conversion; without any, nothing has importance."""

    files: tuple[ImatrixFile, ...]

    def of(self, names: Sequence[str], n_columns: int) -> Vector | None:
        """The importance of a matrix with rows of `n_columns`; None if no file has it.

        Args:
            names: of the matrix: the file's, then the official ones.
            n_columns: the length it must have.

        Raises:
            CheckpointError: a file has another length.
        """
        found = [(file, sums) for file in self.files if (sums := file.find(names)) is not None]
        for file, sums in found:
            if len(sums.squares) != n_columns:
                raise CheckpointError(
                    f"{file.path}: has {len(sums.squares)} inputs of {names[0]!r}, expected "
                    f"{n_columns}. It was made for another model; make one for this model with "
                    f"zquant calibrate."
                )
        if not found:
            return None
        squares = np.sum([sums.squares for _, sums in found], axis=0)
        mean: Vector = (squares / sum(sums.count for _, sums in found)).astype(np.float32)
        return mean if mean.any() else None  # all equal, as without importance

    def of_file(
        self, listed: Listed, officials: Mapping[str, tuple[str, ...]]
    ) -> tuple[dict[str, Vector], tuple[ImatrixFile, ...]]:
        """The importance of a file's tensors, where there is one, and the files it is from.

        Args:
            listed: name, qtype and shape of every tensor; only quantized ones are looked for.
            officials: file name -> official names.

        Raises:
            CheckpointError: a matrix has another length.
        """
        vectors: dict[str, Vector] = {}
        used: list[ImatrixFile] = []
        for name, qtype, shape in listed:
            if not weighs(qtype):
                continue
            names = (name, *officials[name])
            if (vector := self.of(names, shape[-1])) is not None:
                vectors[name] = vector
            used += [file for file in self.files if file not in used and file.find(names)]
        return vectors, tuple(used)

    def check_used(self, used: Sequence[ImatrixFile], names: Sequence[str]) -> None:
        """Every file must say something about one of the tensors `names`, which can be weighed.

        Raises:
            CheckpointError: one does not; it is of another model, or there is nothing to weigh.
        """
        for file in self.files:
            if not names:
                raise CheckpointError(
                    f"{file.path}: nothing here is quantized with importance; F32, F16, BF16 and "
                    f"Q8_0 have no use for it. Choose another --qtype, or leave out --imatrix."
                )
            if file not in used:
                raise CheckpointError(
                    f"{file.path}: has none of the {len(names)} tensors that importance can guide; "
                    f"its names look like {next(iter(file.imatrix.entries))!r:.80}, expected names "
                    f"like {names[-1]!r}. Make one for this model with zquant calibrate, or leave "
                    f"out --imatrix."
                )


def read_importances(paths: Sequence[Path]) -> Importances:
    """Read every file.

    Raises:
        FormatError: one of them is damaged, or is something else.
    """
    return Importances(tuple(_files(paths)))


def _files(paths: Sequence[Path]) -> Iterator[ImatrixFile]:
    for path in paths:
        imatrix = read_imatrix(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        yield ImatrixFile(path=path, sha256=digest, imatrix=imatrix)


def header_pairs(files: Sequence[ImatrixFile], n_matrices: int) -> dict[str, Any]:
    """What the header of a file says that was quantized with these; empty without any."""
    if not files:
        return {}
    datasets = dict.fromkeys(name for file in files for name in file.imatrix.datasets)
    return {
        "quantize.imatrix.file": ", ".join(file.path.name for file in files),
        **({"quantize.imatrix.dataset": ", ".join(datasets)} if datasets else {}),
        "quantize.imatrix.entries_count": n_matrices,
        "quantize.imatrix.chunks_count": sum(file.imatrix.n_chunks for file in files),
        "zquant.imatrix.sha256": [file.sha256 for file in files],
    }
