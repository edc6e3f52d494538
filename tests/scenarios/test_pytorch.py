"""What PyTorch builds on a backend, over "mpicoll": each run is compared with one process alone."""

from __future__ import annotations

import pytest

from tests.harness import REPORTING

pytest.importorskip("torch", reason="torch is not installed (extra: torch)")

COMMON = (
    REPORTING
    + """
import copy
import warnings
warnings.filterwarnings("ignore")
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
import mpicoll.torch

torch.set_num_threads(1)
dist.init_process_group("mpicoll")
ME, N = dist.get_rank(), dist.get_world_size()
ROWS = 12  # of a batch, over all ranks

def model():
    torch.manual_seed(1)
    layers = nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    return nn.Sequential(*layers)

def batches(steps=5):
    made = torch.Generator().manual_seed(2)
    for _ in range(steps):
        yield torch.randn(ROWS, 6, generator=made), torch.randn(ROWS, 3, generator=made)

def mine(x):
    return x[ROWS // N * ME : ROWS // N * (ME + 1)]

def loss(m, x, y):
    return (m(x) - y).square().mean()

def alone():
    m = model()
    sgd = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches():
        sgd.zero_grad()
        loss(m, x, y).backward()
        sgd.step()
    return list(m.parameters())

def trained(wrapped, sgd=None, part=None, losses=None):
    sgd = sgd or torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches():
        sgd.zero_grad()
        found = loss(wrapped, (part or mine)(x), (part or mine)(y))
        found.backward()
        sgd.step()
        if losses is not None:
            losses.append(found.item())
    return wrapped

def whole(parameters):
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]

def off(parameters, expected=None):
    pairs = zip(whole(parameters), expected or alone(), strict=True)
    return max((a.detach() - b.detach()).abs().max().item() for a, b in pairs)

FOUND = {}

"""
)
END = """
report(**FOUND)
dist.destroy_process_group()
"""


def agrees(job, n, script, **options):
    """Run a script that compares what it finds with one process; all must agree to 1e-6."""
    found = job(n, script + END, 60, preamble=COMMON, **options)
    for rank in found.ranks:
        assert rank is not None, found.output
        values = {name: value for name, value in rank.items() if name != "wall"}
        assert values
        assert all(value < 1e-6 for value in values.values()), values


def test_data_parallel_training_is_that_of_one_process(job):
    agrees(
        job,
        3,
        """
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer

FOUND["default"] = off(trained(DDP(model())).parameters())
FOUND["small buckets"] = off(trained(DDP(model(), bucket_cap_mb=1e-4)).parameters())
FOUND["views"] = off(trained(DDP(model(), gradient_as_bucket_view=True)).parameters())
FOUND["static graph"] = off(trained(DDP(model(), static_graph=True)).parameters())
hooked = DDP(model())
hooked.register_comm_hook(dist.group.WORLD, default_hooks.allreduce_hook)
FOUND["hook"] = off(trained(hooked).parameters())

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.unused = model(), nn.Linear(2, 2)
    def forward(self, x):
        return self.net(x)

found = trained(DDP(Branches(), find_unused_parameters=True))
FOUND["unused"] = off(found.module.net.parameters())

wrapped = DDP(model())
zero = ZeroRedundancyOptimizer(wrapped.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
FOUND["zero"] = off(trained(wrapped, zero).parameters())

joined = DDP(model())
sgd = torch.optim.SGD(joined.parameters(), lr=0.1)
steps = 0
with joined.join():
    for x, y in batches(3 + ME):
        sgd.zero_grad()
        loss(joined, x, y).backward()
        sgd.step()
        steps += 1
assert steps == 3 + ME
everyone = [torch.empty_like(joined.module[0].weight) for _ in range(N)]
dist.all_gather(everyone, joined.module[0].weight.detach())
FOUND["join"] = max((e - everyone[0]).abs().max().item() for e in everyone)
""",
    )


HOOKED = """
from mpicoll.torch.hooks import Bfloat16State, bfloat16_hook

def hooked(module, feedback=True, **options):
    wrapped, state = DDP(module, **options), Bfloat16State(None, feedback)
    wrapped.register_comm_hook(state, bfloat16_hook)
    return wrapped, state
"""


