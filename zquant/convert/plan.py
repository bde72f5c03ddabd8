"""What a conversion will write: every file, tensor, qtype and byte, before any work starts.

Headers of the sources are read, weights are not.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

import zquant
from zquant.convert.allocation import MIXED, Allocation, allocation_rules
from zquant.convert.headers import Listed, Metadata, describe, file_header
from zquant.convert.importance import (
    ImatrixFile,
    Importances,
    header_pairs,
    read_importances,
    weighs,
)
from zquant.convert.place import Place, choose_place
from zquant.convert.receipts import made_pairs, measured_pairs
from zquant.errors import CheckpointError
from zquant.formats.detect import open_source
from zquant.formats.model_folder import VARIANTS, Variant
from zquant.formats.names import (
    COMPONENTS,
    Part,
    dit_file_names,
    dit_parts,
    text_encoder_file_names,
    text_encoder_parts,
    vae_file_names,
    vae_file_shape,
    vae_parts,
)
from zquant.formats.origin import Origin, find_origin
from zquant.formats.source import WeightSource
from zquant.quant.codec import holds_lock
from zquant.quant.policy import Component, assign, policy_by_name
from zquant.quant.qtypes import QTYPES, QType

__all__ = ["ConversionPlan", "ConvertRequest", "Output", "OutputTensor", "plan_conversion"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertRequest:
    """What to convert, into what.

    Attributes:
        out: folder to write; created if absent.
        source: folder, all-in-one file, Hugging Face id or URL; None if all files are given.
        dit: a single file or its URL, in place of the source's; likewise `text_encoder` and `vae`.
        text_encoder: see `dit`.
        vae: see `dit`.
        qtype: a policy of `zquant.quant.policy`.
        text_encoder_qtype: the text encoder's policy; None: `qtype`.
        tensor_types: (regular expression on file names, qtype), before the policy's rules.
        variant: "turbo" or "base" where the source does not say; None: Turbo.
        allocation: the qtypes of every tensor of a component, in place of its policy.
        imatrix: importance files, which `zquant calibrate` makes.
        allow_requantize: accept sources that are quantized already.
        threads: None: one per core.
        device: where to quantize: "auto", "cpu", "cuda" or "cuda:1".
        resume: go on from the `.part` files of an interrupted run.
    """

    out: Path
    source: str | None = None
    dit: str | Path | None = None
    text_encoder: str | Path | None = None
    vae: str | Path | None = None
    qtype: str = "Q4_K_M"
    text_encoder_qtype: str | None = None
    tensor_types: tuple[tuple[str, QType], ...] = ()
    allocation: Allocation = field(default_factory=dict)
    variant: str | None = None
    imatrix: tuple[Path, ...] = ()
    allow_requantize: bool = False
    threads: int | None = None
    device: str = "auto"
    resume: bool = False

    def __post_init__(self) -> None:
        if self.variant is not None and self.variant not in VARIANTS:
            raise ValueError(f"variant {self.variant!r} is unknown; known: {', '.join(VARIANTS)}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}; it must be at least 1")
        for pattern, _ in self.tensor_types:
            _check_pattern(pattern)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputTensor:
    """A tensor to write: the rows of `parts`, one after another, as `qtype`.

    `importance` is float32 `[K]`, one number for each input; None: all inputs are equal.
    """

    name: str
    qtype: QType
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    offset: int
    importance: npt.NDArray[np.float32] | None = field(default=None, compare=False, repr=False)

    @property
    def n_weights(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return self.n_weights // self.qtype.qblock * self.qtype.qblock_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A file to write: `header`, then every tensor at its offset, zeros up to `total_size`.

    The header has zeros in the place of what is measured; `sealed` is the final one. `metadata` is
    the rest of what it says.
    `imatrix` are the importance files that say something about its tensors.
    """

    component: str
    path: Path
    policy: str
    metadata: Metadata
    header: bytes
    tensors: tuple[OutputTensor, ...]
    total_size: int
    source: WeightSource
    imatrix: tuple[ImatrixFile, ...] = ()

    @property
    def n_weights(self) -> int:
        """Number of weights in the file."""
        return sum(t.n_weights for t in self.tensors)

    @property
    def bpw(self) -> float:
        """Stored bits per weight."""
        return 8 * sum(t.nbytes for t in self.tensors) / self.n_weights

    @property
    def unweighed(self) -> list[str]:
        """Names of the tensors that importance would help and that have none."""
        return [t.name for t in self.tensors if t.importance is None and weighs(t.qtype)]

    def sealed(self, measured: Metadata) -> bytes:
        """The header with what was measured, from `receipts.measured_pairs`; of the same length."""
        listed = [(t.name, t.qtype, t.shape) for t in self.tensors]
        metadata = {**self.metadata, **measured}
        return file_header(self.component, self.policy, metadata, listed).header

    @property
    def fingerprint(self) -> str:
        """Changes with the source, the options and the version: what a resumed run must share."""
        stamps = [reader.stamp for reader in self.source.readers]
        what = [zquant.__version__, hashlib.sha256(self.header).hexdigest(), stamps]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionPlan:
    """Everything a conversion will do."""

    request: ConvertRequest
    origin: Origin
    variant: Variant
    place: Place
    outputs: tuple[Output, ...]

    @property
    def total_size(self) -> int:
        """Bytes of all files."""
        return sum(output.total_size for output in self.outputs)

    @property
    def n_weights(self) -> int:
        """Weights of all files."""
        return sum(output.n_weights for output in self.outputs)

    @property
    def n_locked(self) -> int:
        """Weights that threads would quantize one after the other, see `codec.holds_lock`."""
        tensors = (t for output in self.outputs for t in output.tensors)
        return sum(
            t.n_weights for t in tensors if holds_lock(t.qtype, importance=t.importance is not None)
        )


