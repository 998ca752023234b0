"""Lets an emulated CUDA kernel read one element beyond its tensors."""

import torch

from kernels.emulated import emulated

x = [torch.zeros(64) for _ in range(4)]
emulated().flow_interpolate(1, 1, 65, *(t.data_ptr() for t in (x[0], x[1], x[0], *x[2:])), None)
