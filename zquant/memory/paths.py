"""Which path every kernel family takes on a device, and why: one place, readable by people.

Nothing else decides between Triton and torch, int8 and exact. `zquant run` names the choice and
`zquant doctor` lists it. Kernels that cannot run are replaced by their torch references, which give
the same picture.
"""

from dataclasses import dataclass

import torch
from zquant_kernels import runtime

from zquant.errors import DeviceError
from zquant.layers.compute import Compute

__all__ = ["ATTENTIONS", "AUTO", "COMPUTES", "KERNELS", "Path", "Paths", "choose"]

AUTO = "auto"
COMPUTES = (AUTO, "exact", "int8")
KERNELS = (AUTO, "triton", "torch")
ATTENTIONS = ("sdpa", "int8")

# GeForce and workstation cards multiply int8 at four times the rate of bfloat16 with float32 sums,
# data-center cards at twice, where the quantizing around it eats the gain
INT8_PAYS = {(7, 5), (8, 6), (8, 7), (8, 9), (12, 0), (12, 1)}
MATRIX_CAPABILITY = (8, 0)  # the oldest whose matrix instructions Triton emits


@dataclass(frozen=True, slots=True)
class Path:
    """How one kernel family is computed here, and why not otherwise (empty: nothing better)."""

    family: str
    path: str
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """Every choice.

    Attributes:
        compute: of the DiT's blocks.
        reason: why exact or int8.
        forbidden: why no kernel may be launched; empty when they may.
        families: one row per kernel family.
    """

    compute: Compute
    reason: str
    forbidden: str
    families: tuple[Path, ...]


def choose(
    device: torch.device,
    dtype: torch.dtype,
    *,
    compute: str = AUTO,
    kernels: str = AUTO,
    attention: str = "sdpa",
) -> Paths:
    """Choose the path of every family.

    Args:
        device: where the networks run.
        dtype: of exact products.
        compute: one of `COMPUTES`.
        kernels: one of `KERNELS`; "triton" insists, "torch" forbids.
        attention: one of `ATTENTIONS`.

    Raises:
        DeviceError: "triton" is asked for and cannot run here.
        ValueError: a choice is unknown.
    """
    _check("compute", compute, COMPUTES)
    _check("kernels", kernels, KERNELS)
    _check("attention", attention, ATTENTIONS)
    forbidden = "switched off by --kernels torch" if kernels == "torch" else ""
    why = forbidden or runtime.why_not(device)
    if kernels == "triton" and why:
        raise DeviceError(f"--kernels triton cannot run here: {why}. Use --kernels auto.")
    int8, reason = _int8(device, compute, why)
    chosen = Compute(dtype=dtype, int8=int8, int8_attention=attention == "int8")
    return Paths(
        compute=chosen,
        reason=reason,
        forbidden=forbidden,
        families=_families(device, chosen, why),
    )


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r} is unknown; known: {', '.join(known)}")


def _int8(device: torch.device, compute: str, why: str) -> tuple[bool, str]:
    """Whether linears are int8, and the reason."""
    if compute != AUTO:
        return compute == "int8", "as asked"
    if device.type != "cuda":
        return False, f"int8 pays on GPUs only; this is '{device.type}'"
    capability = runtime.capability(device)
    shown = "compute capability {}.{}".format(*capability)
    if capability not in INT8_PAYS:
        return False, f"{shown} multiplies int8 too little faster to pay for quantizing"
    if not runtime.has_tensor_cores(device):
        return False, f"'{torch.cuda.get_device_name(device)}' has no tensor cores for int8"
    if why:
        return False, f"int8 needs Triton to be fast: {why}"
    return True, f"{shown} multiplies int8 at four times the rate of floats"


def _families(device: torch.device, compute: Compute, why: str) -> tuple[Path, ...]:
    """The rows of `zquant doctor`."""
    fast = "torch" if why else "Triton"
    dtype = str(compute.dtype).removeprefix("torch.")
    gemm = f"expanded to {dtype}, " + ("cuBLAS" if device.type == "cuda" else "torch")
    no_matrix = _no_matrix(device, why)
    product = fast
    if no_matrix and not why:
        product = "torch._int_mm, finished by Triton"
    scores = "torch SDPA"
    if compute.int8_attention:
        scores = "int8 scores, " + ("torch" if no_matrix else "Triton")
    return (
        Path("dequantize", fast, why),
        Path("linear, exact", gemm),
        Path("linear, int8", product, no_matrix),
        Path("fused block", fast, why),
        Path("attention", scores, no_matrix if compute.int8_attention else ""),
        Path("VAE norm", fast, why),
        Path("quantize (convert)", "torch and numpy on the CPU" if why else "Triton", why),
    )


def _no_matrix(device: torch.device, why: str) -> str:
    """Why Triton's matrix instructions cannot be used; empty when they can."""
    if why or device.type != "cuda":
        return why
    if runtime.capability(device) < MATRIX_CAPABILITY:
        return "Triton has no matrix instructions for compute capability below 8.0"
    return ""
