"""Lets a Triton kernel read one element beyond its tensors."""

import torch

from msf_kernels.interpolation.triton import interpolate_kernel
from msf_kernels.triton_support.launch import launch

names = ("data_ptr", "noise_ptr", "t_ptr", "x_t_ptr", "velocity_ptr")
tensors = {name: torch.zeros(64) for name in names}
launch(interpolate_kernel, torch.device("cpu"), 1, **tensors, size=65, BLOCK=128, warps=1)
