"""Calls kernels of every family at sizes that need masks."""

import torch

import msf_kernels as msf

x = torch.randn(2, 3, 10, 14, dtype=torch.bfloat16)
for form in (torch.contiguous_format, torch.channels_last):
    x = x.contiguous(memory_format=form)
    for mode in ("nearest", "bilinear"):
        base, residual = msf.pyramid_split(x, mode=mode)
        msf.pyramid_merge(base, residual, mode=mode)
    tokens = torch.randn(2, 35, 12)
    msf.guided_euler_step(x.float(), tokens, tokens, 3.0, 0.1, patch=2)
msf.flow_interpolate(x, x, torch.rand(2))
msf.merge_tokens(torch.randn(2, 6, 20), torch.randn(2, 24, 5), grid=(2, 3))
qkv, weight = torch.randn(2, 6, 72, requires_grad=True), torch.randn(12, requires_grad=True)
rope = msf.rope_2d(2, 3, 12)
norms = {"q_weight": weight, "k_weight": weight}
for options in ({}, {"norm": "layer", "q_norm_bias": weight, "k_norm_bias": weight}):
    q, k = msf.qk_norm_rope(qkv, num_heads=2, **norms, **options, rope=rope)
    (q + k).sum().backward()
x, y = torch.randn(2, 2, 37, 161, requires_grad=True).unbind()
gate, shift, scale = torch.randn(2, 6 * 161).chunk(6, 1)[3:]
x_out, h = msf.gate_residual_adaln(x, y, gate, shift[:1], scale)
(x_out + h).sum().backward()
qkv, weight = x.new_ones(1, 21, 2 * 3 * 36).requires_grad_(), torch.ones(36)
options = {"q_weight": weight, "k_weight": weight, "rope": msf.rope_2d(3, 7, 36)}
msf.attention(qkv, num_heads=2, **options).sum().backward()
