"""Sampling with a key-value cache of fixed size: the same tokens as `sample`, in steps that a GPU can play back.

For one token a GPT-2 takes some 300 small operations, and to hand them to a GPU takes longer than to carry them out.
With all memory in place beforehand, one step is recorded as a CUDA graph and played back as a whole for every token.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.cache_utils import StaticCache, StaticLayer
from transformers.pytorch_utils import Conv1D

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.networks import cache_argument, head_logits, language_model, trunk
from rlhf_pipeline.sampling import Batch, Sampling, draw, ids_on, make_batch, sample, tokens_between_looks

Sampler = Callable[..., Batch]

_COLUMNS = 64  # of the cache are taken at a time, so that a prompt a little longer than the last finds room
_REHEARSALS = 2  # steps before one is recorded: what is set up at a first use must not be part of the recording


def make_sampler(cache_implementation: str, model: PreTrainedModel) -> Sampler:
    """`sample` for a `dynamic` cache, or its like for a `static` one."""
    if cache_implementation == "dynamic":
        return sample
    inner = language_model(model)
    attention = inner.config._attn_implementation
    plain = all(type(layer) is StaticLayer for layer in StaticCache(config=inner.config, max_cache_len=1).layers)
    if attention not in ("sdpa", "eager") or not plain or not inner._can_compile_fullgraph:
        raise UserError(
            f"trainer.cache_implementation=static is not carried out for {type(inner).__name__} with its attention "
            f"({attention}{'' if plain else ', not over the whole text in every layer'}); say "
            "trainer.cache_implementation=dynamic."
        )
    return StaticSampler()


class StaticSampler:
    """`sample`, with the memory and the recorded step kept from call to call.

    `graph`: play back a CUDA graph; None: where there is CUDA. What is kept is one cache, and where autocast multiplies
    in 16 bits a copy of the weights in them, for a step that cast them anew would mostly do that. An adapter has to be
    on or off as it was in the first call.
    """

    def __init__(self, graph: bool | None = None) -> None:
        self.graph = graph
        self.step: _Step | None = None

    @torch.no_grad()
    def __call__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], limits: Tensor, sampling: Sampling,
        uniforms: Tensor, tell: Callable[[Tensor], None] | None = None,
    ) -> Batch:  # fmt: skip
        """As `sample` does. A row that has ended goes on, unheard, until all have."""
        longest, width = int(limits.max()), max(map(len, prompts))
        device = next(model.parameters()).device
        step = self.step
        if step is None or not step.fits(model, sampling, len(prompts), width + longest):
            columns = -(-(width + max(longest, 2 + _REHEARSALS)) // _COLUMNS) * _COLUMNS
            self.step = step = None  # its memory first
            self.step = step = _Step(model, sampling, len(prompts), columns)
            if device.type == "cuda" if self.graph is None else self.graph:
                step.begin(prompts, limits, uniforms)
                step.record()
        step.begin(prompts, limits, uniforms)
        pause = tokens_between_looks(device, tell)
        for time in range(1, longest + 1):
            if tell is not None:
                tell(step.drawn[:time, : len(prompts)].t())
            if time == longest or (time % pause == 0 and not bool(step.running.any())):
                break
            step.go()
        drawn, lengths = step.drawn.t().tolist(), step.lengths.tolist()
        answers = [row[:length] for row, length in zip(drawn, lengths, strict=True)]
        return make_batch(prompts, answers[: len(prompts)]).to(device)


class _Step:
    """One token for every row, all of its state in tensors whose place never changes.

    Prompts are padded left, so that all rows write into the same column. `rows` and `columns` (prompt and response) are
    the most that it can take; a smaller batch is filled up with rows that end at once.
    """

    def __init__(self, model: PreTrainedModel, sampling: Sampling, rows: int, columns: int) -> None:
        inner = language_model(model)
        self.model, self.sampling, self.columns = model, sampling, columns
        self.cache = StaticCache(config=inner.config, max_cache_len=columns)
        self.attention = inner.config._attn_implementation
        device = next(model.parameters()).device
        self.ids = [ids_on(device, ids) for ids in (sampling.stop_ids, sampling.suppressed_ids)]  # kept while recorded
        self.device, self.weights = device, dict[str, Tensor]()
        if torch.is_autocast_enabled(device.type):
            self.weights = _matrices(trunk(model), torch.get_autocast_dtype(device.type))
        self.made_for = self._origin(model, sampling)
        self.graph: torch.cuda.CUDAGraph | None = None

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.time = zeros(1)  # of the token that is drawn next
        self.width = zeros(1)  # of the prompts
        self.prompt_lengths, self.limits, self.lengths, self.tokens = (zeros(rows) for _ in range(4))
        self.running = zeros(rows, dtype=torch.bool)
        self.uniforms = zeros(columns, rows, dtype=torch.float32)
        self.drawn = zeros(columns, rows)

    def _origin(self, model: PreTrainedModel, sampling: Sampling) -> tuple[Any, ...]:
        """What a recorded step takes for granted: the distribution, the number format, where the weights lie."""
        kind = self.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return sampling, cast, *(t.data_ptr() for t in (*model.parameters(), *model.buffers()))

    def fits(self, model: PreTrainedModel, sampling: Sampling, rows: int, columns: int) -> bool:
        """Whether this step can serve a batch."""
        room = rows <= len(self.tokens) and columns <= self.columns
        return room and self.model is model and self.made_for == self._origin(model, sampling)

    def begin(self, prompts: Sequence[Sequence[int]], limits: Tensor, uniforms: Tensor) -> None:
        """Read the prompts and draw the first token of each row."""
        count, width, device = len(prompts), max(map(len, prompts)), self.device
        everyone = [*prompts, *[[0]] * (len(self.tokens) - count)]
        inputs = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in everyone]).to(device)
        self.prompt_lengths.copy_(torch.tensor([len(prompt) for prompt in everyone]))
        self.limits.fill_(1)
        self.limits[:count] = limits.to(device)
        self.uniforms[: len(uniforms), :count] = uniforms.to(device)
        self.lengths.copy_(self.limits)
        self.running.fill_(True)
        self.time.zero_()
        self.width.fill_(width)
        self.cache.reset()
        if self.weights:
            own = dict(trunk(self.model).named_parameters(remove_duplicate=False))
            torch._foreach_copy_(list(self.weights.values()), [own[name] for name in self.weights])
        starts = (width - self.prompt_lengths)[:, None]
        column = torch.arange(width, device=device)
        seen = self._seen(column, starts)
        self._draw(self._forward(inputs, seen, (column - starts).clamp(min=0)))

    def go(self) -> None:
        """Draw the next token of each row."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self._go()

    def record(self) -> None:
        """Record a step as a CUDA graph. What state it leaves means nothing: begin anew."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_REHEARSALS):
                self._go()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._go()
        self.graph = graph

    def _go(self) -> None:
        column = self.width + self.time - 1  # in which the last token is written
        seen = self._seen(column, (self.width - self.prompt_lengths)[:, None])
        # A row that has ended stays where it is: the next place may be beyond the model's last.
        places = self.prompt_lengths + torch.minimum(self.time, self.limits) - 1
        self._draw(self._forward(self.tokens[:, None], seen, places[:, None]))

    def _seen(self, column: Tensor, starts: Tensor) -> Tensor:
        """What the tokens of some columns (queries,) attend to: (rows, 1, queries, columns).

        Each sees the row from its start up to itself; padding sees itself alone, for a softmax of nothing is no number.
        """
        every = torch.arange(self.columns, device=self.device)
        query = column[:, None]
        seen = ((every >= starts[:, None]) & (every <= query)) | (every == query)
        return seen[:, None]

    def _forward(self, inputs: Tensor, seen: Tensor, places: Tensor) -> Tensor:
        """Logits (rows, vocabulary) after tokens (rows, queries) at `places` (rows, queries) of their texts."""
        if self.attention == "eager":  # which adds its mask
            dtype = next(self.model.parameters()).dtype
            seen = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        values = {
            "input_ids": inputs, "attention_mask": seen, "position_ids": places, "use_cache": True,
            cache_argument(trunk(self.model)): self.cache,
        }  # fmt: skip
        kind = self.device.type
        # Without autocast's own store of cast weights: it is emptied between the calls, and a recorded step would go on
        # reading where they were.
        with torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), cache_enabled=False):
            out: Any = functional_call(trunk(self.model), self.weights, (), values, tie_weights=False)
        return head_logits(self.model, out.last_hidden_state[:, -1])

    def _draw(self, logits: Tensor) -> None:
        adjusted = self.sampling.adjust_(logits, self.time.expand(len(logits)))
        tokens = draw(adjusted, self.uniforms.index_select(0, self.time)[0])
        self.drawn.index_copy_(0, self.time, tokens[None])
        self.time.add_(1)
        stopped = self.running & self.sampling.ended(tokens)
        self.lengths.copy_(torch.where(stopped, self.time, self.lengths))
        self.running.logical_and_(~stopped & (self.time < self.limits))
        self.tokens.copy_(tokens)


def _matrices(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Room for what autocast would cast: the weights of linear layers, by name."""
    return {
        f"{name}.{kind}": torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D)
        for kind, parameter in module.named_parameters(recurse=False)
        if parameter.dtype == torch.float32
    }
