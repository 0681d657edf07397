"""Batch arithmetic, against numbers worked out by hand."""

from __future__ import annotations

from rayrlhf.config.derive import derive, derive_offline
from rayrlhf.planning.rows import plan_rows


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


# -- training on examples ---------------------------------------------------------------------------------------


def test_numbers_of_pairs(load, bases):
    # 24 pairs = 48 samples a step; 1000 / 24 = 41.7, so 42 steps an epoch; 3 epochs = 126
    config = load(
        *["training.batch_examples=24", "training.epochs=3", "data.max_tokens=100", "policy.ranks=5"],
        *["policy.tokens_per_micro_batch=450", "reference.ranks=7", "reference.tokens_per_micro_batch=250"],
        *["rollout.engines=2"],
        text=bases["dpo"],
    )
    d = derive_offline(config, 1000)
    assert (d.samples_per_example, d.samples_per_step, d.max_tokens_per_step) == (2, 48, 4800)
    assert (d.steps_per_epoch, d.total_steps) == (42, 126)
    policy, reference = d.shares["policy"], d.shares["reference"]
    # 24 pairs over 5 ranks: 5 pairs on the fullest; 450 tokens hold 2 pairs of 200: 3 micro-batches
    assert (policy.samples_per_rank, policy.samples_per_micro_batch, policy.micro_batches) == (10, 4, 3)
    # 48 samples over 7 ranks: 7; 250 tokens hold 2 of 100: 4 forwards
    assert (reference.samples_per_rank, reference.samples_per_micro_batch, reference.micro_batches) == (7, 2, 4)
    assert d.processes == {"policy": 5, "reference": 7, "rollout": 2} and d.total_processes == 14


def test_steps_of_a_run(load, bases):
    config = load("training.epochs=2", text=bases["sft"])  # batches of 16
    assert [derive_offline(config, n).total_steps for n in (1, 16, 17, 160)] == [2, 2, 4, 20]
    assert (derive_offline(config).steps_per_epoch, derive_offline(config).total_steps) == (None, None)
    limited = load("training.epochs=2", "training.max_steps=5", text=bases["sft"])
    assert [derive_offline(limited, n).total_steps for n in (None, 16, 160)] == [5, 2, 5]


def test_roles_of_offline_runs(load, bases):
    assert derive_offline(load(text=bases["sft"])).processes == {"policy": 1}
    assert derive_offline(load(text=bases["sft"])).max_tokens_per_step == 16 * 128
    d = derive_offline(load("policy.lora={}", "policy.ranks=2", text=bases["dpo"]))
    assert d.processes == {"policy": 2, "rollout": 1} and d.shares["reference"].ranks == 2
    simpo = ["dpo.loss=simpo", "guard.kl_prompts=0", "guard.max_kl=null", "reference=null"]
    d = derive_offline(load(*simpo, text=bases["dpo"]))
    assert d.processes == {"policy": 1} and set(d.shares) == {"policy"}
    # of simpo a reference is for the KL alone: it sees no training step
    d = derive_offline(load("dpo.loss=simpo", "guard.actions=[halve_lr]", text=bases["dpo"]))
    assert d.processes == {"policy": 1, "reference": 1, "rollout": 1} and set(d.shares) == {"policy"}


def test_numbers_of_labelled_completions(load, bases):
    # each of 16 completions, and a mismatched one whose prompt (64) and completion (up to 128) come from two examples
    d = derive_offline(load("dpo.loss=kto", "policy.tokens_per_micro_batch=400", text=bases["dpo"]))
    assert (d.samples_per_example, d.samples_per_step, d.max_tokens_per_step) == (2, 32, 32 * 192)
    policy = d.shares["policy"]
    assert (policy.samples_per_rank, policy.samples_per_micro_batch, policy.micro_batches) == (32, 2, 16)
    # over 3 ranks: 6 completions on the fullest, with as many mismatched ones
    d = derive_offline(load("dpo.loss=kto", "policy.ranks=3", text=bases["dpo"]))
    assert d.shares["policy"].samples_per_rank == 12


def test_plan_rows_of_examples(load, bases):
    config = load("training.epochs=3", "data.max_tokens=100", "policy.tokens_per_micro_batch=450", text=bases["dpo"])
    rows = {(row.section, row.name): (row.value, row.how) for row in plan_rows(config, 1000)}
    assert rows["one step", "pairs"] == ("16", "training.batch_examples")
    assert rows["one step", "samples"] == ("32", "16 pairs x 2: chosen and rejected")
    assert rows["one step", "tokens, at most"] == ("3,200", "32 samples x 100")
    assert rows["the run", "optimizer steps an epoch"] == ("63", "1,000 pairs / 16, rounded up")
    assert rows["the run", "optimizer steps"] == ("189", "3 epochs x 63")
    assert rows["policy", "samples a rank, a step"] == ("32", "32 samples over 1 rank")
    how = "4 full-length samples in policy.tokens_per_micro_batch 450"
    assert rows["policy", "micro-batches a rank, a step"] == ("8", how)
    assert rows["processes", "in all"] == ("3", "on the CPU, beside the driver")


def test_plan_rows_before_the_data_is_read(load, bases):
    rows = {(row.section, row.name): (row.value, row.how) for row in plan_rows(load(text=bases["sft"]))}
    assert rows["one step", "examples"] == ("16", "training.batch_examples") and ("one step", "samples") not in rows
    how = "training examples / 16: known when the data is read"
    assert rows["the run", "optimizer steps an epoch"] == ("?", how)
    assert rows["the run", "optimizer steps"] == ("?", "1 epoch x optimizer steps an epoch")
    rows = {row.name: row.value for row in plan_rows(load("training.max_steps=7", text=bases["reward_model"]))}
    assert rows["optimizer steps"] == "at most 7"


def test_a_shared_reference_of_preferences(load, bases):
    rows = plan_rows(load("policy.lora={}", text=bases["dpo"]), 10)
    assert ("reference", "0") in [(row.name, row.value) for row in rows if row.section == "processes"]
    how = next(row.how for row in rows if row.section == "reference" and row.name.startswith("micro"))
    assert how == "64 full-length samples in policy.tokens_per_micro_batch 8,192"
