"""DistributedDataParallel's communication hooks: gradients are sent in fewer bytes.

    from mpicoll.torch.hooks import Bfloat16State, bfloat16_hook

    model = DistributedDataParallel(network)
    model.register_comm_hook(Bfloat16State(None), bfloat16_hook)

PyTorch's own `bf16_compress_hook` does so for CUDA only, and forgets what its rounding takes away.
"""

# Annotations are objects here, not text: DistributedDataParallel compares a hook's with classes.

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.futures import Future

__all__ = ["Bfloat16State", "bfloat16_hook"]

_COMPRESSED = (torch.float32, torch.float64)


class _Begun(NamedTuple):
    """A bucket whose parts are on their way to the ranks that average them."""

    buffer: Tensor
    residual: Tensor
    parts: Tensor  # a row from each rank: what it sends of this rank's part
    work: dist.Work
    done: Future[Tensor]


class Bfloat16State:
    """What `bfloat16_hook` keeps from step to step: for each gradient, what was not sent of it.

    That takes as much memory as the gradients that are compressed.  It is kept by parameter, so
    that it stays right when DistributedDataParallel puts parameters into other buckets, as it does
    after the first step.  A checkpoint needs nothing of it: what is lost is one step's rounding.

    Args:
        process_group: the group of the backend "mpicoll" that the model was given; None is the
            default group.
        use_error_feedback: whether what rounding took away is added to the next step's gradient.
            It must be the same on every rank.
    """

    def __init__(
        self, process_group: dist.ProcessGroup | None, use_error_feedback: bool = True
    ) -> None:
        self.process_group = process_group
        self.use_error_feedback = use_error_feedback
        self._buckets: dict[int, tuple[list[Tensor], Tensor]] = {}
        self._residuals: dict[Tensor, Tensor] = {}  # of each parameter: views of the buckets'
        self._begun: _Begun | None = None

    def residual(self, parameter: Tensor) -> Tensor | None:
        """Return what this rank keeps back of a parameter's gradients.  Local.

        The mean over the ranks of it, and the sum of all means that the hook has returned, are
        together the sum of all mean gradients.  It has the gradient's shape and dtype; it is None
        where nothing is kept.
        """
        return self._residuals.get(parameter)

    def _residual_of(self, bucket: dist.GradBucket) -> Tensor:
        """Return what is kept back of a bucket's gradients: one dimension, to be written to."""
        parameters = bucket.parameters()
        known, residual = self._buckets.get(bucket.index(), ([], None))
        if residual is None or list(map(id, known)) != list(map(id, parameters)):
            buffer = bucket.buffer()
            residual = torch.zeros_like(buffer)
            for parameter, gradient in zip(parameters, bucket.gradients(), strict=True):
                start = gradient.storage_offset() - buffer.storage_offset()
                strides = torch.empty_like(parameter, device="meta").stride()  # as .grad has them
                view = residual.as_strided(parameter.size(), strides, start)
                if parameter in self._residuals:  # it was in another bucket
                    view.copy_(self._residuals[parameter])
                self._residuals[parameter] = view
            self._buckets[bucket.index()] = parameters, residual
        return residual


