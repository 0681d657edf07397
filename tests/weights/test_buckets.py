"""Which tensors travel together, where they lie, and that what is sent is what was announced."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rayrlhf.errors import RunFailed
from rayrlhf.weights import Manifest, plan_buckets
from rayrlhf.weights.bucket import (
    ALIGNMENT,
    damaged_tensors,
    payload_bytes,
    views,
    wire_bytes,
    write_checksums,
    write_tensor,
)
from rayrlhf.weights.manifest import matched
from tests.weights.others import some_tensors


def layout(tensors: Sequence[tuple[str, Tensor]]) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]


def test_a_bucket_stays_within_its_size_and_its_tensors_are_aligned_and_apart() -> None:
    buckets = plan_buckets(layout(some_tensors()), bucket_bytes=1024, dtype="float32")
    assert len(buckets) > 1
    for bucket in buckets:
        assert len(bucket) == 1 or payload_bytes(bucket) <= 1024
        assert all(entry.offset % ALIGNMENT == 0 for entry in bucket)
        ends = [entry.offset + entry.nbytes for entry in bucket]
        assert all(end <= entry.offset for end, entry in zip(ends, bucket[1:], strict=False))
    entries = [entry for bucket in buckets for entry in bucket]
    assert [(entry.name, entry.shape) for entry in entries] == [(n, tuple(t.shape)) for n, t in some_tensors()]
    assert {entry.name: entry.dtype for entry in entries}["counts"] == "int64"


def test_places_by_hand() -> None:
    given = [
        ("a", (10,), torch.float32),
        ("b", (3,), torch.float32),
        ("c", (), torch.int64),
        ("d", (100,), torch.float32),
    ]
    (first, second) = plan_buckets(given, bucket_bytes=150, dtype="bfloat16")
    # a: 20 bytes at 0, b: 6 at 64, c: 8 at 128; d: 200 bytes, more than there is room for.
    assert [(e.name, e.offset, e.nbytes) for e in first] == [("a", 0, 20), ("b", 64, 6), ("c", 128, 8)]
    assert [(e.name, e.offset, e.nbytes, e.dtype) for e in second] == [("d", 0, 200, "bfloat16")]
    assert (payload_bytes(first), wire_bytes(first, False), wire_bytes(first, True)) == (136, 136, 192 + 12)


def test_a_name_given_twice_a_bucket_of_no_size_and_a_strange_type_are_refused() -> None:
    with pytest.raises(ValueError, match="'a' is given twice"):
        plan_buckets([("a", (1,), torch.float32)] * 2, bucket_bytes=8, dtype="float32")
    with pytest.raises(ValueError, match="at least 1"):
        plan_buckets([], bucket_bytes=0, dtype="float32")
    with pytest.raises(ValueError, match="'auto' is not a torch type"):
        plan_buckets([], bucket_bytes=1, dtype="auto")


def test_checksums_are_those_of_the_bytes_that_travel_and_find_each_flipped_bit() -> None:
    tensors = [("w", torch.tensor([1.0, -2.0])), ("v", torch.tensor([3.0]))]
    (bucket,) = plan_buckets(layout(tensors), bucket_bytes=1000, dtype="bfloat16")
    buffer = torch.zeros(wire_bytes(bucket, True), dtype=torch.uint8)
    for entry, (_, tensor) in zip(bucket, tensors, strict=True):
        write_tensor(buffer, entry, tensor)
    write_checksums(buffer, bucket)
    assert buffer[:4].tolist() == [0x80, 0x3F, 0x00, 0xC0]
    assert bytes(buffer[128:132].tolist()) == zlib.crc32(bytes([0x80, 0x3F, 0x00, 0xC0])).to_bytes(4, "little")
    assert [(name, tensor.tolist()) for name, tensor in views(buffer, bucket)] == [("w", [1.0, -2.0]), ("v", [3.0])]
    assert damaged_tensors(buffer, bucket) == []
    for byte, names in ((1, ["w"]), (64, ["v"]), (130, ["w"]), (133, ["v"]), (40, [])):  # 40 lies between the two
        buffer[byte] ^= 16
        assert damaged_tensors(buffer, bucket) == names
        buffer[byte] ^= 16


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t[:3], "they end after 3 tensors, before d"),
        (lambda t: [*t, ("more", torch.ones(1))], "there is one tensor more, more"),
        (lambda t: [t[1], t[0], *t[2:]], "tensor 0 is b, the manifest has a"),
        (lambda t: [("a", torch.ones(5, 3)), *t[1:]], r"a has the shape \[5, 3\], the manifest has \[3, 5\]"),
        (lambda t: [("a", torch.ones(3, 5, dtype=torch.int32)), *t[1:]], "a is of type torch.int32, the manifest has"),
    ],
)
def test_what_is_not_as_announced_is_named_at_the_first_difference(change, said: str) -> None:
    tensors = some_tensors()
    manifest = Manifest(4, "float32", plan_buckets(layout(tensors), bucket_bytes=99, dtype="float32"), False)
    assert [name for _, (name, _) in zip(matched(manifest, tensors), tensors, strict=True)] == [n for n, _ in tensors]
    with pytest.raises(RunFailed, match=f"the weights of version 4 are not what their manifest says: {said}"):
        list(matched(manifest, change(tensors)))


def test_a_manifest_is_small_and_travels() -> None:
    given = [(f"model.layers.{k}.mlp.down_proj.weight", (4096, 11008), torch.bfloat16) for k in range(400)]
    manifest = Manifest(1, "bfloat16", plan_buckets(given, bucket_bytes=2**30, dtype="bfloat16"), True)
    assert pickle.loads(pickle.dumps(manifest)) == manifest and len(pickle.dumps(manifest)) < 100_000
    assert [len(bucket) for bucket in manifest.buckets] == [11] * 36 + [4]
    assert manifest.nbytes >= 400 * 4096 * 11008 * 2
    assert manifest.place(0) == "bucket 1 of 37 (model.layers.0.mlp.down_proj.weight and 10 more)"
