"""A new variant is one file: each test writes a toy one, and uses it through the public interface alone."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from sinkbed.data.pack.audit import audit
from sinkbed.data.pack.batches import Rows
from sinkbed.data.pack.strategy import Strategy
from sinkbed.data.store.token_store import TokenStore
from sinkbed.data.tokenizer import Tokenizer
from sinkbed.model import Decoder, DecoderConfig
from sinkbed.model.observe import observing
from sinkbed.registry import Registry
from sinkbed.train.cli.main import main
from sinkbed.train.loop.optim import OptimizerConfig, build_optimizer
from sinkbed.train.loop.settings import training_bytes
from sinkbed.train.measure.measures import MEASURES
from tests.support.stores import StoreWriter
from tests.train.conftest import write_run_config


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Write one file and load it, as an import by a user's own code does; its toy is forgotten after the test."""
    register = Registry.register

    def register_for_now(registry, name):
        if name == "toy":
            monkeypatch.setitem(registry._variants, name, None)
        return register(registry, name)

    monkeypatch.setattr(Registry, "register", register_for_now)

    def write(code):
        path = tmp_path / "variant.py"
        path.write_text(code)
        spec = importlib.util.spec_from_file_location("variant", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return write


def trained(*, implementation=None, **parts) -> tuple[list[float], Decoder]:
    """Losses of a few steps on one batch, and the decoder."""
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(n_layers=2, d_model=16, n_heads=2, d_ff=24, init_std=0.1, **parts), 32)
    decoder.implementation = implementation
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    tokens = torch.randint(32, (4, 17))
    losses = []
    for _ in range(8):
        loss = decoder(tokens[:, :-1], targets=tokens[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, decoder


def test_a_position_encoding(add):
    add("""
import torch
from sinkbed.model.positions import POSITIONS, PositionEncoding

@POSITIONS.register("toy")
class Toy(torch.nn.Module, PositionEncoding):
    def __init__(self, config, *, length: int = 64):
        super().__init__()
        self.table = torch.nn.Embedding(length, config.d_model)

    def embed(self, x, positions):
        return x + self.table(positions)
""")
    losses, decoder = trained(position={"toy": {"length": 16}})
    assert losses[-1] < losses[0] - 0.1 and decoder.position.table.weight.grad.abs().sum() > 0
    assert decoder.parameter_count() == Decoder.parameters_of(decoder.config, 32)
    with pytest.raises(ValueError, match=r"options of toy \(length\); got 'lenght'; did you mean length\?"):
        trained(position={"toy": {"lenght": 16}})
    for value in ("abc", 16.5, True):
        with pytest.raises(ValueError, match=rf"position.toy.length: expected int, got {value!r}"):
            trained(position={"toy": {"length": value}})


def test_a_norm_and_a_feed_forward(add):
    add("""
from torch import nn
from sinkbed.model.feed_forward import FEED_FORWARDS
from sinkbed.model.norms import NORMS

@NORMS.register("toy")
def norm(config):
    return nn.LayerNorm(config.d_model, config.norm_eps)

@FEED_FORWARDS.register("toy")
def feed_forward(config):
    return nn.Sequential(nn.Linear(config.d_model, config.d_ff), nn.ReLU(), nn.Linear(config.d_ff, config.d_model))
""")
    losses, decoder = trained(norm="toy", feed_forward="toy")
    assert losses[-1] < losses[0] - 0.1 and decoder.norm.bias.abs().sum() > 0
    assert decoder.parameter_count() == Decoder.parameters_of(decoder.config, 32)


def test_a_packing(add, tmp_path):
    add("""
import numpy as np
from sinkbed.data.pack.methods import Laid, PACKINGS, Packing

@PACKINGS.register("toy")
class Toy(Packing):
    def __init__(self, fill="pad", *, most=2):
        self.most = most

    def lay_out(self, items, room):  # up to so many documents a row, in store order
        rows, filled = [[]], 0
        for item, length in enumerate(items.length.tolist()):
            if len(rows[-1]) == self.most or filled + length > room:
                rows.append([])
                filled = 0
            rows[-1].append(item)
            filled += length
        return Laid(np.array([len(row) for row in rows]), np.concatenate(rows))
""")
    with StoreWriter(tmp_path / "store", Tokenizer.train(["some text"], vocab_size=300)) as writer:
        for length in range(1, 20):
            writer.add("train", [10] * length, length)
        writer.finish(recipe={})
    store = TokenStore.open(tmp_path / "store", "train")
    for most in (1, 3):
        strategy = Strategy(packing={"toy": {"most": most}}, mask="intra_document", document_end="none")
        assert audit(Rows(store, strategy, 64))["documents_per_row_max"] == most
    with pytest.raises(ValueError, match=r"options of toy \(most\); got 'least'"):
        Rows(store, Strategy(packing={"toy": {"least": 1}}), 64)


def test_an_optimizer(add):
    add("""
import torch
from sinkbed.train.loop.optim import parameter_groups
from sinkbed.train.loop.optimizers import OPTIMIZERS

@OPTIMIZERS.register("toy")
class Toy(torch.optim.SGD):
    state_tensors, shards = 1, True

    def __init__(self, model, config, *, momentum=0.5):
        super().__init__(parameter_groups(model, config), lr=config.lr, momentum=momentum)
""")
    config = OptimizerConfig(name={"toy": {"momentum": 0.25}}, lr=0.1, weight_decay=0.2)
    optimizer, _ = build_optimizer(Decoder(DecoderConfig(n_layers=1, d_model=8, n_heads=1, d_ff=8), 32), config, 10)
    assert [(g["momentum"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.25, 0.2), (0.25, 0.0)]
    assert (training_bytes(config), training_bytes(OptimizerConfig())) == (12, 16)


def test_a_normalizer(add):
    add("""
import torch
from sinkbed.kernels.normalizers import NORMALIZERS, Normalizer

@NORMALIZERS.register("toy")
class Toy(torch.nn.Module, Normalizer):
    def __init__(self, heads, *, start=-1.0):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.full((heads, 1, 1), start))

    def weights(self, logits):
        return torch.sigmoid(logits + self.shift)
""")
    losses, decoder = trained(normalizer={"toy": {"start": -2.0}})
    dense, _ = trained(normalizer={"toy": {"start": -2.0}}, implementation="reference")
    torch.testing.assert_close(losses, dense, rtol=1e-4, atol=1e-4)
    assert losses[-1] < losses[0] - 0.1 and (decoder.blocks[0].attention.normalizer.shift != -2).all()
    seen = []
    with observing(decoder, attention=seen.append):
        output = decoder(torch.arange(8)[None], statistics=True)
    weights, parts = (torch.cat([w for _, w in seen[1].blocks(3, normalized=of)], dim=2) for of in (False, True))
    torch.testing.assert_close(weights[..., 0], output.statistics[1].first_key_mass)
    torch.testing.assert_close(parts[..., 0], output.statistics[1].normalized.first_key_mass)
    torch.testing.assert_close(parts.sum(2), seen[1].received())
    torch.testing.assert_close(parts.sum(-1), torch.ones(parts.shape[:3]))
    assert not torch.allclose(weights.sum(-1), torch.ones(1))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("logits.exp() - 1", "expected finite weights of at least 0"),
        ("logits.tanh().where(logits.isfinite(), 0)", "expected finite weights of at least 0"),
        ("logits.exp() + 1", "and 0 for the hidden key"),
        ("logits * 0", "expected finite weights"),
    ],
)
def test_weights_that_no_reading_of_a_sink_is_defined_for_are_refused(add, code, message):
    add(f"""
from sinkbed.kernels.normalizers import NORMALIZERS, Normalizer

@NORMALIZERS.register("toy")
class Toy(Normalizer):
    def __init__(self, heads):
        pass

    def weights(self, logits):
        return {code}
""")
    with pytest.raises(ValueError, match=f"normalizer Toy: .*{message}"):
        trained(normalizer="toy")


def test_a_variant_that_is_made_from_others_than_the_folder_says_is_named(add):
    add("""
import torch
from sinkbed.model.attention_parts import ATTENTION_PARTS, AttentionPart

@ATTENTION_PARTS.register("toy")
class Toy(torch.nn.Module, AttentionPart):
    def __init__(self, config):
        super().__init__()
""")
    with pytest.raises(ValueError, match=r"attention_parts\.toy: expected a variant that is called with 2 arguments"):
        trained(attention_parts=["toy"])


def test_an_option_without_an_annotation_is_of_its_default_s_type(add):
    add("""
from sinkbed.kernels.normalizers import NORMALIZERS, Normalizer, normalize

@NORMALIZERS.register("toy")
class Toy(Normalizer):
    def __init__(self, heads, *, power=2, shift: float = 1.0):
        self.power, self.shift = range(power), float.hex(shift)  # which takes no other type

    def weights(self, logits):
        return normalize((logits + 1).relu())
""")
    trained(normalizer={"toy": {"power": 3, "shift": 1}})
    with pytest.raises(ValueError, match=r"normalizer\.toy\.power: expected int, got 'x'"):
        DecoderConfig(n_layers=1, d_model=4, n_heads=1, d_ff=4, normalizer={"toy": {"power": "x"}})


def test_a_block(add):
    add("""
from sinkbed.model.blocks import BLOCKS
from sinkbed.model.block import Block

@BLOCKS.register("toy")
class Toy(Block):
    def join(self, x, part, name):
        return x + 2 * part(getattr(self, f"{name}_norm")(x))
""")
    losses, _ = trained(block="toy")
    assert losses[-1] < losses[0] - 0.1 and losses != trained()[0]


def test_a_sink(add):
    add("""
import torch
from sinkbed.model.sinks import SINKS, Sink

@SINKS.register("toy")
class Toy(torch.nn.Module, Sink):
    def __init__(self, config, *, logit: float = 1.0):
        super().__init__()
        self.logit = logit
        self.v = torch.nn.Parameter(torch.zeros(config.n_heads, config.dim))

    def key(self, q):
        return q.new_full(q.shape[:3], self.logit), self.v
""")
    losses, decoder = trained(sink={"toy": {"logit": 3.0}})
    assert losses[-1] < losses[0] - 0.1 and (decoder.blocks[0].attention.sink.v != 0).any()
    measured = decoder(torch.arange(8)[None], statistics=True).statistics[0]
    first_query = measured.first_key_mass[..., 0] + measured.learned_sink_mass[..., 0]
    torch.testing.assert_close(first_query, torch.ones(1, 2))
    assert measured.learned_sink_mass[..., 0].min() > 0.9  # e³ against one key


def test_an_attention_part_and_an_initialisation(add):
    add("""
import torch
from sinkbed.model.attention_parts import ATTENTION_PARTS, AttentionPart
from sinkbed.model.initializers import INITIALIZERS

@ATTENTION_PARTS.register("toy")
class Toy(torch.nn.Module, AttentionPart):
    def __init__(self, config, layer, *, per_head: bool = True):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.full((config.n_heads,), 1.0 + layer))

    def output(self, o, x):
        return o * self.factor[:, None]

@INITIALIZERS.register("toy")
def toy(config):
    return lambda name, matrix: 0.5 if name == "embedding.weight" else config.init_std
""")
    losses, decoder = trained(attention_parts=["qk_norm", {"toy": {"per_head": True}}], init="toy")
    assert losses[-1] < losses[0] - 0.1 and decoder.embedding.weight.std() > 0.4
    assert [round(float(b.attention.parts[1].factor.mean())) for b in decoder.blocks] == [1, 2]
    with pytest.raises(ValueError, match=r"attention_parts: expected options of toy \(per_head\); got 'heads'"):
        trained(attention_parts=[{"toy": {"heads": 2}}])


def test_options_are_looked_at_where_a_choice_is_made():
    for packing in ({"concat": {"bogus": 1}}, {"best_fit": {"bogus": 1}}, {"pad": 5}, 5):
        with pytest.raises(ValueError, match=r"data.strategy.packing"):
            Strategy(packing=packing)
    for name in ({"adamw": {"bogus": 1}}, {"adamw": "x"}):
        with pytest.raises(ValueError, match=r"model.optimizer.name"):
            OptimizerConfig(name=name)
    assert Strategy(packing={"pad": {}}) == Strategy(packing="pad")
    config = DecoderConfig(n_layers=1, d_model=8, n_heads=1, d_ff=8, position={"rope": {}}, norm={"rms": None})
    assert (config.position, config.norm) == ("rope", "rms")


@pytest.mark.parametrize("key", ["position", "norm", "feed_forward"])
def test_a_name_that_is_none_names_those_there_are(key):
    for choice in ("rop", {}, {"rop": {}}, {"rope": {}, "rms": {}}, 5, ["rope"]):
        with pytest.raises(ValueError, match=f"model.decoder.{key}: expected one of .*(rope|rms|swiglu)"):
            DecoderConfig(n_layers=1, d_model=8, n_heads=1, d_ff=8, **{key: choice})


TOY = """
from sinkbed.train.measure.excerpts import Totals
from sinkbed.train.measure.measures import Column, register_measure

@register_measure(
    "toy",
    group="mixing",
    columns=(Column("size", "mean |h|", "mixing/toy/layer{layer}/{mode}"),),
    note="A toy.",
)
def measure_size(model, excerpts, batch_tokens):
    totals = Totals(len(excerpts.rows))
    excerpts.read(model, batch_tokens, hidden=lambda layer, h: totals.add("size", layer, h.abs().mean((1, 2))))
    return totals.means()
"""


def test_a_measure(add, tiny_store, tmp_path):
    add(TOY)
    run = tmp_path / "run"
    config = write_run_config(tmp_path / "run.yaml", tiny_store)
    fitting = ["fit", "--config", str(config), "--wandb.mode", "disabled", "--measure.mixing_points", "2"]
    assert main([*fitting, "--measure.live_modes", "[bos]"]) == 0
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    live = [p["mixing/toy/layer1/bos"] for p in points if "mixing/toy/layer1/bos" in p]
    assert [p["step"] for p in points if "mixing/toy/layer0/bos" in p] == [0, 2, 10] and len({*live}) == 3
    probing = ["probe", str(run), "--measure", "toy", "--sink_tokens", "16", "--lengths", "8"]
    assert main([*probing, "--modes", "bos", "--out", str(tmp_path / "report")]) == 0
    header, *rows = (tmp_path / "report" / "mixing-bos.csv").read_text().splitlines()
    assert header == "layer,toy/size" and [row.split(",")[0] for row in rows] == ["input", "0", "1"]
    page = (tmp_path / "report" / "index.html").read_text()
    assert "mean |h|" in page and "A toy." in page and "Mixing in the last layer by context length" in page
    assert {"mixing.png", "by_length.svg"} <= {path.name for path in (tmp_path / "report").iterdir()}


def test_a_checkpoint_of_another_trainer(add, tmp_path):
    transformers = pytest.importorskip("transformers")
    add(
        """
import transformers
from sinkbed.model.hf.foreign import FORMATS, Foreign, load_tensors

@FORMATS.register("toy")
class Toy(Foreign):
    @classmethod
    def weights_file(cls, path):
        return path if path.suffix == ".toy" else None

    @property
    def tensors(self):
        return load_tensors(self.file)

    def make_config(self):
        return transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2)

    def targets(self, parameters):
        return {f"toy.{name}": [name] for name in parameters}
"""
    )
    from sinkbed.model.hf.adapter import HFModel
    from sinkbed.model.hf.foreign import foreign_at

    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2)).eval()
    path = tmp_path / "model.toy"
    torch.save({f"toy.{name}": weight for name, weight in theirs.state_dict().items()}, path)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        logits = HFModel.load(str(path), foreign=foreign_at(path))(tokens).logits
        torch.testing.assert_close(logits, theirs(tokens).logits)


def test_every_metric_of_a_measure_is_documented():
    text = Path("train/README.md").read_text()
    for name in MEASURES.names:
        assert MEASURES[name].columns, name
        for column in MEASURES[name].columns:
            assert not column.log or re.search(rf"`{column.log.split('/{')[0].split('/layer')[0]}/", text), column
