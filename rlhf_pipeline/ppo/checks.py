"""Checks during a PPO run. Each error says what is wrong and what to do."""

import math
from pathlib import Path

import torch
from torch import Tensor

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.likelihood import response_states, token_likelihood
from rlhf_pipeline.models.networks import head_output, language_model, trunk
from rlhf_pipeline.models.precision import autocast
from rlhf_pipeline.models.sampling import Sampling, make_batch
from rlhf_pipeline.ppo.actor_critic import ActorCritic
from rlhf_pipeline.ppo.rollout import Rollout
from rlhf_pipeline.runs.checkpoints import newest_whole


def tolerance(actor: ActorCritic, like: Tensor) -> float:
    """Return the largest difference (root mean square) of log-probabilities that counts as rounding error.

    Rounding depends on how a batch is split. With a bf16 trunk and an fp32 head, the demo's policy differed by 0.0002.
    """
    if actor.bf16 or next(trunk(actor.policy).parameters()).dtype in (torch.bfloat16, torch.float16):
        return 0.05
    return 1e-9 if like.dtype == torch.float64 else 1e-3


def rms(differences: Tensor) -> float:
    return float(differences.square().mean().sqrt())


@torch.no_grad()
def check_head(actor: ActorCritic) -> None:
    """Refuse a model if its own forward pass and our use of trunk and head give different log-probabilities."""
    policy, device = language_model(actor.policy).eval(), next(actor.parameters()).device
    ids = list(range(min(8, policy.get_input_embeddings().num_embeddings)))
    batch = make_batch([ids[:1]], [ids[1:]]).to(device)
    # The hook sets the precision of the head: without it, the model would round its logits to bf16.
    hook = policy.get_output_embeddings().register_forward_hook(
        lambda head, given, _: head_output(head, given[0].flatten(0, 1))[None]
    )
    with autocast(actor.bf16, device):
        mine, _ = token_likelihood(policy, response_states(trunk(policy), batch), batch, Sampling())
        logits = policy(input_ids=batch.tokens, use_cache=False).logits[0, :-1].to(mine.dtype)
    hook.remove()
    theirs = logits.log_softmax(-1).gather(-1, batch.tokens[0, 1:, None])[:, 0]
    if not (apart := float((mine[0] - theirs).abs().max())) <= tolerance(actor, mine):  # NaN is refused, too
        raise UserError(
            f"{type(policy).__name__} changes its logits in a way that PPO does not support: its "
            f"log-probabilities differ by {apart:.3g} from those of trunk and head. Use another policy."
        )


@torch.no_grad()
def diagnose(actor: ActorCritic, rollout: Rollout, sampling: Sampling) -> str:
    """Return the likeliest reason why a policy's log-probabilities changed, found by computing them again."""
    limit, device = tolerance(actor, rollout.log_probs), rollout.scores.device

    def ask(rows: int, training: bool = False) -> Tensor:
        actor.train(training)
        found: Tensor = actor(rollout.batch.rows(torch.arange(rows, device=device)), sampling, values=False).log_probs
        return found

    few = min(4, len(rollout.scores))
    first = ask(few)
    if rms(first - ask(few)) > limit:
        return "the policy's log-probabilities change with each call, so something in it draws at random in eval mode"
    if rms(first - ask(few, training=True)) > limit:
        return "the policy's log-probabilities are different in training mode than in eval mode; is dropout on?"
    alone = ask(1)[0]
    if rms(first[0, : len(alone)] - alone) > limit:
        return "a row's results depend on the other rows of its batch; use a policy whose attention is causal"
    return (
        "the weights changed between rollout and update, or the reference has another precision, or the adapter "
        "changed the base weights, which are the reference (leave init_lora_weights at its default)"
    )


def check_drawable(rollout: Rollout, sampling: Sampling) -> None:
    """Refuse a response that the sampling distribution cannot draw, because its ratio would be undefined."""
    never = rollout.log_probs < torch.finfo(rollout.log_probs.dtype).min / 8
    if bool(never.any()):
        row, time = never.nonzero()[0].tolist()
        raise UserError(
            f"response {row} holds the token {int(rollout.batch.responses[row, time])}, which the trainer's sampling "
            f"distribution never draws there (it suppresses {len(sampling.suppressed_ids)} tokens, and ends no "
            f"response before token {sampling.min_length + 1}); sample with the trainer's generate(), or set the same "
            "suppress_tokens and min_new_tokens."
        )


def check_health(means: dict[str, float], threshold: float, update: int, checkpoints: Path) -> None:
    """Raise UserError if a figure is not finite or the ratio exceeds `threshold`; names the last checkpoint."""
    odd = [name for name, value in means.items() if not math.isfinite(value)]
    ratio = means["val/ratio_max"]
    if not odd and ratio <= threshold:
        return
    what = f"{', '.join(odd)} became NaN or infinite" if odd else f"the mean ratio of a step reached {ratio:.3g}"
    newest = newest_whole(checkpoints)
    kept = f"The last good checkpoint is {newest}." if newest else "There is no checkpoint yet."
    raise UserError(
        f"PPO diverged in update {update + 1}: {what}. {kept} Lower trainer.learning_rate or trainer.num_ppo_epochs, "
        "raise trainer.kl_coef, or limit the reward (trainer.score_clip)."
    )
