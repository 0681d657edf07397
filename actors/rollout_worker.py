"""What runs in each process of a vLLM engine: it receives the policy's weights and loads them where they are used.

vLLM mixes `RolloutWorker` into its own worker class, in this process or, where an engine's weights are spread over several,
in a child of it. The import of this module makes vLLM fit for weights that change, before any model is loaded.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.platforms import current_platform

from rayrlhf.actors.rollout_adapter import adapted_name, adapter_request, write_adapter
from rayrlhf.actors.rollout_common import Failed, ModelFacts
from rayrlhf.actors.rollout_parts import Comparison, Parts
from rayrlhf.actors.rollout_process import LAST_WORDS
from rayrlhf.errors import RunFailed
from rayrlhf.weights import Address, Manifest, Receiver, open_receiver
from rayrlhf.weights.checksums import listed

__all__ = ["RolloutWorker"]

PRIMITIVES = 32
"""Shapes of input for which oneDNN keeps what it prepared, for each layer. vLLM's own number."""
ORPHAN_SECONDS = 5.0
"""So long after its parent's death a child may still live."""


class RolloutWorker:
    """Methods that vLLM's worker gets. What fails in an expected way is returned, not raised."""

    rank: int
    device: torch.device
    model_runner: Any
    add_lora: Any
    _policy_weights: Receiver | None = None

    def policy_started(self) -> None:
        """The engine is up: a child tells warnings again."""
        if LAST_WORDS in os.environ:
            logging.disable(logging.NOTSET)

    def policy_connect(self, address: Address, first: int) -> Failed | None:
        """Join the group of the policy's sender as receiver ``first`` + this worker's number."""
        self.policy_disconnect()
        receiver = open_receiver(address, first + self.rank, self.device)
        try:
            receiver.connect()
        except RunFailed as error:
            return Failed(error)
        self._policy_weights = receiver
        return None

    def policy_disconnect(self) -> None:
        """Leave the group, where there is one."""
        receiver, self._policy_weights = self._policy_weights, None
        if receiver is not None:
            receiver.close()

    def policy_load(self, manifest: Manifest, facts: ModelFacts, size: int, verify: bool) -> Failed | None:
        """Load a whole set of weights while it comes in.

        Args:
            facts: of the model.
            size: workers of the engine.
            verify: compare what is held afterwards with what came.
        """
        with _bare(self.model_runner.get_model()) as model:
            comparison = Comparison(Parts(model, facts, self.rank, size), facts)
            try:
                named = self._receiver().receive(manifest)
                loaded = model.load_weights(comparison.watch(manifest, named) if verify else named)
                missing = [name for name, _ in model.named_parameters() if loaded is not None and name not in loaded]
                if missing:
                    raise RunFailed(
                        f"the transfer of version {manifest.version} left parameters of vLLM's model as they were: "
                        f"{listed(missing)}"
                    )
                _repack(model)
                if verify:
                    comparison.check(manifest.version, "the rollout engine" + _of(self.rank, size))
            except RunFailed as error:
                return Failed(error)
        return None

    def policy_adapter(self, manifest: Manifest, number: int) -> Failed | None:
        """Take over an adapter while it comes in, in the place of the one before.

        Args:
            manifest: of kind ``adapter``.
            number: the adapter's, which requests name it by; another for each set of weights.
        """
        assert manifest.adapter is not None
        memory = Path("/dev/shm")
        with tempfile.TemporaryDirectory(prefix="rayrlhf-adapter-", dir=memory if memory.is_dir() else None) as folder:
            try:
                write_adapter(Path(folder), manifest.adapter, self._receiver().receive(manifest))
                self.add_lora(adapter_request(number, folder))
            except (RunFailed, ValueError) as error:
                return Failed(RunFailed(f"the adapter of version {manifest.version} can't be applied: {error}"))
        left = _unapplied(self.model_runner.lora_manager, manifest)
        if left:
            return Failed(RunFailed(f"vLLM applies no adapter to {listed(left)}"))
        return None

    def policy_checksums(self, manifest: Manifest, facts: ModelFacts, size: int) -> dict[str, int]:
        """CRC-32 of this worker's part of each tensor that it can tell."""
        with _bare(self.model_runner.get_model()) as model:
            return Parts(model, facts, self.rank, size).checksums(manifest.entries())

    def _receiver(self) -> Receiver:
        if self._policy_weights is None:
            raise RunFailed("the rollout engine has not been connected to the policy: connect_weights comes first")
        return self._policy_weights


