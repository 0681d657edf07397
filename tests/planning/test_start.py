"""The start of a run on GPUs and in host memory: who is built when, and what is there then."""

from __future__ import annotations

from rayrlhf.planning.document import document
from rayrlhf.planning.known import shape_of
from rayrlhf.planning.memory import engine_backup_bytes
from rayrlhf.planning.plan import make_plan

GIB = 2**30
P = 494_032_768
"""Parameters of Qwen2.5 0.5B; its output layer is its embedding."""
VALUES = P + 897
"""With a critic's head instead."""
OTHER = ["rollout.engine=transformers", "rollout.kv_cache_gib=null"]
SMALL = "policy.path=Qwen/Qwen2.5-0.5B"
ONE = ["cluster.device=cuda", SMALL, "rollout.kv_cache_gib=1"]


def start_of(plan, machine=0):
    assert plan.usage is not None
    return plan.usage.gpus[machine].phases["start"]


def test_one_after_the_other_each_leaves_for_the_next(load):
    """Policy, critic, reference and engine on one GPU. On Ray the engine is built first, then reference, critic, policy. The
    most is there with the last of them: 18 P of the policy (2 parameters, 4 gradients, 12 optimizer), half a GiB for each of the
    four processes, and half a GiB for work."""
    plan = make_plan(load(*ONE, "cluster.nodes=[{gpus: 1}]"))
    assert plan.problems == []
    start = start_of(plan)
    assert (start["parameters"], start["gradients"], start["optimizer"]) == (2 * P, 4 * P, 12 * P)
    assert start["other"] == 2.5 * GIB and start["kv_cache"] == 0
    # The engine was alone.
    assert plan.usage.gpus[0].before_engine == 0
    # The update has more, so it is the peak.
    assert plan.usage.gpus[0].peak[0] == "update"


def test_who_does_not_leave_is_there_with_all_others(load):
    """18 P of the policy, 18 of the critic, 2 of the reference; the engine's 2 P, 1 GiB of KV cache and 2 of workspace; half a
    GiB for each of the four, and half a GiB for work."""
    plan = make_plan(load(*ONE, "cluster.nodes=[{gpus: 1}]", "cluster.offload_idle=false"))
    start = start_of(plan)
    assert start["parameters"] == 2 * (3 * P + VALUES) and start["kv_cache"] == GIB
    assert start["gradients"] == 4 * (P + VALUES) and start["optimizer"] == 12 * (P + VALUES)
    assert start["other"] == 4.5 * GIB
    # The same states are there in the phases, and none of them in host memory.
    update = plan.usage.gpus[0].phases["update"]
    assert [update[part] for part in ("parameters", "optimizer")] == [start["parameters"], start["optimizer"]]
    assert "idle" not in plan.usage.hosts[0].parts


def test_roles_with_gpus_of_their_own_start_alone(load):
    plan = make_plan(load(*ONE, "cluster.nodes=[{gpus: 4}]", "cluster.placement=disaggregated"))
    found = {gpu.roles[0]: gpu.phases["start"] for gpu in plan.usage.gpus}
    assert found["reference"] == {"parameters": 2 * P, "other": GIB}
    assert found["rollout"] == {"parameters": 2 * P, "kv_cache": GIB, "other": 3 * GIB}
    assert found["critic"]["optimizer"] == 12 * VALUES and found["critic"]["other"] == GIB


