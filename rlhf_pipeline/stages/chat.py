"""Talk to a policy in the terminal, or to two side by side; or ask from a script, by --prompt or a pipe.

python -m rlhf_pipeline stage=chat
"""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from rich.console import Console
from rich.text import Text as Line

from rlhf_pipeline import data
from rlhf_pipeline.data.records import Code, Dialogue, Labelled, Prompt, Text, Turn
from rlhf_pipeline.data.templates import written
from rlhf_pipeline.data.tokenization import conversational, encode
from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.evaluation.lineup import same_vocabulary, sampling_as
from rlhf_pipeline.models.networks import positions
from rlhf_pipeline.models.policies import Policy, load_policy, registry
from rlhf_pipeline.models.rewards import Reward, load_reward, trained_part
from rlhf_pipeline.models.sampling import Sampling, make_batch, room_for_prompts, sample
from rlhf_pipeline.registry import suggest
from rlhf_pipeline.report.tables import number, side_by_side
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.runs.models import find, locate, policies_in, ppo_settings, run_of
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.texts import shown
from rlhf_pipeline.training.setup import quiet, say_taken

HELP = {"/reset": "begin a new conversation", "/help": "this list", "/quit": "leave; so do Ctrl-D and Ctrl-C"}
_LENGTH = 64  # tokens of an answer at most, where no PPO of the run says how many


@dataclass
class Speaker:
    """One policy in a conversation. It answers in turn, or continues each text by itself unless it `converses`."""

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
        if len(turns) < len(self.turns) and not self.forgetful:
            note(f"{self.name}: the conversation no longer fits; from here on its oldest turns are dropped")
            self.forgetful = True
        self.turns = turns
        return ids

    def _ids(self, prompt: Prompt) -> list[int]:
        return encode(self.policy.tokenizer, [written(self.policy.tokenizer, prompt)])[0]

    def answer(
        self, asked: str, ids: list[int], draws: torch.Tensor, tell: Callable[[str], None] | None = None
    ) -> tuple[str, str]:
        """The prompt as a reward sees it and the answer to what was `asked`, with `ids`, drawn from `draws` (time,).

        `tell` is given the answer as it grows.
        """

        def grown(drawn: torch.Tensor) -> None:
            if tell:
                tell(make_batch([ids], drawn.tolist()).texts(self.policy.tokenizer)[1][0])

        limits = torch.tensor([self.length])
        batch = sample(self.policy.model, [ids], limits, self.sampling, draws[: self.length, None], grown)
        (prompt,), (text,) = batch.texts(self.policy.tokenizer)
        if self.converses:
            self.turns = [*self.turns, Turn("user", asked), Turn("assistant", text)]
        return prompt, text

    def forget(self) -> None:
        """Begin a new conversation."""
        self.turns, self.forgetful = [], False


class Answer(NamedTuple):
    """A policy's answer, and its reward if there is a reward."""

    name: str
    text: str
    reward: float | None


@dataclass
class Talk:
    """The conversations of one or two policies with the same person."""

    speakers: list[Speaker]
    reward: Reward | None
    generator: torch.Generator

    def ask(self, text: str, tell: Callable[[str], None] | None = None) -> list[Answer]:
        """Each policy's answer to `text`, all from the same random numbers."""
        heard = [speaker.hear(text) for speaker in self.speakers]
        draws = torch.rand(max(speaker.length for speaker in self.speakers), generator=self.generator)
        pairs = [speaker.answer(text, ids, draws, tell) for speaker, ids in zip(self.speakers, heard, strict=True)]
        scores: list[float | None] = [None] * len(pairs)
        if self.reward is not None:
            with contextlib.redirect_stdout(sys.stderr):  # what a reward of the user's own prints is no answer
                scores = [*self.reward([prompt for prompt, _ in pairs], [answer for _, answer in pairs])]
        return [Answer(s.name, text, score) for s, (_, text), score in zip(self.speakers, pairs, scores, strict=True)]


def run(settings: Settings, out: RunDir) -> None:
    """Open the policies, then answer the prompts that were given, else what is typed or piped in."""
    quiet()
    for stream in (sys.stdin, sys.stdout):  # neither bytes that are no text nor a narrow terminal end a conversation
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdin else "backslashreplace")
    terminal = not settings.chat.prompt and sys.stdin.isatty() and sys.stdout.isatty()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers alone
            talk = open_talk(settings, out)
        if terminal:
            note("/help lists the commands")
        lines = typed() if terminal else (line.rstrip("\r\n") for line in sys.stdin)
        for text in settings.chat.prompt or commands(talk, lines, terminal):
            try:
                answer(talk, text, terminal)
            except UserError as error:
                if not terminal:
                    raise
                note(f"error: {error}")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read the answers has left; without this, Python would complain as it leaves, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def commands(talk: Talk, lines: Iterator[str], terminal: bool) -> Iterator[str]:
    """Obey the lines that are commands, drop empty ones, and pass on the others."""
    for line in lines:
        word = line.strip()
        if word == "/quit":
            return
        if word == "/reset":
            for speaker in talk.speakers:
                speaker.forget()
            note("a new conversation")
        elif word == "/help":
            note("\n".join(f"{name:<8}{what}" for name, what in HELP.items()))
        elif terminal and re.fullmatch(r"/\w*", word):
            note(f"there is no command {word}. {suggest(word, HELP)}Known: {', '.join(HELP)}.")
        elif word:
            yield line


