"""`sinkbed bench`: ratios against named peers, measured side by side in one run."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from sinkbed.train.config.arguments import PlainParser, positive


def run(command: str, argv: Sequence[str]) -> int:
    """Parse and run one benchmark."""
    parser = PlainParser(prog=f"sinkbed {command}", description=(__doc__ or "").split("\n")[0])
    benches = parser.add_subparsers(dest="bench", metavar="BENCH", required=True)
    one = benches.add_parser("training", help="training step against Hugging Face's Llama at the same shape")
    one.add_argument("--bfloat16", action="store_true", help="also both with products in bfloat16, as bf16-mixed")
    one.add_argument("--compile", action="store_true", help="also both under torch.compile (needs a C++ compiler)")
    one.add_argument("--profile", action="store_true", help="print where our step spends its time")
    variants = benches.add_parser("parts", help="training step with each variant of a part, against the config's own")
    variants.add_argument("--operator", action="store_true", help="attention alone, under every way to score keys")
    variants.add_argument("--only", nargs="+", help="variants with one of these in their name, such as norm")
    loop = benches.add_parser("fit", help="`sinkbed fit` against the same optimizer step in a plain loop")
    loop.add_argument("--steps", type=positive, default=400, help="of each run and loop")
    for each in (one, variants, loop):
        each.add_argument(
            "--config", type=Path, default=Path("configs/run/demo.yaml"), help="run config with the shape"
        )
        each.add_argument("--batch", type=positive, help="rows (default: the config's)")
        each.add_argument("--length", type=positive, help="T, tokens a row (default: the config's)")
        each.add_argument("--layers", type=positive, help="L (default: the config's)")
        each.add_argument(
            "--d_model", type=positive, help="C; the feed-forward keeps its proportion (default: the config's)"
        )
        each.add_argument("--threads", type=positive, default=1)
        each.add_argument("--repeats", type=positive, default=3 if each is loop else 15)
    for each in (one, variants):
        each.add_argument("--vocab_size", type=positive, default=512)
    two = benches.add_parser("attention", help="the attention operator against SDPA, FlexAttention and others")
    two.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    two.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16; float32 on a CPU")
    two.add_argument("--layouts", nargs="+", choices=("causal", "even", "mixed"), default=["causal", "mixed"])
    two.add_argument("--lengths", type=positive, nargs="+", default=[256, 1024], help="T, positions a row")
    two.add_argument("--dims", type=positive, nargs="+", default=[64], help="D, head dims")
    two.add_argument("--batch", type=positive, default=2)
    two.add_argument("--heads", type=positive, default=8)
    two.add_argument("--kv_heads", type=positive, help="default: as heads")
    two.add_argument("--threads", type=positive, default=2)
    two.add_argument("--repeats", type=positive, default=11)
    two.add_argument("--csv", type=Path, help="write every figure to this file")
    two.add_argument("--plot", type=Path, help="write a plot over T to this PNG")
    three = benches.add_parser("data", help="from token store to batches: loader, packing, memory")
    parts = ("loader", "packing", "memory")
    three.add_argument("--parts", nargs="+", choices=parts, default=["loader", "packing"])
    three.add_argument("--config", type=Path, default=Path("configs/run/demo.yaml"), help="run config")
    three.add_argument("--store", type=Path, help="token store (default: the config's)")
    three.add_argument("--workers", type=positive, default=1, help="also with up to this many worker processes")
    three.add_argument("--threads", type=positive, default=1)
    three.add_argument("--repeats", type=positive, default=15)
    three.add_argument("--length", type=positive, default=2048, help="packing, memory: T, tokens a row")
    three.add_argument("--batch", type=positive, default=32, help="packing, memory: rows a batch")
    three.add_argument("--batches", type=positive, default=500, help="memory: batches to read")
    three.add_argument("--megabytes", type=positive, nargs="+", default=[10, 100, 1000, 10_000], help="memory: sizes")
    three.add_argument(
        "--scratch", type=Path, help="memory: where the stores are generated (default: a temporary folder)"
    )
    four = benches.add_parser("checkpoint", help="what saving costs, and how long resuming takes")
    four.add_argument("--config", type=Path, default=Path("configs/run/120m.yaml"), help="run config to save")
    four.add_argument("--vocab_size", type=positive, default=32_000)
    four.add_argument("--step_seconds", type=float, default=2.0, help="time of an optimizer step where it is trained")
    four.add_argument("--resume", type=Path, help="also train a third of this run config, and resume it early and late")
    four.add_argument("--repeats", type=positive, default=5)
    five = benches.add_parser("prepare", help="documents to tokens on disk, against datasets.map")
    five.add_argument("--file", type=Path, help="JSONL with the document under `text` (default: the demo corpus)")
    five.add_argument("--copies", type=positive, default=1, help="how often to write the corpus out")
    five.add_argument("--tokenizer", type=Path, help="tokenizer.json (default: one is trained on the corpus, untimed)")
    five.add_argument("--bos", default="<bos>", help="with --tokenizer: its BOS token")
    five.add_argument("--eos", default="<eos>", help="with --tokenizer: its EOS token")
    five.add_argument("--vocab_size", type=positive, default=8_192, help="of the tokenizer that is trained")
    five.add_argument("--workers", type=positive, default=2, help="threads or processes of each contender")
    five.add_argument("--repeats", type=positive, default=5)
    five.add_argument(
        "--long_line", type=positive, metavar="MB", help="instead: so much text in one line, against the same as many"
    )
    five.add_argument("--folder", type=Path, help="where temporary files go (default: the system's)")
    six = benches.add_parser("measure", help="measuring a model: against eager attention, and the sampled Jacobian")
    kinds = ("eager", "modes", "jacobian")
    six.add_argument("--parts", nargs="+", choices=kinds, default=kinds)
    six.add_argument("--layers", type=positive, default=30, help="of the Llama; eager keeps 4·heads·T² bytes a layer")
    six.add_argument("--hidden", type=positive, default=576)
    six.add_argument("--heads", type=positive, default=9)
    six.add_argument("--kv_heads", type=positive, default=3)
    six.add_argument("--ffn", type=positive, default=1536)
    six.add_argument("--vocab_size", type=positive, default=49_152)
    six.add_argument("--length", type=positive, default=2048, help="eager: T, tokens of the row")
    six.add_argument("--documents", type=positive, default=100, help="modes: documents of the probe set")
    six.add_argument("--tokens", type=positive, default=64, help="modes, jacobian: tokens of a document")
    six.add_argument("--config", type=Path, default=Path("configs/run/demo.yaml"), help="run config of the decoder")
    six.add_argument("--decoder_vocab_size", type=positive, default=512)
    six.add_argument("--run", type=Path, help="jacobian: a trained run (default: random weights)")
    six.add_argument("--store", type=Path, help="with --run: token store (default: the run's)")
    six.add_argument("--directions", type=positive, default=16, help="jacobian: directions that are drawn")
    six.add_argument("--draws", type=positive, default=8, help="jacobian: how often they are drawn")
    six.add_argument("--jacobian_documents", type=positive, default=4)
    six.add_argument("--threads", type=positive, default=2)
    six.add_argument("--repeats", type=positive, default=5)
    arguments = parser.parse_args(list(argv))
    return int(importlib.import_module(f"sinkbed.train.bench.{arguments.bench}").run(arguments))
