"""What the plan computes, against models that are really built and against sums by hand."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import CommandLine, Refused
from peft import LoraConfig
from tiny import tiny_tokenizer, trainer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config
from transformers.cache_utils import DynamicCache

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.networks import cache_argument, trunk
from rlhf_pipeline.models.precision import fuse_gelu
from rlhf_pipeline.plan import (
    DEVICES,
    GIB,
    Device,
    Job,
    Networks,
    Work,
    count,
    flops,
    launches,
    moments,
    needs,
    seconds,
)
from rlhf_pipeline.settings import Plan

TINY = GPT2Config(vocab_size=300, n_positions=64, n_layer=2, n_embd=32, n_head=2, bos_token_id=0, eos_token_id=0)
LLAMA: dict[str, Any] = {
    "vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
ADAPTER: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}


def size(model: torch.nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def stored(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("adapter", [None, ADAPTER])
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_networks_are_those_of_the_trainer(critic: str, adapter: Any, bf16: bool, tmp_path: Path) -> None:
    given = {"peft_config": LoraConfig(**adapter)} if adapter else {}
    ppo = trainer(tiny_tokenizer(), tmp_path, critic=critic, given=given, bf16=bf16)
    found = count(ppo.model.config, 8, bf16, LoraConfig(**adapter) if adapter else None, critic == "separate")
    own = ppo.model.value_model if critic == "separate" else ppo.model.value_head
    job = Job(found, 0, replace(WORK, bf16=bf16))
    assert found.policy == size(ppo.model.policy)
    assert found.trained == size(ppo.model, trained=True)
    assert found.critic == size(own) - (found.width if adapter and critic == "separate" else 0)  # peft keeps two heads
    assert moments("single", 1, job)["rollout"]["weights"] == pytest.approx(stored(ppo.model), rel=0.02)
    held = stored(ppo.reference.model) if ppo.reference.model else 0
    assert job.reference_bytes == pytest.approx(held, rel=0.02)  # biases are not counted


@pytest.mark.parametrize(
    "model",
    [GPT2LMHeadModel(TINY), *(LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=t)) for t in (False, True))],
)
def test_of_any_family_the_counts_are_those_of_a_model_with_weights(model: PreTrainedModel) -> None:
    found = count(model.config, 10, False)
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert found.policy == found.trained - found.critic == size(model)
    assert found.head == head.numel()
    tables = (embeddings, getattr(getattr(trunk(model), "wpe", None), "weight", None))
    rest = [p for p in trunk(model).parameters() if p.dim() == 2 and not any(p is table for table in tables)]
    assert found.matrices == sum(p.numel() for p in rest)
    fuse_gelu(model.eval())
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Any] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        trunk(model)(input_ids=torch.zeros(1, 10, dtype=torch.long), use_cache=False)
    real = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    assert found.kept == pytest.approx(real, rel=0.15)
    cache = DynamicCache(config=model.config)
    model(torch.zeros(1, 10, dtype=torch.long), **{cache_argument(trunk(model)): cache})
    assert found.cache * 10 == sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)


def test_the_parameters_of_llama_2_are_those_of_its_table() -> None:
    found = count(LlamaConfig(num_hidden_layers=2), 16, True)
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    assert found.matrices == 2 * layer
    assert found.policy + 30 * (layer + 2 * 4096) == 6_738_415_616  # with all 32 layers
    with pytest.raises(UserError, match="T5Config is not the configuration of a causal language model"):
        count(T5Config(), 8, False)


# By hand: 2 layers of width 4, a vocabulary of 10, tied.
NET = Networks(
    policy=500, critic=5, trunks=1, adapter=False, trained=505, stored=2020, layers=2, width=4, vocabulary=10, head=40,
    matrices=400, cache=16, kept=1000,
)  # fmt: skip
WORK = Work(
    rows=8, micro=4, minibatches=1, epochs=2, at_once=8, prompt=3, response=5, length=8, bf16=False, checkpointing=False
)
JOB = Job(NET, 7, WORK)


def test_bytes_by_part() -> None:
    def parts(moment: str, launch: str = "single", processes: int = 1, **work: Any) -> dict[str, float]:
        found = moments(launch, processes, JOB._replace(work=replace(WORK, **work)))[moment]
        return {part: size for part, size in found.items() if size}

    always = {"weights": 4 * 505, "reference": 2000, "reward": 28, "Adam": 8 * 505}
    assert parts("rollout") == {**always, "KV cache": 64 * 8 * 8 * 1.5, "logits": 8 * 10 * 12}
    # Two micro-batches: the second comes on top of the first one's gradients, and of the head's both ends are held.
    assert parts("update: begin") == {
        **always, "gradients": 4 * 505 + 160, "activations": 4 * 1000 + 4 * 5 * 4 * 4, "logits": 4 * 5 * 10 * 4,
    }  # fmt: skip
    assert parts("update: end") == {**always, "gradients": 4 * 505 + 320}
    assert parts("update: begin", micro=8)["gradients"] == 160
    checkpointed = parts("update: begin", checkpointing=True)
    assert checkpointed["activations"] == 4 * 8 * 2 * 4 * 4 + 4 * 1000 / 2 + 320  # the layers' inputs, and one layer
    bf16 = parts("update: begin", bf16=True)
    assert [bf16[part] for part in ("reference", "bf16 copies", "logits")] == [1200, 2 * 400 + 4 * 40, 4 * 5 * 10 * 2]
    assert parts("rollout", bf16=True)["KV cache"] == 32 * 8 * 8 * 1.5

    plain, ddp, two, three = (parts("update: end", name, 4) for name in ("single", "ddp", "zero2", "zero3"))
    assert ddp == {**plain, "buckets": 4 * 505}
    share = {"Adam": 2 * 505, "gradients": 505 + 320, "buckets": 4 * 50_000_000}
    assert two == {**plain, **share, "master": 505}
    assert three == {**plain, **share, "weights": 505, "gathered": 4 * 505}  # less than DeepSpeed has in hand
    sampling = parts("rollout", "zero3", 4)
    assert sampling["weights"] + sampling["gathered"] == plain["weights"]


def test_flops_and_seconds_by_hand() -> None:
    found = flops(JOB)
    body, head = (2 * 400 + 4 * 8 * 8) * 64, 2 * 40 * 40
    assert found == {
        "rollout": body + head, "scores": 2 * (body + head) + 2 * 7 * 64, "update": 2 * 3 * (body + head),
    }  # fmt: skip
    assert flops(JOB._replace(work=replace(WORK, checkpointing=True)))["update"] == 2 * 4 * (body + head)
    adapted = JOB._replace(net=replace(NET, adapter=True))
    assert flops(adapted)["update"] == 2 * 2 * (body + head)  # a frozen matrix has no gradient of its own

    device = Device(memory=1, bf16=1e6, fp32=1e6, bandwidth=1e3, link=1e4)  # so slow that nothing waits for Python
    taken = seconds("ddp", 4, JOB, device, mfu=0.5)
    assert taken["update"] == found["update"] / 0.5e6
    moved = 4 * 440 + 3 * 64 * 8 * (3 + 2.5)
    assert taken["rollout"] == pytest.approx((2 * 400 + 4 * 8 * 8) * 24 / 0.5e6 + 5 * moved / 1e3)
    once = 4 * 505 * 3 / 4 / 1e4  # two epochs of two micro-batches: each reduced, each step's weights gathered
    for launch, times in {"single": 0, "ddp": 2 * 2, "zero2": 4 + 2, "zero3": 4 + 1 + 2 * 4}.items():
        between = seconds(launch, 4 if times else 1, JOB, device, mfu=0.5)["between processes"]
        assert between == pytest.approx(once * times), launch


def test_the_simplest_launch_that_fits() -> None:
    big = JOB._replace(net=replace(NET, policy=10**9, trained=10**9, stored=4 * 10**9))
    room = {name: needs(name, 8, big, DEVICES["h100"], 0.4)["bytes"] for name in ("ddp", "zero2", "zero3")}
    assert room["ddp"] > room["zero2"] > room["zero3"]
    for launch, need in room.items():
        device = DEVICES["h100"]._replace(memory=need / 0.92 + GIB / 100)
        assert next(found["launch"] for found in launches(8, big, device, 0.4) if found["fits"]) == launch


@pytest.fixture
def planned(command_line: CommandLine, workplace: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What stage=plan prints, in an empty folder."""

    def call(*asked: str) -> str:
        assert command_line("stage=plan", *asked) == 0
        return capsys.readouterr().out

    return call


