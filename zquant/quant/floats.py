"""F32, F16 and BF16: weights stored as plain floating-point numbers; and 8-bit ones, to decode.

F16 and BF16 round to nearest, ties to even; too large becomes infinity, NaN stays NaN (its payload
is not kept).

Source: ggml `GGML_FP32_TO_FP16`, `ggml_compute_fp32_to_bf16`.
"""

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["FLOAT_DTYPES", "PLAIN_DTYPES", "dequantize", "quantize"]

FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PLAIN_DTYPES = {
    **FLOAT_DTYPES,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
}


def quantize(weights: npt.NDArray[np.float32], storage_dtype: torch.dtype) -> npt.NDArray[np.uint8]:
    """Round float32 `[N, K]`, contiguous, to `storage_dtype`; its bytes, uint8 `[N, K * size]`."""
    stored = torch.from_numpy(weights).to(storage_dtype, copy=True)
    packed: npt.NDArray[np.uint8] = stored.view(torch.uint8).numpy()
    return packed


def dequantize(packed: torch.Tensor, storage_dtype: torch.dtype, out: torch.Tensor) -> None:
    """Convert uint8 `[N, K * size]` into `out [N, K]` of any float dtype on the same device.

    `storage_dtype` is one of `PLAIN_DTYPES`; every 8-bit number is exact in each float dtype.
    """
    out.copy_(packed.view(storage_dtype))
