"""GPTs of nanoGPT and litgpt, written plainly, and their checkpoints as those trainers save them."""

import math
import types
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from torch import nn
from torch.nn import functional as F


def randomized(model):
    """Weights that are far from a fresh model's, biases and norms too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator) + (weight.dim() == 1))
    return model.eval()


def causal_attention(q, k, v):
    """q [B, H, T, D], k and v of as many heads -> [B, T, H·D]."""
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)


class NanoBlock(nn.Module):
    def __init__(self, width, heads, bias):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn, self.attn.c_proj = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, 4 * width, bias), nn.Linear(4 * width, width, bias)

    def forward(self, x):
        q, k, v = self.attn.c_attn(self.ln_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.attn.c_proj(causal_attention(q, k, v))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    """nanoGPT's model.py: tied embeddings, learned positions, pre-norm."""

    def __init__(self, n_layer, n_head, n_embd, block_size, vocab_size, bias, dropout=0.0):
        super().__init__()
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(vocab_size, n_embd),
                wpe=nn.Embedding(block_size, n_embd),
                h=nn.ModuleList(NanoBlock(n_embd, n_head, bias) for _ in range(n_layer)),
                ln_f=nn.LayerNorm(n_embd, bias=bias),
            )
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, tokens):
        x = self.transformer.wte(tokens) + self.transformer.wpe.weight[: tokens.shape[1]]
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


def save_nanogpt(path, *, compiled=True, vocab_size=65, bias=False, **more):
    """A model, and the ckpt.pt that train.py leaves of it: with the optimizer, and the prefix of `torch.compile`."""
    model_args = dict(n_layer=2, n_head=4, n_embd=32, block_size=64, bias=bias, vocab_size=vocab_size, dropout=0.1)
    model = randomized(NanoGPT(**model_args))
    optimizer = torch.optim.AdamW(model.parameters(), fused=False)
    model(torch.zeros(1, 2, dtype=torch.int64)).sum().backward()
    optimizer.step()
    checkpoint = {
        "model": {("_orig_mod." if compiled else "") + name: w for name, w in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": model_args,
        "iter_num": 7,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "letters", "learning_rate": 1e-3},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**checkpoint, **more}, path)
    return model


@dataclass
class LitConfig:
    """What litgpt saves of its Config, where this model differs from a Llama by settings alone."""

    name: str = "tiny"
    block_size: int = 64
    n_layer: int = 2
    n_embd: int = 32
    vocab_size: int = 90
    padding_multiple: int = 64
    padded_vocab_size: int = 128
    norm_class_name: str = "RMSNorm"
    norm_eps: float = 1e-5
    norm_qk: bool = False
    norm_qk_type: str = "default"
    parallel_residual: bool = False
    shared_attention_norm: bool = False
    n_head: int = 4
    head_size: int = 8
    n_query_groups: int = 2
    attn_bias: bool = False
    rope_base: int = 500
    rotary_percentage: float = 1.0
    rope_condense_ratio: int = 1
    rope_adjustments: dict | None = None
    intermediate_size: int = 48
    bias: bool = False
    mlp_class_name: str = "LLaMAMLP"
    gelu_approximate: str = "none"
    n_expert: int = 0
    routed_scaling_factor: float = 1.0
    scale_embeddings: bool = False
    sliding_window_size: int | None = None
    norm_1: bool = True
    norm_2: bool = True


PYTHIA = dict(
    norm_class_name="LayerNorm", mlp_class_name="GptNeoxMLP", parallel_residual=True, rotary_percentage=0.25,
    n_query_groups=4, bias=True,
)  # fmt: skip


