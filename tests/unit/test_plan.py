"""What the plan computes, against models that are really built and against sums by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CommandLine
from peft import LoraConfig
from tiny import tiny_tokenizer, trainer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config
from transformers.cache_utils import DynamicCache

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.networks import cache_argument, trunk
from rlhf_pipeline.models.precision import fuse_gelu
from rlhf_pipeline.plan import networks
from rlhf_pipeline.plan.devices import DEVICES, GIB, Device
from rlhf_pipeline.plan.launches import Job, Work, fewest, flops, launches, moments, needs, seconds
from rlhf_pipeline.plan.networks import Network, count

TINY = GPT2Config(vocab_size=300, n_positions=64, n_layer=2, n_embd=32, n_head=2, bos_token_id=0, eos_token_id=0)
LLAMA: dict[str, Any] = {
    "vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
ADAPTER: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}


def size(model: torch.nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


@pytest.mark.parametrize("adapter", [None, ADAPTER])
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_parameters_are_those_of_the_trainers_own_networks(critic: str, adapter: Any, tmp_path: Path) -> None:
    lora = {"peft_config": LoraConfig(**adapter)} if adapter else {}
    ppo = trainer(tiny_tokenizer(), tmp_path, critic=critic, given=lora)
    policy = count(ppo.model.config, 8, False, LoraConfig(**adapter) if adapter else None)
    own = None
    if critic == "separate":
        own = count(ppo.model.config, 8, False, LoraConfig(**adapter) if adapter else None, critic=True)
    job = Job(policy, own, 0 if adapter else policy.parameters, 0, WORK)
    assert policy.parameters == size(ppo.model.policy)
    assert job.trained == size(ppo.model, trained=True)
    if own:
        assert own.parameters == size(ppo.model.value_model)
    assert job.reference == (size(ppo.reference.model) if ppo.reference.model else 0)
    assert job.value_head == (0 if own else size(ppo.model.value_head))


@pytest.mark.parametrize(
    "model",
    [GPT2LMHeadModel(TINY), *(LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=t)) for t in (False, True))],
)
def test_of_any_family_the_counts_are_those_of_a_model_with_weights(model: PreTrainedModel) -> None:
    found = count(model.config, 10, False)
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert found.parameters == found.trained == size(model)
    assert found.head == head.numel()
    tables = (embeddings, getattr(getattr(trunk(model), "wpe", None), "weight", None))
    rest = [p for p in trunk(model).parameters() if p.dim() == 2 and not any(p is table for table in tables)]
    assert found.matrices == sum(p.numel() for p in rest)
    fuse_gelu(model.eval())
    body = trunk(model)
    own = {**dict(body.named_parameters()), **dict(body.named_buffers())}
    kept = [networks._kept(body, own, rows, 10, False) for rows in (1, 2)]
    # Without storage nobody can see that no row is padded, so a mask of (length, length) is counted as well.
    assert found.kept == pytest.approx(kept[1] - kept[0], rel=0.1)
    assert found.kept >= kept[1] - kept[0]
    cache = DynamicCache(config=model.config)
    model(torch.zeros(1, 10, dtype=torch.long), **{cache_argument(trunk(model)): cache})
    assert found.cache * 10 == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_the_parameters_of_llama_2_are_those_of_its_table() -> None:
    found = count(LlamaConfig(num_hidden_layers=2), 16, True)
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    assert found.matrices == 2 * layer
    assert found.parameters == 2 * 32000 * 4096 + 2 * (layer + 2 * 4096) + 4096
    assert found.parameters + 30 * (layer + 2 * 4096) == 6_738_415_616  # with all 32 layers
    assert found.copies == pytest.approx(2 * found.matrices, rel=0.01)  # bf16


def test_what_is_no_causal_language_model_is_refused() -> None:
    with pytest.raises(UserError, match="T5Config is not the configuration of a causal language model"):
        count(T5Config(), 8, False)


# By hand: 2 layers of width 4, a vocabulary of 10, tied.
POLICY = Network(
    parameters=500, trained=500, layers=2, width=4, vocabulary=10, head=40, head_trained=True, matrices=400,
    matrices_trained=400, halved=0, attention=8, cache=64, kept=1000, copies=0,
)  # fmt: skip
WORK = Work(
    rows=8, micro=4, minibatches=1, epochs=2, at_once=8, prompt=3, response=5, mean_prompt=3, mean_response=5,
    bf16=False, checkpointing=False,
)  # fmt: skip
JOB = Job(POLICY, None, 500, 7, WORK)


def test_bytes_by_part() -> None:
    found = moments("single", 1, JOB)
    always = {"weights": 4 * 505, "reference": 2000, "reward": 28, "Adam": 8 * 505}
    assert found["rollout"] == {**always, "KV cache": 64 * 8 * 8 * 1.5, "logits": 8 * 10 * 12}
    # Two micro-batches: the second comes on top of the first one's gradients, and of the head's both ends are held.
    assert found["update: begin"] == {
        **always, "gradients": 4 * 505 + 160, "activations": 4 * 1000 + 4 * 5 * 4 * 4, "logits": 4 * 5 * 10 * 4,
    }  # fmt: skip
    assert found["update: end"] == {**always, "gradients": 4 * 505 + 320}
    whole = moments("single", 1, replace(JOB, work=replace(WORK, micro=8)))
    assert whole["update: begin"]["gradients"] == 160
    assert whole["update: end"]["gradients"] == 4 * 505 + 160


def test_in_bf16_the_weights_are_held_once_more_and_the_reference_in_half() -> None:
    job = replace(JOB, policy=replace(POLICY, copies=800), work=replace(WORK, bf16=True))
    assert job.reference_bytes == 4 * 100 + 2 * 400
    found = moments("single", 1, job)
    assert found["rollout"]["bf16 copies"] == 800
    assert found["rollout"]["KV cache"] == 32 * 8 * 8 * 1.5
    assert found["update: begin"]["bf16 copies"] == 800 + 4 * 40
    assert found["update: begin"]["logits"] == 4 * 5 * 10 * 2


def test_checkpointing_keeps_the_layers_inputs_and_one_layer() -> None:
    found = moments("single", 1, replace(JOB, work=replace(WORK, checkpointing=True)))
    assert found["update: begin"]["activations"] == 4 * 7 * 2 * 4 * 4 + 4 * 1000 / 2 + 320


def test_a_critic_of_its_own_and_an_adapter() -> None:
    work = replace(WORK, micro=8)
    found = moments("single", 1, Job(POLICY, replace(POLICY, parameters=470, trained=470, head=0), 500, 0, work))
    assert found["update: begin"]["critic"] == 4 * 470
    assert found["update: begin"]["activations"] == 2 * (8 * 1000 + 8 * 5 * 4 * 4)
    lora = replace(POLICY, trained=30, matrices_trained=30, head_trained=False)
    found = moments("single", 1, Job(lora, None, 0, 0, work))
    assert "reference" not in found["rollout"]
    assert found["rollout"]["Adam"] == 8 * 35
    assert found["update: end"]["gradients"] == 4 * 35


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_what_lies_under_an_adapter_is_kept_in_bf16(critic: str, tmp_path: Path) -> None:
    """As the trainer's own networks are; the backward pass then keeps no copies of it."""
    ppo = trainer(tiny_tokenizer(), tmp_path, critic=critic, given={"peft_config": LoraConfig(**ADAPTER)}, bf16=True)
    networks = [ppo.policy_model, *([ppo.value_model] if critic == "separate" else [])]
    counts = [count(ppo.model.config, 8, True, LoraConfig(**ADAPTER))]
    counts += [count(ppo.model.config, 8, True, LoraConfig(**ADAPTER), critic=True)] if critic == "separate" else []
    for network, found in zip(networks, counts, strict=True):
        held = sum(p.numel() * p.element_size() for p in network.parameters())
        assert 0 < found.halved < found.parameters
        assert 4 * found.parameters - 2 * found.halved == held
        assert found.copies < 2 * found.matrices / 4
    job = Job(counts[0], None, 0, 0, replace(WORK, bf16=True))
    head, saved = 4 * job.value_head, 2 * counts[0].halved
    assert moments("single", 1, job)["rollout"]["weights"] == 4 * counts[0].parameters - saved + head
    assert moments("zero2", 2, job)["rollout"]["weights"] == 4 * counts[0].parameters + head


