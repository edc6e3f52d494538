"""A script for PyTorch's experimental `_dist2`, run by mpicoll: only its import line was changed.

    mpiexec -n 4 python examples/dist2_script.py

It needs PyTorch, but no GPU.  With the original import it runs under torchrun.
"""

from datetime import timedelta

import torch

# import torch.distributed._dist2 as dist2
import mpicoll as dist2


def fit(pg, inputs, targets, steps):
    """Fit a linear model to data that lie on all ranks, by gradient descent."""
    weights = torch.zeros(inputs.shape[1])
    if pg.rank() == 0:
        weights.normal_()
    pg.broadcast(weights, root=0, timeout=timedelta(seconds=10)).wait()
    weights.requires_grad_()

    for _ in range(steps):
        loss = ((inputs @ weights - targets) ** 2).mean()
        loss.backward()
        pg.allreduce(weights.grad, op=dist2.ReduceOp.SUM, timeout=timedelta(seconds=10)).wait()
        with torch.no_grad():
            weights -= 0.1 * weights.grad / pg.size()
            weights.grad.zero_()
    return weights.detach()


def transpose(pg, rows):
    """Return this rank's rows of the transposed matrix, of which each rank holds some rows."""
    blocks = torch.cat([block.t() for block in rows.chunk(pg.size(), dim=1)])
    received = torch.empty_like(blocks)
    pg.all_to_all_single(received, blocks, [], [], timeout=timedelta(seconds=10)).wait()
    return torch.cat(list(received.chunk(pg.size())), dim=1)


def main():
    pg = dist2.new_group(backend="gloo", timeout=timedelta(seconds=60), device="cpu")
    rank, size = pg.rank(), pg.size()

    with dist2.process_group(pg):
        assert dist2.current_process_group() is not None

        # A model whose weights are known, and data that differ between the ranks.
        torch.manual_seed(rank)
        truth = torch.arange(1.0, 6.0)
        inputs = torch.randn(200, 5)
        weights = fit(dist2.current_process_group(), inputs, inputs @ truth, steps=200)
        torch.testing.assert_close(weights, truth, atol=1e-3, rtol=0)

    # Everybody ended with the same bits.
    everyones = [torch.empty_like(weights) for _ in range(size)]
    pg.allgather(everyones, weights, timeout=timedelta(seconds=10)).wait()
    assert all(torch.equal(one, weights) for one in everyones)

    # A matrix that is spread over the ranks: three rows on each.
    width = 3 * size
    matrix = torch.arange(width * width, dtype=torch.float64).reshape(width, width)
    mine = transpose(pg, matrix[3 * rank : 3 * rank + 3].contiguous())
    assert torch.equal(mine, matrix.t()[3 * rank : 3 * rank + 3])

    # The even ranks add up something among themselves.
    even = list(range(0, size, 2))
    half = pg.split_group(even, timeout=timedelta(seconds=10))
    assert (half is not None) == (rank in even)
    if half is not None:
        number = torch.tensor([rank])
        half.allreduce(number, op=dist2.ReduceOp.SUM, timeout=timedelta(seconds=10)).wait()
        assert number.item() == sum(even)

    pg.barrier(timeout=timedelta(seconds=10)).wait()
    if rank == 0:
        print(f"weights {[round(w, 3) for w in weights.tolist()]} on {size} ranks")
        print("correct: the known weights, the transposed matrix and the sum of the even ranks")


if __name__ == "__main__":
    main()