def turned(x, c):
    """Rotary positions on the first share of the channels of x [B, H, T, D], in halves; Llama 3 scales frequencies."""
    count = int(c.rotary_percentage * c.head_size)
    theta = c.rope_base ** -(torch.arange(0, count, 2) / count)
    if c.rope_adjustments:
        a = types.SimpleNamespace(**c.rope_adjustments)
        turns = a.original_max_seq_len * theta / (2 * math.pi)
        smooth = ((turns - a.low_freq_factor) / (a.high_freq_factor - a.low_freq_factor)).clamp(0, 1)
        theta = theta * (smooth + (1 - smooth) / a.factor)
    angle = torch.outer(torch.arange(x.shape[2]) / c.rope_condense_ratio, theta)
    first, second, rest = x.split([count // 2, count // 2, c.head_size - count], -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


class LitBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        norm = getattr(nn, c.norm_class_name)
        self.norm_1, self.norm_2 = norm(c.n_embd, eps=c.norm_eps), norm(c.n_embd, eps=c.norm_eps)
        self.attn, self.mlp = nn.Module(), nn.Module()
        rows = (c.n_head + 2 * c.n_query_groups) * c.head_size
        self.attn.qkv = nn.Linear(c.n_embd, rows, c.bias or c.attn_bias)
        self.attn.proj = nn.Linear(c.n_head * c.head_size, c.n_embd, c.bias)
        for name in ("fc",) if c.mlp_class_name == "GptNeoxMLP" else ("fc_1", "fc_2"):
            setattr(self.mlp, name, nn.Linear(c.n_embd, c.intermediate_size, c.bias))
        self.mlp.proj = nn.Linear(c.intermediate_size, c.n_embd, c.bias)

    def attend(self, x):
        c, groups = self.c, self.c.n_query_groups
        q, k, v = self.attn.qkv(x).unflatten(-1, (-1, c.head_size)).transpose(1, 2).split([c.n_head, groups, groups], 1)
        k, v = (each.repeat_interleave(c.n_head // groups, 1) for each in (turned(k, c), v))
        return self.attn.proj(causal_attention(turned(q, c), k, v))

    def feed(self, x):
        if self.c.mlp_class_name == "GptNeoxMLP":
            return self.mlp.proj(F.gelu(self.mlp.fc(x), approximate=self.c.gelu_approximate))
        return self.mlp.proj(F.silu(self.mlp.fc_1(x)) * self.mlp.fc_2(x))

    def forward(self, x):
        after = x + self.attend(self.norm_1(x))
        return after + self.feed(self.norm_2(x if self.c.parallel_residual else after))


class LitGPT(nn.Module):
    """litgpt's model.py, as far as Llama and Pythia go."""

    def __init__(self, c):
        super().__init__()
        self.lm_head = nn.Linear(c.n_embd, c.padded_vocab_size, bias=False)
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(c.padded_vocab_size, c.n_embd),
                h=nn.ModuleList(LitBlock(c) for _ in range(c.n_layer)),
                ln_f=getattr(nn, c.norm_class_name)(c.n_embd, eps=c.norm_eps),
            )
        )

    def forward(self, tokens):
        x = self.transformer.wte(tokens)
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


def old_names(state, c):
    """A state dict as older versions have it: queries, keys and values of a group stand together in `attn.attn`."""
    per_group = c.n_head // c.n_query_groups
    renamed = {}
    for name, weight in state.items():
        if ".qkv." in name:
            heads = weight.unflatten(0, (-1, c.head_size))
            queries, keys, values = heads.split([c.n_head, c.n_query_groups, c.n_query_groups])
            groups = [
                torch.cat([queries[g * per_group : (g + 1) * per_group], keys[g : g + 1], values[g : g + 1]])
                for g in range(c.n_query_groups)
            ]
            weight = torch.cat(groups).flatten(0, 1)
        renamed[name.replace(".qkv.", ".attn.")] = weight
    return renamed


def save_litgpt(folder, *, old=False, pretraining=False, settings=None):
    """A model, and the folder that litgpt leaves of it: after pretraining with more than weights."""
    c = LitConfig(**(settings or {}))
    model = randomized(LitGPT(c))
    state = old_names(model.state_dict(), c) if old else model.state_dict()
    if pretraining:
        optimizer = torch.optim.AdamW(model.parameters()).state_dict()
        state = {"model": state, "optimizer": optimizer, "hparams": {"out_dir": Path("out")}, "step_count": 3}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "lit_model.pth")
    (folder / "model_config.yaml").write_text(yaml.dump(asdict(c)))
    return model
