"""Whole plans: a 70B run worked out by hand, transfers, and what can't work."""

from __future__ import annotations

import dataclasses
import json
import socket

import pytest

from rayrlhf.planning import known
from rayrlhf.planning.document import document
from rayrlhf.planning.plan import check_plan, make_plan
from rayrlhf.planning.transfer import transport_of

GIB, GB = 2**30, 10**9

LARGE = [
    "cluster.device=cuda",
    "cluster.nodes=[{count: 8, gpus: 8, gpu_memory_gib: 80, memory_gib: 1024, network_gb_per_s: 400}]",
    "policy.path=meta-llama/Meta-Llama-3-70B",
    *[f"{role}.{key}" for role in ("policy", "critic", "reference") for key in ("ranks=64", "zero_stage=3")],
    "critic.path=meta-llama/Meta-Llama-3-8B",
    *[f"{role}.gradient_checkpointing=true" for role in ("policy", "critic")],
    *["rollout.engines=8", "rollout.tensor_parallel=8", "rollout.gpu_memory_fraction=0.6"],
    *["data.max_prompt_tokens=1024", "rollout.max_response_tokens=1024"],
    *["ppo.prompts_per_step=512", "rollout.samples_per_prompt=1", "ppo.minibatch_samples=256"],
]


def within(found: float, expected: float, share: float = 0.01) -> bool:
    return abs(found - expected) <= share * expected


def test_llama_3_70b_on_64_gpus_by_hand(load):
    """Llama 3 70B, colocated on 8 machines of 8 H100 (80 GiB), ZeRO-3, bfloat16. From its dimensions alone:

    - Parameters. h = 8192, I = 28672, 80 layers, 64 heads and 8 key-value heads of 128, V = 128256, untied.
      A layer: q and o 2 x 8192 x 8192 = 134,217,728; k and v 2 x 8192 x 1024 = 16,777,216; MLP 3 x 8192 x 28672 =
      704,643,072; two norms 16,384: 855,654,400. All: 80 x that = 68,452,352,000; embedding and output 2 x 128256 x 8192 =
      2,101,346,304; last norm 8,192. P = 70,553,706,496.
    - A rank of the policy has P / 64 = 1,102,401,664 numbers: parameters x 2 bytes = 2.2048 GB, gradients x 4 = 4.4096 GB,
      master weights and two moments x 12 = 13.2288 GB.
    - The critic, Llama 3 8B without its output layer: h = 4096, I = 14336, 32 layers: a layer q and o 33,554,432, k and v
      8,388,608, MLP 176,160,768, norms 8,192: 218,112,000; x 32 = 6,979,584,000; embedding 525,336,576; last norm 4,096; head
      4,097. 7,504,928,769 / 64 = 117,264,512: x 18 = 2.1108 GB.
    - An engine over 8 GPUs: 2 P / 8 = 17.638 GB of weights each. Its share is 0.6 x 80 GiB = 51.540 GB; 2 GiB (2.147 GB) of
      workspace leave 31.754 GB of KV cache. A token takes 2 x 80 x 1 head x 128 x 2 bytes = 40,960 bytes: 775,000 tokens.
    - Activations with checkpointing: 256 / 64 = 4 samples of 2048 tokens = 8192 tokens, the whole budget. Kept: 80 layers'
      inputs, 8192 x 80 x 2 x 8192 = 10.737 GB. One layer's own: per token two norms 2 x 8192 x (4 + 4) = 131,072, attention
      2 x 128 x 2 x (64 + 8) = 36,864, MLP 4 x 2 x 28672 = 229,376: 397,312 x 8192 = 3.255 GB. Ends 2 x 2 x 8192 x 8192 =
      0.268 GB. Logits 2048 x 128256 x 12 = 3.152 GB. In all 17.412 GB.
    - A transfer: 2 P = 141.107 GB; each engine's GPU has a policy rank, so by ipc. Gathering crosses the network: 63/64 of
      it, 138.903 GB at 400 GB/s = 0.347 s.
    """
    plan = make_plan(load(*LARGE))
    assert plan.problems == []
    assert plan.known.models["policy"][0].shape.parameters() == 70_553_706_496
    assert plan.usage is not None and len(plan.usage.gpus) == 64
    gpu = plan.usage.gpus[40]
    update = gpu.phases["update"]
    critic = 117_264_512
    assert within(update["parameters"], 2.2048 * GB + 2 * critic)
    assert within(update["gradients"], 4.4096 * GB + 4 * critic)
    assert within(update["optimizer"], 13.2288 * GB + 12 * critic)
    # The critic's activations, in the same way: 32 layers' inputs 8192 x 32 x 2 x 4096 = 2.147 GB; per token norms 65,536,
    # attention 2 x 128 x 2 x 40 = 20,480, MLP 114,688: 200,704 x 8192 = 1.644 GB; ends 0.134 GB. 3.926 GB.
    assert within(update["activations"], 17.412 * GB + 3.926 * GB)
    # Whole parameters, 2 bytes each: the policy's embedding, which alone has more than 10^9, and 10^9 of the critic; buckets: the
    # embeddings, 2 x (1,050,673,152 + 525,336,576). Each ZeRO-3 engine also keeps what is smaller than 10^5 whole: the norms,
    # 161 x 8192 and 65 x 4096 (and the head), x 2 bytes.
    assert within(update["buffers"], 2 * (1_050_673_152 + GB) + 2 * (1_050_673_152 + 525_336_576))
    rollout = gpu.phases["rollout"]
    assert within(rollout["parameters"], 17.638 * GB) and within(rollout["kv_cache"], 31.754 * GB)
    assert rollout["optimizer"] == rollout["gradients"] == 0
    (engine,) = plan.usage.engines
    assert engine.sequences == 31_754_000_000 // (40_960 * 2048) == 378
    transfer = plan.transfer
    assert transfer is not None and transfer.transport == "ipc" and within(transfer.nbytes, 141.107 * GB)
    assert transfer.gather is not None and within(transfer.seconds or 0, 0.347)
    # The host keeps what is idle: 8 ranks of policy (18 x P/64) and critic and reference (2 x P/64), and the engine's weights.
    host = plan.usage.hosts[3]
    assert within(host.parts["idle"], 8 * (18 * 1_102_401_664 + 18 * critic + 2 * 1_102_401_664) + 141.107 * GB)


