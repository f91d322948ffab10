"""Step 1: supervised fine-tuning. The policy learns to complete prompts as the demonstrations do.

python -m rlhf_pipeline stage=sft
"""

import math

from datasets import Dataset
from trl import SFTConfig

from rlhf_pipeline.data import demonstrations, fingerprint, load_data, texts
from rlhf_pipeline.policies import Policy, load_policy, lora_config
from rlhf_pipeline.precision import fuse_gelu
from rlhf_pipeline.rundir import RunDir, read_jsonl
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.stages.batching import OrderedSFTTrainer
from rlhf_pipeline.stages.common import Clock, fit_length, say_done, say_taken, trainer_args, watch


def run(settings: Settings, out: RunDir) -> None:
    """Train on the completions alone, unless `trainer.completion_only_loss=false`."""
    clock, args = Clock(), trainer_args(SFTConfig, settings, out)
    rows = load_data(settings.data, settings.seed)
    policy, where = load_policy(
        settings.policy,
        out.upstream("pretrain", policy=settings.policy),
        texts(rows.train),
        settings.seed,
    )
    say_taken("policy", where)
    fit_length(args, policy.model)
    fuse_gelu(policy.model)
    out.begin(settings, {"policy": where}, fingerprint(settings.data, rows))

    def dataset(split: list, seed: int) -> Dataset:  # type: ignore[type-arg]
        pairs = demonstrations(split, policy.tokenizer, settings.data, seed)
        masks = [[0] * len(prompt) + [1] * len(completion) for prompt, completion in pairs]
        return Dataset.from_dict({"input_ids": [p + c for p, c in pairs], "completion_mask": masks})

    trainer = OrderedSFTTrainer(
        policy.model,
        args,
        train_dataset=dataset(rows.train, settings.seed),
        eval_dataset=dataset(rows.test, settings.seed + 1),
        processing_class=policy.tokenizer,
        peft_config=lora_config(settings.policy),
    )
    checkpoint = watch(trainer, out, "sft")
    logged = [row["eval_loss"] for row in read_jsonl(out.path / "metrics.jsonl") if row["step"] == 0]
    before = logged[0] if logged else trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=checkpoint)
    loss = trainer.evaluate()["eval_loss"]
    # An adapter is merged: what is saved stands alone, and the next stage may put its own adapter in.
    whole = policy if trainer.model is policy.model else Policy(trainer.model.merge_and_unload(), policy.tokenizer)
    out.save_model(whole.save)
    results = {"eval_loss": loss, "eval_loss_before": before, "eval_perplexity": math.exp(loss)}
    out.finish(results, objective=-loss)
    say_done(
        out,
        f"held-out loss {loss:.3f}, from {before:.3f}",
        clock,
    )
