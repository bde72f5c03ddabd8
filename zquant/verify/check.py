"""Check a model folder or a single file; every disagreement is a finding with its remedy.

    structure   headers, names and shapes make the networks that the file says it holds
    checksums   sha256 as in `model.json`, crc32 of every tensor as in the receipt inside the file
    weights     every one decodes to a number
    receipts    the file and `model.json` say the same
    source      errors, and bytes, as the receipt says they are against the original

What cannot be checked, because the file is of another program, is said and is no finding.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import zquant
from zquant.convert.receipts import Receipt, read_receipt
from zquant.convert.workers import cores, workers
from zquant.errors import ZQuantError
from zquant.formats.detect import open_source
from zquant.formats.model_folder import MANIFEST, find_model, model_folder
from zquant.formats.names import components_in
from zquant.formats.origin import find_origin
from zquant.formats.source import WeightSource
from zquant.models.checkpoint import Checkpoint
from zquant.verify.against import compare, source_findings
from zquant.verify.scan import Progress, scan
from zquant.verify.structure import (
    PARTS,
    manifest_findings,
    network_findings,
    receipt_findings,
    receipt_of_manifest,
)

__all__ = ["Verdict", "verify"]

PIECES_PER_WORKER = 2  # one being decoded, one waiting


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What a check found.

    `files` has for each file its bytes, sha256, networks, whether it has a receipt, and with a
    source the error of every tensor; `notes` say what could not be checked.
    """

    path: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    compared: bool = False

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings


def verify(
    path: str | Path, source: str | None = None, progress: Progress = lambda *_: None
) -> Verdict:
    """Check what is at `path`.

    Args:
        path: a model folder, "demo", or a weights file.
        source: what it was made from, as `zquant convert` takes it; None: not compared.
        progress: is told the file, and its bytes.

    Raises:
        ZQuantError: nothing is there, or the source cannot be read.
    """
    where = model_folder(path)
    verdict = Verdict(path=str(where))
    with ExitStack() as stack:
        found, manifest = _open(where, verdict, stack)
        originals = _originals(source, stack) if source is not None else {}
        pool = stack.enter_context(workers(cores(), 0))
        for component, opened in found.items():
            check = _Check(verdict, _name(where, opened), opened, pool, progress)
            receipt = check.alone(component if where.is_dir() else None, manifest)
            for name in originals and check.components:
                if name in originals:
                    check.against(name, originals[name], receipt)
                else:
                    verdict.notes.append(f"{source}: has no {name} to compare with")
    return verdict


def _name(where: Path, source: WeightSource) -> str:
    """How findings call a file: the folders of an official model tell its parts apart."""
    path = source.path
    if isinstance(path, Path) and where.is_dir() and path.is_relative_to(where):
        return path.relative_to(where).as_posix()
    return path.name


def _open(
    where: Path, verdict: Verdict, stack: ExitStack
) -> tuple[dict[str, WeightSource], Mapping[str, Any]]:
    """Every file that can be opened by component, a single one as it is; and the `model.json`."""
    paths, manifest = {"file": where}, {}
    if (where / MANIFEST).is_file() or (where / "transformer").is_dir():
        files = find_model(where)
        paths = {"dit": files.dit, "text_encoder": files.text_encoder, "vae": files.vae}
        manifest = dict(files.manifest or {})
        try:
            Checkpoint(files).close()
        except ZQuantError as error:
            verdict.findings.append(str(error))
    opened = {c: _opened(path, verdict, stack) for c, path in paths.items()}
    return {c: source for c, source in opened.items() if source is not None}, manifest


def _opened(path: Path, verdict: Verdict, stack: ExitStack) -> WeightSource | None:
    """The file; None, and a finding, if it cannot be read."""
    try:
        source = open_source(path)
    except ZQuantError as error:
        verdict.findings += {str(error)} - set(verdict.findings)
        return None
    stack.callback(source.close)
    return source


def _originals(source: str, stack: ExitStack) -> dict[str, WeightSource]:
    """The source by component; a single file may hold any of them."""
    path = model_folder(source)
    if path.is_file():
        opened = open_source(path)
        stack.callback(opened.close)
        return dict.fromkeys(components_in(opened), opened)
    found = {c: open_source(p) for c, p in find_origin(source, {}).paths.items()}
    for each in found.values():
        stack.callback(each.close)
    return found


