"""An allocation: the qtype of every tensor by name, solved for or of an earlier conversion.

    {"dit": {"layers.0.attention.qkv.weight": "Q5_K", ...}, "text_encoder": {...}}

Three documents hold one: this one, the `model.json` of a converted folder, and what
`zquant convert --dry-run --json` prints. A component that is not there follows its policy; the VAE
is always kept as it is. An allocation fits a file whose tensors have exactly its names; it comes
after `--tensor-type` and before the policy.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zquant.errors import CheckpointError, PlanError
from zquant.formats.model_folder import read_json
from zquant.quant.policy import Override
from zquant.quant.qtypes import QType, qtype_by_name

__all__ = ["MIXED", "Allocation", "allocation_rules", "read_allocation"]

Allocation = Mapping[str, Mapping[str, QType]]  # component -> name in the file -> qtype

MIXED = "mixed"  # what stands for the policy's name in files that follow an allocation
NETWORKS = ("dit", "text_encoder")


def read_allocation(path: Path) -> Allocation:
    """Read an allocation from any of the three documents.

    Raises:
        FormatError: the file cannot be read.
        CheckpointError: it holds no allocation.
        ValueError: it names a qtype that zquant does not know.
    """
    document = read_json(path)
    found = document.get("tensors", document)
    if not isinstance(found, dict):
        raise _no_allocation(path)
    allocation = {c: _qtypes(path, found[c]) for c in NETWORKS if c in found}
    if not allocation:
        raise _no_allocation(path)
    return allocation


def allocation_rules(
    component: str, qtypes: Mapping[str, QType], shapes: Mapping[str, tuple[int, ...]]
) -> list[Override]:
    """An allocation as rules of `zquant.quant.policy.assign`, one for each tensor.

    Args:
        component: whose allocation it is.
        qtypes: what the allocation says of it.
        shapes: name in the file -> shape.

    Raises:
        PlanError: the names differ, or a tensor cannot be stored so.
    """
    about = f"the allocation of the {component}"
    missing = [name for name in shapes if name not in qtypes]
    unknown = [name for name in qtypes if name not in shapes]
    if missing or unknown:
        first = f"says nothing of {missing[0]!r}" if missing else f"has an unknown {unknown[0]!r}"
        raise PlanError(
            f"{about} names {len(qtypes)} tensors, {len(shapes) - len(missing)} of the "
            f"{len(shapes)} that are there; it {first}. It was made for another model; take the "
            f"model.json of a conversion of this one, or --target-size."
        )
    for name, qtype in qtypes.items():
        shape = shapes[name]
        if not qtype.is_float and (len(shape) < 2 or shape[-1] % qtype.qblock):
            raise PlanError(
                f"{about} gives {qtype} to {name!r} of shape {list(shape)}; expected a matrix "
                f"whose rows are whole qblocks of {qtype.qblock}. Give it F32 or BF16."
            )
    return [(f"^{re.escape(name)}$", qtype) for name, qtype in qtypes.items()]


def _qtypes(path: Path, entries: Any) -> dict[str, QType]:
    """The qtype of every name of one component, in any of the three spellings."""
    if isinstance(entries, list):
        entries = {str(e.get("name")): e for e in entries if isinstance(e, dict)}
    if not isinstance(entries, dict) or not entries:
        raise _no_allocation(path)
    found = {}
    for name, entry in entries.items():
        qtype = entry.get("qtype") if isinstance(entry, dict) else entry
        if not isinstance(qtype, str):
            raise _no_allocation(path)
        found[name] = qtype_by_name(qtype)
    return found


def _no_allocation(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: holds no allocation; expected the qtype of every tensor by name, as in the "
        f"model.json of a converted folder or what zquant convert --dry-run --json prints."
    )