def test_gradients_sent_as_bfloat16_train_nearly_as_whole_ones(job):
    """Error feedback bounds the distance; without it that grows."""
    ended = job(
        2,
        HOOKED
        + """
def long(wrapped):
    (x, y), sgd = next(batches()), torch.optim.SGD(wrapped.parameters(), lr=0.05)
    for _ in range(100):
        sgd.zero_grad()
        loss(wrapped, mine(x), mine(y)).backward()
        sgd.step()
    return list(wrapped.parameters())

whole_ones = long(DDP(model()))
for cap in (25, 1e-4):  # one bucket; one per parameter, after the first step
    FOUND[f"fed back, {cap}"] = off(long(hooked(model(), bucket_cap_mb=cap)[0]), whole_ones)
FOUND["forgotten"] = off(long(hooked(model(), False)[0]), whole_ones)
"""
        + END,
        60,
        preamble=COMMON,
    )
    for rank in ended.ranks:
        near = [value for name, value in rank.items() if name.startswith("fed back")]
        assert len(near) == 2 and 0 < max(near) < 5e-5, ended.ranks
        assert 3 * max(near) < rank["forgotten"] < 1e-2, ended.ranks


def test_of_gradients_sent_as_bfloat16_nothing_is_lost(job):
    """The means that came, and the mean of what ranks keep back, are all that there was."""
    agrees(
        job,
        3,
        HOOKED
        + """
class Weighted(nn.Module):  # a parameter's gradient is what it is multiplied by
    def __init__(self, like):
        super().__init__()
        self.all = nn.ParameterList(nn.Parameter(torch.zeros_like(x)) for x in like)
    def forward(self, by):
        return sum((p * x).sum() for p, x in zip(self.all, by))

made = torch.Generator().manual_seed(5)
def normal(*shape):
    return torch.randn(shape, generator=made, dtype=torch.double)

def gradients():
    strided = torch.channels_last
    of_all = [
        (normal(5, 3), normal(7), normal(2, 3, 4, 5).to(memory_format=strided)) for _ in range(N)
    ]
    return of_all[ME], [sum(same) / N for same in zip(*of_all)]

for cap in (25, 1e-5):
    wrapped, state = hooked(Weighted(gradients()[0]), bucket_cap_mb=cap)
    came, was = [[torch.zeros_like(p) for p in wrapped.parameters()] for _ in range(2)]
    for step in range(6):
        by, means = gradients()
        wrapped.zero_grad()
        wrapped(by).backward()
        for p, a, b, mean in zip(wrapped.parameters(), came, was, means):
            a += p.grad
            b += mean
            assert (p.grad == p.grad.bfloat16()).all() and not torch.equal(p.grad, mean)
    for k, p in enumerate(wrapped.parameters()):
        kept = state.residual(p).clone()
        assert kept.shape == p.shape and kept.any() and kept.abs().max() < 0.1
        dist.all_reduce(kept, dist.ReduceOp.AVG)
        FOUND[f"{k} of {cap}"] = (came[k] + kept - was[k]).abs().max().item()

wrapped, state = hooked(Weighted([torch.zeros(4)]))
for value in (1.0, float("inf"), 1.0):  # such a step is skipped, and costs no other
    wrapped.zero_grad()
    wrapped([torch.full((4,), value)]).backward()
FOUND["after an overflow"] = (wrapped.module.all[0].grad - 1).abs().max().item()

wrapped, state = hooked(Weighted([torch.zeros(4, dtype=torch.bfloat16)]))
wrapped([torch.full((4,), ME * 2.0, dtype=torch.bfloat16)]).backward()
FOUND["bfloat16"] = (wrapped.module.all[0].grad.float() - N + 1).abs().max().item()
assert state.residual(wrapped.module.all[0]) is None

wrapped, state = hooked(nn.Embedding(4, 2, sparse=True))
wrapped(torch.tensor([ME])).sum().backward()
grad = wrapped.module.weight.grad.to_dense()
FOUND["sparse"] = (grad[:N] - 1 / N).abs().max().item() + grad[N:].abs().max().item()
""",
    )