def test_the_command_prints_a_plan_and_leaves_nothing(planned: Callable[..., str]) -> None:
    asked = ("policy=gpt2_scratch", "policy.size=small", "reward=length", "plan.gpus=8")
    said = planned(*asked)
    for part in ("computed   not measured", "124,439,808", "value head of 769", "ddp is the simplest"):
        assert part in said
    found = json.loads(planned(*asked, "plan.json=true", "trainer.critic=separate", "trainer.max_steps=50"))
    assert found["parameters"]["critic"] == 124_439_808 + 768
    assert [(row["launch"], row["updates"]) for row in found["launches"]] == [("ddp", 50), ("zero2", 50), ("zero3", 50)]
    assert not os.listdir()


def test_what_does_not_fit_is_told(planned: Callable[..., str]) -> None:
    LlamaConfig(**LLAMA).save_pretrained("llama")
    asked = ("policy=causal_lm", "policy.path=llama", "reward=length", "plan.gpu_memory=0.01")
    found = json.loads(planned(*asked, "trainer.response_length=16", "plan.json=true"))
    assert (found["chosen"], found["launches"][0]["fits"]) == (None, False)
    assert "none; try trainer.gradient_checkpointing=true" in planned(*asked, "trainer.response_length=16")


# What the README's table says of memory (GiB), FLOPs (T) and seconds, which may be 15 % off.
README = {
    "small 1": (4.4, 54, 1.1), "small 8": (4.9, 54, 1.1), "small 64": (4.9, 54, 1.4),
    "xl 1": (35.4, 764, 5.6), "xl 8": (41.2, 764, 5.9), "xl 64": (41.2, 764, 9.5),
}  # fmt: skip


