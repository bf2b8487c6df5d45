"""How large the tensors are that a computation makes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor holds that an operator returns; of one dtype, if it is given."""

    def __init__(self, dtype: torch.dtype | None = None):
        super().__init__()
        self.dtype, self.numel = dtype, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor) and self.dtype in (None, x.dtype):
                self.numel = max(self.numel, x.numel())
        return result
