"""Chat with a policy in the terminal, or with two side by side. A script can use --prompt or a pipe.

python -m rlhf_pipeline stage=chat
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers import TextStreamer

from rlhf_pipeline import data
from rlhf_pipeline.data.records import Code, Dialogue, Labelled, Text, Turn
from rlhf_pipeline.data.templates import format_prompt
from rlhf_pipeline.data.tokenization import conversational, encode
from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.evaluation.lineup import Sampler, open_all
from rlhf_pipeline.models.policies import Policy, registry
from rlhf_pipeline.models.rewards import Reward, load_reward, trained_part
from rlhf_pipeline.models.sampling import room_for_prompts, sample
from rlhf_pipeline.registry import did_you_mean
from rlhf_pipeline.report.tables import side_by_side
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.runs.models import find_policy, locate_model, run_of
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.texts import printable
from rlhf_pipeline.training.setup import print_input, quiet

HELP = {"/reset": "begin a new conversation", "/help": "show this list", "/quit": "leave (or Ctrl-D, Ctrl-C)"}


class AnswerStreamer(TextStreamer):
    """Prints an answer in the terminal while it is sampled."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print the new text. Control characters become escapes, because a model wrote them."""
        print(printable(text), end="\n" if stream_end else "", flush=True)


@dataclass
class Talk:
    """A user's conversations with one or two policies. Unless it `converses`, the policies continue texts."""

    policies: list[Sampler]
    length: int  # of an answer, in tokens, at most
    converses: bool
    reward: Reward | None
    generator: torch.Generator
    turns: dict[int, tuple[Turn, ...]] = field(default_factory=dict)  # by the policy's index

    def ask(self, text: str, grows: bool = False) -> list[tuple[str, str, float | None]]:
        """Return each policy's name, answer and reward (if there is one). The policies use the same random numbers.

        With `grows` the answers are printed while they are sampled.
        """
        asked = [self._ids(place, text) for place in range(len(self.policies))]
        uniforms, limits = torch.rand(self.length, 1, generator=self.generator), torch.tensor([self.length])
        said = []
        for who, ids in zip(self.policies, asked, strict=True):
            growing = AnswerStreamer(who.policy.tokenizer, skip_special_tokens=True) if grows else None
            batch = sample(who.policy.model, [ids], limits, who.sampling, uniforms, growing and growing.put)
            if growing:
                growing.end()
            said.append([texts[0] for texts in batch.texts(who.policy.tokenizer)])
        prompts, answers = map(list, zip(*said, strict=True))
        for place, answer in enumerate(answers):
            self.turns[place] = (*self.turns.get(place, ()), Turn("user", text), Turn("assistant", answer))
        with contextlib.redirect_stdout(sys.stderr):  # a user's own reward may print
            scores = self.reward(prompts, answers) if self.reward else [None] * len(answers)
        return list(zip([who.name for who in self.policies], answers, scores, strict=True))

    def _ids(self, place: int, text: str) -> list[int]:
        """Return the token ids of a policy's prompt. If a conversation no longer fits, its oldest turns are dropped."""
        name, policy = self.policies[place].name, self.policies[place].policy
        room, turns = room_for_prompts(policy.model, self.length), self.turns.get(place, ())
        for dropped in range(0, len(turns) + 1, 2):  # a question with its answer: templates begin with the user
            prompt = (*turns[dropped:], Turn("user", text)) if self.converses else text
            ids = encode(policy.tokenizer, [format_prompt(policy.tokenizer, prompt)])[0]
            if len(ids) <= room:
                break
        if not 1 <= len(ids) <= room:
            raise UserError(
                f"the prompt takes {len(ids)} tokens, and {name} has room for 1 to {room} before an answer of "
                f"{self.length}; use fewer words, or lower chat.response_length."
            )
        if dropped:
            print_remark(f"{name}: the conversation no longer fits, so its oldest turns are dropped")
        self.turns[place] = turns[dropped:]
        return ids


