"""Settings of PyTorch's compiler that everything compiled here needs."""

import torch

# One graph for each pattern of attention, in training and validation, for full and last batches, and a second network
# in the process. PyTorch's 8 are too few, and past them it would silently run uncompiled.
_GRAPHS = 64


def prepare_compiler() -> None:
    """Allow as many graphs of one function as are needed, and leave each whole under DDP.

    What is compiled are single blocks, between which DDP can already send; it would cut them apart.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    torch._dynamo.config.optimize_ddp = False
