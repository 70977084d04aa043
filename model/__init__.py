"""The network: one Llama-like decoder whose variants are small parts chosen by config."""

from model.config import DecoderConfig
from model.decoder import Decoder, DecoderOutput

__all__ = ["Decoder", "DecoderConfig", "DecoderOutput"]
