"""The end of a conversion: `model.json`, then every file under its final name.

Without `model.json` the folder is not a model, so the old one goes first and the new one comes
last; a conversion that is stopped in between is finished by `--resume`.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import zquant
from zquant.convert.plan import ConversionPlan, Output
from zquant.errors import ZQuantError
from zquant.formats.model_folder import MANIFEST, MANIFEST_FORMAT
from zquant.formats.resumable import ResumableFile

__all__ = ["manifest_of", "publish"]


def manifest_of(
    plan: ConversionPlan, files: Sequence[ResumableFile], hashes: Sequence[str]
) -> dict[str, Any]:
    """Content of `model.json`; depends on the sources and options only.

    (The last digits of errors depend on where their sums are made.)
    """
    written = list(zip(plan.outputs, files, strict=True))
    entries = map(_file_entry, plan.outputs, hashes)
    said = plan.origin.manifest or {}
    return {
        "format": MANIFEST_FORMAT,
        "zquant": zquant.__version__,
        "variant": plan.variant.name,
        "shift": plan.variant.shift,
        "steps": plan.variant.steps,
        "guidance_scale": plan.variant.guidance_scale,
        # a small model stays one in another qtype
        **{key: said[key] for key in ("size", "hint") if key in said},
        "source": plan.origin.label,
        "files": {o.component: entry for o, entry in zip(plan.outputs, entries, strict=True)},
        "tensors": {output.component: _tensor_entries(output, file) for output, file in written},
    }


def _file_entry(output: Output, sha256: str) -> dict[str, Any]:
    imatrix = [{"name": each.path.name, "sha256": each.sha256} for each in output.imatrix]
    return {
        "name": output.path.name,
        "policy": output.policy,
        "bytes": output.total_size,
        "sha256": sha256,
        "weights": output.n_weights,
        "bpw": round(output.bpw, 4),
        **({"imatrix": imatrix} if imatrix else {}),
    }


def _tensor_entries(output: Output, file: ResumableFile) -> dict[str, Any]:
    """Every tensor's qtype, and the errors that were noted when it was written."""
    return {
        tensor.name: {"qtype": tensor.qtype.name, **note["errors"]}
        for tensor, note in zip(output.tensors, file.notes, strict=True)
    }


def publish(folder: Path, files: Sequence[ResumableFile], manifest: dict[str, Any]) -> None:
    """Give every sealed file its name, `model.json` last.

    Raises:
        ZQuantError: the folder cannot be changed; `--resume` goes on from there.
    """
    target = folder / MANIFEST
    part = target.with_name(MANIFEST + ".part")
    try:
        with part.open("w", encoding="utf-8") as text:
            json.dump(manifest, text, indent=1, ensure_ascii=False)
            text.flush()
            os.fsync(text.fileno())
        target.unlink(missing_ok=True)
        for file in files:
            file.publish()
        _sync(folder)
        part.replace(target)
        _sync(folder)
        for file in files:
            file.clean_up()
    except OSError as error:
        raise ZQuantError(
            f"{folder}: cannot be completed ({error.strerror}). Run again with --resume."
        ) from error


def _sync(folder: Path) -> None:
    """Force the folder's new names to the disk, where the system can."""
    if os.name != "posix":
        return
    with suppress(OSError):  # some network file systems refuse
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
