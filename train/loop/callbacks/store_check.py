"""A token store is compared with its checksums while a run trains on it."""

import threading
from typing import Any

import lightning.pytorch as L

from sinkbed.data.pack.batches import Rows
from sinkbed.data.store.token_store import TokenStore
from sinkbed.train.loop.datamodule import TokenData


class StoreCheck(L.Callback):
    """Compares the token store with its checksums while training goes on, in a thread; damage stops the run.

    A small store is compared before the first step.
    """

    def __init__(self, data: TokenData) -> None:
        self.data = data
        self.damage: Exception | None = None
        self._thread: threading.Thread | None = None

    def _compare(self) -> None:
        try:
            for split in self.data.store.manifest.splits:
                TokenStore.open(self.data.store_path, split).verify()
            # Opened anew: what training reads from is not for two threads.
            store = TokenStore.open(self.data.store_path, "train")
            Rows(store, self.data.strategy, self.data.context_length).layout.verify()
        except Exception as error:
            self.damage = error

    def _raise(self) -> None:
        if self.damage is not None:
            raise ValueError(
                f"{self.damage}. Steps since this run began may have read what is damaged: make the store anew, then "
                "start again"
            )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin, from one process of each machine."""
        if trainer.local_rank == 0 and self._thread is None:
            self._thread = threading.Thread(target=self._compare, name="store-check", daemon=True)
            self._thread.start()
            self._thread.join(timeout=1.0)
            self._raise()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Stop on damage, before the checkpoint of this step."""
        self._raise()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait for the end of the comparison."""
        if self._thread is not None:
            self._thread.join()
        self._raise()
