"""Sampling draws the same tokens however it is batched, and asks the device for as little as it can."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny import PROMPTS, answers, tiny_policy, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Model, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, masking_utils

from rlhf_pipeline.models import sampling
from rlhf_pipeline.models.sampling import Batch, Sampling, join_batches, sample, uniform_draws
from rlhf_pipeline.ppo.actor_critic import ActorCritic
from rlhf_pipeline.ppo.objective import policy_loss, value_loss

ODD = Sampling(0.7, stop_ids=(0, 3, 40), min_length=4, suppressed_ids=tuple(range(100, 250)))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


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


def llama(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("family", ["GPT-2", "Llama, sdpa", "Llama, eager"])
def test_a_batch_draws_the_same_tokens_as_its_rows_alone(family: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """GPT-2 has a vector for each position, Llama rotates by their distances."""
    policy = tiny_policy(tokenizer) if family == "GPT-2" else llama(family.split()[-1])
    how, limits = Sampling(0.8, (5, 6)), torch.tensor([12] * 16)
    prompts, draws = PROMPTS * 4, uniform_draws(limits, torch.Generator().manual_seed(0))
    rows = [sample(policy, prompts[i : i + 1], limits[i : i + 1], how, draws[:, i : i + 1]) for i in range(16)]
    assert alike(sample(policy, prompts, limits, how, draws), join_batches(rows))


def test_sampled_tokens_obey_the_distribution(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = answers(tiny_policy(tokenizer), PROMPTS * 50, [9] * 200, ODD)
    said = batch.responses[batch.response_mask]
    assert not torch.isin(said, torch.tensor(ODD.suppressed_ids)).any()
    stops = torch.isin(batch.responses, torch.tensor(ODD.stop_ids)) & batch.response_mask
    assert not stops[:, : ODD.min_length].any()
    last = torch.arange(batch.responses.shape[1]) == (batch.response_lengths - 1)[:, None]
    assert (stops <= last).all(), "a response goes on after its stop"
    assert ((batch.response_lengths == 9) | stops.any(1)).all(), "a response ends before limit and stop"


def test_frequencies_of_drawn_tokens_are_the_models_probabilities(tokenizer: PreTrainedTokenizerBase) -> None:
    policy = tiny_policy(tokenizer)
    batch = answers(policy, [PROMPTS[0]] * 4000, [1] * 4000, Sampling(1.0))
    counts = torch.bincount(batch.responses[:, 0], minlength=len(tokenizer)) / 4000
    with torch.no_grad():
        expected = policy(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    assert (counts - expected).abs().max() < 0.015
    assert expected.max() > 0.03


def test_looking_less_often_draws_the_same_tokens(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, limits = tiny_policy(tokenizer), [17, 3, 9, 1] * 6
    often = answers(policy, PROMPTS * 6, limits, ODD)
    monkeypatch.setattr(sampling, "steps_between_checks", lambda device, tell: 8)
    assert alike(often, answers(policy, PROMPTS * 6, limits, ODD))


def test_what_is_told_is_what_is_drawn(tokenizer: PreTrainedTokenizerBase) -> None:
    policy, limits, told = tiny_policy(tokenizer), torch.tensor([7]), list[int]()
    draws = uniform_draws(limits, torch.Generator().manual_seed(0))
    batch = sample(policy, PROMPTS[:1], limits, Sampling(), draws, lambda tokens: told.extend(tokens.tolist()))
    assert told == batch.responses[0].tolist()


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
    seen = actor(batch, ODD)
    nothing = torch.zeros_like(seen.log_probs)
    count = torch.tensor(17)  # on the CPU, as the trainer has it: a single number may be
    loss = policy_loss(
        seen.log_probs, nothing, nothing, batch.response_mask, 0.2, count, batch.response_mask / count
    ).loss
    (loss + value_loss(seen.values, nothing, nothing, batch.response_mask, 0.2, count).loss).backward()
    assert all(p.grad is not None for p in actor.parameters())
