"""Prints the fault that the audit finds in attention's forward at 80 tokens and heads of 96."""

from functools import partial

import torch

from msf_kernels.audit import calls
from msf_kernels.audit import triton as audit
from msf_kernels.examples import examples

(example,) = (found for found in examples("attention") if found.variant == "norm-rope")
shape = (2, 80, 4, 96)
assert shape in example.audited_forward
new = partial(calls.new_tensor, call_dtype=torch.bfloat16, memory_format=torch.contiguous_format)
call = partial(calls.run, "attention", "triton", example, new, shape, False)
*_, (kernel, compiled, log, _) = audit._compile(call, 90)  # the first prepares q and k
print(
    audit._row(
        kernel.__name__, "", 90, compiled, log, 255, audit.disassemble(compiled.asm["cubin"])
    ).fault
)
