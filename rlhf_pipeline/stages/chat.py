"""Talk to a policy in the terminal, or to two side by side; or ask from a script, by --prompt or a pipe.

python -m rlhf_pipeline stage=chat
"""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.text import Text as Line

from rlhf_pipeline import data
from rlhf_pipeline.data.records import Code, Dialogue, Labelled, Text
from rlhf_pipeline.data.tokenization import conversational
from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.made import POLICIES, locate, policies_in, run_of
from rlhf_pipeline.networks import positions
from rlhf_pipeline.policies import Policy, load_policy, registry
from rlhf_pipeline.registry import suggest
from rlhf_pipeline.rewards import Reward, load_reward, trained_part
from rlhf_pipeline.rundir import RunDir
from rlhf_pipeline.scripts import shown
from rlhf_pipeline.settings import STAGES, Settings
from rlhf_pipeline.stages.common import quiet, sampling_as, say_taken
from rlhf_pipeline.stages.speaker import Speaker
from rlhf_pipeline.tables import number, side_by_side

HELP = {"/reset": "begin a new conversation", "/help": "this list", "/quit": "leave; so do Ctrl-D and Ctrl-C"}
_LENGTH = 64  # tokens of an answer at most, where no PPO of the run says how many


class Answer(NamedTuple):
    """What a policy said, and what that is worth where there is a reward."""

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
        """What each policy says to `text`, all from the same random numbers."""
        heard = [(speaker, speaker.forgetful, speaker.hear(text)) for speaker in self.speakers]
        for speaker, forgetful, _ in heard:
            if speaker.forgetful and not forgetful:
                note(f"{speaker.name}: the conversation no longer fits; from here on its oldest turns are dropped")
        draws = torch.rand(max(speaker.length for speaker in self.speakers), generator=self.generator)
        said = [speaker.answer(text, ids, draws, tell) for speaker, _, ids in heard]
        scores: list[float | None] = [None] * len(said)
        if self.reward is not None:
            with contextlib.redirect_stdout(sys.stderr):  # what a reward of the user's own prints is no answer
                scores = [*self.reward([prompt for prompt, _ in said], [answer for _, answer in said])]
        return [Answer(s.name, text, score) for s, (_, text), score in zip(self.speakers, said, scores, strict=True)]

    def forget(self) -> None:
        """Begin all conversations anew."""
        for speaker in self.speakers:
            speaker.forget()


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
        for text in settings.chat.prompt or commands(talk, typed() if terminal else piped(), terminal):
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
    """Obey the lines that are commands, and pass on the others, but for empty ones."""
    for line in lines:
        word = line.strip()
        if word == "/quit":
            return
        if word == "/reset":
            talk.forget()
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


def piped() -> Iterator[str]:
    """Lines from a pipe or a file."""
    for line in sys.stdin:
        yield line.rstrip("\r\n")


def answer(talk: Talk, text: str, terminal: bool) -> None:
    """Answer on stdout: one policy as it speaks, two side by side, or in a script one below the other."""
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
    """Prints an answer while it grows; what would steer the terminal is shown as escapes, for a model wrote it."""

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
    """Say something that is no answer, on stderr."""
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
        places.append(opponent(settings.against, home))
    policies = [_open(settings, place) for place in places]
    mode = settings.chat.mode or _mode(settings, places[0], policies[0])
    trained = [_ppo_settings(run_of(place)) for place in places]
    speakers = []
    for place, policy, own in zip(places, policies, trained, strict=True):
        say_taken("policy", shown(place))
        sampling, length, _ = _sampling(settings, policy, own or _as_the_other(policy, policies[0], trained[0]))
        speakers.append(Speaker(_name(place, home), policy, sampling, length, mode == "chat"))
    return Talk(speakers, _judge(settings, home), torch.Generator().manual_seed(settings.seed))


def opponent(against: str, home: RunDir) -> str:
    """Where the second policy lies: a stage of the first one's run, else a run, a stage's folder or a hub id."""
    if against not in STAGES:
        return locate(against)
    found = home.upstream(against) if against in POLICIES else None
    if found is None:
        made = ", ".join(stage for stage in POLICIES if home.upstream(stage))
        raise NotFinishedError(
            f"against={against}: {home.runs / home.name} has made no such policy. It has: {made or 'none'}; or give a "
            "run's folder, a path or a hub id."
        )
    return str(found)


def _open(settings: Settings, place: str) -> Policy:
    policy, _ = load_policy({**settings.policy, "path": place}, None, [], settings.seed)
    policy.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return policy


def _mode(settings: Settings, place: str, policy: Policy) -> str:
    """Whether it has learnt to talk or to go on from a text: by the data of its run, else by its tokenizer."""
    tokenizer = policy.tokenizer
    own = "chat" if tokenizer.chat_template or (tokenizer.cls_token and tokenizer.sep_token) else "complete"
    home = run_of(place)
    if home is None:
        return own
    choice = home.config()["data"]
    kind = data.kind(choice["name"])
    if kind in (Text, Code, Labelled, Dialogue):
        return "chat" if kind is Dialogue else "complete"
    try:
        rows = data.load_data(choice, settings.seed).test
    except UserError as error:
        note(f"chat.mode={own}: the data that would tell cannot be read ({error})")
        return own
    return "chat" if conversational(rows) else "complete"


def _ppo_settings(home: RunDir | None) -> dict[str, Any]:
    """The settings of a run's PPO, done or not; empty where it has none."""
    if home is None:
        return {}
    done = home.upstream("ppo")
    ppo = RunDir(home.runs, home.name, "ppo") if done is None else run_of(done)
    config: dict[str, Any] = ppo.config().get("trainer", {}) if ppo else {}
    return config


def _as_the_other(policy: Policy, other: Policy, trained: dict[str, Any]) -> dict[str, Any]:
    """How a policy without a PPO of its own samples: as the other; its tokens mean nothing in another vocabulary."""
    if policy.tokenizer.get_vocab() == other.tokenizer.get_vocab():
        return trained
    return {key: value for key, value in trained.items() if key in ("response_length", "temperature", "min_new_tokens")}


def _sampling(settings: Settings, policy: Policy, trained: dict[str, Any]) -> Any:
    places = positions(policy.model) or 2 * _LENGTH
    said = {"temperature": settings.chat.temperature, "response_length": settings.chat.response_length}
    return sampling_as({"response_length": min(_LENGTH, places // 2), **trained}, policy, **said)


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
