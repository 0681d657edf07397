"""The way of the policy's weights to the rollout engines.

The trainer calls `publish`: named tensors are packed into buckets, and each bucket is put into a transport. The small,
picklable `Manifest` that comes back travels to the engines, which take the tensors out again with `receive`. Checksums
of the bytes, one for each tensor, let an engine prove that what it holds is what the trainer sent.
"""

from __future__ import annotations

from rayrlhf.weights.bucket import Bucket, Entry, pack, unpack
from rayrlhf.weights.checksums import checksum, differing
from rayrlhf.weights.manifest import Manifest, publish, receive, release
from rayrlhf.weights.shared_memory import SharedMemory
from rayrlhf.weights.transport import Handle, ObjectStore, Transport, make_transport

__all__ = [
    "Bucket",
    "Entry",
    "Handle",
    "Manifest",
    "ObjectStore",
    "SharedMemory",
    "Transport",
    "checksum",
    "differing",
    "make_transport",
    "pack",
    "publish",
    "receive",
    "release",
    "unpack",
]