def test_what_a_launch_divides() -> None:
    plain, ddp, two, three = (moments(name, 4, JOB)["update: end"] for name in ("single", "ddp", "zero2", "zero3"))
    assert ddp == {**plain, "buckets": 4 * 505}
    assert two["Adam"] == plain["Adam"] / 4
    assert two["master"] == 4 * 505 / 4
    assert two["weights"] == plain["weights"]
    assert two["gradients"] == 4 * 505 / 4 + 320
    assert three["weights"] == plain["weights"] / 4
    assert three["gathered"] == 4 * 505  # all of it: it is less than DeepSpeed has in hand
    assert two["buckets"] == three["buckets"] == 4 * 50_000_000
    while_sampling = moments("zero3", 4, JOB)["rollout"]
    assert while_sampling["weights"] + while_sampling["gathered"] == plain["weights"]


def test_flops_by_hand() -> None:
    found = flops(JOB)
    body, head = (2 * 400 + 4 * 8 * 8) * 64, 2 * 40 * 40
    assert found["rollout"] == found["log p"] == found["reference"] == body + head
    assert found["reward"] == 2 * 7 * 64
    assert found["update"] == 2 * 3 * (body + head)
    assert flops(replace(JOB, work=replace(WORK, checkpointing=True)))["update"] == found["update"] + 2 * body
    lora = Job(replace(POLICY, matrices_trained=0, head_trained=False), None, 0, 0, WORK)
    assert flops(lora)["update"] == 2 * (2 * (body + head) + 4 * 8 * 8 * 64)


