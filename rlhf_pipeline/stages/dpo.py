"""DPO (Rafailov et al. 2023, arXiv 2305.18290): a policy learns from preferences directly, without a reward model.

python -m rlhf_pipeline stage=dpo data=preferences data.path=pairs.jsonl
"""

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from rlhf_pipeline.data import fingerprint, texts
from rlhf_pipeline.data.records import Preference, Ranking
from rlhf_pipeline.data.templates import format_prompt
from rlhf_pipeline.data.tokenization import lesson
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.policies import Policy, load_policy, lora_config, without_adapter
from rlhf_pipeline.progress import parts
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.training.batching import ResumableTrainer
from rlhf_pipeline.training.preferences import comparisons_of, preferences_of
from rlhf_pipeline.training.setup import attach_log, building, limit_length, print_input, read_data, trainer_args


def run(settings: Settings, out: RunDir) -> None:
    """Train the policy to prefer the better answers, but to stay near its start, the reference."""
    args = trainer_args(DPOConfig, settings, out)
    source = preferences_of(out, settings.data)
    rows = read_data(source, settings.seed)
    upstream = out.upstream("sft", "pretrain", policy=settings.policy)
    policy, where = load_policy(settings.policy, upstream, texts(rows.train), settings.seed)
    print_input("policy", where)
    limit_length(args, policy.model)
    train, test = (pairs(split, policy) for split in (rows.train, rows.test))
    out.begin(settings, {"policy": where}, fingerprint(source, rows))
    adapter = lora_config(settings.policy)
    with building():
        trainer = PairTrainer(
            policy.model,
            None if adapter else copy.deepcopy(policy.model),  # with an adapter, the base is the reference
            args,
            train_dataset=train,
            eval_dataset=test,
            processing_class=policy.tokenizer,
            peft_config=adapter,
        )
    trainer.train(resume_from_checkpoint=attach_log(trainer, out))
    trainer.evaluate()
    found = trainer.state.log_history[-1]
    if not out.leads:
        return
    out.save_model(without_adapter(trainer.model, policy).save)
    names = {"eval_loss": "eval_loss", "accuracy": "eval_rewards/accuracies", "margin": "eval_rewards/margins"}
    results = {name: found[key] for name, key in names.items()} | {"pairs": len(test)}
    out.finish(results, objective=results["accuracy"])


class PairTrainer(ResumableTrainer, DPOTrainer):
    """TRL's DPOTrainer on rows of token ids, in an order that a resumed run repeats."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def _uncounted(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "completion_mask": torch.zeros_like(batch["completion_mask"])}


def pairs(rows: Sequence[Preference | Ranking], policy: Policy) -> Dataset:
    """Return token ids of prompts with their better and worse answers. Each answer ends with EOS."""
    columns: dict[str, list[Any]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": [], "length": []}
    for row in itertools.chain.from_iterable(parts(comparisons_of(rows), 100, "tokenize", "prompt")):
        prompt = format_prompt(policy.tokenizer, row.prompt)
        answers = [lesson(policy.tokenizer, [(prompt, False), (answer, True)]) for answer in row.answers]
        split = [len(ids) - sum(learnt) for ids, learnt in answers]
        ends = [[*ids[at:], policy.tokenizer.eos_token_id] for (ids, _), at in zip(answers, split, strict=True)]
        for better, worse, _ in row.pairs:
            asked = answers[better].ids[: split[better]]
            length = len(asked) + max(len(ends[better]), len(ends[worse]))
            for column, value in zip(columns.values(), (asked, ends[better], ends[worse], length), strict=True):
                column.append(value)
    if not columns["prompt_ids"]:
        raise UserError("training and held-out data each need a prompt with two different answers; add preferences.")
    return Dataset.from_dict(columns)
