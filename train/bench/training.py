"""`sinkbed bench training`: one optimizer step of our decoder against Hugging Face's Llama at the same shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser

from sinkbed.data.pack.batches import Batch
from sinkbed.model import Decoder, DecoderConfig
from sinkbed.train.bench.timing import interleave, matmul_flops
from sinkbed.train.loop.module import counted_targets
from sinkbed.train.loop.optim import OptimizerConfig, build_optimizer


def read_config(path: Path) -> dict[str, Any]:
    """A run config as plain values; raises FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"bench: no config at {path}")
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    return config


def decoder_config(config: dict[str, Any]) -> DecoderConfig:
    """The shape in a run config."""
    parser = ArgumentParser()
    parser.add_class_arguments(DecoderConfig, "decoder")
    shape = parser.instantiate_classes(parser.parse_object({"decoder": config["model"]["decoder"]})).decoder
    return shape if isinstance(shape, DecoderConfig) else DecoderConfig(**vars(shape))


def random_batch(rows: int, length: int, vocab_size: int) -> Batch:
    """Rows of random tokens, each one document."""
    tokens = torch.randint(vocab_size, (rows, length + 1))
    zeros = torch.zeros(rows, length, dtype=torch.int32)
    return Batch(
        tokens=tokens[:, :-1].contiguous(),
        targets=tokens[:, 1:].contiguous(),
        loss_mask=torch.ones(rows, length, dtype=torch.bool),
        positions=torch.arange(length).expand(rows, length),
        doc_start=zeros,
        doc_end=zeros + length,
    )


def step_of(module: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """One optimizer step: forward, loss, backward, clipping, AdamW."""
    optimizer, _ = build_optimizer(module, OptimizerConfig(lr=1e-3), total_steps=10_000)

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoder_step(shape: DecoderConfig, batch: Batch, vocab_size: int, compiled: bool = False) -> Callable[[], None]:
    """`step_of` a decoder of ours."""
    decoder = Decoder(shape, vocab_size)
    forward = torch.compile(decoder) if compiled else decoder
    return step_of(decoder, lambda: forward(batch.tokens, targets=counted_targets(batch)).loss)


def run(arguments: Any) -> int:
    """One optimizer step (forward, loss, backward, clipping, AdamW) of our decoder and of HF's Llama."""
    config = read_config(arguments.config)
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise ValueError("bench training: the peer is missing; pip install -e '.[bench]'") from None

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    shape = decoder_config(config)
    B, T, V = config["data"]["batch_size"], config["data"]["context_length"], arguments.vocab_size
    batch = random_batch(B, T, V)

    def peer(compiled: bool) -> Callable[[], None]:
        llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=V,
                hidden_size=shape.d_model,
                intermediate_size=shape.d_ff,
                num_hidden_layers=shape.n_layers,
                num_attention_heads=shape.n_heads,
                num_key_value_heads=shape.key_heads,
                head_dim=shape.dim,
                tie_word_embeddings=shape.tie_embeddings,
                use_cache=False,
            )
        )
        forward = torch.compile(llama) if compiled else llama

        def loss() -> torch.Tensor:
            logits = forward(input_ids=batch.tokens).logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())

        return step_of(llama, loss)

    contenders = {"HF Llama (SDPA)": peer(False), "Sinkbed": decoder_step(shape, batch, V)}
    if arguments.compile:
        contenders |= {"HF Llama, compiled": peer(True), "Sinkbed, compiled": decoder_step(shape, batch, V, True)}
    timings = interleave(contenders, arguments.repeats, warmup=5)
    base = timings[0].median
    count = Decoder(shape, V).parameter_count()
    # 6 FLOP a parameter and token, without the embedding's lookup; attention 6·T·C a layer and token (causal).
    lookup = 0 if shape.tie_embeddings else V * shape.d_model
    flops = 6 * (count - lookup + shape.n_layers * T * shape.n_heads * shape.dim) * B * T
    ceiling = matmul_flops()
    print(f"{count:,} parameters, {B} rows of {T} tokens, {arguments.threads} threads, {arguments.repeats} steps each")
    print(f"{'':24}{'ms/step':>9}{'tokens/s':>10}{'vs HF':>7}{'of matmul peak':>16}")
    for t in timings:
        share = flops / t.median / ceiling
        print(f"{t.name:24}{t.median * 1e3:9.1f}{B * T / t.median:10,.0f}{base / t.median:7.2f}{100 * share:15.0f}%")
    print(f"matrix products reach {ceiling / 1e9:.0f} GFLOP/s here: the limit is {flops / ceiling * 1e3:.1f} ms/step")
    if arguments.profile:
        from torch.profiler import profile

        with profile() as profiler:
            for _ in range(5):
                contenders["Sinkbed"]()
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=45))
    return 0