def test_a_role_that_has_its_gpus_to_itself_keeps_everything(load):
    alone = make_plan(load(*LARGE[:1], "cluster.nodes=[{gpus: 8, gpu_memory_gib: 80}]", "policy.path=Qwen/Qwen2.5-1.5B",
                           "cluster.placement=disaggregated"))  # fmt: skip
    assert alone.problems == [] and alone.usage is not None
    policy = next(gpu for gpu in alone.usage.gpus if gpu.roles == ("policy",))
    assert policy.phases["rollout"]["optimizer"] == policy.phases["update"]["optimizer"] == 12 * 1_543_714_304
    assert alone.transfer is not None and alone.transfer.transport == "nccl"
    assert all("idle" not in host.parts for host in alone.usage.hosts)


def test_nobody_leaves_for_whom_nobody_comes(load):
    """Policy and critic share, reference and reward share, the engine is alone: all of a pool are on its GPUs after a step."""
    shared = make_plan(
        load(
            *LARGE[:1],
            "cluster.nodes=[{gpus: 8, gpu_memory_gib: 80}]",
            "policy.path=Qwen/Qwen2.5-1.5B",
            "reward.sources=[{model: Qwen/Qwen2.5-1.5B}]",
            "cluster.placement=[[policy, critic], [reference, reward]]",
        )
    )
    assert shared.problems == [] and shared.usage is not None
    trained, scorers = (
        dict(next(gpu.phases for gpu in shared.usage.gpus if role in gpu.roles)) for role in ("policy", "reward")
    )
    del trained["start"], scorers["start"]
    assert len({phase["optimizer"] for phase in trained.values()}) == 1 and trained["rollout"]["optimizer"] > 0
    assert len({phase["parameters"] for phase in scorers.values()}) == 1 and scorers["rollout"]["parameters"] > 0


