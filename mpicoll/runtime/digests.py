"""Digests of bytes that are the same in every process, unlike those of `hash`."""

from __future__ import annotations


def blake2b(data: bytes, size: int) -> bytes:
    """Return so many bytes that differ where the data do."""
    import hashlib  # takes 2 ms to load, and is needed by the first group

    return hashlib.blake2b(data, digest_size=size).digest()
