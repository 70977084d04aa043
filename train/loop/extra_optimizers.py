"""The optimizers of the package pytorch-optimizer, which is an extra."""

try:
    from pytorch_optimizer import SOAP, Lion
except ImportError:
    raise ValueError(
        "model.optimizer.name: lion and soap need the package pytorch-optimizer, got none; "
        "pip install -e '.[optimizers]'"
    ) from None

__all__ = ["SOAP", "Lion"]
