"""What the training step makes of packed rows equals documents one at a time."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from sinkbed.data.pack.batches import Rows
from sinkbed.data.pack.strategy import Strategy
from sinkbed.data.store.manifest import Manifest
from sinkbed.data.store.token_store import TokenStore
from sinkbed.model import Decoder, DecoderConfig
from sinkbed.train.loop.callbacks.sinks import _PACKED_ROWS, SinkMonitor
from sinkbed.train.loop.module import counted_targets
from sinkbed.train.measure.config import MeasureConfig
from sinkbed.train.measure.masks import strategy_mask

LENGTH = 24


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory):
    """Documents of 1 to 22 tokens: with a marker or two, some fill a row of 24."""
    from sinkbed.data.tokenizer import Tokenizer
    from tests.support.stores import StoreWriter

    out = tmp_path_factory.mktemp("short") / "store"
    generator = torch.Generator().manual_seed(0)
    lengths = [22, 1, 22, 21, *torch.randint(1, 23, (30,), generator=generator).tolist()]
    with StoreWriter(out, Tokenizer.train([], vocab_size=258)) as writer:
        for length in lengths:
            writer.add("train", torch.randint(2, 258, (length,), generator=generator).tolist(), length)
        writer.finish(recipe={})
    return TokenStore.open(out)


def decoder():
    torch.manual_seed(0)
    return Decoder(DecoderConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, init_std=0.2), 258)


def marked(store: TokenStore, strategy: Strategy, number: int) -> torch.Tensor:
    manifest: Manifest = store.manifest
    start, end = (manifest.token_id(what) for what in (strategy.document_start, strategy.document_end))
    text = store.slice(number).tolist()
    return torch.tensor([*([] if start is None else [start]), *text, *([] if end is None else [end])])


@pytest.mark.parametrize("positions", ["row", "document"])
@pytest.mark.parametrize(
    "packing",
    [
        {"packing": "best_fit"},
        {"packing": "best_fit", "document_start": "bos"},
        {"packing": "best_fit", "fill": "crop", "overflow": "truncate"},
        {"packing": "pad", "document_start": "bos", "document_end": "none"},
        {"packing": "grouped"},
    ],
    ids=lambda axes: "-".join(axes.values()),
)
def test_loss_and_gradients_of_packed_rows_equal_those_of_separate_documents(packing, positions, short_documents):
    if packing["packing"] == "pad":  # one document a row: nothing to keep apart
        strategy = Strategy(**packing)
    else:
        strategy = Strategy(**packing, mask="intra_document", positions=positions)
    rows = Rows(short_documents, strategy, LENGTH)
    batch = rows.__getitems__(list(range(len(rows))))
    together, apart = decoder(), decoder()
    given = batch.positions if strategy.positions == "document" else None
    logits = together(batch.tokens, given, strategy_mask(strategy, batch.doc_start, batch.doc_end)).logits
    packed = F.cross_entropy(logits.flatten(0, 1), counted_targets(batch).flatten(), reduction="sum")
    packed.backward()

    # What a row holds of each document, as the plan says: all of it, unless the strategy crops.
    held, documents, _ = rows.layout.plan.read(torch.arange(len(rows)).numpy())
    separate, read, edge = torch.zeros(()), [], 0
    for count in held.tolist():
        room = LENGTH
        for number in documents[edge : edge + count].tolist():
            tokens = marked(short_documents, strategy, number)[:room]
            room -= len(tokens)
            read.append(number)
            if len(tokens) > 1:
                loss = F.cross_entropy(apart(tokens[None]).logits[0, :-1], tokens[1:], reduction="sum")
                loss.backward()
                separate = separate + loss.detach()
        edge += count
    assert sorted(read) == list(range(short_documents.documents)), "every document stands in one row"
    if packing["packing"] != "pad":
        assert held.max() > 1, "documents share rows"
    torch.testing.assert_close(packed.detach(), separate, rtol=1e-5, atol=1e-3)
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("fill", ["pad", "crop"])
def test_what_stands_in_another_document_or_in_padding_changes_no_counted_loss(fill, short_documents):
    strategy = Strategy(packing="best_fit", fill=fill, mask="intra_document")
    rows = Rows(short_documents, strategy, LENGTH)
    batch = rows.__getitems__(list(range(len(rows))))
    first = batch.doc_start == 0
    model = decoder()

    def losses(tokens):
        logits = model(tokens, None, strategy_mask(strategy, batch.doc_start, batch.doc_end)).logits
        targets = counted_targets(batch).masked_fill(~first, -100)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")

    changed = batch.tokens.masked_fill(~first, 7)
    assert (changed != batch.tokens).sum() > 50
    with torch.no_grad():
        assert torch.equal(losses(changed), losses(batch.tokens))


def test_padding_has_no_part_in_the_masses_of_packed_rows(short_documents, tmp_path):
    strategy = Strategy(packing="pad", document_end="none")
    monitor = SinkMonitor(MeasureConfig(), tmp_path)
    monitor.packed = Rows(short_documents, strategy, LENGTH)
    model = decoder().eval()
    module = SimpleNamespace(data=SimpleNamespace(strategy=strategy), device=torch.device("cpu"))
    found = monitor._packed(model, module)
    batch = monitor.packed.__getitems__(list(range(min(_PACKED_ROWS, len(monitor.packed)))))
    lengths = (batch.doc_start == 0).sum(1).tolist()
    assert min(lengths) < LENGTH - 5, "rows end in padding"
    masses = [[] for _ in range(model.config.n_layers)]
    with torch.no_grad():
        for tokens, length in zip(batch.tokens, lengths, strict=True):
            alone = model(tokens[None, :length], statistics=True).statistics
            for layer, statistics in enumerate(alone):
                masses[layer].append(statistics.first_key_mass[0, :, 1:].flatten())
    expected = torch.stack([torch.cat(layer).mean() for layer in masses]).mean()
    assert found["sink/packed_document_mass"] == pytest.approx(float(expected), rel=1e-5)
    assert found["sink/packed_first_key_mass"] == pytest.approx(float(expected), rel=1e-5)
