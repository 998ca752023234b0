"""Mistakes planted in attention in CUDA are seen; without them it is right."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emulation.build import CSRC, build
from msf_kernels import rope_2d
from msf_kernels.attention import reference
from msf_kernels.qk_norm_rope.examples import preparation
from numerics import assert_as_good_as, assert_sum_as_good_as, normal

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compiles kernels for the host")
HEADS, DIM, WHOLE, STREAMED = 2, 72, 227 << 10, 0

# File, what stands there, and what stands there by mistake.
MISTAKES = {
    "nothing": ("attention.cu", "", ""),
    "fragments of two lanes exchanged": (
        "attention.cuh",
        "rows.at(first + lane % 16, lane / 16 * 8);\n#pragma unroll\n    for (int k",
        "rows.at(first + (lane ^ 1) % 16, lane / 16 * 8);\n#pragma unroll\n    for (int k",
    ),
    "no .trans": (
        "attention.cuh",
        "load_matrices<true>(b, at + 8 * j)",
        "load_matrices(b, at + 8 * j)",
    ),
    "no product of the last 8 channels": (
        "attention.cuh",
        "multiply_matrices<T, 8>(sums[tile][i], a[tile].rest, {b[0]});",
        "",
    ),
    "keys read before they have arrived": (
        "attention.cu",
        "    wait_copies<0>();\n  }\n  write",
        "  }\n  write",
    ),
    "no barrier before the keys are overwritten": (
        "attention.cu",
        "__syncthreads();  // all see",
        "__syncwarp();  // all see",
    ),
    "k prepared twice": (
        "attention.cu",
        "keys.prepare(row, row, head.prepared, 1);",
        "for (int i = 0; i < 2; ++i) keys.prepare(row, row, head.prepared, 1);",
    ),
    "a key beyond the last": (
        "attention.cuh",
        "i % 2 < count) continue",
        "i % 2 <= count) continue",
    ),
    "outputs not rescaled": ("queries.cuh", "out[tile][j][2 * row] *= factor;", ""),
    "the other row's logsumexp": (
        "attention_backward.cu",
        "row + 8 * (k / 2);",
        "row + 8 * (1 - k / 2);",
    ),
    "rotated back the wrong way": (
        "preparation.cuh",
        "rotate(grad, other, -1)",
        "rotate(grad, other, 1)",
    ),
    "the bias of the first head": (
        "preparation.cuh",
        "((part - 2) * heads + head) * kDim",
        "(part - 2) * heads * kDim",
    ),
    "the bias of v in the row sums": ("attention_backward.cu", "(bias ? bias[8 * i + k] : 0)", "0"),
    "rows beyond the last in the gradient of the bias": (
        "attention_backward.cu",
        "add_columns(tile.grad_v[0], tokens - first,",
        "add_columns(tile.grad_v[0], 16,",
    ),
    "a key beyond the last in the gradient": (
        "attention_backward.cu",
        "if (!kKeys && count < 16 * kGroups) mask(scores, count);",
        "",
    ),
    "sums of weights not cleared": ("attention_backward.cu", "head.sums[i] = 0;", ";"),
    "no barrier before the row sums are read": (
        "attention_backward.cu",
        "read_rows(head, a, index);\n  __syncthreads();",
        "read_rows(head, a, index);",
    ),
}


# Only what is called here, which compiles sooner.
OTHERS = {"quad_head.cuh": r"case (?!72)\d+", "dispatch.cuh": r"case DType::float16"}


def compiled_with(mistake: str, folder: Path) -> Path:
    file, right, wrong = MISTAKES[mistake]
    kernels = shutil.copytree(CSRC, folder / "csrc") / "kernels"
    text = (kernels / file).read_text()
    assert right in text
    (kernels / file).write_text(text.replace(right, wrong, 1) if right else text)
    for name, cases in OTHERS.items():
        text = (kernels / name).read_text()
        (kernels / name).write_text(re.sub(rf" {cases}: return (body|call)\(.*\);", "", text))
    files = {"": "attention.cu", "_BACKWARD": "attention_backward.cu"}
    definitions = [f'MSF_ATTENTION{end}="{name}"' for end, name in files.items()]
    alone = Path(__file__).parent / "attention_alone.cpp"
    return build([alone], definitions=definitions, includes=[kernels], module=True)


def call(function: Callable[..., bool], qkv: Tensor, *arguments: Any) -> None:
    sizes = (ctypes.c_int * 4)(*qkv.shape[:2], HEADS, DIM)
    given = [
        ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else x for x in (qkv, *arguments)
    ]
    if not function(sizes, *given):
        raise AssertionError("the launch failed")


def check(library: ctypes.CDLL) -> None:
    low = torch.tensor([-4.0, 4.0, 0.0]).repeat_interleave(HEADS * DIM)  # of all scores
    for prepared, shared, tokens, mean in (
        *((True, WHOLE, 37, 0), (False, WHOLE, 24, low)),
        *((False, WHOLE, 80, 0), (False, STREAMED, 200, 0)),
    ):
        size = 0.1 if mean is low else 1 if prepared else 3
        qkv = (normal(1, tokens, 3 * HEADS * DIM) * size + mean).to(torch.bfloat16)
        options: dict[str, Tensor] = {}
        if prepared:
            q_weight, k_weight = (1 + 0.3 * normal(2, DIM)).float()
            options = {"qkv_bias": normal(3 * HEADS * DIM).float(), "q_weight": q_weight}
            options |= {"k_weight": k_weight, "rope": rope_2d(1, tokens, DIM)}
        given = preparation(HEADS, **options)
        passed = given.qkv_bias, given.q_weight, given.k_weight, given.rope
        out = torch.full((1, tokens, HEADS * DIM), torch.nan, dtype=torch.bfloat16)
        logsumexp = torch.full((1, HEADS, tokens), torch.nan)
        call(library.forward, qkv, *passed, out, logsumexp, shared)
        native, exact = (reference.attention(x, *given) for x in (qkv, qkv.double()))
        for results in zip((out, logsumexp), native, exact, strict=True):
            assert_as_good_as(*results)
        if shared == STREAMED:
            continue
        grad = normal(*out.shape, dtype=torch.bfloat16)
        grad_qkv, partials = torch.full_like(qkv, torch.nan), torch.zeros(5 * HEADS * DIM)
        sums = [torch.full_like(x, torch.nan) if prepared else None for x in passed[:3]]
        made = grad_qkv, partials if prepared else None, *sums
        call(library.backward, qkv, *passed, out, grad, logsumexp, *made)
        native, exact = (
            reference.attention_backward(g, *outputs, x, *given)
            for g, x, outputs in ((grad, qkv, native), (grad.double(), qkv.double(), exact))
        )
        assert_as_good_as(grad_qkv, native[0], exact[0])
        for got, right in zip(sums, exact[1:]):
            if got is not None:
                assert_sum_as_good_as(got, right, native[0], exact[0])


def run(library: Path) -> None:
    """End the process with 0 if all is right in every order of threads, with 1 if something is
    not."""
    torch.manual_seed(0)
    for order in ("fifo", "lifo", "random:1"):
        os.environ["MSF_EMULATION_ORDER"] = order
        try:
            check(ctypes.CDLL(str(library)))
        except AssertionError:
            sys.exit(1)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake: str, tmp_path: Path) -> None:
    # In a process of its own: the thread-local variables of so many libraries do not fit one.
    library = compiled_with(mistake, tmp_path)
    process = get_context("fork").Process(target=run, args=(library,))
    process.start()
    process.join()
    assert process.exitcode == (mistake != "nothing")
