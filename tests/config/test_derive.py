"""Batch arithmetic, against numbers worked out by hand."""

from __future__ import annotations

from rayrlhf.config.derive import derive, plan_rows


def test_numbers_of_a_cluster(load):
    d = derive(
        load(
            # 24 prompts x 5 = 120 samples; 120 / 40 = 3 minibatches x 2 passes = 6 optimizer steps; x 7 steps = 42
            *[
                "ppo.prompts_per_step=24",
                "rollout.samples_per_prompt=5",
                "ppo.minibatch_samples=40",
                "ppo.ppo_epochs=2",
            ],
            *["ppo.steps=7", "data.max_prompt_tokens=100", "rollout.max_response_tokens=60"],
            *[
                "policy.ranks=3",
                "policy.tokens_per_micro_batch=500",
                "critic.ranks=2",
                "critic.tokens_per_micro_batch=160",
            ],
            *["reference.ranks=4", "rollout.engines=2", "rollout.max_num_seqs=25", "reward.ranks=2"],
        )
    )
    assert (d.samples_per_step, d.minibatches_per_epoch, d.optimizer_steps_per_step) == (120, 3, 6)
    assert (d.total_optimizer_steps, d.total_samples) == (42, 840)
    assert (d.max_sample_tokens, d.max_tokens_per_step) == (160, 19200)
    assert (d.samples_per_engine, d.decode_waves) == (60, 3)  # 25 + 25 + 10
    policy, critic, reference = d.shares["policy"], d.shares["critic"], d.shares["reference"]
    assert (policy.samples_per_rank, policy.samples_per_micro_batch, policy.micro_batches) == (14, 3, 5)  # 3*4 + 2
    assert (critic.samples_per_rank, critic.samples_per_micro_batch, critic.micro_batches) == (20, 1, 20)
    assert (reference.samples_per_rank, reference.samples_per_micro_batch, reference.micro_batches) == (30, 51, 1)
    assert "reward" not in d.shares
    assert d.processes == {"policy": 3, "critic": 2, "reference": 4, "reward": 2, "rollout": 2}
    assert d.total_processes == 13


def test_lora_makes_the_policy_the_reference(load):
    d = derive(load("policy.lora={}", "policy.ranks=2"))
    assert "reference" not in d.processes and d.shares["reference"].ranks == 2
    assert derive(load("policy.lora={}", "reference.path=other")).processes["reference"] == 1


def test_roles_that_are_not_there(load):
    groups = ["critic=null", "reference=null", "ppo.kl_coef=0", "ppo.advantage_estimator=rloo"]
    d = derive(load(*groups, "reward.sources=[{model: rm}]"))
    assert list(d.processes) == ["policy", "reward", "rollout"] and set(d.shares) == {"policy", "reward"}


def test_plan_rows(load):
    rows = {
        (row.section, row.name): (row.value, row.how) for row in plan_rows(load("ppo.ppo_epochs=4", "ppo.steps=500"))
    }
    assert rows["one step", "samples"] == ("64", "16 prompts x 4 each")
    assert rows["one step", "minibatches a pass"] == ("2", "64 samples / 32 a minibatch")
    assert rows["one step", "optimizer steps"] == ("8", "2 a pass x 4 passes")
    assert rows["one step", "tokens, at most"] == ("8,192", "64 samples x 128")
    assert rows["the run", "optimizer steps"] == ("4,000", "500 steps x 8")
    assert rows["policy", "samples a rank, a minibatch"] == ("32", "32 samples over 1 rank")
    assert rows["policy", "micro-batches a rank, a minibatch"] == (
        "1",
        "64 full-length samples in policy.tokens_per_micro_batch 8,192",
    )
    assert rows["processes", "in all"] == ("5", "on the CPU, beside the driver")
    assert all(isinstance(value, str) for row in plan_rows(load()) for value in row)


def test_plan_rows_of_one_process(load):
    rows = plan_rows(load("cluster.executor=inline"))
    assert [row.value for row in rows if row.section == "processes"] == ["1"]


def test_a_shared_reference_is_shown_without_a_process(load):
    rows = [row for row in plan_rows(load("policy.lora={}")) if row.section == "processes"]
    assert ("reference", "0") in [(row.name, row.value) for row in rows] and rows[-1].value == "4"
