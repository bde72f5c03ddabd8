"""Triton kernels for quantized weights, usable without zquant: torch and triton only.

Each file holds one kernel family: formula, compile cases, reference, kernel, wrapper.
"""