def test_inline_the_engine_comes_last_and_finds_too_little(load):
    """In one process everything stays where it is built, and the engine is built last: 18 P and 18 of the critic, 2 of the
    reference: 17.48 GiB. Of 40 GiB vLLM wants 0.6, 24, free; with the process's half GiB 42 are needed."""
    words = [*ONE, "cluster.nodes=[{gpus: 1, gpu_memory_gib: 40}]", "cluster.executor=inline"]
    plan = make_plan(load(*words, "rollout.gpu_memory_fraction=0.6"))
    others = 18 * (P + VALUES) + 2 * P
    assert plan.usage.gpus[0].before_engine == others
    (problem,) = plan.problems
    short = (others + GIB // 2 + 0.6 * 40 * GIB - 40 * GIB) / GIB
    assert f"but others have 17.5 when it is built: {short:.1f} too little" in problem, problem
    assert "what would do: cluster.executor ray" in problem
    # (40 - 17.48 - 0.5) / 40 = 0.55
    assert "rollout.gpu_memory_fraction 0.55" in problem
    for does, overrides in ((True, "0.55"), (False, "0.56")):
        assert (make_plan(load(*words, f"rollout.gpu_memory_fraction={overrides}")).problems == []) == does
    # On Ray the engine is built first.
    assert make_plan(load(*words, "rollout.gpu_memory_fraction=0.6", "cluster.executor=ray")).problems == []
    # transformers' engine asks for nothing beforehand.
    assert make_plan(load(*words, "rollout.gpu_memory_fraction=0.6", *OTHER)).problems == []


def test_the_start_can_be_the_peak(load):
    """One process: the roles take turns in the run, but all of them are there at the start: 18 P and 18 of the critic, 2 P of the
    reference and of the engine, with its 3 GiB, and half a GiB for the process and for work. That is 22.4 GiB."""
    words = [*ONE, "cluster.executor=inline", "rollout.gpu_memory_fraction=0.05", "policy.tokens_per_micro_batch=64"]
    words += ["critic.tokens_per_micro_batch=64", "reference.tokens_per_micro_batch=64", "data.max_prompt_tokens=32"]
    words += ["rollout.max_response_tokens=32", "policy.logits_chunk_tokens=64"]
    plan = make_plan(load(*words, "cluster.nodes=[{gpus: 1, gpu_memory_gib: 80}]"))
    phase, peak = plan.usage.gpus[0].peak
    assert phase == "start" and peak == 22 * P + 18 * VALUES + 4 * GIB
    assert plan.problems == []
    (problem,) = make_plan(load(*words, "cluster.nodes=[{gpus: 1, gpu_memory_gib: 22.3}]")).problems
    # Not the executor ray: its update has four processes, and with them 23.2 GiB.
    assert "22.4 GiB in the phase start" in problem and "what would do: policy.offload_optimizer cpu" in problem


def test_an_evaluation_builds_each_models_engine_beside_those_that_stay(load):
    """Reference and model are one process each; the reference stays, and leaves the GPU before a model's own roles are built."""
    words = ["cluster.device=cuda", "rollout.kv_cache_gib=1", "cluster.nodes=[{gpus: 1, gpu_memory_gib: 40}]"]
    words.append("models=[{path: Qwen/Qwen2.5-0.5B}, {path: Qwen/Qwen2.5-1.5B}]")
    away = make_plan(load(*words, base="base_evaluation"))
    assert away.usage.gpus[0].before_engine == GIB // 2
    stays = make_plan(load(*words, "cluster.offload_idle=false", base="base_evaluation"))
    assert stays.usage.gpus[0].before_engine == 2 * P + GIB // 2 and stays.problems == []
    # Inline the model is built before its engine.
    inline = make_plan(load(*words, "cluster.executor=inline", base="base_evaluation"))
    assert inline.usage.gpus[0].before_engine == 2 * 1_543_714_304


def test_inline_there_is_one_process(load):
    """Four roles on the GPU, and a fifth that needs none: one CUDA context, in which all have half a GiB to work in; a GiB of
    host memory. On a CPU 640 MiB."""
    words = ["cluster.executor=inline", SMALL, "rollout.kv_cache_gib=1"]
    plan = make_plan(load("cluster.device=cuda", *words, "cluster.nodes=[{gpus: 1}]"))
    phases = plan.usage.gpus[0].phases
    assert phases["score"]["other"] == phases["update"]["other"] == phases["transfer"]["other"] == GIB
    assert phases["rollout"]["other"] == 3 * GIB  # with the engine's workspace
    assert [plan.usage.hosts[0].phases[phase]["processes"] for phase in ("start", "run")] == [GIB, GIB]
    (host,) = make_plan(load(*words)).usage.hosts
    assert host.parts["processes"] == 640 * 2**20


# -- host memory --------------------------------------------------------------------------------------------------------


def test_each_rank_reads_the_whole_model_in_float32(load):
    """Four ranks of stage 2 on a machine: 4 x 4 P while they read, and a GiB for each process. Under ZeRO-3 they read tensor by
    tensor; the largest is the embedding, 151,936 x 896 numbers of 2 bytes."""
    words = ["cluster.device=cuda", "cluster.nodes=[{gpus: 4}]", "policy.path=Qwen/Qwen2.5-0.5B", "policy.ranks=4"]
    (host,) = make_plan(load(*words, base="base_sft")).usage.hosts
    assert dict(host.phases["start"]) == {"processes": 4 * GIB, "loading": 4 * 4 * P}
    assert host.total == 4 * GIB + 16 * P and dict(host.phases["run"]) == {"processes": 4 * GIB}
    (spread,) = make_plan(load(*words, "policy.zero_stage=3", base="base_sft")).usage.hosts
    assert spread.parts["loading"] == 4 * 2 * 151_936 * 896
    # On two machines each has its own.
    apart = make_plan(load(*words, "cluster.nodes=[{count: 2, gpus: 2}]", base="base_sft")).usage.hosts
    assert [host.parts["loading"] for host in apart] == [8 * P, 8 * P]


def test_one_reads_while_the_earlier_ones_are_idle(load):
    """Policy and critic with adapters, one rank each, and an engine: these are built engine, critic, policy. While the policy is
    read (4 P), the engine's weights (2 P) and the critic wait in host memory: 2 bytes of 494,032,768, of its head's 897, of the
    adapters on q and v, 24 layers x (896 + 896 + 896 + 128) = 67,584, and of the head once more, as it is trained; 16 bytes of
    gradients and optimizer of the last two. In the end the policy is there too, with less: 2 P and 18 of its adapters."""
    lora = "{rank: 1, target_modules: [q_proj, v_proj]}"
    words = [*ONE, "cluster.nodes=[{gpus: 1}]", f"policy.lora={lora}", f"critic.lora={lora}"]
    (host,) = make_plan(load(*words)).usage.hosts
    start, run = host.phases["start"], host.phases["run"]
    critic = 2 * VALUES + 18 * (67_584 + 897)
    assert start["loading"] == 4 * P and start["idle"] == 2 * P + critic
    assert run["idle"] == 2 * P + critic + 2 * P + 18 * 67_584 and "loading" not in run
    assert host.total == sum(start.values()) > sum(run.values())


def test_too_little_host_memory_for_the_start_is_refused(load):
    words = ["cluster.device=cuda", "policy.path=Qwen/Qwen2.5-0.5B", "policy.ranks=4"]
    needed = (4 * GIB + 16 * P) / GIB
    for more, fits in ((0.01, True), (-0.01, False)):
        nodes = f"cluster.nodes=[{{gpus: 4, memory_gib: {needed + more}}}]"
        problems = make_plan(load(*words, nodes, base="base_sft")).problems
        assert (problems == []) == fits
    assert "in the start" in problems[0] and "what would do: policy.zero_stage 3" in problems[0]


def test_the_document_has_the_start(load):
    found = document(make_plan(load(*ONE, "cluster.nodes=[{gpus: 1}]")))
    assert list(found["memory"]["gpus"][0]["phases"]) == ["start", "rollout", "score", "update", "transfer"]
    assert list(found["memory"]["machines"][0]["phases"]) == ["start", "run"]


def test_vllm_keeps_page_locked_copies_of_its_segments(load):
    """transformers' weights leave in pieces, and so do all other roles'; what is more with vLLM is the engine's alone."""
    words = ["cluster.device=cuda", SMALL, "cluster.nodes=[{gpus: 1}]"]
    vllm, other = (
        make_plan(load(*words, f"rollout.engine={name}")).usage.hosts[0].parts for name in ("vllm", "transformers")
    )
    # By hand for another model in test_memory.py.
    backup = engine_backup_bytes(shape_of("Qwen/Qwen2.5-0.5B"), "bfloat16", 1)
    assert vllm["idle"] == other["idle"] and vllm["pinning"] - other["pinning"] == backup - 2 * P > 0


def test_the_start_is_named_as_the_peak_only_where_it_has_the_most(load):
    """Where an engine is alone, start and generation have the same: it is told as generation's."""
    words = ["cluster.device=cuda", "cluster.nodes=[{gpus: 3}]", "cluster.placement=disaggregated", SMALL]
    gpu = next(gpu for gpu in make_plan(load(*words, base="base_critique")).usage.gpus if gpu.roles == ("rollout",))
    assert sum(gpu.phases["start"].values()) == sum(gpu.phases["rollout"].values())
    assert gpu.peak[0] == "rollout"


def test_machines_that_are_alike_are_told_together(load):
    words = ["cluster.device=cuda", "policy.path=Qwen/Qwen2.5-7B", "policy.ranks=8"]
    (problem,) = make_plan(
        load(*words, "cluster.nodes=[{count: 4, gpus: 2, memory_gib: 32}]", base="base_sft")
    ).problems
    # Two ranks each: 2 GiB, and 4 bytes of 7,615,616,512 numbers each: 56.7.
    assert problem.startswith(
        "host memory of node 0 and 3 more machines: 59 GiB in the start, 27 more than the 32 there are"
    )