def run(settings: Settings, out: RunDir) -> None:
    """Open the policies, then answer the prompts of --prompt, else the lines that are typed or piped in."""
    quiet()
    for stream in (sys.stdin, sys.stdout):  # no character that cannot be decoded or shown ends a conversation
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdin else "backslashreplace")
    terminal = not settings.chat.prompt and sys.stdin.isatty() and sys.stdout.isatty()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers alone
            talk = open_talk(settings, out)
        if terminal:
            print_remark("/help lists the commands")
        for text in settings.chat.prompt or prompts(talk, terminal):
            try:
                grows = terminal and len(talk.policies) == 1
                show(talk.ask(text, grows), terminal, grows)
            except UserError as error:
                if not terminal:
                    raise
                print_remark(f"error: {error}")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the pipe's reader has ended; without this, Python would print another error at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prompts(talk: Talk, terminal: bool) -> Iterator[str]:
    """Yield the lines that are neither empty nor commands, and run the commands."""
    for line in typed_lines() if terminal else sys.stdin:
        word = line.strip()
        if word == "/quit":
            return
        if word == "/reset":
            talk.turns.clear()
            print_remark("a new conversation")
        elif word == "/help":
            print_remark("\n".join(f"{name:<8}{what}" for name, what in HELP.items()))
        elif terminal and word[:1] == "/" and word[1:].isalpha():
            print_remark(f"there is no command {word}. {did_you_mean(word, HELP)}Known: {', '.join(HELP)}.")
        elif word:
            yield line.rstrip("\r\n")


def typed_lines() -> Iterator[str]:
    """Yield lines from the terminal, with history and editing if the standard library has readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() uses it)
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")
    print()


def show(answers: list[tuple[str, str, float | None]], terminal: bool, printed: bool) -> None:
    """Print the answers on stdout, then the rewards. Two answers are side by side, or two lines in a script."""
    if terminal and len(answers) > 1:
        return side_by_side(answers)
    for name, answer, reward in answers:
        label = f"{printable(name)}: " if len(answers) > 1 else ""
        if not printed:
            print(f"{label}{printable(answer)}", flush=True)
        if reward is not None:
            print_remark(f"{label}reward {reward:.3f}")


def print_remark(text: str) -> None:
    """Print a remark on stderr: stdout is for answers alone."""
    print(printable(text), file=sys.stderr, flush=True)


def open_talk(settings: Settings, out: RunDir) -> Talk:
    """Open the policies and the reward, and print a line with the origin of each."""
    first = registry.build(settings.policy).path
    if first is None:
        raise NotFinishedError(
            f"{out.runs / out.name} has no policy to talk to; 'make sft NAME={out.name}' makes one, or give name= or "
            "policy.path=."
        )
    place = locate_model(first)
    made_by = run_of(place)
    home = made_by or out
    places = [(made_by.stage if made_by else place, place)]
    if settings.against:
        places.append((settings.against, find_policy(settings.against, home)))
    for _, path in places:
        print_input("policy", printable(path))
    chat, seed = settings.chat, settings.seed
    how = {"temperature": chat.temperature, "response_length": chat.response_length}
    policies = open_all(places, home, settings.policy, **how)
    converses = chat.mode == "chat" if chat.mode else _converses(made_by, policies[0].policy, seed)
    length = min(each.longest for each in policies)
    return Talk(policies, length, converses, _judge(settings, home), torch.Generator().manual_seed(seed))


def _converses(run: RunDir | None, policy: Policy, seed: int) -> bool:
    """Return whether a policy was trained on conversations. Its run's data decides, or else its tokenizer."""
    if run is not None:
        choice = run.config()["data"]
        if (kind := data.row_type(choice["name"])) in (Text, Code, Labelled, Dialogue):
            return kind is Dialogue
        with contextlib.suppress(UserError):  # the data may have been moved
            return conversational(data.load_data(choice, seed).test)
    return bool(policy.tokenizer.chat_template or (policy.tokenizer.cls_token and policy.tokenizer.sep_token))


def _judge(settings: Settings, home: RunDir) -> Reward | None:
    """Return the chosen reward, else the run's reward, if it has one."""
    if settings.chat.reward is False:
        return None
    try:
        reward, where = load_reward(settings.reward, home.upstream("reward", reward=trained_part(settings.reward)))
        reward.check_columns([], "a chat")
    except UserError as error:
        if settings.chat.reward:
            raise
        if not isinstance(error, NotFinishedError):  # a run without a reward needs no note
            print_remark(f"no reward is shown: {error}")
        return None
    print_input("reward", printable(where))
    return reward
