"""What all tests share."""

import torch

torch.set_num_threads(1)  # tensors are small: a second thread would mostly wait, for long on a busy machine
