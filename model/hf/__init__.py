"""Causal language models of `transformers` under our attention operator, and our decoder as one of theirs."""
