"""Train a network whose parameters lie on all ranks (FSDP2), over mpicoll.

    mpiexec -n 2 python examples/fsdp.py

Each rank keeps its part of every parameter, of its gradient and of the optimizer's state; they are
gathered where a layer is computed.  The result is compared with one process that has all of it.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mpicoll.torch  # noqa: F401  (not needed where mpicoll is installed)

STEPS, ROWS, WIDTH = 20, 48, 64


def network():
    """Return the same network on every rank."""
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*layers).double()


def train(model, rank=0, size=1):
    """Fit the network to random numbers; return the loss of each step on this rank's rows."""
    made = torch.Generator().manual_seed(1)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(STEPS):
        x, y = torch.rand(2, ROWS, WIDTH, generator=made, dtype=torch.double)
        mine = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
        loss = (model(x[mine]) - y[mine]).square().sum() * size / (ROWS * WIDTH)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def main():
    """Train together, then alone, and compare."""
    dist.init_process_group("mpicoll")
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    model = network()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = train(model, rank, size)
    dist.all_reduce(losses, dist.ReduceOp.AVG)
    off = (losses - train(network())).abs().max().item()
    here = sum(p.to_local().numel() for p in model.parameters())
    if rank == 0:
        whole = sum(p.numel() for p in model.parameters())
        print(f"rank 0 of {size} keeps {here} of {whole} parameters")
        print(f"correct: {off < 1e-6} (losses differ from one process's by {off:.1e})")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
