"""The two ends of a weight transfer, whatever carries the bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator

from torch import Tensor

from rayrlhf.errors import RunFailed
from rayrlhf.weights.bucket import damaged_tensors, views, write_checksums, write_tensor
from rayrlhf.weights.checksums import listed
from rayrlhf.weights.control import CONNECTING, Address, Control
from rayrlhf.weights.manifest import Manifest, matched

__all__ = ["Receiver", "Sender"]


class Sender(ABC):
    """The end in the trainer's process.

    Attributes:
        address: what receivers open their end with.
    """

    control: Control

    def __init__(self) -> None:
        self._broken: str | None = None

    @property
    def address(self) -> Address:
        return self.control.address

    def connect(self) -> None:
        """Meet the receivers, where the transport needs them all together.

        Raises:
            RunFailed: where one doesn't come before the deadline; it is named.
        """
        self.control.check(CONNECTING)

    def send(self, manifest: Manifest, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Send a set of weights; returns when all receivers have taken them.

        A bucket is filled while the one before it is under way. A tensor is copied before the next one is asked for, as a
        parameter that ZeRO-3 has gathered is freed then.

        Args:
            manifest: what is sent. Its ``serial`` is larger than that of any transfer before.
            named_tensors: (Hugging Face name, tensor on any device), in the manifest's order.

        Raises:
            RunFailed: where the tensors aren't those of the manifest, or a receiver doesn't take a bucket before the
                deadline; the receivers stop waiting then.
        """
        if self._broken:
            raise RunFailed(f"the weight group {self.address.group} is of no use any more: {self._broken}")
        given = matched(manifest, named_tensors)
        try:
            for number, bucket in enumerate(manifest.buckets):
                buffer = self._room(manifest, number)
                for entry in bucket:
                    write_tensor(buffer, entry, next(given)[1])
                if manifest.checksums:
                    write_checksums(buffer, bucket)
                self._hand_over(manifest, number, buffer)
                del buffer
            for _ in given:  # nothing is left, or it says what is
                raise AssertionError("the manifest has more tensors than its buckets")
            self._finish(manifest)
        except BaseException as error:
            self.control.fail(manifest.serial, str(error) or type(error).__name__)
            self._give_up(manifest)
            raise

    @abstractmethod
    def _room(self, manifest: Manifest, number: int) -> Tensor:
        """Memory for a bucket, uint8 [its bytes on the wire]; waits until there is some."""

    @abstractmethod
    def _hand_over(self, manifest: Manifest, number: int, buffer: Tensor) -> None:
        """The bucket is filled."""

    @abstractmethod
    def _finish(self, manifest: Manifest) -> None:
        """Wait until all receivers have taken all buckets."""

    def _give_up(self, manifest: Manifest) -> None:
        """After a failure: free what lies there."""
        self.release()

    @abstractmethod
    def release(self) -> None:
        """Free what still lies there of the last transfer: where it is laid out as a whole, or receivers held it to the end."""

    @abstractmethod
    def close(self) -> None:
        """End the group, and free everything. May be called twice."""


class Receiver(ABC):
    """The end in the process that loads the weights.

    Args:
        address: the sender's.
        index: which of the receivers this is, 0 to ``address.receivers`` - 1.
    """

    def __init__(self, address: Address, index: int):
        if not 0 <= index < address.receivers:
            raise ValueError(f"receiver {index} of a group with {address.receivers} receivers")
        self.address, self.index, self.name = address, index, address.receiver(index)
        self._control: Control | None = None
        self._broken: str | None = None

    @property
    def control(self) -> Control:
        if self._control is None:
            raise RuntimeError(f"{self.name} has not been connected to the weight group {self.address.group}")
        return self._control

    def connect(self) -> None:
        """Join the sender's group.

        Raises:
            RunFailed: where the sender isn't there, or has another group by now.
        """
        if self._control is None:
            self._control = Control.join(self.address, str(self.index), self.name)

    def receive(self, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
        """The tensors that are sent, whole, under their Hugging Face names, in the manifest's order.

        They may be views of memory that is used again for a later bucket: copy, don't keep. The sender is told that a bucket
        is taken when the tensor after it is asked for; left before its end, the transfer is ended for all.

        Raises:
            RunFailed: where a bucket doesn't come before the deadline, or the manifest has checksums and a tensor's bytes are
                not those that were sent; transport, bucket, tensors and this receiver are named.
        """
        if self._broken:
            raise RunFailed(f"the weight group {self.address.group} is of no use any more: {self._broken}")
        finished, buffers = False, self._buffers(manifest)
        try:
            for number, buffer in enumerate(buffers):
                bucket = manifest.buckets[number]
                if manifest.checksums and (damaged := damaged_tensors(buffer, bucket)):
                    raise RunFailed(
                        f"weights of version {manifest.version} were damaged on their way to {self.name} "
                        f"({self.address.transport}, bucket {number + 1} of {len(manifest.buckets)}): {listed(damaged)}"
                    )
                yield from views(buffer, bucket)
                del buffer
            finished = True
        except Exception as error:
            self.control.fail(manifest.serial, str(error))
            finished = True
            raise
        finally:
            if not finished:
                self.control.fail(manifest.serial, "it stopped loading")
            buffers.close()

    @abstractmethod
    def _buffers(self, manifest: Manifest) -> Generator[Tensor]:
        """Each bucket's bytes, uint8; when the next one is asked for, the one before has been taken."""

    def close(self) -> None:
        """Leave the group. May be called twice."""
        self._control = None
