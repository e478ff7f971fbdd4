"""Sizes, rates and durations as people write them, and back.

``parse_bytes`` and ``parse_rate`` read the hardware files of ServerlessLLM: every prefix is a power of 1024, ``GB`` and
``GiB`` alike, and ``Gbps`` counts bits (1024**3 / 8 bytes per second).
"""

from __future__ import annotations

import math
import re
import sys
from array import array

from sllmdask.errors import ConfigError

_POWER = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)I?B?\s*$", re.IGNORECASE)
_RATE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)(?:(I?B)/S|BPS)\s*$", re.IGNORECASE)
_DURATION = re.compile(r"^\s*(-?\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?\s*$", re.IGNORECASE)
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _is_number(value: str | int | float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def parse_bytes(text: str | int | float) -> int:
    """Bytes in ``"4 GiB"``, ``"32GB"``, ``"512"`` or a number; raises :class:`ConfigError`."""
    if _is_number(text):
        return int(text)
    match = _SIZE.match(str(text))
    if not match:
        raise ConfigError(f"{text!r} is not a size; write for example '512 MiB' or '32GB'.")
    return int(float(match[1]) * 1024 ** _POWER[match[2].upper()])


def parse_rate(text: str | int | float) -> float:
    """Bytes per second in ``"5GB/s"``, ``"10Gbps"`` (bits) or a number; raises :class:`ConfigError`."""
    if _is_number(text):
        return float(text)
    match = _RATE.match(str(text))
    if not match:
        raise ConfigError(f"{text!r} is not a bandwidth; write for example '5GB/s' or '10Gbps'.")
    per_s = float(match[1]) * 1024 ** _POWER[match[2].upper()]
    return per_s if match[3] else per_s / 8


def parse_seconds(text: str | int | float) -> float:
    """Seconds in ``"250 ms"``, ``"5m"``, ``"-1"`` or a number; raises :class:`ConfigError`."""
    if _is_number(text):
        return float(text)
    match = _DURATION.match(str(text))
    if not match:
        raise ConfigError(f"{text!r} is not a duration; write for example '250 ms', '30s' or '5m'.")
    return float(match[1]) * _SECONDS[(match[2] or "s").lower()]


def format_bytes(nbytes: float) -> str:
    """``1536`` as ``"1.5 KiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """``0.0123`` as ``"12 ms"``, ``75`` as ``"1m15s"``."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s"


def float32s(data: bytes) -> list[float]:
    """The numbers of little-endian float32 bytes."""
    numbers = array("f", data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()