def test_transfers_by_hand(load):
    two = "cluster.nodes=[{count: 2, gpus: 2, gpu_memory_gib: 80, gpu_link_gb_per_s: 450, network_gb_per_s: 50}]"
    small = ["cluster.device=cuda", two, "policy.path=Qwen/Qwen2.5-1.5B", "reference=null", "ppo.kl_coef=0"]
    nbytes = 2 * 1_543_714_304
    # policy and critic on one machine, the engine over two GPUs on the other: one broadcast over the network.
    apart = make_plan(load(*small, "cluster.placement=[[policy, critic]]", "rollout.tensor_parallel=2")).transfer
    assert apart is not None and (apart.transport, apart.nbytes) == ("nccl", nbytes)
    assert apart.send.seconds == pytest.approx(nbytes / 50e9) and apart.gather is None
    # one machine: over its links
    near = make_plan(
        load(*small, "cluster.nodes=[{gpus: 4, gpu_memory_gib: 80}]", "cluster.placement=disaggregated")
    ).transfer
    assert near is not None and near.seconds == pytest.approx(nbytes / 450e9)
    # adapters of rank 16 on q and v alone: 28 layers x 16 x (1536 + 1536 + 1536 + 256) numbers of 2 bytes
    lora = "policy.lora={rank: 16, target_modules: [q_proj, v_proj]}"
    adapter = make_plan(load(*small, lora, "rollout.lora_transfer=adapter")).transfer
    assert adapter is not None and adapter.nbytes == 28 * 16 * (1536 + 1536 + 1536 + 256) * 2
    # Before the first one its base is sent, the whole model.
    assert adapter.base is not None and (adapter.base.what, adapter.base.nbytes) == ("base", nbytes)
    assert adapter.base.seconds == pytest.approx(nbytes / 1e12) and apart.base is None  # within a GPU
    # gloo to two engines: a tree over three processes, in which the sender sends twice
    cpu = load("policy.path=Qwen/Qwen2.5-1.5B", "rollout.engines=2", "rollout.weight_transport=gloo")
    gloo = make_plan(cpu).transfer
    assert gloo is not None and gloo.send.nbytes == 2 * nbytes


def test_the_transport_that_auto_stands_for(load):
    gpu = ["cluster.device=cuda", "policy.ranks=4", "rollout.engines=2", "rollout.tensor_parallel=2"]
    assert transport_of(load(*gpu)) == "ipc"
    assert transport_of(load(*gpu, "policy.ranks=3")) == "gloo"
    assert transport_of(load(*gpu, "cluster.placement=disaggregated")) == "nccl"
    assert transport_of(load()) == "shared_memory"
    assert transport_of(load("cluster.address=auto")) == "gloo"
    assert transport_of(load("cluster.nodes=[{count: 3}]")) == "gloo"
    assert transport_of(load("cluster.executor=inline")) == "shared_memory"


# -- what can't work --------------------------------------------------------------------------------------------------


def test_the_base_of_an_adapter_is_in_the_plan(load):
    """Llama 3 70B with adapters under ZeRO-3 over 64 ranks: the base is 2 P = 141.107 GB, gathered over the network at 400 GB/s:
    63/64 of it, 0.347 s. Its largest tensors, embedding and output of 2 x 1,050,673,152 bytes, have buckets of their own. A
    layer's attention makes a group, and so does each tensor of its MLP; the last layer's norms and the last norm, 16 KiB each,
    are gathered with the output. While it is sent a rank has two buckets and a group: 6.304 GB."""
    lora = [f"{role}.lora={{rank: 16, target_modules: [q_proj, v_proj]}}" for role in ("policy", "critic")]
    config = load(*LARGE, *lora, "rollout.lora_transfer=adapter", "reference={}")
    plan = make_plan(config)
    assert plan.problems == [] and plan.transfer is not None and plan.transfer.base is not None
    base = plan.transfer.base
    assert within(base.nbytes, 141.107 * GB) and within(base.seconds or 0, 0.347)
    assert base.bucket_bytes == 2 * 1_050_673_152 and base.gathered_bytes == 2 * 1_050_673_152 + 3 * 16_384
    # The adapter: q 16 x (8192 + 8192), v 16 x (8192 + 1024), 80 layers, 2 bytes: 65,536,000 bytes, one bucket, gathered at once.
    adapter = 80 * 16 * (8192 + 8192 + 8192 + 1024) * 2
    assert plan.transfer.nbytes == plan.transfer.bucket_bytes == plan.transfer.gathered_bytes == adapter
    assert plan.usage is not None
    assert plan.usage.gpus[5].phases["transfer"]["transfer"] == 3 * 2 * 1_050_673_152 + 3 * 16_384
    each, once = document(plan)["transfers"]
    assert (each["what"], each["when"], each["bytes"]) == ("adapter", "each step", adapter)
    assert (once["what"], once["when"], once["bytes"]) == ("base", "once, before the first", base.nbytes)


