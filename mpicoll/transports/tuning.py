"""The sizes at which transports change their way, and of the pieces in which they work.

A transport is given a `Tuning` when it is made, so two groups may differ, and a test can have small
arrays go the way of large ones.  All ranks of a group must have the same one: a rank that chose
another way would wait for ever.  What nothing varies is a constant of the module that uses it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tuning:
    """Sizes, in bytes unless it says otherwise.

    Attributes:
        mpi_elements: elements that one call of MPI is given at most; its counts are C ints.
        packed: a message of this size at most is one message of MPI, its payload copied behind its
            header; a larger one is two.
        inline: bytes of one rank that travel beside its record, if there is room for them; where
            arrays are reduced, four times as many.
        at_once: where a call that only moves is larger, it does not go by the compiled core, which
            holds the interpreter's lock throughout.
        nodes_from: where a call is smaller, MPI over the whole group is as fast as or faster than
            going inside the nodes first.
        nodes_piece: what of one stripe is between the nodes at a time.
        staged_piece: what is copied at a time between a GPU's memory and the host's.
        aware_whole: a broadcast of GPU memory up to this size is sent whole to each rank.
        aware_message: what one message of GPU memory holds at most; MPI's counts are C ints.
        nccl_ahead: calls on a stream: where CUDA finds no room for more, it blocks the host.
    """

    mpi_elements: int = 2**30
    packed: int = 4096
    inline: int = 256 * 1024
    at_once: int = 64 * 2**20
    nodes_from: int = 2**20
    nodes_piece: int = 512 * 1024
    staged_piece: int = 2 * 2**20
    aware_whole: int = 64 * 1024
    aware_message: int = 2**30
    nccl_ahead: int = 128
