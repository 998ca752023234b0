"""Trains a tiny model under FSDP2, its blocks sharded alone in bfloat16, and prints the losses."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from models import images, tiny_model

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = tiny_model()
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
for stage in model.stages:
    for block in stage.blocks:
        fully_shard(block, mp_policy=policy)
# Images come in float32, and the model itself casts what the first layer takes.
root = MixedPrecisionPolicy(
    param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
)
fully_shard(model, mp_policy=root)
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
x, y = images(8), torch.arange(8) % 3
for _ in range(3):
    loss = model(x, y, generator=torch.Generator().manual_seed(0))["total"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(loss.item())
dist.destroy_process_group()
