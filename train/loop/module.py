"""The Lightning module: loss, optimizer, clipping, and what makes a checkpoint self-describing."""

import dataclasses
import os
import time
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sinkbed.data.pack.batches import Batch
from sinkbed.kernels import Implementation
from sinkbed.model import Decoder, DecoderConfig
from sinkbed.model.loss import IGNORED
from sinkbed.plain_text import counted
from sinkbed.ranges import check_number
from sinkbed.train.loop.datamodule import TokenData
from sinkbed.train.loop.fsdp import FSDP2Strategy, shard
from sinkbed.train.loop.identity import check_identity
from sinkbed.train.loop.optim import OptimizerConfig, build_optimizer, decay_until, learning_rate_factor
from sinkbed.train.loop.optimizers import OPTIMIZERS
from sinkbed.train.measure.masks import strategy_mask
from sinkbed.train.run import directory
from sinkbed.train.run.metrics import record


class TrainingDiverged(RuntimeError):
    """The loss, its gradient or the weights are no longer finite."""


def counted_targets(batch: Batch) -> Tensor:
    """[B, T] targets, IGNORED where they do not count."""
    return batch.targets.masked_fill(~batch.loss_mask, IGNORED)


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


_DEFAULT_OPTIMIZER = OptimizerConfig()


class SinkbedModule(L.LightningModule):
    """A decoder under training."""

    def __init__(
        self,
        decoder: DecoderConfig,
        optimizer: OptimizerConfig = _DEFAULT_OPTIMIZER,
        max_grad_norm: float | None = 1.0,
        compile: bool = False,
        activation_checkpointing: bool = False,
        implementation: Implementation | None = None,
    ) -> None:
        """Configure the model.

        Args:
            decoder: shape and parts of the decoder; the vocabulary comes from the token store.
            optimizer: the optimizer and its schedule.
            max_grad_norm: the gradient's global norm is scaled down to this, more than 0; null never.
            activation_checkpointing: compute each block again in the backward pass instead of keeping it; the same
                bits in less memory.
            implementation: of the attention operator; null takes the device's own.
            compile: run the decoder through torch.compile (needs a C++ compiler on CPUs).
        """
        super().__init__()
        if max_grad_norm is not None:
            check_number("model.max_grad_norm", max_grad_norm, above=0)
        self.decoder_config = decoder
        self.optimizer_config = optimizer
        self.max_grad_norm = max_grad_norm
        self.compile_decoder = compile
        self.activation_checkpointing = activation_checkpointing
        self.implementation = implementation
        self.decoder: Decoder | None = None
        self.parent: dict[str, Any] | None = None
        """The run and step that this run is a fork of, when it starts from another run's checkpoint."""
        self._losses: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._last: tuple[int, Tensor, Tensor] | None = None
        self._window: tuple[float, int] | None = None
        self._decay: tuple[int, float] = (0, 0.0)

    @property
    def data(self) -> TokenData:
        """The run's data module."""
        return self.trainer.datamodule  # type: ignore[attr-defined, no-any-return]

    def configure_model(self) -> None:
        """Build the decoder once the vocabulary is known."""
        if self.decoder is not None:
            return
        self.decoder = Decoder(self.decoder_config, self.data.store.manifest.vocab_size)
        self.decoder.implementation = self.implementation
        self.decoder.checkpoint_activations = self.activation_checkpointing
        if isinstance(self.trainer.strategy, FSDP2Strategy):
            shard(self.decoder, self.trainer.strategy.device_mesh["data_parallel"])
        if self.compile_decoder:
            self.decoder.compile()

    def configure_optimizers(self) -> Any:
        """The optimizer, stepped with its schedule every optimizer step."""
        assert self.decoder is not None
        optimizer, schedule = build_optimizer(self.decoder, self.optimizer_config, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def parts(self) -> int:
        """Forward passes of an optimizer step, over all processes."""
        return self.trainer.accumulate_grad_batches * self.trainer.world_size

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Loss of one micro-batch: the mean over its targets, or its share of the sum over the step's targets."""
        assert self.decoder is not None
        strategy = self.data.strategy
        mask = strategy_mask(strategy, batch.doc_start, batch.doc_end)
        positions = batch.positions if strategy.positions == "document" else None
        loss = self.decoder(batch.tokens, positions, mask, targets=counted_targets(batch)).loss
        if self.parts > 1:
            # Micro-batches differ in the targets that count. Lightning averages over micro-batches and processes;
            # `_normalise` makes of that the mean over all targets, whatever the parts.
            count = batch.loss_mask.sum()
            loss = loss * (count / batch.loss_mask.numel())
            self._counts.append(count)
        self._losses.append(loss.detach())
        return loss

    def _normalise(self) -> Tensor:
        """Loss of the optimizer step, the mean over all its targets; scales the gradients to it."""
        if self.parts == 1:
            [loss] = self._losses
        else:
            local = torch.stack([torch.stack(self._losses).sum(), torch.stack(self._counts).sum().float()])
            sums = self.trainer.strategy.reduce(local, reduce_op="sum")
            targets = self.data.batch_size * self.data.context_length
            # sums[0] is parts times the average that Lightning made of sum / micro-batch size.
            loss = sums[0] / self.parts * (targets / sums[1].clamp_min(1))
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            torch._foreach_mul_([local_part(g) for g in gradients], targets / sums[1].clamp_min(1))
        self._losses.clear()
        self._counts.clear()
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the global norm, stop on a norm that is not finite, and log."""
        loss = self._normalise()
        parameters = list(self.parameters())
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
        norm = whole(total)
        step = self.trainer.global_step + 1
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = step % every == 0 or step in (1, self.trainer.max_steps)
        # Reading a number from an accelerator stalls it, so there the check waits for the logging step.
        self._last = (step, loss, norm)
        if due or norm.device.type == "cpu":
            self.check_finite(clipped=False)
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, total, foreach=True)
        if due:
            self._log_training(step, loss, norm)

    def check_finite(self, *, clipped: bool = True) -> None:
        """Raise TrainingDiverged where the last step's loss or gradient was not finite; call before saving."""
        if self._last is None:
            return
        step, loss, norm = self._last
        if not torch.isfinite(loss + norm):
            # Clipping by a norm that is not finite spoils them all.
            named = [] if clipped else [(name, p.grad) for name, p in self.named_parameters() if p.grad is not None]
            gradients = ((name, local_part(gradient)) for name, gradient in named)
            wrong = [name.removeprefix("decoder.") for name, gradient in gradients if not gradient.isfinite().all()]
            of = f", {counted(len(wrong), 'gradient')} not finite, {wrong[0]} among them" if wrong else ""
            raise self._diverged(
                step, "loss and gradient", f"loss {float(loss):.4g} and gradient norm {float(norm):.4g}{of}"
            )

    def check_weights(self) -> None:
        """Raise TrainingDiverged, in every process, where a weight or moment is not finite; call before saving."""
        tensors: dict[str, Tensor] = dict(self.named_parameters())
        for optimizer in self.trainer.optimizers:
            for number, state in enumerate(optimizer.state.values()):
                for key, value in state.items():
                    each = value if isinstance(value, list) else [value]  # SOAP keeps lists
                    kept = {f"{key}{at or ''}": part for at, part in enumerate(each) if isinstance(part, Tensor)}
                    tensors |= {f"{name} of parameter {number}": part for name, part in kept.items()}
        parts = {name: local_part(tensor.detach()) for name, tensor in tensors.items()}
        # The extremes of a tensor take no copy of it, and nan is among them where it is anywhere.
        extremes = {name: torch.stack(torch.aminmax(part)).float() for name, part in parts.items() if part.numel()}
        device = self.trainer.strategy.root_device
        finite = torch.stack([each.to(device) for each in extremes.values()]).isfinite().all()
        if self.trainer.strategy.reduce((~finite).float(), reduce_op="sum") > 0:
            wrong = [name for name, each in extremes.items() if not each.isfinite().all()]
            raise self._diverged(
                self.trainer.global_step,
                "weights and moments",
                f"{wrong[0].removeprefix('decoder.')} {'with others ' if len(wrong) > 1 else ''}not finite"
                if wrong
                else "some in another process that are not",
            )

    def _diverged(self, step: int, expected: str, actual: str) -> TrainingDiverged:
        saved = getattr(self.trainer.checkpoint_callback, "saved", None)
        kept = "no step is saved" if saved is None else "the checkpoints before it are good"
        fork = ", from the beginning or with --fork from one of them (a resumed run keeps its settings)"
        return TrainingDiverged(
            f"step {step} ({self.data.tokens_at(step):,} tokens): expected finite {expected}, got {actual}. Weights of "
            f"this step are not saved and {kept}; start a new run with a lower model.optimizer.lr or a longer "
            f"warm-up{'' if saved is None else fork}"
        )

    def _log_training(self, step: int, loss: Tensor, norm: Tensor) -> None:
        now = time.perf_counter()
        self._decay = (step, decay_until(self.optimizer_config, step, self.trainer.max_steps, since=self._decay))
        values = {
            "train/loss": float(loss),
            "train/lr": self.trainer.optimizers[0].param_groups[0]["lr"],
            "train/accumulated_decay": self._decay[1],
            "train/grad_norm": float(norm),
        }
        if self._window is not None:
            then, before = self._window
            speed = (self.data.tokens_at(step) - self.data.tokens_at(before)) / (now - then)
            values["train/tokens_per_second"] = speed
            self.log("tok/s", round(speed), prog_bar=True, logger=False)
        self._window = (now, step)
        self.log("loss", values["train/loss"], prog_bar=True, logger=False)
        record(self.trainer, values, step=step, tokens=self.data.tokens_at(step))

    def skip_time(self, seconds: float) -> None:
        """Leave time that was not training out of the tokens per second."""
        if self._window is not None:
            self._window = (self._window[0] + seconds, self._window[1])

    def identity(self, data: TokenData, trainer: L.Trainer) -> dict[str, Any]:
        """What a checkpoint must share with the run that resumes it, and what `validate` rebuilds it from."""
        manifest = data.store.manifest
        return {
            "format": directory.FORMAT,
            "decoder": dataclasses.asdict(self.decoder_config),
            "vocab_size": manifest.vocab_size,
            "tokenizer": manifest.tokenizer_sha256,
            "store": str(data.store_path),
            "documents": {name: split.digest for name, split in manifest.splits.items()},
            "bos_id": manifest.bos_id,
            "eos_id": manifest.eos_id,
            "manifest": manifest.digest,
            "strategy": dataclasses.asdict(data.strategy),
            "context_length": data.context_length,
            "batch_size": data.batch_size,
            "seed": data.seed,
            "unique_rows": data.unique_rows,
            "seed_everything": int(os.environ.get("PL_GLOBAL_SEED", 0)),
            "optimizer": dataclasses.asdict(self.optimizer_config),
            "max_grad_norm": self.max_grad_norm,
            "max_steps": trainer.max_steps,
            "precision": str(trainer.precision),
            "micro_batches": trainer.accumulate_grad_batches,
            "processes": trainer.world_size,
            "arithmetic": {
                "model.compile": self.compile_decoder,
                "model.implementation": self.implementation,
                "trainer.deterministic": torch.are_deterministic_algorithms_enabled(),
                "trainer.benchmark": torch.backends.cudnn.benchmark,
            },
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the identity; name the optimizer's states by parameter, so that any strategy can read them."""
        checkpoint["sinkbed"] = self.identity(self.data, self.trainer)
        for state, optimizer in zip(checkpoint["optimizer_states"], self.trainer.optimizers, strict=True):
            if state:  # empty where another process saves the whole
                rename_states(state, dict(enumerate(self._parameter_names(optimizer))))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `check_identity`. Lightning counts micro-batches, which may be of another size now."""
        fork = self.parent is not None
        check_identity(checkpoint, self.identity(self.data, self.trainer), fork=fork)
        done = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            # As saved in the hook at a batch's end: processed, not yet completed.
            counts.update(ready=done, started=done, processed=done, completed=done - 1)
        if fork:
            self._adopt(checkpoint)

    def _adopt(self, checkpoint: dict[str, Any]) -> None:
        """Keep weights and moments of another run's checkpoint; every setting is this run's own."""
        c = self.optimizer_config
        assert self.decoder is not None
        factor = learning_rate_factor(c, checkpoint["global_step"], self.trainer.max_steps)
        fresh, _ = build_optimizer(self.decoder, c, self.trainer.max_steps)
        before, after = (OPTIMIZERS.name_of(name) for name in (checkpoint["sinkbed"]["optimizer"]["name"], c.name))
        names = iter(self._parameter_names(fresh))
        for state in checkpoint["optimizer_states"]:
            if before != after:  # what another one kept has another meaning
                state |= {"state": {}, "param_groups": [{} for _ in fresh.param_groups]}
            for group, ours in zip(state["param_groups"], fresh.param_groups, strict=True):
                parameters = [next(names) for _ in ours["params"]]
                group |= {**ours, "params": parameters, "lr": c.lr * factor, "initial_lr": c.lr}
        for schedule in checkpoint["lr_schedulers"]:
            schedule["base_lrs"] = [c.lr] * len(fresh.param_groups)
        for name in ("SinkMonitor", "StateMonitor", "Checkpoints"):
            checkpoint["callbacks"].pop(name, None)

    def _parameter_names(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """Names in the order of the optimizer's own numbers."""
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def rename_states(state: dict[str, Any], names: dict[Any, Any]) -> None:
    """Rename the parameters of an optimizer's state dict, in place; a name that is not among `names` stays."""
    state["state"] = {names.get(key, key): value for key, value in state["state"].items()}
    for group in state["param_groups"]:
        group["params"] = [names.get(key, key) for key in group["params"]]
