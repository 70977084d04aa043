"""Optimizers, a file each.

One is made from the model and the `OptimizerConfig`: a `torch.optim.Optimizer` over parameter groups, as
`optim.parameter_groups` makes them. It has two attributes: `state_tensors`, about how many tensors of a parameter's
size it keeps, and `shards`, whether it works on parameters that are sharded (FSDP2).
"""

from sinkbed.registry import Registry

OPTIMIZERS = Registry("model.optimizer.name", __name__)