@dataclass(frozen=True, slots=True)
class _Check:
    """One file under examination."""

    verdict: Verdict
    name: str
    source: WeightSource
    pool: Executor
    progress: Progress

    @property
    def components(self) -> tuple[str, ...]:
        """The networks in the file."""
        try:
            return components_in(self.source)
        except ZQuantError:
            return ()

    @property
    def used(self) -> set[str]:
        """Names of the tensors that matter: those of networks and their scales, or else all."""
        found = [p.info for c in self.components for p in PARTS[c](self.source).values()]
        scales = [info.scale for info in found if info.scale is not None]
        return {info.name for info in (*found, *scales)} or set(self.source.tensors)

    def alone(self, component: str | None, manifest: Mapping[str, Any]) -> Receipt | None:
        """The file by itself and with its `model.json`; returns what vouches for its errors."""
        findings, notes = self.verdict.findings, self.verdict.notes
        receipt = self._receipt()
        found = [*network_findings(self.source, component)]
        if component and manifest:
            found += manifest_findings(self.name, self.source, component, manifest, receipt)
        elif not self.components and not found:
            notes.append(f"{self.name}: no network that zquant knows; only its weights are checked")
        scanned = scan(self.source, self.pool, cores() * PIECES_PER_WORKER, self.progress)
        (first, *_) = hashes = list(scanned.sha256.values())
        found += receipt_findings(self.name, receipt, scanned.crc32)
        expected = manifest.get("files", {}).get(component, {}).get("sha256")
        if expected not in (None, first):
            found.append(
                f"{self.name}: sha256 is {first}; {MANIFEST} says {expected}. The file was damaged "
                f"or replaced; download or convert it again."
            )
        found += [
            f"{self.name}: {text}; expected numbers only. Download or convert it again."
            for tensor, text in scanned.spoilt.items()
            if tensor in self.used
        ]
        findings += [text for text in found if text not in findings]
        if receipt is None and self.source.container == "gguf":
            notes.append(f"{self.name}: no receipt inside; tensors have no checksums of their own")
        self.verdict.files[self.name] = {
            "bytes": sum(reader.size for reader in self.source.readers),
            "sha256": hashes if len(hashes) > 1 else first,
            "networks": list(self.components),
            "tensors": len(self.source.tensors),
            "receipt": receipt is not None,
        }
        return receipt or (receipt_of_manifest(manifest, component) if component else None)

    def against(self, component: str, original: WeightSource, receipt: Receipt | None) -> None:
        """The file beside its source."""
        ours, theirs = PARTS[component](self.source), PARTS[component](original)
        absent = [n for n, p in ours.items() if n not in theirs or theirs[n].shape != p.shape]
        if absent:
            self.verdict.findings.append(
                f"{self.name}: {len(absent)} of {len(ours)} tensors have no match in "
                f"{original.path} (first: {absent[0]!r}). Give what it was made from as --source."
            )
            return
        weighed = bool(receipt and receipt.imatrix)
        window = cores() * PIECES_PER_WORKER
        found = compare(ours, theirs, self.pool, window, weighed=weighed, progress=self.progress)
        entry = self.verdict.files[self.name]
        entry["errors"] = {**entry.get("errors", {}), **found.errors}
        self.verdict.compared = True
        if receipt is not None:
            if receipt.version != zquant.__version__:  # quantizers may have become better
                found = replace(found, other_bytes=())
            self.verdict.findings += source_findings(self.name, receipt, found)
        self.verdict.notes += _limits(self.name, receipt)

    def _receipt(self) -> Receipt | None:
        try:
            return read_receipt(self.source)
        except ZQuantError as error:
            self.verdict.findings.append(str(error))
            return None


def _limits(name: str, receipt: Receipt | None) -> Iterator[str]:
    """What a comparison with the source could not tell."""
    if receipt is None:
        yield f"{name}: without a receipt its errors are measured but compared with nothing"
    elif receipt.imatrix:
        yield f"{name}: made with {receipt.imatrix}; not quantized again where that is used"
    elif receipt.version != zquant.__version__:
        yield f"{name}: made by zquant {receipt.version}; its bytes are not compared with new ones"