@dataclass(frozen=True, slots=True)
class _Component:
    """How one component is read and named."""

    parts: Callable[[WeightSource], dict[str, Part]]
    file_names: Callable[[Iterable[str]], list[tuple[str, tuple[str, ...]]]]


_COMPONENTS = {
    "dit": _Component(dit_parts, dit_file_names),
    "text_encoder": _Component(text_encoder_parts, text_encoder_file_names),
    "vae": _Component(vae_parts, vae_file_names),
}


def plan_conversion(request: ConvertRequest) -> ConversionPlan:
    """Read the headers and decide everything.

    Raises:
        ZQuantError: the source is missing, damaged, another model, or quantized already; or the
            output would replace its own source; or the device is not there.
        ValueError: a policy or tensor type is unknown or matches nothing.
    """
    place = choose_place(request.device)
    policies = {c: policy_by_name(request.qtype) for c in COMPONENTS}
    if request.text_encoder_qtype:
        policies["text_encoder"] = policy_by_name(request.text_encoder_qtype)
    policies |= dict.fromkeys(request.allocation, MIXED)
    files = {"dit": request.dit, "text_encoder": request.text_encoder, "vae": request.vae}
    origin = find_origin(request.source, {c: path for c, path in files.items() if path})
    variant = VARIANTS[request.variant] if request.variant else origin.variant
    importances = read_importances(request.imatrix)
    outputs = tuple(_output(request, origin, c, policies[c], importances) for c in COMPONENTS)
    _check_overrides(request, outputs)
    importances.check_used(
        [file for output in outputs for file in output.imatrix],
        [t.name for output in outputs for t in output.tensors if weighs(t.qtype)],
    )
    if any(output.imatrix for output in outputs):
        place = place.without_gpu("importance is weighed there only")
    _keep_sources(outputs)
    return ConversionPlan(
        request=request,
        origin=origin,
        variant=variant or VARIANTS["turbo"],
        place=place,
        outputs=outputs,
    )


