"""Lightning's view of the data: rows of the train split, in an order whose whole state is one integer."""

import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import context, popen_fork
from pathlib import Path
from types import TracebackType
from typing import Any

import lightning.pytorch as L
import torch

from sinkbed.data.pack.audit import audit
from sinkbed.data.pack.batches import Batch, RowLoader, Rows, RowSampler
from sinkbed.data.pack.strategy import Strategy
from sinkbed.data.store.token_store import TokenStore
from sinkbed.train.loop.settings import micro_batches
from sinkbed.train.run.world import end_with_parent


class _Popen(popen_fork.Popen):
    terminate = popen_fork.Popen.kill  # what is ignored would be waited for without end


class _Worker(context.ForkProcess):
    """A data worker: forked by the training process, whose end is its own, and killed where it is to be terminated."""

    @staticmethod
    def _Popen(process: Any) -> _Popen:
        return _Popen(process)


class _Workers(context.ForkContext):
    """In place of the default, which is another one in a process that is not the first: in an arm of a study."""

    Process = _Worker  # type: ignore[assignment]


def _begin_worker(worker: int) -> None:
    """A scheduler signals every process; batches are wanted until the checkpoint is saved."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(os.getppid())
    sys.excepthook = _tell_of_faults


def _tell_of_faults(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Nothing of a training process that hangs up as it ends: Python's thread that hands it batches calls this."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)


class TokenData(L.LightningDataModule):
    """Rows from a token store under a strategy."""

    def __init__(
        self,
        store: Path,
        context_length: int,
        strategy: Strategy,
        batch_size: int,
        micro_batch_size: int | None = None,
        seed: int = 0,
        workers: int = 0,
        unique_rows: int | None = None,
    ) -> None:
        """Configure the data.

        Args:
            store: folder of the token store (see `sinkbed prepare`).
            context_length: T, tokens a row.
            strategy: packing, first token, document start and end, mask, positions.
            batch_size: rows an optimizer step, over all processes and micro-batches.
            micro_batch_size: rows a forward pass in one process; null takes batch_size over the processes.
            seed: seed of the row order and of random first tokens; not of the model.
            workers: processes that build batches; 0 builds them in the training process.
            unique_rows: train on only so many rows, those of the first documents, again and again; null on all.
        """
        super().__init__()
        self.store_path = store
        self.context_length = context_length
        self.strategy = strategy
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.workers = workers
        self.rows_at_start = 0
        self.tokens_at_start = 0
        self.steps_at_start = 0
        self.store = TokenStore.open(store, "train")
        self.unique_rows = unique_rows
        self.rows = Rows(self.store, strategy, context_length, seed, unique_rows)

    def accumulation(self, world_size: int) -> int:
        """Micro-batches an optimizer step. Raises ValueError where the batch sizes do not divide."""
        return micro_batches(self.batch_size, self.micro_batch_size, world_size)

    def rows_consumed(self) -> int:
        """Rows that optimizer steps have used so far: the state of the data."""
        steps = self.trainer.global_step if self.trainer is not None else self.steps_at_start
        return self.rows_at_start + (steps - self.steps_at_start) * self.batch_size

    def tokens_at(self, step: int) -> int:
        """Tokens seen after `step` optimizer steps of this run."""
        done = step - max(0, self.steps_at_start)
        return self.tokens_at_start + done * self.batch_size * self.context_length

    def layout(self) -> dict[str, Any]:
        """What decides the tokens of row number r."""
        return {
            "documents": self.store.info.digest,
            "strategy": dataclasses.asdict(self.strategy),
            "context_length": self.context_length,
            "seed": self.seed,
            "unique_rows": self.unique_rows,
        }

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        steps = self.trainer.global_step if self.trainer is not None else self.steps_at_start
        return {"rows_consumed": self.rows_consumed(), "tokens": self.tokens_at(steps), "layout": self.layout()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From the checkpoint, before the loader is made. A fork may have other rows; it begins with their first."""
        self.rows_at_start = state["rows_consumed"] if state["layout"] == self.layout() else 0
        self.tokens_at_start = state["tokens"]
        self.steps_at_start = -1  # set by the loader, once the trainer knows its step

    def train_dataloader(self) -> RowLoader:
        """Endless batches, from the first row not yet consumed."""
        trainer = self.trainer
        assert trainer is not None
        if self.steps_at_start < 0:
            self.steps_at_start = trainer.global_step
        sampler = RowSampler(
            self.batch_size,
            micro_batch_size=self.batch_size // trainer.world_size // self.accumulation(trainer.world_size),
            rows_consumed=self.rows_consumed(),
            world_size=trainer.world_size,
            rank=trainer.global_rank,
        )
        return RowLoader(
            self.rows,
            sampler,
            num_workers=self.workers,
            worker_init_fn=_begin_worker,
            multiprocessing_context=_Workers() if self.workers else None,
            pin_memory=torch.cuda.is_available(),
        )

    def on_exception(self, exception: BaseException) -> None:
        """End the workers: one that died may have left a lock behind, at which the others wait for ever.

        Without torch's handler, which would raise of their end in the midst of whatever comes next.
        """
        sets_handlers = threading.current_thread() is threading.main_thread()
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if sets_handlers else None
        try:
            for child in multiprocessing.active_children():
                if isinstance(child, _Worker):
                    child.kill()
                    child.join(timeout=5)
        finally:
            if sets_handlers:
                signal.signal(signal.SIGCHLD, handler)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move the batch's tensors."""
        return batch.to(device)

    def audit(self) -> dict[str, Any]:
        """What packing did with the corpus."""
        return audit(self.rows)
