"""What must hold while PPO runs, and a plain account of what is off where it does not."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.likelihood import log_probs, response_states, token_likelihood
from rlhf_pipeline.models.networks import head_output, language_model, trunk
from rlhf_pipeline.models.precision import autocast
from rlhf_pipeline.models.sampling import Sampling, make_batch
from rlhf_pipeline.ppo.actor_critic import ActorCritic
from rlhf_pipeline.ppo.rollout import Rollout

Whole = Callable[[], AbstractContextManager[None]]  # puts weights together that are in shards

# How far log-probabilities of one network may lie apart, root mean square, when a batch is cut otherwise: rounding, and
# no more. A trunk in bf16 under a head in fp32 was seen at 0.0002 (the demo's policy).
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3}
_ROUNDING_BF16 = 0.05


def check_head(actor: ActorCritic) -> None:
    """Refuse a family whose log-probabilities we would not compute as its own forward pass has them."""
    policy = language_model(actor.policy)
    device = next(actor.parameters()).device
    count = min(8, policy.get_input_embeddings().num_embeddings)
    ids = list(range(count))
    batch, plain = make_batch([ids[:1]], [ids[1:]]).to(device), Sampling()
    training = policy.training
    policy.eval()
    # The model's own forward pass, but for the head's precision: there it would round logits to bf16.
    hook = policy.get_output_embeddings().register_forward_hook(
        lambda head, given, _: head_output(head, given[0].flatten(0, 1))[None]
    )
    with torch.no_grad(), autocast(actor.bf16, device):
        mine, _ = token_likelihood(policy, response_states(trunk(policy), batch), batch, plain)
        logits = policy(input_ids=batch.tokens, use_cache=False).logits[0, :-1].to(mine.dtype)
    hook.remove()
    policy.train(training)
    theirs = logits.log_softmax(-1).gather(-1, batch.tokens[0, 1:, None])[:, 0]
    if not (apart := float((mine[0] - theirs).abs().max())) <= _rounding(actor, mine):  # not a number is not either
        raise UserError(
            f"{type(policy).__name__} does something to its logits that this trainer does not know: its "
            f"log-probabilities differ by {apart:.3g} from those of trunk and head. Use another policy."
        )


def check_adapter(actor: ActorCritic) -> None:
    """Refuse a fresh adapter that changes what the policy says: with it off, the reference would be another model."""
    policy = actor.policy
    ids = list(range(min(8, language_model(policy).get_input_embeddings().num_embeddings)))
    batch, plain = make_batch([ids[:1]], [ids[1:]]).to(next(actor.parameters()).device), Sampling()
    training = policy.training
    policy.eval()
    start = log_probs(policy, batch, plain)
    with policy.disable_adapter():
        apart = _rms(log_probs(policy, batch, plain) - start)
    policy.train(training)
    if not apart <= _rounding(actor, start):
        raise UserError(
            f"policy.lora: the fresh adapter changes log-probabilities by {apart:.3g} (root mean square), so with the "
            "adapter off the reference is not the policy that PPO starts from. Initialisations that move the base "
            "(pissa, olora, loftq, corda) do this; leave init_lora_weights at its default."
        )


def check_reference(rollout: Rollout, actor: ActorCritic, sampling: Sampling, whole: Whole = nullcontext) -> None:
    """Policy and reference are one network before the first step, so their KL is 0; say what is off if it is not."""
    apart = _rms((rollout.log_probs - rollout.ref_log_probs)[rollout.batch.response_mask])
    if not apart <= _rounding(actor, rollout.log_probs):
        with whole():
            why = diagnose(actor, rollout, sampling)
        raise UserError(
            f"policy and reference have the same weights, yet their log-probabilities differ by {apart:.3g} (root mean "
            f"square) before the first step: {why}."
        )


def check_drawable(rollout: Rollout, sampling: Sampling) -> None:
    """Refuse a response that the sampling distribution never draws: its ratio would mean nothing."""
    never = rollout.log_probs < torch.finfo(rollout.log_probs.dtype).min / 8
    if bool(never.any()):
        row = int(never.any(1).nonzero()[0])
        token = int(rollout.batch.responses[row][never[row].nonzero()[0, 0]])
        raise UserError(
            f"response {row} holds the token {token}, which the trainer's sampling distribution never draws there "
            f"(it suppresses {len(sampling.suppressed_ids)} tokens, and ends before token {sampling.min_length + 1}); "
            "sample with the trainer's generate(), or set the same suppress_tokens and min_new_tokens."
        )


def check_first_ratio(
    ratio: float, approx_kl: float, actor: ActorCritic, rollout: Rollout, sampling: Sampling, whole: Whole = nullcontext
) -> None:
    """No step has been taken since the rollout, so new / old probability is 1; say what is off if it is not."""
    allowed = _rounding(actor, rollout.log_probs)
    if not abs(ratio - 1) <= allowed or not 2 * approx_kl <= allowed**2:
        with whole():
            why = diagnose(actor, rollout, sampling)
        raise UserError(
            f"the ratio of new to old probabilities is {ratio:.6g} before any step, and should be 1: {why}."
        )


def check_health(
    means: dict[str, float], threshold: float, update: int, last_checkpoint: Callable[[], str | None]
) -> None:
    """Stop at numbers that are none, or at a ratio that has run away; the last checkpoint is from before."""
    odd = [name for name, value in means.items() if not math.isfinite(value)]
    ratio = means.get("val/ratio_max", 1.0)
    if not odd and ratio <= threshold:
        return
    what = f"{', '.join(odd)} stopped being a number" if odd else f"the mean ratio of a step reached {ratio:.3g}"
    checkpoint = last_checkpoint()
    kept = f"The last good checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint yet."
    raise UserError(
        f"PPO diverged in update {update + 1}: {what}. {kept} Lower trainer.learning_rate or trainer.num_ppo_epochs, "
        "raise trainer.kl_coef, or limit the reward (trainer.score_clip)."
    )


@torch.no_grad()
def diagnose(actor: ActorCritic, rollout: Rollout, sampling: Sampling) -> str:
    """The likeliest reason why a policy disagrees with itself, found by asking it again in several ways."""
    rows = rollout.batch.rows(torch.arange(min(4, len(rollout.scores)), device=rollout.scores.device))
    limit = _rounding(actor, rollout.log_probs)

    def ask(training: bool) -> Tensor:
        was = actor.training
        actor.train(training)
        found = actor(rows, sampling, values=False).log_probs
        actor.train(was)
        return found

    calm, again, training = ask(False), ask(False), ask(True)
    if _rms(calm - again) > limit:
        return "the policy gives other numbers each time it is asked, so something in it draws at random in eval mode"
    if _rms(calm - training) > limit:
        active = [n for n, m in actor.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]
        which = f" ({', '.join(active[:3])})" if active else ""
        return f"the policy gives other numbers in training mode than in eval mode; dropout or the like is on{which}"
    alone = actor(rollout.batch.rows(torch.tensor([0], device=rollout.scores.device)), sampling, values=False).log_probs
    width = alone.shape[1]
    if _rms(alone[0] - calm[0, :width]) > limit:
        return "a row's numbers depend on the other rows of its batch; the model needs causal attention without padding"
    return "the weights changed between rollout and update, or the reference is in another precision"


def _rms(differences: Tensor) -> float:
    return float(differences.square().mean().sqrt())


def _rounding(actor: ActorCritic, like: Tensor) -> float:
    in_16_bits = actor.bf16 or next(trunk(actor.policy).parameters()).dtype in (torch.bfloat16, torch.float16)
    return _ROUNDING_BF16 if in_16_bits else _ROUNDING.get(like.dtype, 1e-3)
