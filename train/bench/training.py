"""`sinkbed bench training`: one optimizer step of our decoder against Hugging Face's Llama at the same shape."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jsonargparse import ArgumentParser

from sinkbed.data.pack.batches import Batch
from sinkbed.model import Decoder, DecoderConfig
from sinkbed.train.bench.timing import interleave, matmul_flops
from sinkbed.train.loop.cpu import use_cpu
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


class Shape(NamedTuple):
    """What a training step is measured at."""

    decoder: DecoderConfig
    rows: int
    length: int


def shape_of(arguments: Any) -> Shape:
    """The shape in the run config of a command line, where this says no other; uses its threads and a fixed seed."""
    config = read_config(arguments.config)
    decoder = decoder_config(config)
    if arguments.d_model:
        d_ff = decoder.d_ff * arguments.d_model // decoder.d_model
        decoder = dataclasses.replace(decoder, d_model=arguments.d_model, d_ff=d_ff)
    if arguments.layers:
        decoder = dataclasses.replace(decoder, n_layers=arguments.layers)
    use_cpu(arguments.threads)
    torch.manual_seed(0)
    data = config["data"]
    return Shape(decoder, arguments.batch or data["batch_size"], arguments.length or data["context_length"])


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


def decoder_step(
    shape: DecoderConfig, batch: Batch, vocab_size: int, compiled: bool = False, bfloat16: bool = False
) -> Callable[[], None]:
    """`step_of` a decoder of ours; `bfloat16`: as under `trainer.precision: bf16-mixed`."""
    decoder = Decoder(shape, vocab_size)
    forward = torch.compile(decoder) if compiled else decoder

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return forward(batch.tokens, targets=counted_targets(batch)).loss

    return step_of(decoder, loss)


def run(arguments: Any) -> int:
    """One optimizer step (forward, loss, backward, clipping, AdamW) of our decoder and of HF's Llama."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise ValueError("bench training: the peer is missing; pip install -e '.[bench]'") from None

    (shape, B, T), V = shape_of(arguments), arguments.vocab_size
    batch = random_batch(B, T, V)

    def peer(compiled: bool = False, bfloat16: bool = False) -> Callable[[], None]:
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
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                logits = forward(input_ids=batch.tokens).logits
            return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten())

        return step_of(llama, loss)

    ways: dict[str, dict[str, Any]] = {"": {}}
    if arguments.bfloat16:
        ways[", bfloat16"] = {"bfloat16": True}
    if arguments.compile:
        ways |= {f"{name}, compiled": {**way, "compiled": True} for name, way in ways.items()}
    contenders: dict[str, Callable[[], None]] = {}
    for name, way in ways.items():
        contenders |= {f"HF Llama{name}": peer(**way), f"Sinkbed{name}": decoder_step(shape, batch, V, **way)}
    timings = interleave(contenders, arguments.repeats, warmup=5)
    base = timings[0].median
    count = Decoder(shape, V).parameter_count()
    # 6 FLOP a parameter and token, without the embedding's lookup; attention 6·T·C a layer and token (causal).
    lookup = 0 if shape.tie_embeddings else V * shape.d_model
    flops = 6 * (count - lookup + shape.n_layers * T * shape.n_heads * shape.dim) * B * T
    peaks = {dtype: matmul_flops(dtype) for dtype in ("float32", "bfloat16")[: 1 + arguments.bfloat16]}
    print(f"{count:,} parameters, {B} rows of {T} tokens, {arguments.threads} threads, {arguments.repeats} steps each")
    print(f"{'':30}{'ms/step':>9}{'tokens/s':>10}{'vs HF':>7}{'of matmul peak':>16}")
    for t in timings:
        share = flops / t.median / peaks["bfloat16" if "bfloat16" in t.name else "float32"]
        print(f"{t.name:30}{t.median * 1e3:9.1f}{B * T / t.median:10,.0f}{base / t.median:7.2f}{100 * share:15.0f}%")
    for dtype, peak in peaks.items():
        print(
            f"matrix products in {dtype} reach {peak / 1e9:.0f} GFLOP/s here: at least {flops / peak * 1e3:.1f} ms/step"
        )
    if arguments.profile:
        from torch.profiler import profile

        with profile() as profiler:
            for _ in range(5):
                contenders[f"Sinkbed{name}"]()
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=45))
    return 0
