"""log p of tokens and the entropy of their distributions, without all logits in memory at once."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_pipeline.models.networks import head_logits, matrix_head, project, trunk
from rlhf_pipeline.models.sampling import Batch, Sampling

# Logits in one piece of work: few enough for a CPU core's cache, or enough to keep a GPU busy.
_PIECE, _PIECE_ON_GPU = 2**20, 2**24
# At most this many logits exist at once, in addition to the probabilities that a backward pass needs.
_SCRATCH = 2**24
# Without kept probabilities, the logits of at most this many tokens exist at once.
_AT_ONCE = 256


def response_states(body: nn.Module, batch: Batch) -> Tensor:
    """Return the last hidden states that predict the responses' tokens, row after row: (tokens, hidden)."""
    row, time = batch.places
    # The last column predicts no token.
    states: Tensor = body(input_ids=batch.tokens[:, :-1], use_cache=False).last_hidden_state
    return states[row, batch.prompt_lengths[row] + time - 1]


def token_likelihood(model: Any, states: Tensor, batch: Batch, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return log p of each response token under the sampling distribution, and that distribution's entropy, in nats.

    `states` come from `response_states`. Both results are (batch, longest response), 0 beyond a response's end.
    """
    targets, times, head = batch.chosen, batch.places[1], matrix_head(model)
    if head is None:  # the plain definition; autograd keeps several copies of the logits
        every = sampling.adjust_(head_logits(model, states).clone(), times).log_softmax(-1)
        found = every.gather(-1, targets[:, None])[:, 0], -(every.exp() * every).sum(-1)
    elif torch.is_grad_enabled():
        fused: Any = _TokenLikelihood.apply
        found = fused(states, head.weight, head.bias, targets, times, sampling)
    else:
        found = _likelihood(states, head.weight, head.bias, targets, times, sampling, keep=False)[:2]
    shape = batch.response_mask.shape
    log_probs, entropy = (torch.zeros(shape, dtype=f.dtype, device=f.device).index_put(batch.places, f) for f in found)
    return log_probs, entropy


@torch.no_grad()
def log_probs(model: Any, batch: Batch, sampling: Sampling) -> Tensor:
    """Return log p (batch, longest response), as `token_likelihood` does, from the tokens alone."""
    return token_likelihood(model, response_states(trunk(model), batch), batch, sampling)[0]


class Losses(NamedTuple):
    """How well a language model predicts tokens, as sums over them."""

    loss: Tensor  # -log p of the tokens, in nats; the only field with a gradient
    entropy: Tensor  # of the predicted distributions, in nats
    right: Tensor  # how many had the highest probability
    tokens: Tensor  # how many there were


def next_token_losses(model: Any, states: Tensor, targets: Tensor) -> Losses:
    """Losses of `targets` (tokens,), each predicted from a last hidden state (tokens, hidden)."""
    if (head := matrix_head(model)) is not None:
        return summed_losses(states, head.weight, head.bias, targets)
    every = head_logits(model, states).log_softmax(-1)
    entropy = -(every.detach().exp() * every.detach()).sum()
    right = (every.argmax(-1) == targets).sum()
    return Losses(-every.gather(-1, targets[:, None]).sum(), entropy, right, targets.new_tensor(len(targets)))


def summed_losses(states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Losses:
    """`next_token_losses` for a head that is a matrix, (vocabulary, hidden)."""
    fused: Any = _SumOfLosses.apply
    loss, entropy, right = fused(states, weight, bias, targets)
    return Losses(loss, entropy, right, targets.new_tensor(len(targets)))


class _SumOfLosses(torch.autograd.Function):
    """The sum of -log p over tokens. The forward pass also computes the gradient, one piece of the logits at a time.

    Logits are not rounded to 16 bits. The matrix products of the gradient use autocast's format.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        device = states.device.type
        narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        wants = ctx.needs_input_grad
        factor = weight.to(narrow)
        by_states = torch.empty_like(states) if wants[0] else None
        by_weight = torch.zeros_like(weight) if wants[1] else None
        by_bias = torch.zeros_like(bias) if bias is not None and wants[2] else None
        sums = states.new_zeros(3, dtype=torch.promote_types(states.dtype, torch.float32))
        for start in range(0, len(states), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            logits = project(states[some], weight, bias)
            rows = _rows_of_a_piece(logits)
            for z, target in zip(logits.split(rows), targets[some].split(rows), strict=True):
                p, log_total = _probabilities_(z)
                chosen = z.gather(-1, target[:, None])
                log_p = chosen - log_total
                sums += torch.stack([-log_p.sum(), log_total.sum() - z.mul_(p).sum(), (chosen == 0).sum()])
                z.copy_(p).scatter_(-1, target[:, None], log_p.expm1())  # the gradient with respect to the logits
            slope = logits.to(narrow)
            if by_states is not None:
                by_states[some] = slope @ factor
            if by_weight is not None:
                by_weight += slope.t() @ states[some].to(narrow)
            if by_bias is not None:
                by_bias += logits.sum(0)
        ctx.grads = by_states, by_weight, by_bias
        loss, entropy, right = sums.unbind()
        ctx.mark_non_differentiable(entropy, right)
        return loss, entropy, right

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if found is None else found.mul_(grad) for found in ctx.grads), None)