def _of(rank: int, size: int) -> str:
    return f"'s worker {rank}" if size > 1 else ""


def _unapplied(manager: Any, manifest: Manifest) -> list[str]:
    """Modules with an adapter to which vLLM has given no layer that applies it."""
    inner = manager._adapter_manager
    applied = set()
    for name in inner.modules:
        parents, _, module = name.rpartition(".")
        members = inner.packed_modules_mapping.get(module, [module])
        applied |= {f"{parents}.{member}" if parents else member for member in members}
    wanted = {adapted_name(entry.name)[0].removesuffix(".weight") for entry in manifest.entries()}
    return sorted(wanted - applied)


@contextlib.contextmanager
def _bare(model: Any) -> Iterator[Any]:
    """The model without the layers that apply adapters, so that parameters have the names that they are loaded by."""
    wrapped = [(name, module) for name, module in model.named_modules() if hasattr(module, "base_layer")]
    if not wrapped:
        yield model
        return
    for name, module in wrapped:
        _put(model, name, module.base_layer)
    try:
        yield model
    finally:
        for name, module in wrapped:
            _put(model, name, module)


def _put(model: Any, name: str, module: Any) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


# -- linear layers on a CPU ---------------------------------------------------------------------------------------


def _repack(model: Any) -> None:
    """Make again what a CPU's kernels compute with, after the weights have changed."""
    for module in model.modules():
        if hasattr(module, "cpu_linear"):
            _pack(module)
        for name in ("w13_weight", "w2_weight"):
            if hasattr(getattr(module, name, None), "packed"):
                del getattr(module, name).packed


def _pack(layer: Any) -> None:
    """Make the copy of a linear layer's weight that oneDNN computes with; it must be made again after each change."""
    from vllm import _custom_ops as ops

    if layer.weight.ndim != 2 or layer.weight.is_meta or not ops._supports_onednn:
        layer.cpu_linear = torch.nn.functional.linear
        return
    packed = ops.create_onednn_mm(layer.weight.t(), PRIMITIVES)
    layer.cpu_linear = lambda x, weight, bias: ops.onednn_mm(packed, x, bias)


def _keep_plain_weights() -> None:
    """Keep weights as they are in the checkpoint, beside the copies that products are computed with.

    vLLM lets the packed copies take the weights' place when it loads a model on a CPU. They can't be loaded into again,
    and a tied output layer keeps the old one silently.
    """
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: _pack(layer)
    _keep_plain_experts()


def _keep_plain_experts() -> None:
    """The same for mixtures of experts: they are packed when they are first computed with."""
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    pack, compute = cpu_moe.cpu_prepack_moe_weight, cpu_moe.cpu_fused_moe

    def packed(weight: Any, isa: str) -> Any:
        if not hasattr(weight, "packed"):
            weight.packed = pack(weight.detach(), isa)
        return weight.packed

    def compute_packed(
        output: Any,
        states: Any,
        w1: Any,
        w2: Any,
        b1: Any,
        b2: Any,
        top: Any,
        ids: Any,
        kind: Any,
        isa: str,
        *rest: Any,
    ) -> Any:
        return compute(output, states, packed(w1, isa), packed(w2, isa), b1, b2, top, ids, kind, isa, *rest)

    cpu_moe.cpu_prepack_moe_weight = lambda weight, isa: weight.detach()
    cpu_moe.cpu_fused_moe = compute_packed  # type: ignore[assignment]


# -- the process --------------------------------------------------------------------------------------------------


class _LastWords(logging.Handler):
    """Writes what a child fails at into a file for its parent, which is told nothing but that it has failed."""

    def __init__(self, folder: str):
        super().__init__(logging.ERROR)
        self._path = Path(folder) / str(os.getpid())

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not self._path.exists():
            self._path.write_text(f"{type(error).__name__}: {error}")


def _end_with_parent() -> None:
    """End this process soon after its parent, whatever it is doing: one that waits for its neighbours would do so for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        sentinels: Sequence[int] = [parent.sentinel]
        multiprocessing.connection.wait(sentinels)
        time.sleep(ORPHAN_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def _be_a_child() -> None:
    _end_with_parent()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its children in order
    logging.getLogger("vllm").addHandler(_LastWords(os.environ[LAST_WORDS]))
    if os.environ.get("VLLM_LOGGING_LEVEL", "").upper() == "WARNING":
        logging.disable(logging.WARNING)  # a dozen of them at every start


if current_platform.is_cpu():
    _keep_plain_weights()
if LAST_WORDS in os.environ:
    _be_a_child()