@pytest.mark.parametrize("row", README)
def test_the_table_of_the_readme(row: str, planned: Callable[..., str]) -> None:
    policy, gpus = row.split()
    plan = json.loads(planned(
        "experiment=null", "policy=gpt2_scratch", f"policy.size={policy}", "reward=length", f"plan.gpus={gpus}",
        "plan.prompt_tokens=128", "plan.json=true", "trainer.response_length=128",
        "trainer.per_device_train_batch_size=16", "trainer.gradient_accumulation_steps=4",
        "trainer.num_mini_batches=4", "trainer.num_ppo_epochs=4",
    ))  # fmt: skip
    found = next(found for found in plan["launches"] if found["launch"] == plan["chosen"])
    figures = (found["bytes"] / GIB, found["update_flops"] / 1e12, found["update_seconds"])
    assert figures == pytest.approx(README[row], rel=0.15)


REFUSED = {
    "stage=plan plan.gpu=h1000": ["plan.gpu is 'h1000'", "'rtx4090'"],
    "stage=plan plan.launch=zero1": ["plan.launch is 'zero1'", "'zero2'"],
    "stage=plan plan.gpus=0": ["plan.gpus is 0; it takes a whole number of at least 1"],
    "stage=plan plan.mfu=40": ["plan.mfu is 40; it takes a number above 0, at most 1"],
    "stage=plan plan.gpus=2 plan.launch=single": ["plan.launch=single goes with plan.gpus=1"],
    "stage=plan plan.launch=zero3": ["every other launch with more"],
    "stage=plan plan.gpuz=2": ["no setting 'plan.gpuz'", "Known: gpus, gpu, "],
    "stage=plan trainer.learning_rat=1": ["trainer.learning_rat is not a field of PPOConfig"],
    "stage=plan policy=causal_lm policy.path=./nowhere reward=length": ["there is no folder ./nowhere"],
    "stage=plan policy.path=x/y/z": ["there is no folder x/y/z"],
    "stage=plan policy=gpt2_scratch reward=length trainer.response_length=300": ["has 256 positions"],
    "stage=plan trainer.num_mini_batches=7": ["does not divide into trainer.num_mini_batches=7"],
    "-m stage=plan plan.gpus=1,8": ["drop -m"],
}


@pytest.mark.parametrize("asked", REFUSED)
def test_what_is_wrong_is_named(asked: str, refused: Refused) -> None:
    error = refused(asked)
    assert all(part in error for part in REFUSED[asked]), error
    assert "Traceback" not in error


def test_every_device_can_be_asked_for() -> None:
    assert get_args(Plan.__annotations__["gpu"]) == (*DEVICES,)
