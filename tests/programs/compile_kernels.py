"""Compiles kernels as the audit does, and asserts what the machine code must look like."""

import re
from functools import partial

import torch

from msf_kernels.audit import calls
from msf_kernels.audit import triton as audit
from msf_kernels.audit.disassembly import disassemble
from msf_kernels.audit.occupancy import Launch
from msf_kernels.audit.sass import parse
from msf_kernels.examples import examples

(split,) = (example for example in examples("pyramid") if example.name == "pyramid_split nearest")
shape = split.audited[0]
new = partial(calls.new_tensor, call_dtype=torch.float32, memory_format=torch.contiguous_format)
call = partial(calls.run, "pyramid", "triton", split, new, shape, False)
((kernel, compiled, log, launch),) = audit._compile(call, 90)
assert launch == Launch(grid=256 * 16 * 32 * 32 // 256, threads=128, shared=0), launch
(sass,) = disassemble([compiled.asm["cubin"]], 90)
row = audit._row(kernel.__name__, "", 90, compiled, log, audit.BUDGET, sass)
assert row.problem() is None and 8 <= row.registers <= row.budget, row
code = compiled.asm["ptx"]
assert "div.rn.f32" in code and not re.search(r"fma\.|\.ftz|div\.full", code)
assert set(re.findall(r"(?:ld|st)\.global\.v4", code)) == {"ld.global.v4", "st.global.v4"}

# Each of several kernels has its own instructions, and its jumps stay among them.
with_gradient = partial(calls.run, "pyramid", "triton", split, new, shape, True)
cubins = [compiled.asm["cubin"] for _, compiled, *_ in audit._compile(with_gradient, 90)]
together = [parse(sass) for sass in disassemble(cubins, 90)]
assert len(together) == 2 and together[0] != together[1]
for cubin, (instructions, successors) in zip(cubins, together):
    alone, alone_successors = parse(*disassemble([cubin], 90))
    assert [x.opcode for x in instructions] == [x.opcode for x in alone]
    assert successors == alone_successors
    assert any(at in to for at, to in enumerate(successors))  # the empty loop behind the end

calls.DTYPES = {"bf16": torch.bfloat16}
assert [row.problem() for row in audit.rows_of("tokens", 80)] == [None] * 3
