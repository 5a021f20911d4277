"""What all tests share, and helpers that several files import."""

import torch

torch.set_num_threads(1)  # tensors are small: a second thread would mostly wait, for long on a busy machine


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Malicious:
    """Unpickled by an unwary reader, it calls function(*arguments)."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def parameters(module):
    return sum(p.numel() for p in module.parameters())
