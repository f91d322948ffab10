"""One policy in a conversation: its own tokenizer, its own words for the turns, its own memory of them."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhf_pipeline.data.records import Turn
from rlhf_pipeline.data.templates import written
from rlhf_pipeline.data.tokenization import encode
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.policies import Policy
from rlhf_pipeline.sampling import Sampling, make_batch, room_for_prompts, sample


@dataclass
class Speaker:
    """Answers in turn, or goes on from each text by itself where it does not `converse`."""

    name: str
    policy: Policy
    sampling: Sampling
    length: int  # of an answer, at most, in tokens
    converses: bool
    turns: list[Turn] = field(default_factory=list)
    forgetful: bool = False  # whether turns have been dropped

    def hear(self, text: str) -> list[int]:
        """The token ids that it is asked with; of a conversation that no longer fits, the oldest turns are dropped."""
        room = room_for_prompts(self.policy.model, self.length)
        user, turns = Turn("user", text), self.turns
        ids = self._ids((*turns, user) if self.converses else text)
        while len(ids) > room and self.converses and turns:
            turns = turns[2:]  # a question with its answer: templates want the user to speak first
            ids = self._ids((*turns, user))
        if not 1 <= len(ids) <= room:
            raise UserError(
                f"that takes {len(ids)} tokens, and {self.name} has room for 1 to {room} before an answer of "
                f"{self.length}; say it in fewer words, or lower chat.response_length."
            )
        self.forgetful = self.forgetful or len(turns) < len(self.turns)
        self.turns = turns
        return ids

    def _ids(self, prompt: str | tuple[Turn, ...]) -> list[int]:
        return encode(self.policy.tokenizer, [written(self.policy.tokenizer, prompt)])[0]

    def answer(
        self, asked: str, ids: list[int], draws: Tensor, tell: Callable[[str], None] | None = None
    ) -> tuple[str, str]:
        """The prompt as a reward sees it and the answer to what was `asked`, with `ids`, drawn from `draws` (time,).

        `tell` is given the answer as it grows.
        """

        def grown(drawn: Tensor) -> None:
            if tell:
                tell(make_batch([ids], drawn.tolist()).texts(self.policy.tokenizer)[1][0])

        limits = torch.tensor([self.length])
        batch = sample(self.policy.model, [ids], limits, self.sampling, draws[: self.length, None], grown)
        (prompt,), (text,) = batch.texts(self.policy.tokenizer)
        if self.converses:
            self.turns = [*self.turns, Turn("user", asked), Turn("assistant", text)]
        return prompt, text

    def forget(self) -> None:
        """Begin anew."""
        self.turns, self.forgetful = [], False
