"""`sinkbed bench attention`: the operator against its peers on the same inputs, with and without statistics.

Every contender is first compared with the float64 reference, outputs and gradients, on rows of the same layout of up
to 1,024 positions: it may err twice as much as the reference itself does in the inputs' dtype. Speeds count the work
that the mask asks for: 2·D·H·Σ len² FLOP forward over the documents of a causal row, 3.5 times that with the backward;
a kernel that ignores document boundaries gains nothing by computing more.
"""

import dataclasses
import functools
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sinkbed.data.files import write_atomic
from sinkbed.kernels import attention
from sinkbed.plain_text import csv_of
from sinkbed.train.bench.attention_peers import OURS, Case, Contender, contenders
from sinkbed.train.bench.timing import Timing, by_events, interleave, matmul_flops
from sinkbed.train.loop.cpu import use_cpu

LAYOUTS = ("causal", "even", "mixed")
_WIDTH = 33  # of the longest name
_CHECKED_LENGTH = 1024  # beyond the length from which documents are computed one by one on CPUs
_CHECKED_BATCH = 2
_FLOOR = {torch.float32: 2e-4, torch.float16: 2e-3, torch.bfloat16: 2e-3}
_BACKWARD = 2.5  # FLOP of the backward, in forwards
# Dense 16-bit matrix FLOP/s of the makers' data sheets, by a part of the device's name.
_PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "MI300X": 1307e12}
_Result = TypeVar("_Result")


