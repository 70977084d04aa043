"""Scorings of every kind, for two heads: keyword arguments of `attention`."""

import torch

from sinkbed.kernels.normalizers import NORMALIZERS


def scoring(softcap=None, slopes=None, normalizer="softmax", device="cpu"):
    """Arguments of the operator, from a config's words."""
    slopes = None if slopes is None else torch.tensor(slopes, device=device)
    return {"softcap": softcap, "slopes": slopes, "normalizer": NORMALIZERS.make(normalizer, 2)}


SCORINGS = {
    "softcap": dict(softcap=1.5),
    "ALiBi": dict(slopes=[0.5, 0.125]),
    "softcap, ALiBi": dict(softcap=2.0, slopes=[0.5, 0.125]),
    "sigmoid": dict(normalizer="sigmoid"),
    "sigmoid, bias": dict(normalizer={"sigmoid": {"bias": -2.0}}),
    "sigmoid, normalized": dict(normalizer={"sigmoid": {"normalized": True}}),
    "elu": dict(normalizer="elu"),
    "elu, normalized": dict(normalizer={"elu": {"normalized": True}}),
    "softpick": dict(normalizer="softpick"),
    "softpick, softcap, ALiBi": dict(normalizer="softpick", softcap=2.0, slopes=[0.5, 0.125]),
    "sigmoid, softcap, ALiBi": dict(
        normalizer={"sigmoid": {"normalized": True, "bias": -1.0}}, softcap=2.0, slopes=[0.5, 0.125]
    ),
}
