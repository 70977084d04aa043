"""A number that is not finite is never a result: comparisons with it are false, so that it would read as "no sink"."""

import dataclasses
import math
from typing import Any, TypeVar

T = TypeVar("T")


def finite(result: T, what: str) -> T:
    """The result itself, a number, dataclass or nested container of them. Raises ValueError that names a quantity in
    it that is not finite."""
    place = _not_finite(result, "")
    if place is not None:
        raise ValueError(
            f"measuring {what}: expected finite numbers, got {place}; the model overflows or its weights are "
            "damaged. Measure it in float32 (probe: --dtype float32), or an earlier checkpoint"
        )
    return result


def _not_finite(value: Any, path: str) -> str | None:
    """Value and place of the first number that is not finite."""
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{value} in {path.lstrip('.') or 'the result'}"
    if dataclasses.is_dataclass(value):
        items = [(f"{path}.{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, dict):
        items = [(f"{path}.{key}", item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
    else:
        return None
    return next((place for name, item in items if (place := _not_finite(item, name)) is not None), None)