def test_weights_that_ranks_share_are_gathered_for_publishing(load):
    """Qwen2.5 1.5B under AutoTP over 2 ranks: a layer's linear weights are q and o 2 x 1536 x 1536, k and v 2 x 256 x 1536, MLP
    3 x 1536 x 8960, in all 46,792,704; 28 layers. Of their 2 bytes each a half comes from the other rank. The largest, 8960 x
    1536, is there twice while its parts are put together."""
    words = [
        "cluster.device=cuda",
        "policy.path=Qwen/Qwen2.5-1.5B",
        "reference=null",
        "ppo.kl_coef=0",
        "policy.ranks=2",
    ]
    words += ["policy.tensor_parallel=2", "critic={num_layers: 1, lora: {}}", "rollout.engines=2"]
    near = make_plan(load(*words, "cluster.nodes=[{gpus: 2, gpu_link_gb_per_s: 450}]"))
    assert near.problems == [] and near.transfer is not None and near.transfer.gather is not None
    gather = near.transfer.gather
    assert gather.nbytes == 28 * 46_792_704 and gather.seconds == pytest.approx(28 * 46_792_704 / 450e9)
    assert near.transfer.gathered_bytes == 2 * 2 * 8960 * 1536
    # By ipc each rank sends: two buckets of 1 GiB, and what is gathered.
    assert near.usage is not None
    assert near.usage.gpus[1].phases["transfer"]["transfer"] == 2 * GIB + near.transfer.gathered_bytes
    # A group over two machines gathers over the network.
    far = make_plan(load(*words, "cluster.nodes=[{count: 2, gpus: 1, network_gb_per_s: 50}]")).transfer
    assert far is not None and far.gather is not None
    assert far.gather.seconds == pytest.approx(28 * 46_792_704 / 50e9)


def test_groups_that_are_gathered_by_hand(load):
    """Qwen2.5 0.5B under ZeRO-3, bfloat16: the embedding has 259.7 MiB, so it is a group by itself; a layer has 14,912,384
    numbers, 28.4 MiB, and the tensor with which 256 MiB are reached, of 8.3 MiB at most, is the last of a group."""
    words = ["cluster.device=cuda", "cluster.nodes=[{gpus: 2}]", "policy.path=Qwen/Qwen2.5-0.5B", "policy.ranks=2"]
    transfer = make_plan(load(*words, "policy.zero_stage=3")).transfer
    assert transfer is not None
    assert transfer.gathered_bytes == 2 * 151_936 * 896 > 2**28
    # In the engines' type it travels, in the policy's it is gathered.
    other = make_plan(load(*words, "policy.zero_stage=3", "rollout.dtype=float32")).transfer
    assert other is not None and other.gather is not None
    assert other.nbytes == 2 * transfer.nbytes and other.gather.nbytes == transfer.nbytes // 2


def told(load, *overrides: str, base: str = "base") -> list[str]:
    return make_plan(load(*overrides, base=base)).problems


def test_an_engine_size_that_does_not_divide_the_heads(load):
    config = load("policy.path=Qwen/Qwen2.5-7B", "rollout.tensor_parallel=3", "cluster.device=cuda")
    (problem,) = make_plan(config).problems
    assert "rollout.tensor_parallel: found 3, but Qwen/Qwen2.5-7B has 28 heads, 4 key-value heads" in problem
    assert problem.endswith("what would do: 1 or 2 or 4")
    assert check_plan(config) == [problem]


def test_sequences_are_shared_by_ranks_that_divide_the_heads(load):
    (problem,) = told(load, "policy.path=Qwen/Qwen2.5-7B", "policy.ranks=8", "policy.sequence_parallel=8")
    assert "policy.sequence_parallel: found 8" in problem and problem.endswith("what would do: 2 or 4")


