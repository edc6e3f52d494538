"""The second door: `torch.distributed` with ``backend="mpicoll"``.

    import torch.distributed as dist
    dist.init_process_group("mpicoll")     # under mpiexec or srun: MPI says who is who

`import torch` calls `register` by the entry point `torch.backends`; so does an import of this
package.  The modules: `rendezvous` finds the ranks and their store, `group` is the process group
that PyTorch calls, `work` its handle on one call, `layout` and `sparse` have to do with tensors
that are not contiguous, `errors` are mpicoll's as PyTorch's users catch them, and `dispatch` is
what PyTorch's C++ code calls otherwise.
"""

from __future__ import annotations

from typing import Any

from .. import Work

__all__ = ["future_of", "register"]

_errors: list[Exception] = []


def register() -> None:
    """Make the backend known to `torch.distributed`.  It may be called again.

    It never raises, since `import torch` would fail with it: what went wrong is raised when a
    group is asked for.  It is cheap: MPI is loaded with the first group.
    """
    try:
        import torch.distributed as dist

        if not dist.is_available() or "MPICOLL" in dist.Backend._plugins:
            return
        from . import rendezvous

        rendezvous.wrap(dist, _check)
        dist.Backend.register_backend(
            "mpicoll", rendezvous.create, extended_api=True, devices=["cpu", "cuda"]
        )
    except Exception as error:
        _errors.append(error)


def future_of(work: Work) -> Any:
    """Return a `torch.futures.Future` of a call that was made on a group of mpicoll's own.

    A communication hook of DistributedDataParallel must return one.  Its value is `work.result()`:
    a list of the tensors that were given.  It raises what `work.wait()` does, and completes by
    itself, from a thread.  Local.
    """
    from .work import future_of

    return future_of(work)


def _check() -> None:
    """Raise what went wrong in `register`, now that the backend is asked for."""
    for error in _errors:
        raise RuntimeError(
            "backend 'mpicoll' could not be registered when torch was imported: the error above "
            "says why"
        ) from error


register()
