"""All documents end to end are one stream, cut into rows (see `layout.Stream`)."""

from sinkbed.data.pack.methods import PACKINGS, Packing


@PACKINGS.register("concat")
class Concat(Packing):
    """Nothing is laid out."""

    is_stream = True