def _rows_of_a_piece(logits: Tensor) -> int:
    return max((_PIECE_ON_GPU if logits.is_cuda else _PIECE) // logits.shape[1], 1)


def _probabilities_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities (tokens, vocabulary) of logits, and log(sum(exp(logits))), (tokens, 1).

    The logits are first shifted in place, so that the largest is 0. Its probability is then 1 / sum, so no `exp` is
    needed: torch's takes ten times as long for numbers that underflow, such as those of suppressed tokens.
    """
    logits.sub_(logits.amax(-1, keepdim=True))
    p = logits.softmax(-1)
    return p, -p.amax(-1, keepdim=True).log()


def _likelihood(
    states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, times: Tensor, sampling: Sampling, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p and entropy, (tokens,); with `keep` also probabilities (tokens, vocabulary) in autocast's format."""
    device = states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    kept = weight.new_empty(len(states) if keep else 0, len(weight), dtype=dtype)
    in_place = keep and dtype.itemsize >= 4  # else the logits are wider than the kept probabilities
    log_p, entropy = [], []
    at_once = max(_SCRATCH // len(weight), 1)
    for start in range(0, len(states), at_once):
        some = slice(start, start + at_once)
        logits = project(states[some], weight, bias, out=kept[some] if in_place else None)
        rows = _rows_of_a_piece(logits)
        pieces = [logits.split(rows), targets[some].split(rows), times[some].split(rows)]
        for number, (part, target, time) in enumerate(zip(*pieces, strict=True)):
            z = sampling.adjust_(part, time)
            p, log_total = _probabilities_(z)
            log_p.append((z.gather(-1, target[:, None]) - log_total)[:, 0])
            entropy.append(log_total[:, 0] - z.mul_(p).sum(-1))
            if keep:
                kept[start + number * rows :][: len(p)] = p
    return torch.cat(log_p), torch.cat(entropy), kept


class _TokenLikelihood(torch.autograd.Function):
    """`_likelihood` with its gradient: one buffer for logits, then probabilities, then their gradient."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, times: Tensor,
        sampling: Sampling,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        log_p, entropy, p = _likelihood(states, weight, bias, targets, times, sampling, keep=True)
        ctx.save_for_backward(states, weight, targets, log_p, entropy, p)
        ctx.temperature = sampling.temperature
        ctx.set_materialize_grads(False)
        return log_p, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        states, weight, targets, log_p, entropy, p = ctx.saved_tensors
        by_log_p, by_entropy = (None if g is None else g / ctx.temperature for g in grads)
        rows = _rows_of_a_piece(p)
        for start in range(0, len(p), rows):
            part = slice(start, start + rows)
            piece = p[part].to(entropy.dtype)
            # d log p(y) / dz = [y] - p;  d entropy / dz = -p (log p + entropy)
            slope = torch.zeros_like(piece[:, :1]) if by_log_p is None else -by_log_p[part, None]
            if by_entropy is not None:
                log_piece = piece.clamp(min=torch.finfo(piece.dtype).tiny).log()
                slope = slope - by_entropy[part, None] * (log_piece + entropy[part, None])
            p[part] = piece.mul_(slope)
        # The target's gradient comes from log p, because bf16 would lose the difference between 1 and a p near 1.
        at_target = torch.zeros_like(log_p) if by_log_p is None else by_log_p * -log_p.expm1()
        if by_entropy is not None:
            at_target = at_target - by_entropy * log_p.exp() * (log_p + entropy)
        p[torch.arange(len(p), device=p.device), targets] = at_target.to(p.dtype)
        wants = ctx.needs_input_grad
        by_states = (p @ weight.to(p.dtype)).to(states.dtype) if wants[0] else None
        by_weight = (p.t() @ states.to(p.dtype)).to(weight.dtype) if wants[1] else None
        by_bias = p.sum(0).to(weight.dtype) if wants[2] else None
        return by_states, by_weight, by_bias, None, None, None
