"""When an operator of torch.library may be passed by: calling it takes as long as a product with a small matrix."""

import torch
from torch import Tensor


def eager(x: Tensor) -> bool:
    """Nothing looks at the call but us: a plain tensor without gradient, and no compiler."""
    return type(x) is Tensor and not x.requires_grad and not torch.compiler.is_compiling()
