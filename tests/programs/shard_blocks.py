"""Trains a tiny model, its blocks sharded alone in bfloat16, prints the losses and saves it. The
arguments are the wrapper, fsdp1 or fsdp2, and the folder."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from models import images, tiny_model
from msf.transformer import Block

DTYPES = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}


# Images come in float32, and the model itself casts what the first layer takes: neither wrapper
# casts the inputs of the whole model.
def sharded_by_fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        mixed_precision=MixedPrecision(**DTYPES, cast_root_forward_inputs=False),
        device_id=torch.device("cpu"),
    )


def sharded_by_fsdp2(model: nn.Module) -> nn.Module:
    for stage in model.stages:
        for block in stage.blocks:
            fully_shard(block, mp_policy=MixedPrecisionPolicy(**DTYPES))
    root = MixedPrecisionPolicy(**DTYPES, cast_forward_inputs=False)
    return fully_shard(model, mp_policy=root)


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = {"fsdp1": sharded_by_fsdp1, "fsdp2": sharded_by_fsdp2}[sys.argv[1]](tiny_model())
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
x, y = images(8), torch.arange(8) % 3


def loss():
    value = model(x, y, generator=torch.Generator().manual_seed(0))["total"]
    print(value.item())
    return value


for _ in range(3):
    loss().backward()
    optimizer.step()
    optimizer.zero_grad()
loss()
if sys.argv[1] == "fsdp1":
    try:
        model.save_pretrained(sys.argv[2])
    except ValueError as error:
        print(error)
    with FullyShardedDataParallel.summon_full_params(model):
        model.save_pretrained(sys.argv[2])
else:
    model.save_pretrained(sys.argv[2])
dist.destroy_process_group()
