"""Step 2, first half: answers to compare, and the labels that people, or a reward in their place, give them.

python -m rlhf_pipeline stage=collect
"""

import os
import re
from collections.abc import Sequence
from typing import Any

import torch

from rlhf_pipeline.atomic import read_jsonl, write_jsonl
from rlhf_pipeline.data import fingerprint, texts
from rlhf_pipeline.data.records import Row
from rlhf_pipeline.data.tokenization import Question, fitting, questions
from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.policies import Policy, load_policy
from rlhf_pipeline.ppo.config import PPOConfig, make_sampling
from rlhf_pipeline.processes import agree
from rlhf_pipeline.progress import progress
from rlhf_pipeline.rewards import Reward, load_reward, trained_part
from rlhf_pipeline.rundir import CANDIDATES, CANDIDATES_SO_FAR, LABELS, PROJECT, RunDir
from rlhf_pipeline.sampling import room_for_prompts
from rlhf_pipeline.settings import SAMPLING, STAGES, Settings
from rlhf_pipeline.stages.candidates import Asker, ids_for
from rlhf_pipeline.stages.common import quiet, say_taken, take_data
from rlhf_pipeline.stages.labeler import rank
from rlhf_pipeline.stages.labelling import bring_pulled, offer, settle

_MAKE_POLICIES = ("pretrain", "sft", "ppo")


def run(settings: Settings, out: RunDir) -> None:
    """Draw the candidates, unless they are there, then see how far they are labelled."""
    quiet()
    reward, judge = _labeler(settings, out)
    if not agree(lambda: (out.path / CANDIDATES).exists() and bool(out.record)):
        _ask(settings, out, {"labeler": judge} if judge else {})
    elif out.leads:
        out.reopen(settings)
    if not out.leads:
        return
    rows = read_jsonl(out.path / CANDIDATES)
    if reward is not None:
        found, agreement = rank(
            rows, reward, (settings.labeler or {}).get("noise", 0.0), f"{settings.seed} {out.round}"
        )
        people = [row for row in read_jsonl(out.path / LABELS) if row.get("source")]
        write_jsonl(out.path / LABELS, found + people)
        print(f"{judge} ranked the answers; {agreement:.1%} of the pairs as it would without noise", flush=True)
    elif (out.path / PROJECT).exists():
        try:
            bring_pulled(out)
        except UserError as error:  # it need not be running
            print(f"note: nothing new from Label Studio: {error}", flush=True)
    settle(settings.collect, out)


def _labeler(settings: Settings, out: RunDir) -> tuple[Reward | None, str]:
    """The reward in the place of people, if there is to be one, and where it came from."""
    choice = settings.labelling_reward
    if choice is None:
        return None, ""
    try:
        return load_reward(choice, out.upstream("reward", reward=trained_part(choice)))
    except UserError as error:
        raise type(error)(re.sub(r"\breward(?=[.=])", "labeler", str(error))) from error


def _ask(settings: Settings, out: RunDir, judge: dict[str, str]) -> None:
    """Draw the candidates; a batch of prompts that is finished stays, should the rest be cut off."""
    rows = take_data(settings.data, settings.seed)
    policies = _policies(settings, out, texts(rows.train))
    for where in policies:
        say_taken("policy", where)
    parents = {f"policy[{n}]" if n else "policy": where for n, where in enumerate(policies)}
    out.begin(settings, {**parents, **judge}, fingerprint(settings.data, rows))
    asker, asked = _asker(settings, out, policies, rows.train)
    kept = _drawn(asker, asked, out)
    if not out.leads:
        return
    if not kept:
        (out.path / CANDIDATES_SO_FAR).unlink()  # or the advice would be refused as other work
        raise UserError(
            f"none of {len(asked)} prompts brought two answers that differ; raise collect.temperatures, or "
            "collect.similarity."
        )
    say_what_lacks(kept, len(asked), settings.collect.answers)
    offer(out, kept, settings.report.lang)
    os.replace(out.path / CANDIDATES_SO_FAR, out.path / CANDIDATES)


def say_what_lacks(kept: Sequence[dict[str, Any]], prompts: int, answers: int) -> None:
    """Where a policy repeats itself: how many prompts brought nothing to compare, and how many less than was asked."""
    few = sum(len(row["answers"]) < answers for row in kept)
    for count, what in ((prompts - len(kept), "no two"), (few, f"2 or more, but not {answers},")):
        if count:
            print(f"{count} of {prompts} prompts brought {what} answers that differ", flush=True)


