"""The way of the policy's weights to the rollout engines.

The trainer opens a `Sender`, each process that loads weights a `Receiver` with the sender's `Address`. A transfer begins
with a `Manifest`, small and picklable: names, types, and which tensors travel together in a bucket. Then the sender fills
bucket after bucket, and the receivers take the tensors out again, at the same time. Checksums that travel along let a
receiver prove that what has arrived is what was sent.

vLLM's own transfer interface (`vllm.distributed.weight_transfer`) does not stand behind this one: between vLLM 0.25 and
0.32 its classes and their arguments have changed, it knows neither deadlines nor checksums, and it has nothing for a CPU.
"""

from __future__ import annotations

from rayrlhf.weights.bucket import Bucket, Entry, plan_buckets
from rayrlhf.weights.checksums import checksum, differing
from rayrlhf.weights.control import CONNECTING, Address, PeerFailed, abort
from rayrlhf.weights.manifest import Manifest
from rayrlhf.weights.opening import TRANSPORTS, join_sender, open_receiver, open_sender
from rayrlhf.weights.transport import Receiver, Sender

__all__ = [
    "CONNECTING",
    "TRANSPORTS",
    "Address",
    "Bucket",
    "Entry",
    "Manifest",
    "PeerFailed",
    "Receiver",
    "Sender",
    "abort",
    "checksum",
    "differing",
    "join_sender",
    "open_receiver",
    "open_sender",
    "plan_buckets",
]
