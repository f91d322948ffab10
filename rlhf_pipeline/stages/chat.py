"""Talk to a policy in the terminal, or to two side by side; or ask from a script, by --prompt or a pipe.

python -m rlhf_pipeline stage=chat
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.text import Text as Line

from rlhf_pipeline import data
from rlhf_pipeline.data.records import Code, Dialogue, Labelled, Text, Turn
from rlhf_pipeline.data.templates import written
from rlhf_pipeline.data.tokenization import conversational, encode
from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.evaluation.lineup import Contestant, open_all
from rlhf_pipeline.models.policies import Policy, load_policy, registry
from rlhf_pipeline.models.rewards import Reward, load_reward, trained_part
from rlhf_pipeline.models.sampling import make_batch, room_for_prompts, sample
from rlhf_pipeline.registry import suggest
from rlhf_pipeline.report.tables import number, side_by_side
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.runs.models import find, locate, policies_in, run_of
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.texts import shown
from rlhf_pipeline.training.setup import quiet, say_taken

HELP = {"/reset": "begin a new conversation", "/help": "this list", "/quit": "leave; so do Ctrl-D and Ctrl-C"}


@dataclass
class Speaker:
    """One policy in a conversation. It answers in turn, or continues each text by itself unless it `converses`."""

    who: Contestant
    length: int  # of an answer, at most, in tokens
    converses: bool
    turns: tuple[Turn, ...] = ()
    forgetful: bool = False  # whether turns have been dropped

    def hear(self, text: str) -> list[int]:
        """The token ids that it is asked with; if a conversation no longer fits, its oldest turns are dropped."""
        room, user = room_for_prompts(self.who.policy.model, self.length), Turn("user", text)
        tokenizer = self.who.policy.tokenizer
        for begin in range(0, len(self.turns) + 1, 2):  # a question with its answer: templates want the user first
            turns = self.turns[begin:]
            ids = encode(tokenizer, [written(tokenizer, (*turns, user) if self.converses else text)])[0]
            if len(ids) <= room:
                break
        if not 1 <= len(ids) <= room:
            raise UserError(
                f"that takes {len(ids)} tokens, and {self.who.name} has room for 1 to {room} before an answer of "
                f"{self.length}; use fewer words, or lower chat.response_length."
            )
        if turns != self.turns and not self.forgetful:
            note(f"{self.who.name}: the conversation no longer fits; from here on its oldest turns are dropped")
            self.forgetful = True
        self.turns = turns
        return ids

    def answer(
        self, text: str, ids: list[int], uniforms: torch.Tensor, tell: Callable[[str], None] | None
    ) -> tuple[str, str]:
        """The prompt as a reward sees it, and the answer to `text`, of token `ids`; `tell` gets it as it grows."""
        tokenizer = self.who.policy.tokenizer

        def grown(drawn: torch.Tensor) -> None:
            if tell:
                tell(make_batch([ids], drawn.tolist()).texts(tokenizer)[1][0])

        limits = torch.tensor([self.length])
        batch = sample(self.who.policy.model, [ids], limits, self.who.sampling, uniforms, grown)
        (prompt,), (answer,) = batch.texts(tokenizer)
        if self.converses:
            self.turns = (*self.turns, Turn("user", text), Turn("assistant", answer))
        return prompt, answer


@dataclass
class Talk:
    """The conversations of one or two policies with the same person."""

    speakers: list[Speaker]
    reward: Reward | None
    generator: torch.Generator

    def ask(self, text: str, tell: Callable[[str], None] | None = None) -> list[tuple[str, str, float | None]]:
        """Each policy's name, its answer from the same random numbers, and the answer's reward if there is one."""
        heard = [speaker.hear(text) for speaker in self.speakers]
        uniforms = torch.rand(self.speakers[0].length, 1, generator=self.generator)
        pairs = [speaker.answer(text, ids, uniforms, tell) for speaker, ids in zip(self.speakers, heard, strict=True)]
        scores: list[float | None] = [None] * len(pairs)
        if self.reward is not None:
            with contextlib.redirect_stdout(sys.stderr):  # what a user's own reward prints is no answer
                scores = [*self.reward([prompt for prompt, _ in pairs], [answer for _, answer in pairs])]
        names = [speaker.who.name for speaker in self.speakers]
        return [(name, answer, score) for name, (_, answer), score in zip(names, pairs, scores, strict=True)]


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
        for text in settings.chat.prompt or prompts(talk, terminal):
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


def prompts(talk: Talk, terminal: bool) -> Iterator[str]:
    """The lines that are typed or piped in and are neither empty nor commands, which are obeyed."""
    for line in typed() if terminal else sys.stdin:
        word = line.strip()
        if word == "/quit":
            return
        if word == "/reset":
            for speaker in talk.speakers:
                speaker.turns, speaker.forgetful = (), False
            note("a new conversation")
        elif word == "/help":
            note("\n".join(f"{name:<8}{what}" for name, what in HELP.items()))
        elif terminal and word[:1] == "/" and word[1:].isalpha():
            note(f"there is no command {word}. {suggest(word, HELP)}Known: {', '.join(HELP)}.")
        elif word:
            yield line.rstrip("\r\n")


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
        ((_, said, reward),) = talk.ask(text, lambda grown: stream.show(grown.rstrip("\ufffd")))  # not yet a character
        stream.end(said)
        if reward is not None:
            note(f"reward {number(reward)}")
    elif terminal:
        side_by_side(talk.ask(text))
    else:
        for name, said, reward in talk.ask(text):
            print(f"{shown(name)}: {shown(said)}", flush=True)
            if reward is not None:
                note(f"{name}: reward {number(reward)}")


class Stream:
    """Prints an answer while it grows. A model wrote it, so control characters are shown as escapes."""

    printed = ""

    def show(self, text: str) -> None:
        """Print what is new."""
        if text.startswith(self.printed):
            print(shown(text[len(self.printed) :]), end="", flush=True)
            self.printed = text

    def end(self, text: str) -> None:
        """Print the rest, or all of an answer that reads otherwise now that it is whole, and end the line."""
        if not text.startswith(self.printed):
            print()
            self.printed = ""
        self.show(text)
        print(flush=True)


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
    place = locate(first)
    made_by = run_of(place)
    home = made_by or out
    places = [(home.stage if made_by else place, place)]
    if settings.against:
        try:
            places.append((settings.against, find(settings.against, home)))
        except UserError as error:
            raise type(error)(f"against={settings.against}: {error}") from error
    for _, path in places:
        say_taken("policy", shown(path))
    policies, length, _ = open_all(
        places, home, lambda path: load_policy({**settings.policy, "path": path}, None, [], settings.seed)[0],
        temperature=settings.chat.temperature, response_length=settings.chat.response_length,
    )  # fmt: skip
    for each in policies:
        each.policy.model.to("cuda" if torch.cuda.is_available() else "cpu")
    asked = settings.chat.mode
    converses = asked == "chat" if asked else _converses(made_by, policies[0].policy, settings.seed)
    speakers = [Speaker(each, length, converses) for each in policies]
    return Talk(speakers, _judge(settings, home), torch.Generator().manual_seed(settings.seed))


def _converses(run: RunDir | None, policy: Policy, seed: int) -> bool:
    """Whether a policy was taught conversations rather than texts: by its run's data, else by its tokenizer."""
    if run is not None:
        choice = run.config()["data"]
        if (kind := data.kind(choice["name"])) in (Text, Code, Labelled, Dialogue):
            return kind is Dialogue
        with contextlib.suppress(UserError):  # the data may have been moved
            return conversational(data.load_data(choice, seed).test)
    return bool(policy.tokenizer.chat_template or (policy.tokenizer.cls_token and policy.tokenizer.sep_token))


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