def bfloat16_hook(state: Bfloat16State, bucket: dist.GradBucket) -> Future[Tensor]:
    """Average a bucket's gradients over the ranks, sent as bfloat16: half of float32's bytes.

    Every rank registers it, with a state of its own::

        model.register_comm_hook(Bfloat16State(process_group), bfloat16_hook)

    Each rank rounds its gradients to bfloat16, which has 8 bits of precision and float32's range,
    and sends each other rank a part.  That rank adds in float32, and sends all ranks the mean,
    rounded again.  What either rounding takes away is added to the same gradient in the next step
    (error feedback: Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014; of both
    ways: Tang et al., "DoubleSqueeze", ICML 2019), so that nothing is lost, but comes late.
    What is infinite, or not a number, is sent and not kept back.

    Without error feedback it is one `all_reduce` of bfloat16, which sends less between nodes that
    have several ranks each.  Gradients of other dtypes than float32 and float64, such as bfloat16,
    and sparse ones are averaged as they are.

    Args:
        state: what is kept between steps.
        bucket: gradients of several parameters, in one tensor of one dimension.

    Returns:
        A future of that tensor, with the means in it, in its own dtype: the same on every rank.
        It raises what the calls do, and the bucket and the state are then not to be used.
    """
    buffer, group = bucket.buffer(), state.process_group
    if bucket.index() == 0:
        state._begun = None  # of a step that failed
    if buffer.layout is not torch.strided:
        done = default_hooks.allreduce_hook(group, bucket)
    elif buffer.dtype not in _COMPRESSED:
        done = _averaged(buffer, buffer, group)
    elif not state.use_error_feedback:
        done = _averaged(buffer, buffer.to(torch.bfloat16), group)
    else:
        # A bucket's means are sent when the next one's parts have been: every rank makes the calls
        # in this order, and the parts have had the time until then to arrive.
        before, state._begun = state._begun, _begin(state, bucket)
        if before is not None:
            _end(before, group)
        done = state._begun.done.then(_value)  # C++ does not see an exception in `done` itself
    if bucket.is_last() and state._begun is not None:
        last, state._begun = state._begun, None
        _end(last, group)
    return done


def _value(future: Future[Tensor]) -> Tensor:
    return future.value()


def _averaged(buffer: Tensor, sent: Tensor, group: dist.ProcessGroup | None) -> Future[Tensor]:
    """Average what is sent; return a future of the buffer with the means in it."""
    work = dist.all_reduce(sent, dist.ReduceOp.AVG, group, async_op=True)

    def decompress(future: Future[list[Tensor]]) -> Tensor:
        (mean,) = future.value()
        return buffer if mean is buffer else buffer.copy_(mean)

    return work.get_future().then(decompress)


def _begin(state: Bfloat16State, bucket: dist.GradBucket) -> _Begun:
    """Send each rank its part of what is to be averaged; keep back what rounding takes away."""
    buffer, group = bucket.buffer(), state.process_group
    size = dist.get_world_size(group)
    residual = state._residual_of(bucket)
    residual += buffer
    count = -(-buffer.numel() // size)
    rounded = torch.zeros(size * count, dtype=torch.bfloat16, device=buffer.device)
    rounded[: buffer.numel()] = residual
    residual -= rounded[: buffer.numel()]  # exact: the rest has no more digits than there were
    residual.nan_to_num_(0.0, 0.0, 0.0)  # what overflowed would spoil all steps to come
    parts = torch.empty_like(rounded)
    work = dist.all_to_all_single(parts, rounded, group=group, async_op=True)
    work.get_future()  # it goes on while gradients are computed
    return _Begun(buffer, residual, parts.view(size, count), work, Future())


def _end(begun: _Begun, group: dist.ProcessGroup | None) -> None:
    """Average this rank's part, and send the means to all ranks."""
    buffer, residual, parts, work, done = begun
    work.wait()
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    count = parts.shape[1]
    mine = residual[rank * count : (rank + 1) * count]
    mean = parts.sum(0, dtype=buffer.dtype) / size
    means = torch.empty(size * count, dtype=torch.bfloat16, device=buffer.device)
    own = means[rank * count : (rank + 1) * count]
    own.copy_(mean)
    lost = (mean - own).nan_to_num_(0.0, 0.0, 0.0)[: len(mine)]
    mine += lost * size  # this rank's share of the next mean is one of `size`

    def decompress(future: Future[list[Tensor]]) -> None:
        try:
            future.value()
        except Exception as error:
            done.set_exception(error)
        else:
            done.set_result(buffer.copy_(means[: buffer.numel()]))

    gathered = dist.all_gather_into_tensor(means, own, group=group, async_op=True)
    gathered.get_future().then(decompress)
