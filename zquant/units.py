"""Numbers for people: bytes as GiB, seconds, rates. The only place that formats them.

Sizes are `int` bytes inside zquant and binary units (1 GiB = 2**30 bytes) outside.
"""

import re

__all__ = ["format_bytes", "format_count", "format_seconds", "parse_bytes"]

_BINARY = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SUFFIXES = {name.lower(): size for name, size in _BINARY.items()}
_SUFFIXES |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SUFFIXES |= {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "": 1}


def format_bytes(n_bytes: float) -> str:
    """Bytes as the largest binary unit that keeps the number at least 1, e.g. "7.5 GiB"."""
    unit = next((u for u in reversed(_BINARY) if abs(n_bytes) >= _BINARY[u]), "B")
    value = n_bytes / _BINARY[unit]
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def parse_bytes(text: str) -> int:
    """Bytes from "4GiB", "1.5 GiB", "800MB" or a plain number of bytes.

    Raises:
        ValueError: `text` is not a positive number with a known unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].lower() not in _SUFFIXES or float(match[1]) <= 0:
        raise ValueError(f"size {text!r} is not a number of bytes; write it like 4GiB or 800MiB")
    return int(float(match[1]) * _SUFFIXES[match[2].lower()])


def format_seconds(seconds: float) -> str:
    """Seconds as "0.42 s", "12.3 s", "4 min 05 s" or "1 h 02 min"."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_count(n: float) -> str:
    """A count with a metric suffix, e.g. "6.15 G"."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= limit:
            return f"{n / limit:.2f} {suffix}"
    return f"{n:.0f}"