def test_a_gpu_that_overflows_is_told_with_what_would_do(load):
    wanted = [
        *["cluster.device=cuda", "cluster.nodes=[{gpus: 4, gpu_memory_gib: 24}]", "policy.path=Qwen/Qwen2.5-1.5B"],
        *["policy.ranks=4", "critic.ranks=4", "rollout.gpu_memory_fraction=0.5", "data.max_prompt_tokens=1024"],
        "ppo.minibatch_samples=64",
    ]
    problems = told(load, *wanted)
    assert problems and all(
        "more than the 24.0 there are" in problem and "what would" in problem for problem in problems
    )
    # What is named as doing does.
    changes = problems[0].partition("what would do: ")[2].split(", or ")[0].split(" with ")
    assert changes and told(load, *wanted, *(change.replace(" ", "=") for change in changes)) == []


def test_what_is_named_is_legal(load):
    """An engine over 4 GPUs would have the room, but 14 heads can't be dealt out over 4; 16 of another model can."""
    words = ["cluster.device=cuda", "cluster.placement=disaggregated", "rollout.tensor_parallel=2"]
    words += ["cluster.nodes=[{gpus: 8, gpu_memory_gib: 24}]", "rollout.kv_cache_gib=60"]
    for path, does in (("Qwen/Qwen2.5-0.5B", False), ("Qwen/Qwen3-0.6B", True)):
        (problem,) = told(load, *words, f"policy.path={path}")
        assert ("what would do: rollout.tensor_parallel 4" in problem) == does, problem


def test_a_hub_that_does_not_answer_is_asked_once(load, monkeypatch):
    """A port that takes connections and says nothing: five roles with three models of the hub wait for it once."""
    with socket.create_server(("127.0.0.1", 0), backlog=1) as silent:
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(known, "HUB_TIMEOUT_S", 0.2)
        plan = make_plan(load("policy.path=a/a", "critic.path=b/b", "reward.sources=[{model: c/c}]"))
    found = plan.known.unseen
    assert [model.key for model in found] == ["policy.path", "critic.path", "reward.sources.0.model"]
    assert ["can't be asked" in model.why for model in found] == [True, False, False]


def test_the_limit_is_where_it_is_said_to_be(load):
    """A GPU with just the memory that is planned has no problem; with a MiB less it has."""
    words = ["cluster.device=cuda", "policy.path=Qwen/Qwen2.5-0.5B", "rollout.kv_cache_gib=1"]
    usage = make_plan(load(*words, "cluster.nodes=[{gpus: 1}]")).usage
    assert usage is not None
    peak = usage.gpus[0].peak[1] / GIB
    assert told(load, *words, f"cluster.nodes=[{{gpus: 1, gpu_memory_gib: {peak + 1 / 1024}}}]") == []
    (problem,) = told(load, *words, f"cluster.nodes=[{{gpus: 1, gpu_memory_gib: {peak - 1 / 1024}}}]")
    assert "0.0 more than" in problem and "node 0 GPU 0" in problem
    host = usage.hosts[0].total / GIB
    assert told(load, *words, f"cluster.nodes=[{{gpus: 1, memory_gib: {host + 1 / 1024}}}]") == []
    (problem,) = told(load, *words, f"cluster.nodes=[{{gpus: 1, memory_gib: {host - 1 / 1024}}}]")
    assert problem.startswith("host memory of node 0")


def test_no_room_for_a_kv_cache(load):
    small = ["cluster.device=cuda", "cluster.nodes=[{gpus: 8, gpu_memory_gib: 24}]", "policy.path=Qwen/Qwen2.5-7B"]
    problems = told(load, *small, "policy.lora={}", "reference={}", "critic={num_layers: 1, lora: {}}")
    # 2 x 7,615,616,512 bytes are 14.2 GiB, of 0.4 x 24 = 9.6.
    assert any("rollout.gpu_memory_fraction: found 0.4 of 24.0 GiB" in p and "(14.2)" in p for p in problems)
    # 14.2, 2 and 0.01 of 24 GiB are 0.675 of them.
    assert any(
        "with rollout.gpu_memory_fraction 0.68" in p or "what would do: rollout.gpu_memory_fraction 0.68" in p
        for p in problems
    )


def test_all_that_can_not_work_is_told_together(load, tmp_path):
    problems = told(
        load,
        "cluster.device=cuda",
        "cluster.nodes=[{gpus: 2}]",
        "policy.path=Qwen/Qwen2.5-7B",
        "policy.ranks=4",
        "rollout.tensor_parallel=3",
        f"critic.path={tmp_path}",
        "data.max_prompt_tokens=200000",
        *[f"{role}.tokens_per_micro_batch=300000" for role in ("policy", "critic", "reference")],
    )
    assert len(problems) == 4, problems
    assert "has no config.json" in problems[0] and "28 heads" in problems[1] and "reads at most" in problems[2]
    assert "what would do" in problems[3] and "an engine over 3 GPUs" in problems[3]


