"""What a setting may be: a number in a range, where what is no number or not a finite one lies in none, or a choice."""

import math
from collections.abc import Sequence

from sinkbed.plain_text import did_you_mean


def check_number(
    name: str,
    value: float,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float = math.inf,
    below: float = math.inf,
    integer: bool = False,
) -> None:
    """Raise ValueError for a setting that is no finite number in a range; `above` and `below` exclude the bound."""
    low = -math.inf if least is None else least
    number = isinstance(value, int if integer else int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (number and low <= value <= most and value < below and (above is None or value > above)):
        bounds = [f"at least {least:g}"] if least is not None else []
        bounds += [f"more than {above:g}"] if above is not None else []
        bounds += [f"at most {most:g}"] if most < math.inf else []
        bounds += [f"less than {below:g}"] if below < math.inf else []
        expected = ("an integer of " if integer else "") + (" and ".join(bounds) or "a finite number")
        expected = f"a finite number, {expected}" if value in (math.inf, -math.inf) and bounds else expected
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError for a setting that is none of the choices."""
    if value not in choices:
        raise ValueError(
            f"{name}: expected one of {', '.join(choices)}, got {value!r}{did_you_mean(str(value), choices)}"
        )
