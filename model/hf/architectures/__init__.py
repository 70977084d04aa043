"""Architectures of Hugging Face that our decoder can go out as, a file each; `model.hf.export` chooses.

Nothing of `transformers` is needed. With the same weights both models give the same logits in float32.
"""