def test_sharded_and_tensor_parallel_training_is_that_of_one_process(job):
    agrees(
        job,
        4,
        """
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel, RowwiseParallel, parallelize_module
)

def sharded_on(mesh):
    sharded = model()
    for layer in (sharded[0], sharded[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(sharded, mesh=mesh)

def split_on(mesh):
    return parallelize_module(model(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})

mesh = init_device_mesh("cpu", (N,))
by_gloo = DeviceMesh.from_group(dist.new_group(backend="gloo"), "cpu")
assert dist.get_backend(by_gloo.get_group()) == "gloo"
for name, on, part in ("fsdp2", sharded_on, mine), ("tensor parallel", split_on, lambda x: x):
    losses, gloos = [], []
    found = trained(on(mesh), part=part, losses=losses)
    FOUND[name] = off(found.parameters())
    trained(on(by_gloo), part=part, losses=gloos)
    assert len(gloos) == 5 and len(set(losses)) == 5, losses
    FOUND[f"losses of {name}"] = max(abs(a - b) for a, b in zip(losses, gloos))

import tempfile
import torch.distributed.checkpoint as checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
sharded = trained(sharded_on(mesh))
folder = [tempfile.mkdtemp() if ME == 0 else None]
dist.broadcast_object_list(folder)
checkpoint.save(get_model_state_dict(sharded), checkpoint_id=folder[0])
other = model()
for p in other.parameters():
    p.data.zero_()
fully_shard(other, mesh=mesh)
state = get_model_state_dict(other)
checkpoint.load(state, checkpoint_id=folder[0])
set_model_state_dict(other, state)
FOUND["checkpoint"] = off(other.parameters(), whole(sharded.parameters()))

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
hybrid = model()
fully_shard(hybrid, mesh=mesh)
FOUND["hsdp"] = off(trained(hybrid).parameters())
""",
    )


def test_a_rank_that_raises_in_training_is_named_by_the_others(job):
    ended = job(
        2,
        """
wrapped = DDP(model())
try:
    for step, (x, y) in enumerate(batches()):
        if ME == 1 and step == 2:
            raise KeyError("label 17")
        loss(wrapped, mine(x), mine(y)).backward()
except RuntimeError as error:
    report(text=str(error))
    raise
except KeyError:
    report(text="mine")
    raise
""",
        60,
        preamble=COMMON,
        fails=True,
    )
    texts = ended["text"]
    assert texts[1] == "mine"
    assert "rank 1" in texts[0] and "label 17" in texts[0], texts


def test_uneven_inputs_without_join_say_which_rank_left(job):
    ended = job(
        2,
        """
wrapped = DDP(model())
for x, y in batches(3 - ME):
    try:
        loss(wrapped, mine(x), mine(y)).backward()
    except RuntimeError as error:
        report(text=str(error))
        break
else:
    report(text="all went well")
dist.destroy_process_group()
""",
        60,
        preamble=COMMON,
    )
    assert "rank 1" in ended["text"][0], ended.ranks


def test_an_entry_point_is_enough_and_an_error_in_it_breaks_nothing(job):
    script = """
import warnings
warnings.filterwarnings("ignore")
import sys
import torch
import mpicoll.torch as door
from importlib.metadata import EntryPoint
again = EntryPoint("mpicoll", "mpicoll.torch:register", "torch.backends").load()
again()
again()
import torch.distributed as dist
assert "mpi4py.MPI" not in sys.modules
assert dist.is_backend_available("mpicoll")

dist.Backend._plugins.pop("MPICOLL")
register = dist.Backend.register_backend
def fails(*args, **kwargs):
    raise LookupError("of a PyTorch to come")
dist.Backend.register_backend = fails
again()
dist.Backend.register_backend = register
try:
    dist.init_process_group("mpicoll", store=dist.HashStore(), rank=0, world_size=1)
except Exception as error:
    report(text=repr(error), cause=repr(error.__cause__))
"""
    ended = job(0, script, preamble=REPORTING)
    assert "LookupError" in ended["cause"][0], ended.ranks
