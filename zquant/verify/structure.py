"""What a file is by its header: which networks, whether they are whole, what it says of itself."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from zquant.convert.headers import check_network
from zquant.convert.receipts import Receipt, rounded
from zquant.errors import ZQuantError
from zquant.formats.names import Part, components_in, dit_parts, text_encoder_parts, vae_parts
from zquant.formats.source import WeightSource
from zquant.models.tokenizer import Vocabulary

__all__ = [
    "PARTS",
    "manifest_findings",
    "network_findings",
    "receipt_findings",
    "receipt_of_manifest",
]

PARTS: dict[str, Callable[[WeightSource], dict[str, Part]]] = {
    "dit": dit_parts,
    "text_encoder": text_encoder_parts,
    "vae": vae_parts,
}
AGAIN = "Download or convert it again."
CHANGED = "One of them was changed after they were made. Convert again."


def network_findings(source: WeightSource, component: str | None) -> Iterator[str]:
    """What keeps the file from being the networks that it holds.

    Args:
        source: the opened file.
        component: what it must be; None: whatever it is.
    """
    try:
        for name in (component,) if component else components_in(source):
            check_network(name, source, PARTS[name](source))
        if "tokenizer.ggml.tokens" in source.metadata:
            Vocabulary.from_gguf(source.metadata, str(source.path))
    except ZQuantError as error:
        yield str(error)


def receipt_findings(name: str, receipt: Receipt | None, crc32: Mapping[str, int]) -> Iterator[str]:
    """Tensors whose bytes are not those that were written."""
    if receipt is None:
        return
    for tensor, expected in receipt.crc32.items():
        if crc32[tensor] != expected:
            yield (
                f"{name}: the bytes of {tensor!r} were changed: crc32 is {crc32[tensor]:08x}, "
                f"expected {expected:08x}. {AGAIN}"
            )


def receipt_of_manifest(manifest: Mapping[str, Any], component: str) -> Receipt | None:
    """What `model.json` knows of a file that has no receipt inside: no checksums, but errors."""
    listed = manifest.get("tensors", {}).get(component)
    if not isinstance(listed, dict) or not all(isinstance(t, dict) for t in listed.values()):
        return None
    errors = {name: said.get("relative_rms_error") for name, said in listed.items()}
    if not all(isinstance(error, float | int) for error in errors.values()):
        return None
    entry = manifest["files"][component]
    return Receipt(
        version=str(manifest.get("zquant")),
        policy=str(entry.get("policy")),
        source_files=(str(manifest.get("source")),),
        imatrix="an imatrix" if entry.get("imatrix") else "",
        errors={name: rounded(error) for name, error in errors.items()},
        crc32={},
        source_sum64={},
    )


def manifest_findings(
    name: str,
    source: WeightSource,
    component: str,
    manifest: Mapping[str, Any],
    receipt: Receipt | None,
) -> Iterator[str]:
    """What `model.json` says of a file and the file does not.

    Args:
        name: of the file.
        source: the opened file.
        component: as `model.json` calls it.
        manifest: its content.
        receipt: the file's own.
    """
    entry = manifest["files"][component]
    size = sum(reader.size for reader in source.readers)
    if entry.get("bytes", size) != size:
        yield f"{name}: has {size} bytes; model.json says {entry['bytes']}. {AGAIN}"
    policy = entry.get("policy")
    if receipt and (receipt.policy, receipt.version) != (policy, manifest.get("zquant")):
        yield (
            f"{name}: says it is {receipt.policy} by zquant {receipt.version}; model.json says "
            f"{policy} by {manifest.get('zquant')}. {CHANGED}"
        )
    listed = manifest.get("tensors", {}).get(component)
    if not isinstance(listed, dict):
        return
    absent = sorted(source.tensors.keys() ^ listed.keys())
    if absent:
        where = name if absent[0] in source.tensors else "model.json"
        yield (
            f"{name}: {len(absent)} tensors are not in both the file and model.json (first: "
            f"{absent[0]!r}, in {where} only). {CHANGED}"
        )
        return
    for tensor, info in source.tensors.items():
        yield from _tensor_findings(f"{name}: {tensor!r}", info.qtype.name, listed[tensor])
        if receipt is None or not isinstance(listed[tensor], dict):
            continue
        error, own = listed[tensor].get("relative_rms_error"), receipt.errors[tensor]
        if not isinstance(error, float | int) or rounded(error) != own:
            yield (
                f"{name}: {tensor!r} has the error {own:.4g} by the file and {error!r:.20} by "
                f"model.json. {CHANGED}"
            )


def _tensor_findings(where: str, qtype: str, said: object) -> Iterator[str]:
    expected = said.get("qtype") if isinstance(said, dict) else said
    if expected != qtype:
        yield f"{where} is {qtype}; model.json says {expected!r:.40}. {CHANGED}"
