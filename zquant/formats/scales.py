"""Scales that lie beside weights, as ComfyUI's quantized safetensors have them.

    X.weight        F8_E4M3, F8_E5M2 or I8 `[N, K]`
    X.weight_scale  F32: one number, or one per row; X.scale_weight in older files
    X.comfy_quant   uint8, JSON: {"format": "int8_tensorwise", "convrot": true, ...}

The JSON may be in the file's metadata instead, for all weights at once. Scales of activations
(X.input_scale, X.scale_input) and the old marker `scaled_fp8` are not needed to decode. A weight
without a scale is plain numbers. Formats whose scales are shared by blocks (nvfp4, mxfp8) are
refused.

Source: ComfyUI `comfy/ops.py` and its `_quantization_metadata`; comfy-kitchen for the rotation.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zquant.errors import FormatError
from zquant.formats.source import TensorInfo, quoted
from zquant.quant.qtypes import EIGHT_BIT

__all__ = ["quant_formats", "with_scales"]

METADATA_KEY = "_quantization_metadata"
FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
ROTATION = 256  # of int8_tensorwise with convrot, where it says nothing else

_SCALES = (".weight_scale", ".scale_weight")
_UNNEEDED = (".comfy_quant", ".input_scale", ".scale_input", ".weight_scale_2", ".scale_input_2")
_GROUPS = (4, 16, 64, 256, 1024)
_MARKER = "scaled_fp8"
_MAX_JSON = 65536  # bytes of one tensor's description
_REMEDY = "Use the bf16, fp8 or int8 file of the same model, or a GGUF file."


def with_scales(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, Any]
) -> dict[str, TensorInfo]:
    """The weights with their scales, which are tensors of their own no longer.

    Args:
        tensors: name without prefix -> tensor, of one file.
        metadata: of the file.

    Raises:
        FormatError: a weight is in a format that zquant cannot read, or its scale does not fit.
    """
    formats = quant_formats(tensors, metadata)
    found = {}
    for name, info in tensors.items():
        if name.endswith((*_SCALES, *_UNNEEDED)) or name.rpartition(".")[2] == _MARKER:
            continue
        module, _, leaf = name.rpartition(".")
        if leaf == "weight":
            scale = next((tensors[module + s] for s in _SCALES if module + s in tensors), None)
            info = _scaled(info, scale, formats.get(module, {}))
        found[name] = info
    return found


def quant_formats(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, Any]
) -> dict[str, Mapping[str, Any]]:
    """Module name, as in `tensors` -> what the file says of its format, most often nothing.

    Raises:
        FormatError: what it says is not JSON.
    """
    listed = _listed(tensors, metadata)
    formats: dict[str, Mapping[str, Any]] = {}
    for name, info in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "comfy_quant":
            formats[module] = _described(info)
        elif leaf == "weight":
            said = listed.get(info.name.removesuffix(".weight"))
            if isinstance(said, dict):
                formats.setdefault(module, said)
    return formats


def _listed(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """Module name in the file -> description, from the metadata of the file."""
    text = metadata.get(METADATA_KEY)
    if not isinstance(text, str):
        return {}
    file = next((info.reader.name for info in tensors.values()), "the file")
    layers = _object(text, f"{file}: metadata {METADATA_KEY!r}").get("layers")
    return layers if isinstance(layers, dict) else {}


def _described(info: TensorInfo) -> Mapping[str, Any]:
    where = f"{info.reader.name}: tensor {quoted(info.name)}"
    if info.nbytes > _MAX_JSON:
        raise FormatError(
            f"{where} has {info.nbytes} bytes; expected a JSON object of at most {_MAX_JSON}. "
            "Download the file again."
        )
    return _object(info.reader.read(info.offset, info.nbytes).tobytes(), where)


def _object(text: str | bytes, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not JSON. Download the file again.") from error
    return value if isinstance(value, dict) else {}


def _scaled(info: TensorInfo, scale: TensorInfo | None, said: Mapping[str, Any]) -> TensorInfo:
    """`info` with its scale and rotation, after checking that they can be used."""
    where = f"{info.reader.name}: tensor {quoted(info.name)}"
    kind = said.get("format")
    if kind is not None and kind not in FORMATS:
        raise FormatError(
            f"{where} is {quoted(kind)}, which zquant cannot read. Readable of ComfyUI's formats: "
            f"{', '.join(FORMATS)}. {_REMEDY}"
        )
    if scale is None:
        if info.qtype.name == "I8":
            raise FormatError(
                f"{where} is I8 and has no scale; expected {_SCALES[0]!r} beside it. The file is "
                "incomplete; download it again."
            )
        return info
    _check_scale(info, scale, where)
    return replace(info, scale=scale, rotation=_rotation(info, said, where))


def _check_scale(info: TensorInfo, scale: TensorInfo, where: str) -> None:
    readable = scale.qtype.is_float
    n_rows = info.shape[0] if info.shape else 1
    shape = (scale.n_weights,) if len(scale.shape) < 2 else scale.shape
    if not readable or shape not in {(1,), (n_rows,), (1, 1), (n_rows, 1)}:
        raise FormatError(
            f"{where} has the scale {quoted(scale.name)} of type {scale.qtype} and shape "
            f"{list(scale.shape)}; expected F32, one number or one for each of {n_rows} rows. "
            f"Scales of blocks are not read. {_REMEDY}"
        )


def _rotation(info: TensorInfo, said: Mapping[str, Any], where: str) -> int:
    """Group of the rotation; 0 for none."""
    if not said.get("convrot"):
        return 0
    group = said.get("convrot_groupsize", ROTATION)
    known = [each for each in _GROUPS if each == group and type(group) is int]
    if not known or len(info.shape) != 2 or info.shape[1] % known[0]:
        raise FormatError(
            f"{where} of shape {list(info.shape)} is rotated in groups of {quoted(group)}; "
            f"expected a power of 4 that divides its rows. {_REMEDY}"
        )
    if info.qtype != EIGHT_BIT["I8"]:
        raise FormatError(f"{where} is rotated and {info.qtype}; expected I8. {_REMEDY}")
    return known[0]