def typed() -> Iterator[str]:
    """Lines from the terminal, with a history and editing where the standard library has them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() uses it)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def answer(talk: Talk, text: str, terminal: bool) -> None:
    """Print the answers on stdout: of one policy while it grows, of two side by side, or in a script one per line."""
    if len(talk.speakers) == 1:
        stream = Stream()
        (only,) = talk.ask(text, stream.grow)
        stream.end(only.text)
        if only.reward is not None:
            note(f"reward {number(only.reward)}")
    elif terminal:
        side_by_side(talk.ask(text))
    else:
        for each in talk.ask(text):
            print(f"{shown(each.name)}: {shown(each.text)}", flush=True)
            if each.reward is not None:
                note(f"{each.name}: reward {number(each.reward)}")


class Stream:
    """Prints an answer while it grows. A model wrote it, so control characters are shown as escapes."""

    def __init__(self) -> None:
        self.printed = ""

    def grow(self, text: str) -> None:
        """Print what is new, but for a last character that may not be whole."""
        self._print(text.rstrip("\ufffd"))

    def end(self, text: str) -> None:
        """Print the rest and end the line."""
        if not text.startswith(self.printed):  # a tokenizer may write its words otherwise once more of them follow
            print(flush=True)
            self.printed = ""
        self._print(text)
        print(flush=True)

    def _print(self, text: str) -> None:
        if text.startswith(self.printed):
            print(shown(text[len(self.printed) :]), end="", flush=True)
            self.printed = text


def note(text: str) -> None:
    """Print a remark on stderr: stdout is for answers alone."""
    Console(stderr=True, highlight=False).print(Line(shown(text), style="dim"), soft_wrap=True)


def open_talk(settings: Settings, out: RunDir) -> Talk:
    """The policies, how they are asked and sample, and the reward; one line each for where they came from."""
    first = registry.build(settings.policy).path
    if first is None:
        there = ", ".join(policies_in(out.runs))
        raise NotFinishedError(
            f"{out.runs / out.name} has no policy to talk to; 'make sft NAME={out.name}' makes one"
            f"{f', and there is one under name= {there}' if there else ''}; or give policy.path=."
        )
    places = [locate(first)]
    home = run_of(places[0]) or out
    if settings.against:
        try:
            places.append(find(settings.against, home))
        except UserError as error:
            raise type(error)(f"against={settings.against}: {error}") from error
    policies = [_open(settings, place) for place in places]
    converses = settings.chat.mode == "chat" if settings.chat.mode else _converses(settings, places[0], policies[0])
    trained = [ppo_settings(run_of(place)) for place in places]
    asked = {"temperature": settings.chat.temperature, "response_length": settings.chat.response_length}
    speakers = []
    for place, policy, own in zip(places, policies, trained, strict=True):
        say_taken("policy", shown(place))
        usual = {"response_length": min(_LENGTH, (positions(policy.model) or 2 * _LENGTH) // 2)}
        # Without a PPO of its own a policy samples as the other does.
        foreign = not own and not same_vocabulary(policy, policies[0])
        drawing = sampling_as({**usual, **(own or trained[0])}, policy, {} if foreign else None, **asked)
        speakers.append(Speaker(_name(place, home), policy, drawing.sampling, drawing.longest, converses))
    return Talk(speakers, _judge(settings, home), torch.Generator().manual_seed(settings.seed))


def _open(settings: Settings, place: str) -> Policy:
    policy, _ = load_policy({**settings.policy, "path": place}, None, [], settings.seed)
    policy.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return policy


def _converses(settings: Settings, place: str, policy: Policy) -> bool:
    """Whether a policy was taught conversations rather than texts: by its run's data, else by its tokenizer."""
    tokenizer = policy.tokenizer
    likely = bool(tokenizer.chat_template or (tokenizer.cls_token and tokenizer.sep_token))
    home = run_of(place)
    if home is None:
        return likely
    choice = home.config()["data"]
    kind = data.kind(choice["name"])
    if kind in (Text, Code, Labelled, Dialogue):
        return kind is Dialogue
    try:
        return conversational(data.load_data(choice, settings.seed).test)
    except UserError as error:
        note(f"chat.mode={'chat' if likely else 'complete'}: the data that would tell cannot be read ({error})")
        return likely


def _name(place: str, home: RunDir) -> str:
    """A policy's name: its stage, with its run where that is another; else where it lies."""
    own = run_of(place)
    if own is None:
        return place
    return own.stage if own.runs / own.name == home.runs / home.name else f"{own.name}/{own.stage}"


def _judge(settings: Settings, home: RunDir) -> Reward | None:
    """The reward that was asked for, else the run's, where it has one."""
    if settings.chat.reward is False:
        return None
    try:
        reward, where = load_reward(settings.reward, home.upstream("reward", reward=trained_part(settings.reward)))
    except UserError as error:
        if settings.chat.reward:
            raise
        if not isinstance(error, NotFinishedError):  # a run without a reward is nothing to speak of
            note(f"no reward is shown: {error}")
        return None
    say_taken("reward", shown(where))
    return reward
