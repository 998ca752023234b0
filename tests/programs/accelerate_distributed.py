"""Trains an accelerated transformer with each of the wrappers that are named, all but "none" in two
processes, and prints the losses."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import msf
from drop_in.transformers import inputs, make


def sharded(model):
    mesh = init_device_mesh("cpu", (2,))
    for block in (*model.blocks, model):
        fully_shard(block, mesh=mesh)
    return model


WRAPPERS = {
    "none": msf.accelerate,
    "ddp": lambda model: DistributedDataParallel(msf.accelerate(model)),
    "fsdp2": lambda model: sharded(msf.accelerate(model)),
    "fsdp2 first": lambda model: msf.accelerate(sharded(model)),
}


def losses(name, rank):
    model = WRAPPERS[name](make("LightningDiT", torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    x, c = inputs(torch.float64, batch=4)
    own = slice(None) if name == "none" else slice(2 * rank, 2 * rank + 2)
    for _ in range(3):
        out = model(x[own], c[own])
        loss = out.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        if name != "none":
            dist.all_reduce(total)
            total /= 2
        yield total.item()


def train(rank, folder, *names):
    torch.set_num_threads(1)
    store = f"file://{Path(folder) / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for name in names:
        line = f"{name}: {' '.join(map(repr, losses(name, rank)))}"
        if rank == 0:
            print(line, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    # What is imported above, which takes seconds, is shared.
    mp.start_processes(train, tuple(sys.argv[1:]), nprocs=2, start_method="fork")