def _values(call: Contender, inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients of q, k and v, in float64."""
    output = call(*inputs)
    weight = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=torch.float64).view_as(output)
    gradients = torch.autograd.grad((output.double() * weight).sum(), inputs)
    return [x.detach().double() for x in (output, *gradients)]


def _reference(case: Case, dtype: torch.dtype) -> list[Tensor]:
    mask = case.mask()
    inputs = [x.detach().to(dtype).requires_grad_() for x in case.inputs()]
    return _values(lambda q, k, v: attention(q, k, v, mask, implementation="reference").output, inputs)


def error_of(values: list[Tensor], exact: list[Tensor]) -> float:
    """Largest deviation of any tensor from the exact one, relative to its largest value, and at least to a thousandth
    of the output's: gradients through a softmax of one key are 0. NaN where any is NaN."""
    least = float(1e-3 * exact[0].abs().max())
    errors = [(a - b).abs().max() / b.abs().max().clamp_min(least) for a, b in zip(values, exact, strict=True)]
    return float(torch.stack(errors).max())


def _tried(name: str, call: Callable[[], _Result], absent: dict[str, str]) -> _Result | None:
    """What `call` returns; None, with the reason in `absent`, where a peer refuses or has no memory for it. Our own
    errors are nobody's excuse."""
    try:
        return call()
    except RuntimeError as refused:  # a backend that does not take this dtype, mask or head dim; out of memory
        if name in OURS:
            raise
        absent[name] = (str(refused).splitlines() or [type(refused).__name__])[0]
        return None


def measure(case: Case, repeats: int) -> tuple[dict[str, tuple[Timing, Timing]], dict[str, str]]:
    """Name -> timings of forward and of forward with backward; and name -> why it was not timed.

    Raises ValueError where a contender's values are wrong.
    """
    absent: dict[str, str] = {}
    short = dataclasses.replace(case, length=min(case.length, _CHECKED_LENGTH), batch=min(case.batch, _CHECKED_BATCH))
    exact = _reference(short, torch.float64)
    allowed = max(2 * error_of(_reference(short, case.dtype), exact), _FLOOR[case.dtype])
    for name, contender in contenders(short):
        if isinstance(contender, str):
            absent[name] = contender
            continue
        values = _tried(name, functools.partial(_values, contender, short.inputs()), absent)
        if values is not None and not (error := error_of(values, exact)) <= allowed:
            raise ValueError(f"bench attention: {name}: expected values within {allowed:.2e} of the float64 "
                             f"reference, got {error:.2e} ({short})")  # fmt: skip
    del exact
    inputs = case.inputs()
    grad = torch.randn_like(inputs[0])
    forward: dict[str, Callable[[], Any]] = {}
    both: dict[str, Callable[[], Any]] = {}
    for name, contender in contenders(case):
        if name in absent or isinstance(contender, str):
            continue
        steps = functools.partial(_forward, contender, inputs), functools.partial(_both, contender, inputs, grad)
        # Once alone: who has no memory for the whole length leaves before the timing.
        for step in steps:
            _tried(name, step, absent)
        if name not in absent:
            forward[name], both[name] = steps
    clock = by_events if case.device.type == "cuda" else None
    first = interleave(forward, repeats, 3, clock)
    second = interleave(both, repeats, 3, clock)
    return {a.name: (a, b) for a, b in zip(first, second, strict=True)}, absent


@torch.no_grad()
def _forward(contender: Contender, inputs: list[Tensor]) -> None:
    contender(*inputs)


def _both(contender: Contender, inputs: list[Tensor], grad: Tensor) -> None:
    torch.autograd.grad(contender(*inputs), inputs, grad)


def peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that nothing exceeds, and where the figure comes from; (0, …) where no figure is known, as for a GPU that
    is not in the table and for float32 on one."""
    if device.type == "cpu":
        return matmul_flops(), "large float32 matrix products here"
    name = torch.cuda.get_device_name(device)
    if dtype == torch.float32:
        return 0.0, f"{name}: not known for float32"
    return next(((p, f"data sheet of {n}") for n, p in _PEAKS.items() if n in name), (0.0, f"{name}: not known"))


def run(arguments: Any) -> int:
    """Measure every case, print a table, write CSV and a plot where asked."""
    use_cpu(arguments.threads)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected a device that is here, got cuda without a GPU that torch can use")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    ceiling, source = peak(device, dtype)
    rows: list[dict[str, Any]] = []
    seen: set[tuple[str, str]] = set()
    for layout, length, dim in itertools.product(arguments.layouts, arguments.lengths, arguments.dims):
        case = Case(
            layout=layout, batch=arguments.batch, heads=arguments.heads, dtype=dtype, device=device,
            key_heads=arguments.kv_heads or arguments.heads, length=length, dim=dim,
        )  # fmt: skip
        timings, absent = measure(case, arguments.repeats)
        new = _rows(case, timings, ceiling)
        print(_table(case, new), flush=True)
        rows += new
        for name, why in absent.items():
            if (name, why) not in seen:
                print(f"  {name}: not timed: {why}")
            seen.add((name, why))
        if arguments.csv is not None:  # after every case: a later one that fails takes nothing with it
            write_atomic(arguments.csv, csv_of(rows, list(rows[0])))
    print(f"peak: {ceiling / 1e12:.3g} TFLOP/s ({source}); medians of {arguments.repeats}; ratio: its time / ours")
    if arguments.plot is not None:
        _plot(rows, arguments.plot)
    return 0


def _rows(case: Case, timings: dict[str, tuple[Timing, Timing]], ceiling: float) -> list[dict[str, Any]]:
    """One record a contender and pass; ratios are to ours without statistics."""
    measurements = []
    for number, (kind, work) in enumerate((("forward", 1.0), ("forward + backward", 1.0 + _BACKWARD))):
        ours = timings["Sinkbed"][number].median
        for name, pair in timings.items():
            seconds = pair[number].median
            speed = case.flops() * work / seconds
            measurements.append(
                {
                    "layout": case.layout, "T": case.length, "D": case.dim, "pass": kind, "contender": name,
                    "ms": round(seconds * 1e3, 4), "ratio": round(seconds / ours, 3),
                    "tflops": round(speed / 1e12, 5), "of_peak": round(speed / ceiling, 4) if ceiling else "",
                }
            )  # fmt: skip
    return measurements


def _table(case: Case, rows: list[dict[str, Any]]) -> str:
    shape = f"B {case.batch}, H {case.heads}/{case.key_heads}, T {case.length}, D {case.dim}, {case.dtype}"
    documents = f"{len(case.documents())} documents a row"
    lines = [f"\n{case.layout}: {shape}, {documents}", f"{'':{_WIDTH}}{'forward':>30}{'forward + backward':>30}"]
    lines.append(f"{'':{_WIDTH}}" + f"{'ms':>9}{'ratio':>7}{'TFLOP/s':>9}{'peak':>5}" * 2)
    for name in dict.fromkeys(r["contender"] for r in rows):
        line = f"{name:{_WIDTH}}"
        for r in rows:
            if r["contender"] == name:
                share = f"{100 * r['of_peak']:4.0f}%" if r["of_peak"] != "" else "     "
                line += f"{r['ms']:9.3f}{r['ratio']:7.2f}{r['tflops']:9.3g}{share}"
        lines.append(line)
    return "\n".join(lines)


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed against T, a panel for each layout and pass, lines for the contenders at the first head dim."""
    from matplotlib.figure import Figure

    dim = rows[0]["D"]
    layouts = list(dict.fromkeys(r["layout"] for r in rows))
    passes = list(dict.fromkeys(r["pass"] for r in rows))
    figure = Figure(figsize=(4.5 * len(layouts), 6.5), layout="constrained")
    panels = figure.subplots(len(passes), len(layouts), squeeze=False, sharex=True)
    for i, kind in enumerate(passes):
        for j, layout in enumerate(layouts):
            axes = panels[i][j]
            chosen = [r for r in rows if (r["layout"], r["pass"], r["D"]) == (layout, kind, dim)]
            for name in dict.fromkeys(r["contender"] for r in chosen):
                line = [(r["T"], r["tflops"]) for r in chosen if r["contender"] == name]
                axes.plot(*zip(*line, strict=True), marker="o", markersize=3, label=name)
            axes.set_title(f"{layout}, D {dim}: {kind}", fontsize=9)
            axes.set_xscale("log", base=2)
            axes.set_xlabel("T")
            axes.set_ylabel("TFLOP/s of what the mask asks for")
    panels[0][0].legend(fontsize=7)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    write_atomic(path, content.getvalue())
