"""Which charts W&B has of a point: a dozen of the sink, the losses, and maps of layers and heads over training.

metrics.jsonl keeps every figure. With a chart a figure there would be more than a thousand at 32 layers: layers become
maps, layers down, measurements across.
"""

import itertools
import math
import re
from typing import Any, Literal, NamedTuple

Detail = Literal["headline", "layers", "all"]
MOST_OF_SINK = 12
"""Charts of the section `sink`."""
_SINK = (
    *("sink/rate_eps0.3/{}", "sink/mass/{}", "sink/packed_document_mass", "sink/packed_first_key_mass"),
    *("sink/rate_placed_eps0.3/{}", "sink/rate_deep_eps0.3/{}", "sink/strongest_head/{}", "sink/val_loss/{}"),
)
_MODES = 2
"""Inference modes of these charts and maps: the first of those measured, where key 0 can be seen."""
_LAYER = re.compile(r"(?P<name>.*)/layer(?P<layer>\d+)(?P<mode>/[^/]*)?")


class Map(NamedTuple):
    """A map of values from 0 to `top`, [rows][columns], and what it is of."""

    values: list[list[float]]
    top: float
    caption: str


class Charts:
    """Chooses a row of W&B's history for each point of metrics.jsonl, all of which it must see in order."""

    def __init__(self, detail: Detail) -> None:
        self.detail = detail
        self.columns: dict[str, list[list[float]]] = {}
        """Map -> the layers' figures at each measurement so far."""

    def row(self, point: dict[str, Any]) -> dict[str, Any]:
        """Key -> number, text or `Map`, without what W&B is not sent."""
        numbers = {key: value for key, value in point.items() if not isinstance(value, list) and value is not None}
        row = {"trainer/global_step": numbers.pop("step")}
        modes = [m for m in _modes_of(numbers) if m != "first_key_masked"][:_MODES]
        numbers |= {f"sink/val_loss/{mode}": point[key] for mode in modes if (key := f"val/loss/{mode}") in numbers}
        if self.detail == "all":
            row |= numbers
        else:
            kinds = ("sink/",) if self.detail == "layers" else ("sink/", "state/", "mixing/")
            row |= {
                key: value
                for key, value in numbers.items()
                if not key.startswith(kinds) and not _LAYER.fullmatch(key) and not _of_another(key, modes)
            }
            keys = dict.fromkeys(key.format(mode) for key in _SINK for mode in modes)
            of_sink = [key for key in keys if key in numbers][:MOST_OF_SINK]
            row |= {key: numbers[key] for key in of_sink}
        maps = self._maps(numbers, modes) | _heads(point, modes)  # always, as the next ones hold these
        row |= {} if self.detail == "headline" else maps
        # Sections are in alphabetical order: the sink's comes first.
        return {f"state/{key}" if key.startswith("mixing/") else key: value for key, value in row.items()}

    def _maps(self, numbers: dict[str, Any], modes: list[str]) -> dict[str, Map]:
        """A map for each figure of layers in this point, of its measurements so far."""
        layers: dict[str, dict[int, float]] = {}
        for key, value in numbers.items():
            if (match := _LAYER.fullmatch(key)) and not _of_another(key, modes):
                name = match["name"].replace("sink/", "sink_maps/") + (match["mode"] or "")
                layers.setdefault(name, {})[int(match["layer"])] = value
        maps = {}
        for key, of_layer in layers.items():  # a figure that is not finite is not among them
            columns = self.columns.setdefault(key, [])
            columns.append([of_layer.get(layer, math.nan) for layer in range(max(of_layer) + 1)])
            values = [list(line) for line in itertools.zip_longest(*columns, fillvalue=math.nan)]
            top = max(value for line in values for value in line if value == value)
            across = f"measurements across, up to {numbers['train/tokens']:,} tokens"
            maps[key] = Map(values, top, f"{key}: layers down, {across}; 0 dark to {top:.3g} bright, by the root")
        return maps


def _heads(point: dict[str, Any], modes: list[str]) -> dict[str, Map]:
    scale = f"layers down, heads across; 0 dark to 1 bright, by the root; {point['train/tokens']:,} tokens"
    return {
        f"sink_maps/heads/{mode}": Map(point[key], 1.0, f"{key}: {scale}")
        for mode in modes
        if (key := f"sink/heatmap/{mode}") in point
    }


def _modes_of(numbers: dict[str, Any]) -> list[str]:
    of_modes = (key for key in numbers if key.startswith(("sink/mass/", "state/", "mixing/")))
    return list(dict.fromkeys(key.rpartition("/")[2] for key in of_modes))


def _of_another(key: str, modes: list[str]) -> bool:
    """Whether a figure of states or of mixing, or a layer's, is of a mode that has no charts."""
    return key.startswith(("sink/", "state/", "mixing/")) and key.count("/") > 1 and key.rpartition("/")[2] not in modes
