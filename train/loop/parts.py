"""What a run config chooses by name; imports neither torch nor Lightning."""

from sinkbed.data.pack.methods import PACKINGS
from sinkbed.model.attention_parts import ATTENTION_PARTS
from sinkbed.model.config import PARTS
from sinkbed.train.loop.optimizers import OPTIMIZERS

REGISTRIES = {registry.key: registry for registry in (*PARTS.values(), ATTENTION_PARTS, OPTIMIZERS, PACKINGS)}
"""Key of the config -> what may stand there."""
