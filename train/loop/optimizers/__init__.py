"""Optimizers, a file each.

One is made from parameter groups (matrices with `weight_decay`, then the rest without) and the `OptimizerConfig`. Its
attribute `state_tensors` says how many tensors of a parameter's size it keeps.
"""

from sinkbed.registry import Registry

OPTIMIZERS = Registry("model.optimizer.name", __name__)
