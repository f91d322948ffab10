"""Step 2, first half: sample answers to compare. People, or a reward in their place, label them.

python -m rlhf_pipeline stage=collect
"""

import os
from collections.abc import Sequence
from typing import Any

from rlhf_pipeline.data import fingerprint
from rlhf_pipeline.data.tokenization import Question, columns_of, questions
from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.evaluation.lineup import make_sampler, policy_at, with_room
from rlhf_pipeline.feedback.candidates import Asker
from rlhf_pipeline.feedback.labelling import note_progress, pull_labels, rank_by_reward, write_label_files
from rlhf_pipeline.files import read_jsonl, write_jsonl
from rlhf_pipeline.hub import model_folder
from rlhf_pipeline.models.policies import registry
from rlhf_pipeline.models.rewards import Reward, load_reward, trained_part
from rlhf_pipeline.processes import agree
from rlhf_pipeline.progress import progress
from rlhf_pipeline.registry import rename_in_errors
from rlhf_pipeline.runs.directory import CANDIDATES, CANDIDATES_SO_FAR, LABELS, PROJECT, RunDir
from rlhf_pipeline.runs.models import find_policy
from rlhf_pipeline.settings import SAMPLING, Settings
from rlhf_pipeline.training.setup import print_input, quiet, read_data


def run(settings: Settings, out: RunDir) -> None:
    """Sample the candidates, unless they exist, then record how many are labelled."""
    quiet()
    reward, judge = _labeler(settings, out)
    if not agree(lambda: (out.path / CANDIDATES).exists() and bool(out.record)):
        _collect(settings, out, reward, {"labeler": judge} if judge else {})
    elif out.leads:
        out.reopen(settings)
    if not out.leads:
        return
    if reward is not None:
        noise, seed = (settings.labeler or {}).get("noise", 0.0), f"{settings.seed} {out.round}"
        found, agreement = rank_by_reward(read_jsonl(out.path / CANDIDATES), reward, noise, seed)
        people = [row for row in read_jsonl(out.path / LABELS) if row.get("source")]
        write_jsonl(out.path / LABELS, found + people)
        print(f"{judge} ranked the answers; {agreement:.1%} of the pairs are in the order without noise", flush=True)
    elif (out.path / PROJECT).exists():
        try:
            pull_labels(out)
        except UserError as error:  # the server may not be running
            print(f"note: no new labels from Label Studio: {error}", flush=True)
    note_progress(settings.collect, out)


def _labeler(settings: Settings, out: RunDir) -> tuple[Reward | None, str]:
    """Return the reward that labels in place of people, if there is one, and its origin."""
    choice = settings.labelling_reward
    if choice is None:
        return None, ""
    with rename_in_errors("labeler", "reward"):
        return load_reward(choice, out.upstream("reward", reward=trained_part(choice)))


def _collect(settings: Settings, out: RunDir, reward: Reward | None, judge: dict[str, str]) -> None:
    """Sample the candidates. Batches of prompts that an earlier run finished are kept."""
    collect, number, rows = settings.collect, out.round or 1, read_data(settings.data, settings.seed)
    places = _policies(settings, out)
    for where in places:
        print_input("policy", where)
    policies = {where: policy_at(settings.policy, where) for where in places}
    opened = list(policies.values())
    every = questions(rows.train, opened[0].tokenizer, settings.data, settings.seed)
    every = with_room(every, opened, collect.response_length)
    if reward is not None:
        reward.check_columns(columns_of(every))
    parents = {f"policy[{n}]" if n else "policy": where for n, where in enumerate(places)}
    out.begin(settings, {**parents, **judge}, fingerprint(settings.data, rows))
    as_ppo = {key: getattr(collect, key) for key in SAMPLING}
    sampling = {where: make_sampler(where, policy, as_ppo).sampling for where, policy in policies.items()}
    asker = Asker(policies, sampling, collect, f"{settings.seed} {number}")
    asked = choose(every, collect.prompts, number)
    kept, begun = agree(lambda: _finished(out, collect.batch_size))
    with progress(len(asked), "collect", "prompt", initial=begun) as bar:
        for part in asker.rows(asked, begun):
            out.add(CANDIDATES_SO_FAR, part)
            kept += part
            bar.update(min(collect.batch_size, len(asked) - bar.n))
    if not out.leads:
        return
    if not kept:
        (out.path / CANDIDATES_SO_FAR).unlink()  # otherwise other settings would be refused as different work
        raise UserError(
            f"none of {len(asked)} prompts got two different answers; raise collect.temperatures, or "
            "collect.similarity."
        )
    few = sum(len(row["answers"]) < collect.answers for row in kept)
    for count, lack in ((len(asked) - len(kept), "no two"), (few, f"fewer than {collect.answers}")):
        if count:
            print(f"{count} of {len(asked)} prompts got {lack} different answers", flush=True)
    write_label_files(out, kept, settings.report.lang)
    os.replace(out.path / CANDIDATES_SO_FAR, out.path / CANDIDATES)


def _policies(settings: Settings, out: RunDir) -> list[str]:
    """Return the paths of the policies that answer: `collect.policies`, else the run's newest policy."""
    later = (out.round or 1) > 1
    names = [name for name in settings.collect.policies if name != "ppo" or out.round != 1]
    if len(names) < len(settings.collect.policies):
        print("note: collect.policies names ppo, which exists from round 2 on", flush=True)
    if names or later:
        before = out.in_round(out.round - 1) if out.round and later else out
        return [find_policy(name, before if name == "ppo" else out) for name in names or ["ppo"]]
    upstream = None if settings.policy.get("path") else out.upstream("sft", "pretrain", policy=settings.policy)
    if where := upstream or registry.build(settings.policy).path:
        return [model_folder(str(where))]
    raise NotFinishedError("there is no policy to answer yet; run stage=sft first, or give policy.path=.")


def choose(every: Sequence[Question], count: int, number: int) -> list[Question]:
    """Return `count` different prompts for round `number`, which continues where the round before it ended.

    If there are too few, the first prompts are used again, to get other answers.
    """
    different = list({repr(question.prompt): question for question in every}.values())
    first = (number - 1) * count
    if len(different) < first + count:
        print(f"the data has {len(different)} different prompts: some are used again, to get other answers", flush=True)
    return [different[place % len(different)] for place in range(first, first + count)]


def _finished(out: RunDir, size: int) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of the complete batches, and the number of the next prompt. The last batch may be incomplete."""
    kept = read_jsonl(out.path / CANDIDATES_SO_FAR)
    begun = max((row["number"] for row in kept), default=0) // size * size
    kept = [row for row in kept if row["number"] < begun]
    write_jsonl(out.path / CANDIDATES_SO_FAR, kept)
    return kept, begun