def _output(
    request: ConvertRequest,
    origin: Origin,
    component: str,
    policy: str,
    importances: Importances,
) -> Output:
    source = open_source(origin.paths[component])
    parts = _COMPONENTS[component].parts(source)
    _refuse_quantized(request, source, parts)
    metadata = describe(component, origin, source, parts)
    names = _COMPONENTS[component].file_names(parts)
    grouped = {name: tuple(parts[ours] for ours in officials) for name, officials in names}
    listed = _listed(request, component, policy, grouped)
    vectors, used = importances.of_file(listed, dict(names))
    metadata |= header_pairs(used, len(vectors))
    zeros: Metadata = {}
    if component != "vae":
        metadata |= made_pairs(zquant.__version__, policy, request.tensor_types, source)
        zeros = measured_pairs(*[[0] * len(listed)] * 3)
    header = file_header(component, policy, {**metadata, **zeros}, listed)
    tensors = tuple(
        OutputTensor(
            name=name,
            qtype=qtype,
            shape=shape,
            parts=grouped[name],
            offset=offset,
            importance=vectors.get(name),
        )
        for (name, qtype, shape), offset in zip(listed, header.offsets, strict=True)
    )
    file = "vae.safetensors" if component == "vae" else f"{component}-{policy}.gguf"
    return Output(
        component=component,
        path=request.out / file,
        policy="as stored" if component == "vae" else policy,
        metadata=metadata,
        header=header.header,
        tensors=tensors,
        total_size=header.total_size,
        source=source,
        imatrix=used,
    )


def _listed(
    request: ConvertRequest,
    component: str,
    policy: str,
    grouped: Mapping[str, tuple[Part, ...]],
) -> Listed:
    """Name, qtype and shape of every tensor of a file."""
    shapes = {name: _joined_shape(component, name, parts) for name, parts in grouped.items()}
    if component == "vae":  # kept as it is: small, and all convolutions
        qtypes = {
            n: p[0].qtype if p[0].qtype.is_float else QTYPES["F32"] for n, p in grouped.items()
        }
    else:
        overrides = [o for o in request.tensor_types if any(re.search(o[0], n) for n in shapes)]
        network: Component = "dit" if component == "dit" else "text_encoder"
        if (allocation := request.allocation.get(component)) is not None:
            overrides += allocation_rules(component, allocation, shapes)
            policy = request.qtype  # the allocation has a rule for every tensor
        qtypes = assign(network, shapes, policy, overrides)
    return [(name, qtypes[name], shape) for name, shape in shapes.items()]


def _joined_shape(component: str, name: str, parts: tuple[Part, ...]) -> tuple[int, ...]:
    """Shape in the output: rows added up, the VAE's attention as convolutions."""
    shape = parts[0].shape
    if len(parts) > 1:
        shape = (sum(part.shape[0] for part in parts), *shape[1:])
    return vae_file_shape(name, shape) if component == "vae" else shape


def _refuse_quantized(
    request: ConvertRequest, source: WeightSource, parts: Mapping[str, Part]
) -> None:
    packed = [(name, part.qtype) for name, part in parts.items() if not part.qtype.is_float]
    if packed and not request.allow_requantize:
        raise CheckpointError(
            f"{source.path}: {len(packed)} of {len(parts)} tensors are quantized already (first: "
            f"{packed[0][0]!r}, {packed[0][1]}); quantizing again adds error on error. Convert the "
            f"original, or accept the loss with --allow-requantize."
        )


def _keep_sources(outputs: tuple[Output, ...]) -> None:
    """No output may take the place of a source: an interrupted run could not be resumed."""
    sources = {Path(reader.name).resolve() for o in outputs for reader in o.source.readers}
    for output in outputs:
        if output.path.resolve() in sources:
            raise CheckpointError(
                f"{output.path}: is a source and would be replaced. Choose another OUT folder."
            )


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"--tensor-type {pattern!r} is not a regular expression: {error}"
        ) from error


def _check_overrides(request: ConvertRequest, outputs: tuple[Output, ...]) -> None:
    """Every --tensor-type must say something about some tensor."""
    names = [t.name for output in outputs if output.component != "vae" for t in output.tensors]
    for pattern, qtype in request.tensor_types:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"--tensor-type {pattern}={qtype} matches none of {len(names)} tensors; names look "
                f"like {names[-1]!r}. See all of them with --dry-run."
            )
