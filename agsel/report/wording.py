"""Numbers as people read them."""

from __future__ import annotations

from datetime import UTC, datetime

from agsel.monitor import duration

MINUS = "\N{MINUS SIGN}"


def number(value: float) -> str:
    """Four digits of it, or all of a whole number: `1,234`, `0.9876`, `3.333e-05`."""
    if float(value).is_integer() and abs(value) < 1e15:
        text = f"{value:,.0f}"
    elif 1e-3 <= abs(value) < 1e4:
        text = f"{value:,.4g}"
    else:
        text = f"{value:.3e}" if abs(value) < 1 else f"{value:,.0f}"
    return text.replace("-", MINUS, 1) if value < 0 else text


def points(value: float) -> str:
    """Between two shares, for example `2.0 points`."""
    return f"{100 * value:.1f} points"


def share(value: float) -> str:
    """For example `12.5 %`."""
    return f"{100 * value:.1f} %"


def gigabytes(value: float) -> str:
    """Of 10^9 bytes, for example `18.7 GB`, or `669 MB`."""
    if value < 1:
        return f"{1000 * value:.3g} MB"
    return f"{value:.1f} GB" if value >= 10 else f"{value:.3g} GB"


def size(count: int) -> str:
    """Of bytes, for example `104.6 kB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def seconds(value: float) -> str:
    """For example `1:02:03`, or `34.2 s`."""
    return duration(value) if value >= 60 else f"{value:.3g} s"


def milliseconds(value: float) -> str:
    """For example `941 ms`."""
    return f"{value:.3g} ms" if value < 1000 else f"{value:,.0f} ms"


def moment(time: datetime | str) -> str:
    """For example `2026-11-28 15:29:02 UTC`."""
    known = datetime.fromisoformat(time) if isinstance(time, str) else time
    return f"{known.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def change(value: float, base: float) -> str:
    """By how much of the base a value lies above it: `+3.2 %`."""
    percent = 100 * (value - base) / abs(base)
    text = f"{percent:+,.1f} %" if abs(percent) >= 0.05 else f"{percent:+.1g} %"
    return MINUS + text[1:] if value < base else text
