"""Host memory that DeepSpeed takes for the states which it keeps there, block by block, and what rounding adds to it.

For a GPU these blocks are page-locked (``pin_memory``), and torch rounds each page-locked block up to a power of two:
`CachingHostAllocatorImpl::allocate` in ATen/core/CachingHostAllocator.h, as long as ``pinned_max_round_threshold`` isn't set.
What is freed it keeps for blocks of the same size, so a block counts although DeepSpeed lets go of it. The blocks are those of
`DeepSpeedZeroOptimizer` (runtime/zero/stage_1_and_2.py), `DeepSpeedZeroOptimizer_Stage3` (stage3.py) and
`Init` (partition_parameters.py); a test compares them with what real engines ask for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rayrlhf.planning.shapes import Weight, numel

__all__ = [
    "PIECE",
    "Block",
    "moved_bytes",
    "optimizer_blocks",
    "parameter_blocks",
    "pinned_bytes",
    "segment_bytes",
    "swap_blocks",
]

PIECE = 2**26
"""Bytes that a state which leaves its GPU takes of host memory at once, see `rayrlhf.models.residence`."""


MIB = 2**20
LARGE, STEP, SMALL = 10 * MIB, 2 * MIB, 20 * MIB
"""Tensors from the first size on have segments of their own in torch's GPU memory, in steps of the second; others share segments
of the third one (c10/cuda/CUDACachingAllocator.h)."""


class Block(NamedTuple):
    """One tensor in host memory."""

    part: str
    nbytes: int
    pinned: bool
    """Whether it is page-locked where there is a GPU."""
    freed: bool = False
    """Whether DeepSpeed lets go of it before the first step."""


def pinned_bytes(nbytes: int) -> int:
    """What torch takes for a page-locked block: the next power of two."""
    return 1 << (nbytes - 1).bit_length() if nbytes > 0 else 0


def moved_bytes(nbytes: int) -> int:
    """What a storage takes in host memory that has left its GPU, in pieces of 64 MiB and the rest."""
    return nbytes // PIECE * PIECE + pinned_bytes(nbytes % PIECE)


def segment_bytes(tensors: Iterable[int]) -> int:
    """What copies of the GPU memory that holds tensors of these sizes take in page-locked host memory."""
    sizes = list(tensors)
    own = sum(pinned_bytes(-(-size // STEP) * STEP) for size in sizes if size >= LARGE)
    return own + -(-sum(size for size in sizes if size < LARGE) // SMALL) * pinned_bytes(SMALL)


def swap_blocks(nbytes: int, count: int) -> list[Block]:
    """Buffers through which states travel between host memory and a disk. They are locked in memory as they are, not by torch:
    `SwapBufferManager` (runtime/swap_tensor/utils.py), `AsyncPartitionedParameterSwapper` (partitioned_param_swapper.py)."""
    return [Block("buffers", nbytes, False)] * count


def optimizer_blocks(trained: Sequence[Weight], ranks: int, stage: int, size: int, sub_group: int) -> Iterator[Block]:
    """Blocks of ``offload_optimizer: cpu``, of one rank.

    - Stages 1 and 2: master weights and gradients (4 T / N each) in one block each; a copy of the rank's parameters in b; a
      tensor's gradient in b, of the largest one. Float32 models add up each tensor's gradient in host memory too.
    - Stage 3: gradients in one block for each group of ``sub_group`` numbers, and once more in one for all of them. Master
      weights aren't page-locked.
    - Moments, 8 T / N, aren't page-locked.

    Args:
        trained: what is trained.
        ranks: N.
        stage: of ZeRO.
        size: b.
        sub_group: numbers that ZeRO-3's optimizer works on at once.
    """
    if stage == 3:
        shares = [-(-w.numel // ranks) for w in trained]
        for count in _groups(shares, sub_group):
            yield Block("optimizer", 4 * count, False)
            yield from (Block("optimizer", 4 * count, False) for _ in range(2))
            yield Block("gradients", 4 * count, True)
        yield Block("gradients", 4 * sum(shares), True)
        return
    count, largest = -(-numel(trained) // ranks), max(w.numel for w in trained)
    yield Block("optimizer", 4 * count, True)
    yield from (Block("optimizer", 4 * count, False) for _ in range(2))
    yield Block("optimizer", size * count, True)
    yield Block("gradients", 4 * count, True)
    yield Block("gradients", size * largest, True)
    if size == 4:
        # Of the tensors of which this rank has a part; all ranks' parts are alike but for the tensors that two of them share.
        left = count
        for weight in trained:
            if left <= 0:
                break
            yield Block("gradients", size * weight.numel, True)
            left -= weight.numel


def _groups(shares: Sequence[int], sub_group: int) -> Iterator[int]:
    """Numbers of each group: tensors in their order, until a group has that many."""
    if sum(shares) <= sub_group:
        yield sum(shares)
        return
    count = 0
    for share in shares:
        count += share
        if count >= sub_group:
            yield count
            count = 0
    if count:
        yield count


def parameter_blocks(everything: Sequence[Weight], trained: Sequence[Weight], ranks: int, size: int) -> Iterator[Block]:
    """Blocks of ``offload_parameters: cpu``, of one rank: its share of each parameter by itself; those which are trained move
    then to one block for all.

    Args:
        everything: all parameters, ``trained`` among them.
        trained: those that the optimizer has.
        ranks: N.
        size: b.
    """
    moving = {w.name for w in trained}
    for weight in everything:
        yield Block("parameters", size * -(-weight.numel // ranks), True, weight.name in moving)
    if trained:
        yield Block("parameters", size * sum(-(-w.numel // ranks) for w in trained), True)
