"""A tokenizer that marks spaces, as those of Gemma and Llama 2 do."""

import tokenizers
from tokenizers import decoders, models, normalizers


def marked(normalizer: normalizers.Normalizer) -> tokenizers.Tokenizer:
    """A space is a letter of its own, with bytes to fall back on; words join, and runs of spaces."""
    letters = ["<bos>", "<eos>", "\u2581", *"abc", "\u2581\u2581", "ab", "\u2581ab"]
    letters += [f"<0x{byte:02X}>" for byte in range(256)]
    merges = [("\u2581", "\u2581"), ("a", "b"), ("\u2581", "ab")]
    model = models.BPE({token: i for i, token in enumerate(letters)}, merges, byte_fallback=True, fuse_unk=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizer
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<bos>", "<eos>"])
    return backend
