"""Step 1: supervised fine-tuning. The policy learns to complete prompts as the demonstrations do.

python -m rlhf_pipeline stage=sft
python -m rlhf_pipeline stage=sft data=preferences   (on the best answers of stage=collect: rejection sampling)
"""

import functools
import math

from datasets import Dataset
from peft import get_peft_model
from trl import SFTConfig

from rlhf_pipeline.data import fingerprint, row_type, texts
from rlhf_pipeline.data.records import Demonstration, Dialogue, Preference, Ranking
from rlhf_pipeline.data.templates import template_of
from rlhf_pipeline.data.tokenization import conversational, demonstrations, shortened
from rlhf_pipeline.files import read_log
from rlhf_pipeline.models.policies import load_policy, lora_config, without_adapter
from rlhf_pipeline.models.precision import fuse_gelu, store_in_bf16
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.training.batching import OrderedSFTTrainer
from rlhf_pipeline.training.preferences import preferences_of
from rlhf_pipeline.training.setup import (
    attach_log,
    building,
    limit_length,
    print_input,
    read_data,
    sharded_weights,
    trainer_args,
)


def run(settings: Settings, out: RunDir) -> None:
    """Train on the completions alone, unless `trainer.completion_only_loss=false`."""
    args = trainer_args(SFTConfig, settings, out)
    compared = row_type(settings.data["name"]) == Preference | Ranking
    source = preferences_of(out, settings.data) if compared else settings.data
    rows = read_data(source, settings.seed, answers=True)
    # Rejection sampling trains the policy that gave the answers.
    upstream = out.upstream(*(["sft"] if compared else []), "pretrain", policy=settings.policy)
    policy, where = load_policy(settings.policy, upstream, texts(rows.train), settings.seed)
    print_input("policy", where)
    if conversational(rows.train):
        policy.tokenizer.chat_template = template_of(policy.tokenizer)  # saved with the model, for all who use it
    limit_length(args, policy.model)
    fuse_gelu(policy.model)
    lessons = [
        demonstrations(split, policy.tokenizer, settings.data, settings.seed + number)
        for number, split in enumerate((rows.train, rows.test))
    ]
    if not args.packing or args.packing_strategy == "bfd":  # other strategies continue in the next block
        apart = compared or isinstance(rows.train[0], Demonstration | Dialogue)
        lessons = shortened(lessons, policy.tokenizer, args.max_length, apart)
    train, test = (
        Dataset.from_dict({"input_ids": [x.ids for x in split], "completion_mask": [x.learnt for x in split]})
        for split in lessons
    )
    out.begin(settings, {"policy": where}, fingerprint(source, rows))

    model, adapter = policy.model, lora_config(settings.policy)
    with building():
        if adapter is not None and args.bf16 and not settings.policy.get("quantize"):
            model, adapter = get_peft_model(model, adapter), None
            store_in_bf16(model)
        trainer = OrderedSFTTrainer(
            model,
            args,
            train_dataset=train,
            eval_dataset=test,
            processing_class=policy.tokenizer,
            peft_config=adapter,
        )
    checkpoint = attach_log(trainer, out)
    logged = [row for row in read_log(out.path / "metrics.jsonl") if row["step"] == 0]
    args.eval_on_start = not logged  # not evaluate(): accelerate would then treat the model as prepared for training
    trainer.train(resume_from_checkpoint=checkpoint)
    before = next(row["eval_loss"] for row in logged or trainer.state.log_history if "eval_loss" in row)
    loss = trainer.evaluate()["eval_loss"]
    weights = sharded_weights(trainer)
    if not out.leads:
        return
    out.save_model(functools.partial(without_adapter(trainer.model, policy).save, weights=weights))
    results = {"eval_loss": loss, "eval_loss_before": before, "eval_perplexity": math.exp(loss)}
    out.finish(results, objective=-loss)
