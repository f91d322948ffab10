"""Step 0: a language model from scratch. Its tokenizer is trained on the texts, then the model itself.

python -m rlhf_pipeline stage=pretrain
"""

import functools
import math

from datasets import Dataset
from trl import SFTConfig

from rlhf_pipeline.data import fingerprint, texts
from rlhf_pipeline.data.tokenization import documents
from rlhf_pipeline.models.policies import make_policy
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.training.batching import OrderedSFTTrainer
from rlhf_pipeline.training.setup import attach_log, building, limit_length, read_data, sharded_weights, trainer_args


def run(settings: Settings, out: RunDir) -> None:
    """Train the policy on all of each text, packed into blocks."""
    args = trainer_args(SFTConfig, settings, out)
    rows = read_data(settings.data, settings.seed, answers=True)
    out.begin(settings, {}, fingerprint(settings.data, rows))
    policy = make_policy(settings.policy, texts(rows.train), settings.seed)
    limit_length(args, policy.model)
    parameters = policy.model.num_parameters() / 1e6
    print(
        f"a GPT-2 of {parameters:.2f} M parameters, {len(policy.tokenizer)} tokens, {len(rows.train)} texts", flush=True
    )
    train, test = (documents(split, policy.tokenizer) for split in (rows.train, rows.test))
    longer = sum(len(ids) > args.max_length for ids in (*train, *test))
    if longer and (not args.packing or args.packing_strategy == "bfd"):  # other strategies lose nothing
        said = f"{longer} of {len(train) + len(test)} texts lose what is beyond {args.max_length} tokens"
        print(f"warning: {said}; trainer.packing_strategy=wrapped loses nothing", flush=True)
    with building():
        trainer = OrderedSFTTrainer(
            policy.model,
            args,
            train_dataset=Dataset.from_dict({"input_ids": train}),
            eval_dataset=Dataset.from_dict({"input_ids": test}),
            processing_class=policy.tokenizer,
        )
    trainer.train(resume_from_checkpoint=attach_log(trainer, out))
    loss = trainer.evaluate()["eval_loss"]
    weights = sharded_weights(trainer)
    if not out.leads:
        return
    out.save_model(functools.partial(policy.save, weights=weights))
    out.finish({"eval_loss": loss, "eval_perplexity": math.exp(loss), "parameters_M": parameters}, objective=-loss)
