"""Format conversations as a policy reads them: turns to text with special tokens, by the tokenizer's chat template."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_pipeline.data.records import Dialogue, Prompt, Prompted, Turn, answers
from rlhf_pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10.0  # that a template may take for a conversation
MEMORY = 2 << 30  # bytes that it may use
LENGTH = 10_000_000  # bytes that it may write

# For tokenizers without a template. The template is saved with the tokenizer from stage to stage.
TEMPLATES = {
    # GPT2-chitchat's format: [CLS] first [SEP] second [SEP]. If the tokenizer has no [SEP], EOS ends each turn.
    "dialogue": (
        "{{ cls_token or '' }}"
        "{% for message in messages %}{{ message['content'] }}{{ sep_token or eos_token }}{% endfor %}"
    ),
    "instruction": (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}"
        "{{ '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' }}"
        "{% elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% else %}{{ message['content'] + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
}


def template_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the tokenizer's own template, else the built-in one that its special tokens suggest."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if own:
        return str(own)
    return TEMPLATES["dialogue" if tokenizer.cls_token and tokenizer.sep_token else "instruction"]


def render(tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn], reply_follows: bool) -> str:
    """Return the text of a conversation with special tokens. With `reply_follows`, it ends where a reply begins."""
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    try:
        with _limits():
            text = tokenizer.apply_chat_template(
                messages, chat_template=template_of(tokenizer), tokenize=False, add_generation_prompt=reply_follows
            )
        if (length := len(str(text).encode())) > LENGTH:
            raise ValueError(f"its output has {length} bytes")
    except Exception as error:  # a template may raise anything
        roles = ", ".join(turn.role for turn in turns[:8])
        own = Path(tokenizer.name_or_path, "chat_template.jinja")
        raise UserError(
            f"the chat template of {own if own.exists() else tokenizer.name_or_path} cannot format a conversation of "
            f"{roles} ({str(error)[:200] or 'it uses too much memory'}); change the data, or set "
            "policy.template=dialogue or instruction."
        ) from error
    return str(text)


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Stop a template that takes too much time or memory, if the system and the thread allow it."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    import resource

    def stop(*_: object) -> None:
        raise TimeoutError(f"it takes more than {SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    bounds = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(OSError, ValueError):  # no /proc, or the limit is already lower
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, bounds[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)  # again each second: jinja's compiler swallows exceptions
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, bounds)


def format_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> str:
    """Return a prompt as the policy reads it, with special tokens."""
    return prompt if isinstance(prompt, str) else render(tokenizer, prompt, reply_follows=True)


def visible_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> str:
    """Return a prompt as rewards and people see it: as the policy reads it, without special tokens."""
    ids: Any = tokenizer(format_prompt(tokenizer, prompt), add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def learnt_parts(tokenizer: "PreTrainedTokenizerBase", row: Prompted) -> list[tuple[str, bool]]:
    """Return a row's text in parts, each with whether it is learnt: a dialogue, or a prompt with its best answer.

    Some templates write a turn differently once another follows (for example without the thoughts). Such a dialogue
    cannot be cut into parts, so only its last reply is learnt.
    """
    if not isinstance(row, Dialogue):
        return [(format_prompt(tokenizer, row.prompt), False), (answers(row)[0], True)]
    found: list[tuple[str, bool]] = []
    so_far = ""
    for index in row.replies:
        before = render(tokenizer, row.turns[:index], reply_follows=row.turns[index].role == "assistant")
        after = render(tokenizer, row.turns[: index + 1], reply_follows=False)
        # Before a reply that is still to come, some templates write more (an empty thought) than before a given reply.
        # The reply then begins where the two texts differ, as in TRL.
        shared = os.path.commonprefix([before, after])  # noqa: RUF071  # by characters
        if shared != before and not shared.startswith(render(tokenizer, row.turns[:index], reply_follows=False)):
            found, so_far = [], ""
            continue
        before = shared
        if not before.startswith(so_far):
            found, so_far = [], ""
        found += [(before[len(so_far) :], False), (after[len(before) :], True)]
        so_far = after
    return found