def test_seconds_by_hand() -> None:
    device = Device(memory=1, bf16=1e6, fp32=1e6, bandwidth=1e3, link=1e4)  # so slow that nothing waits for Python
    found = seconds("ddp", 4, JOB, device, mfu=0.5)
    assert found["update"] == flops(JOB)["update"] / 0.5e6
    moved = 4 * 440 + 3 * 64 * 8 * (3 + 2.5)
    assert found["rollout"] == pytest.approx((2 * 400 + 4 * 8 * 8) * 24 / 0.5e6 + 5 * moved / 1e3)
    assert found["between processes"] == 2 * 4 * 505 * 2 * 3 / 4 / 1e4
    assert seconds("single", 1, JOB, device, mfu=0.5)["between processes"] == 0
    parts = replace(WORK, micro=1)
    passes = parts.rows // parts.minibatches
    two, three = (seconds(name, 4, replace(JOB, work=parts), device, mfu=0.5) for name in ("zero2", "zero3"))
    steps = 4 * 505 * parts.epochs * parts.minibatches * 3 / 4 / 1e4
    assert two["between processes"] == pytest.approx(steps * (passes + 1))
    gathered = 4 * 505 * 3 / 4 / 1e4
    assert three["between processes"] == pytest.approx(steps * passes + gathered + 2 * steps * passes)


def test_the_simplest_launch_that_fits() -> None:
    big = Job(replace(POLICY, parameters=10**9, trained=10**9), None, 10**9, 0, WORK)
    room = {name: needs(name, 8, big, DEVICES["h100"], 0.4)["bytes"] for name in ("ddp", "zero2", "zero3")}
    assert room["ddp"] > room["zero2"] > room["zero3"]
    for launch, need in room.items():
        device = replace(DEVICES["h100"], memory=need / 0.92 + GIB / 100)
        assert next(found["launch"] for found in launches(8, big, device, 0.4) if found["fits"]) == launch
        least = fewest(8, big, device, 0.4)
        assert least
        assert least["fits"]
        assert least["processes"] <= 8
    assert fewest(8, big, replace(DEVICES["h100"], memory=GIB), 0.4) is None
    assert fewest(8, big, DEVICES["h200"], 0.4)["processes"] == 1  # type: ignore[index]


def test_the_command_prints_a_plan_and_leaves_nothing(
    command_line: CommandLine, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("stage=plan", "policy=gpt2_scratch", "policy.size=small", "reward=length", "plan.gpus=8")
    assert command_line(*asked) == 0
    said = capsys.readouterr().out
    for part in ("computed   not measured", "124,439,808", "value head of 769", "ddp is the simplest", "single on 1"):
        assert part in said
    assert command_line(*asked, "plan.json=true", "trainer.critic=separate") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["critic"] == 124_439_808 + 768
    assert command_line(*asked, "plan.json=true", "trainer.max_steps=50") == 0
    assert [row["updates"] for row in json.loads(capsys.readouterr().out)["launches"]] == [50, 50, 50]
    assert [row["launch"] for row in found["launches"]] == ["ddp", "zero2", "zero3"]
    assert not list(workplace.iterdir())


def test_what_does_not_fit_is_told_what_would_help(
    command_line: CommandLine, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LlamaConfig(**LLAMA).save_pretrained(workplace / "llama")
    asked = ("stage=plan", "policy=causal_lm", "policy.path=llama", "reward=length", "plan.gpu_memory=0.01")
    assert command_line(*asked, "trainer.response_length=16") == 0
    said = capsys.readouterr().out
    assert "none; what would need less" in said
    few = "trainer.local_rollout_forward_batch_size=8:"
    for part in ("trainer.gradient_checkpointing=true:", few, "policy.lora.r=8:", "per_device_train_batch_size=1"):
        assert part in said


REFUSED = {
    "stage=plan plan.gpu=h1000": ["plan.gpu is 'h1000'", "Did you mean 'h100'", "rtx4090"],
    "stage=plan plan.launch=zero1": ["plan.launch is 'zero1'", "zero2"],
    "stage=plan plan.gpus=0": ["plan.gpus is 0; it takes a number above 0"],
    "stage=plan plan.mfu=40": ["plan.mfu is 40; it is a share"],
    "stage=plan plan.gpus=2 plan.launch=single": ["plan.launch=single goes with plan.gpus=1"],
    "stage=plan plan.launch=zero3": ["every other launch with more"],
    "stage=plan plan.gpuz=2": ["no setting 'plan.gpuz'", "Known: gpus, gpu, "],
    "stage=plan trainer.learning_rat=1": ["trainer.learning_rat is no field of PPOConfig"],
    "stage=plan policy=causal_lm policy.path=./nowhere reward=length": ["there is no folder ./nowhere"],
    "stage=plan policy.path=x/y/z": ["there is no folder x/y/z"],
    "stage=plan policy=gpt2_scratch reward=length trainer.response_length=300": ["has 256 positions"],
    "stage=plan trainer.num_mini_batches=7": ["does not divide into trainer.num_mini_batches=7"],
    "-m stage=plan plan.gpus=1,8": ["drop -m"],
}


@pytest.mark.parametrize("asked", REFUSED)
def test_what_is_wrong_is_named(
    asked: str, command_line: CommandLine, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(*asked.split()) == 2
    said = capsys.readouterr().err
    for part in REFUSED[asked]:
        assert part in said
    assert "Traceback" not in said
