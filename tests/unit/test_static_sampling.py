"""A cache of fixed size draws what a growing one draws, in steps that could be recorded."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PROMPTS, answers, tiny_policy, tiny_tokenizer, trainer, weights
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerBase,
    masking_utils,
)

from rlhf_pipeline import sampling as dynamic
from rlhf_pipeline import static_sampling
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.ppo.actor_critic import ActorCritic
from rlhf_pipeline.ppo.objective import policy_loss, value_loss
from rlhf_pipeline.sampling import Batch, Sampling, sample, uniform_draws
from rlhf_pipeline.static_sampling import StaticSampler, make_sampler

ODD = Sampling(0.7, stop_ids=(0, 3, 40), min_length=4, suppressed_ids=tuple(range(100, 250)))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


def both(
    sampler: Any, policy: Any, prompts: list[list[int]], limits: list[int], how: Sampling, seed: int = 0
) -> tuple[Batch, Batch]:
    """The answers of `sample` and of another sampler."""
    wanted = torch.tensor(limits)
    draws = uniform_draws(wanted, torch.Generator().manual_seed(seed))
    return sample(policy, prompts, wanted, how, draws), sampler(policy, prompts, wanted, how, draws)


def alike(one: Batch, other: Batch) -> bool:
    pairs = ((getattr(b, name) for b in (one, other)) for name in Batch.__dataclass_fields__)
    return all(torch.equal(a, b) for a, b in pairs)


class Asked(TorchDispatchMode):
    """Notes what makes a GPU finish all it was given: a number or a shape that depends on its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_a_fixed_cache_draws_the_same_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """One sampler for all: what a batch leaves behind is not seen by the next, whatever their sizes."""
    policy, sampler = tiny_policy(tokenizer), StaticSampler()
    for seed, (prompts, limits, how) in enumerate([
        (PROMPTS * 6, [9] * 24, Sampling()), (PROMPTS, [8, 3, 5, 1], Sampling()), (PROMPTS * 3, [12] * 12, ODD),
        (PROMPTS[:1], [1], ODD), (PROMPTS[2:3] * 8, [30] * 8, ODD), (PROMPTS * 6, [2] * 24, ODD),
    ]):  # fmt: skip
        assert alike(*both(sampler, policy, prompts, limits, how, seed)), (seed, how)
    one, _ = both(sampler, policy, PROMPTS * 6, [20] * 24, ODD)
    assert (one.response_lengths < 20).any(), "nothing stopped, so stopping was not tried"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_another_family_and_attention(attention: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5, attn_implementation=attention,
    )  # fmt: skip
    policy = LlamaForCausalLM(config).eval()
    assert alike(*both(make_sampler("static", policy), policy, PROMPTS * 4, [12] * 16, Sampling(0.8, (5, 6))))


