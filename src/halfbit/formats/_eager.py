"""When an operator of torch.library may be passed by: calling it takes as long as a product with a small matrix."""

from torch import Tensor
from torch.compiler import is_compiling


def eager(x: Tensor) -> bool:
    """Nothing looks at the call but us: a plain tensor without gradient, and no compiler."""
    return type(x) is Tensor and not x.requires_grad and not is_compiling()
