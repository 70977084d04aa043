"""Puts `tests.support.ptx` under the project's own launches: `attention` and its gradients run as compiled for a chip.

Compiling needs a process without Triton's interpreter, which the tests run in: a worker compiles, and the code that it
returns runs here.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from sinkbed.train.cli.kernels import compile_only
from tests.support import ptx

KERNELS = ("forward", "delta", "dq", "dkv", "received")


class Compiled(NamedTuple):
    """What the worker returns."""

    code: str
    """PTX."""
    parameters: list[str]
    """Names of the arguments that were not compiled into the code."""
    shared: int
    """Bytes of shared memory a block."""


class Compiler:
    """Compiles launches in a process of its own, each once."""

    def __init__(self, cache: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.worker = ProcessPoolExecutor(1, spawn, initializer=compile_only, initargs=(str(cache),))
        self.compiled: dict[Any, Compiled] = {}

    def __call__(self, arch: str, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Compiled:
        """`arguments` of the kernel `name`, by position."""
        kinds = tuple(x.dtype if isinstance(x, torch.Tensor) else x for x in arguments)
        key = arch, name, kinds, tuple(options.items())
        if key not in self.compiled:
            self.compiled[key] = self.worker.submit(_compile, arch, name, kinds, options).result()
        return self.compiled[key]


def _no_machine_code(backend: Any = None, stages: Any = None, *_: Any) -> tuple[str, str]:
    """For Triton to end with PTX: a third of the time would go to the assembler, whose code nothing reads."""
    if stages is not None:
        stages["cubin"] = lambda ptx, metadata: b""
    return "no machine code", "no machine code"


def _compile(arch: str, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Compiled:
    from triton import knobs

    from sinkbed.kernels.triton import aot
    from sinkbed.kernels.triton import kernels as triton_kernels

    knobs.runtime.add_stages_inspection_hook = _no_machine_code
    aot.stand_in(arch)
    kernel = getattr(triton_kernels, f"{name}_kernel")
    compiled = kernel.warmup(*arguments, grid=(1,), **options)
    names = [n for n in kernel.arg_names if compiled.src.signature[n] != "constexpr"]
    return Compiled(compiled.asm["ptx"], names, compiled.metadata.shared)


class _Kernel(NamedTuple):
    """Takes the place of a kernel of the project."""

    compiler: Compiler
    arch: str
    name: str
    names: list[str]
    """Of its arguments."""
    change: Callable[[str, str], str]
    settings: dict[str, Any]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.launch(grid, arguments, options)

    def launch(self, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        compiled = self.compiler(self.arch, self.name, arguments, options)
        given = dict(zip(self.names, arguments, strict=False)) | options
        memory, values = ptx.Memory(), []
        for name in compiled.parameters:
            x = given[name]
            if isinstance(x, torch.Tensor):
                assert x.data_ptr() % 16 == 0, "what the code was compiled for"
                memory.add(name, torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).numpy())
                x = x.data_ptr()
            values.append(x)
        scratch = [0, 0]  # two pointers that Triton adds and these kernels do not use
        code = self.change(self.name, compiled.code)
        ptx.launch(code, grid, [*values, *scratch], memory, compiled.shared, **self.settings)


@contextmanager
def running_on(
    arch: str, compiler: Compiler, *, change: Callable[[str, str], str] = lambda name, code: code, **settings: Any
) -> Iterator[None]:
    """Inside, `implementation="triton"` runs what is compiled for `arch`, `sm_80` or `sm_90`, with its tiles.

    change: takes a kernel's name and its PTX to the PTX that runs.
    settings: lanes, late and seed of `ptx.launch`.
    """
    from sinkbed.kernels.triton import kernels as triton_kernels
    from sinkbed.kernels.triton import op

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(op, "_architecture", lambda: arch))
        for name in KERNELS:
            names = getattr(triton_kernels, f"{name}_kernel").arg_names
            kernel = _Kernel(compiler, arch, name, names, change, settings)
            patches.enter_context(mock.patch.object(triton_kernels, f"{name}_kernel", kernel))
        yield