def test_ipc_where_an_engine_has_gpus_without_the_policy(load):
    """Of 2 machines with 6 GPUs the policy's 8 ranks take 6 and 2, an engine over 4 GPUs is on each: two have no rank."""
    words = [
        "cluster.device=cuda",
        "policy.path=Qwen/Qwen3-0.6B",
        "policy.ranks=8",
        "rollout.engines=2",
        "reference=null",
    ]
    words += ["ppo.kl_coef=0", "rollout.tensor_parallel=4", "rollout.weight_transport=ipc"]
    config = load(*words, "cluster.nodes=[{count: 2, gpus: 6}]")
    (problem,) = make_plan(config).problems
    assert (
        "rollout.weight_transport: found ipc" in problem
        and "(node 1 GPU 2, 3)" in problem
        and "auto or gloo" in problem
    )
    assert check_plan(config) == [problem]
    for mended in (["rollout.weight_transport=auto"], ["rollout.weight_transport=gloo"], ["policy.ranks=10"]):
        assert make_plan(load(*words, "cluster.nodes=[{count: 2, gpus: 6}]", *mended)).problems == []
    assert make_plan(load(*words)).problems == []  # 8 GPUs of one machine, as is assumed


def test_gpus_without_a_role_are_noted(load):
    plan = make_plan(load("cluster.device=cuda", "cluster.nodes=[{gpus: 8}]", "policy.path=Qwen/Qwen2.5-0.5B"))
    assert "7 of 8 GPUs have no role" in plan.notes


@pytest.mark.parametrize("base", ["base_sft", "base_reward_model", "base_dpo"])
def test_training_on_examples_is_planned(load, base):
    config = load("cluster.device=cuda", "cluster.nodes=[{gpus: 1}]", "policy.path=Qwen/Qwen2.5-0.5B", base=base)
    plan = make_plan(config)
    assert plan.problems == [] and plan.usage is not None
    update = plan.usage.gpus[0].phases["update"]
    head = 0 if base != "base_reward_model" else 896  # tied: the output layer is the embedding
    parameters = 494_032_768 + head
    assert update["optimizer"] == 12 * parameters and update["gradients"] == 4 * parameters
    assert (plan.transfer is not None) == (base == "base_dpo")


@pytest.mark.parametrize("base", ["base_sampling", "base_critique", "base_evaluation"])
def test_work_with_finished_models_is_planned(load, base):
    paths = ["models=[{path: Qwen/Qwen2.5-0.5B}, {path: Qwen/Qwen2.5-1.5B}]"] if base == "base_evaluation" else []
    paths = paths or ["policy.path=Qwen/Qwen2.5-0.5B"]
    plan = make_plan(load("cluster.device=cuda", "cluster.nodes=[{gpus: 1}]", *paths, base=base))
    assert plan.problems == [] and plan.usage is not None
    # The larger one of the models that are up one after the other.
    numbers = 1_543_714_304 if base == "base_evaluation" else 494_032_768
    assert within(plan.usage.gpus[0].phases["rollout"]["parameters"], 2 * numbers)


def test_the_document_has_the_same_numbers(load):
    plan = make_plan(load(*LARGE))
    found = json.loads(json.dumps(document(plan)))
    assert found["ok"] is True and found["resources"]["GPU"] == 64 and found["resources"]["nodes"] == 8
    assert found["memory"]["gpus"][5]["phases"] == {k: dict(v) for k, v in plan.usage.gpus[5].phases.items()}
    assert found["transfers"][0]["seconds"] == plan.transfer.seconds
    assert found["roles"]["policy"]["models"][0]["parameters"] == 70_553_706_496
    assert set(found) == {
        *(
            "version",
            "algorithm",
            "ok",
            "unseen",
            "problems",
            "notes",
            "batch",
            "roles",
            "placement",
            "memory",
            "transfers",
        ),
        "resources",
    }
    assert {field.name for field in dataclasses.fields(plan)} >= {"problems", "notes", "placement"}