def _asker(
    settings: Settings, out: RunDir, policies: dict[str, Policy], rows: Sequence[Row]
) -> tuple[Asker, list[Question]]:
    """What draws the answers, and the prompts to ask, which are in the words of the first policy."""
    collect, first = settings.collect, next(iter(policies.values()))
    room = min(room_for_prompts(policy.model, collect.response_length) for policy in policies.values())
    every = fitting(questions(rows, first.tokenizer, settings.data, settings.seed), room)
    everywhere = [q for q in every if all(len(ids_for(policy, first, q)) <= room for policy in policies.values())]
    if len(everywhere) < len(every):
        said = f"{len(every) - len(everywhere)} of {len(every)} prompts are too long in another policy's tokens"
        print(f"warning: {said}, and are left out", flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for policy in policies.values():
        policy.model.to(device).eval()
    given = {key: getattr(collect, key) for key in SAMPLING}
    args = PPOConfig(output_dir=str(out.checkpoints), temperature=1.0, bf16=False, **given)
    sampling = {
        where: make_sampling(args, policy.tokenizer, policy.model.get_input_embeddings().num_embeddings)
        for where, policy in policies.items()
    }
    number = out.round or 1
    return Asker(policies, sampling, collect, f"{settings.seed} {number}"), choose(everywhere, collect.prompts, number)


def _drawn(asker: Asker, asked: Sequence[Question], out: RunDir) -> list[dict[str, Any]]:
    """All candidates; what an earlier run has finished of them is not drawn again."""
    size = asker.collect.batch_size
    kept, begun = agree(lambda: _finished(out, size))
    with progress(len(asked), "collect", "prompt", initial=begun) as bar:
        for part in asker.rows(asked, begun):
            out.add(CANDIDATES_SO_FAR, part)
            kept += part
            bar.update(min(size, len(asked) - bar.n))
    return kept


def _finished(out: RunDir, size: int) -> tuple[list[dict[str, Any]], int]:
    """The rows of the batches that are whole, and the prompt to go on with; the last batch may have been cut off."""
    kept = read_jsonl(out.path / CANDIDATES_SO_FAR)
    begun = max((row["number"] for row in kept), default=0) // size * size
    kept = [row for row in kept if row["number"] < begun]
    write_jsonl(out.path / CANDIDATES_SO_FAR, kept)
    return kept, begun


def _policies(settings: Settings, out: RunDir, strings: Sequence[str]) -> dict[str, Policy]:
    """Who answers, by where each came from: those of `collect.policies`, else the newest that the run has made."""
    found: dict[str, Policy] = {}
    first_round = (out.round or 1) == 1
    names = [name for name in settings.collect.policies if not (out.round == 1 and name == "ppo")]
    if len(names) < len(settings.collect.policies):
        print("note: collect.policies names ppo, which there is from round 2 on", flush=True)
    for name in names or ["" if first_round else "ppo"]:
        choice, upstream = settings.policy, None
        if not name:
            upstream = out.upstream("sft", "pretrain", policy=settings.policy)
        elif name in _MAKE_POLICIES:
            before = out.in_round(out.round - 1) if out.round and name == "ppo" else out
            upstream = before.upstream(name, policy=settings.policy)
            if upstream is None:
                raise NotFinishedError(f"{before.runs / before.name} has no {name} to be asked; make it first.")
            choice = {**choice, "path": None}  # it was chosen by hand for what came before
        elif name in STAGES:
            takes = ", ".join(_MAKE_POLICIES)
            raise UserError(f"collect.policies names {name}, which makes no policy; it takes {takes}, and paths.")
        else:
            choice = {**settings.policy, "path": name}
        policy, where = load_policy(choice, upstream, strings, settings.seed)
        if where.endswith(", untrained"):
            raise NotFinishedError("there is no policy to answer yet; run stage=sft first, or give policy.path=.")
        found[where] = policy
    return found


def choose(every: Sequence[Question], count: int, number: int) -> list[Question]:
    """`count` prompts for round `number`, which goes on where the one before ended; those that are alike once.

    Where there are fewer, the first ones are asked again, for other answers.
    """
    different = list({repr(question.prompt): question for question in every}.values())
    if not different:
        raise UserError(
            "no prompt leaves room for an answer in the policy's positions; lower collect.response_length, or "
            "data.prompt_tokens."
        )
    first = (number - 1) * count
    if len(different) < first + count:
        print(
            f"the data has {len(different)} different prompts, so some are asked again, for other answers", flush=True
        )
    return [different[place % len(different)] for place in range(first, first + count)]