def test_looking_less_often_draws_the_same_tokens(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, limits = tiny_policy(tokenizer), [17, 3, 9, 1] * 6
    often = answers(policy, PROMPTS * 6, limits, ODD)
    for module in (dynamic, static_sampling):
        monkeypatch.setattr(module, "tokens_between_looks", lambda device, tell: 8)
    seldom, fixed = both(StaticSampler(), policy, PROMPTS * 6, limits, ODD)
    assert alike(often, seldom)
    assert alike(often, fixed)


def test_what_is_told_is_what_is_drawn(tokenizer: PreTrainedTokenizerBase) -> None:
    policy, limits = tiny_policy(tokenizer), torch.tensor([7])
    draws = uniform_draws(limits, torch.Generator().manual_seed(0))
    told: list[list[list[int]]] = [[], []]
    for heard, sampler in zip(told, (sample, StaticSampler()), strict=True):
        sampler(policy, PROMPTS[:1], limits, Sampling(), draws, lambda ids, heard=heard: heard.append(ids[0].tolist()))
    assert told[0] == told[1]
    assert [len(ids) for ids in told[0]] == [1, 2, 3, 4, 5, 6, 7]


def test_a_step_could_be_recorded(tokenizer: PreTrainedTokenizerBase) -> None:
    """It asks for no number, and all it goes on from stays in its place from step to step and call to call."""
    policy, sampler = tiny_policy(tokenizer), StaticSampler(graph=False)
    both(sampler, policy, PROMPTS, [20] * 4, ODD)
    step: Any = sampler.step

    def places() -> list[int]:
        state = [*vars(step).values(), *step.ids, *step.weights.values()]
        layers = [tensor for layer in step.cache.layers for tensor in vars(layer).values()]
        return [tensor.data_ptr() for tensor in [*state, *layers] if isinstance(tensor, torch.Tensor)]

    before = places()
    assert len(before) > 15
    step.begin(PROMPTS, torch.tensor([20] * 4), torch.rand(20, 4))
    with torch.no_grad(), Asked() as asked:
        step.go()
        step.go()
    assert asked.found == []
    both(sampler, policy, PROMPTS[:3], [25] * 3, ODD)
    assert sampler.step is step
    assert places() == before
    both(sampler, policy, PROMPTS, [20] * 4, Sampling())
    assert sampler.step is not step, "a step of another distribution was taken"


def test_a_recording_has_room_to_be_rehearsed(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step too many would write beyond the cache, which a GPU answers with a broken process."""
    recorded = []

    def record(step: Any) -> None:
        for _ in range(static_sampling._REHEARSALS + 1):
            step._go()
        recorded.append(step)

    monkeypatch.setattr(static_sampling._Step, "record", record)
    policy = tiny_policy(tokenizer)
    for width in range(58, 64):  # up to all the positions that the policy has
        prompt = [[5 + place % 40 for place in range(width)]]
        assert alike(*both(StaticSampler(graph=True), policy, prompt, [1], Sampling()))
    assert [step.columns for step in recorded] == [64] * 3 + [128] * 3


def test_a_copy_in_16_bits_follows_the_weights(tokenizer: PreTrainedTokenizerBase) -> None:
    policy, sampler = tiny_policy(tokenizer), StaticSampler()
    limits, draws = torch.tensor([10] * 16), torch.rand(10, 16, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        first = sampler(policy, PROMPTS * 4, limits, Sampling(), draws)
        step: Any = sampler.step
        assert {tensor.dtype for tensor in step.weights.values()} == {torch.bfloat16}
        assert "h.0.attn.c_attn.weight" in step.weights
        assert "wte.weight" not in step.weights, "the embeddings are not multiplied, and the head stays in fp32"
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        second = sampler(policy, PROMPTS * 4, limits, Sampling(), draws)
        assert sampler.step is step
        assert not alike(first, second)
        assert alike(second, StaticSampler()(policy, PROMPTS * 4, limits, Sampling(), draws))


def test_what_a_fixed_cache_cannot_do_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"cache_implementation=static .* MistralForCausalLM .*=dynamic"):
        make_sampler("static", MistralForCausalLM(config))
    with pytest.raises(UserError, match="cache_implementation is 'paged'; it takes dynamic or static"):
        trainer(tokenizer, tmp_path, cache_implementation="paged")


def test_ppo_is_the_same_with_either_cache(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    trained = []
    for kind in ("dynamic", "static"):
        ppo = trainer(
            tokenizer, tmp_path / kind, cache_implementation=kind, min_response_length=3,
            local_rollout_forward_batch_size=3,
        )  # fmt: skip
        ppo.train()
        trained.append(weights(ppo))
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-5)


def test_a_micro_batch_asks_the_device_for_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    """What depends on the lengths was worked out where the batch came from. transformers' trunk looks for padding."""
    policy = tiny_policy(tokenizer)
    batch = answers(policy, PROMPTS, [8, 3, 5, 1], ODD).to("cpu")
    actor = ActorCritic(policy)
    with Asked() as of_transformers:
        policy.transformer(input_ids=batch.tokens[:, :-1], use_cache=False)
    with Asked() as asked:
        seen = actor(batch, ODD)
        (seen.log_probs.sum() + seen.values.sum()).backward()
    assert asked.found == of_transformers.found
    with Asked() as anew:
        actor(Batch(batch.tokens, batch.prompt_lengths, batch.response_lengths), ODD)
    assert len(anew.found) > len(asked.found), "a batch that is not carried over asks, so the test would see it"


def test_nothing_is_mixed_over_two_devices(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """On torch's device without memory, which takes no operand from the CPU, as a GPU, and can be asked for nothing."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which it has not
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: None)
    monkeypatch.setattr(GPT2Model, "warn_if_padding_and_no_attention_mask", lambda *_: None)
    policy = tiny_policy(tokenizer)
    batch = answers(policy, PROMPTS, [8, 3, 5, 1], ODD).to("meta")
    actor = ActorCritic(policy).to("meta")
    with torch.no_grad():
        step = static_sampling._Step(actor.policy, ODD, 5, 64)
        step.begin(PROMPTS, torch.tensor([8, 3, 5, 1]), torch.rand(8, 4))
        step.go()
    assert step.drawn.device.type == "meta"
    seen = actor(batch, ODD)
    nothing = torch.zeros_like(seen.log_probs)
    count = torch.tensor(17)  # on the CPU, as the trainer has it: a single number may be
    loss = policy_loss(seen.log_probs, nothing, nothing, batch.response_mask, 0.2, count).loss
    (loss + value_loss(seen.values, nothing, nothing, batch.response_mask, 0.2, count).loss).backward()
    assert all(p.grad is not None for p in actor.parameters())
