"""Scripts written for each generation of TRL run once their import is changed, as the table in PPO's README says."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import ROOT
from huggingface_hub import ModelCard
from tiny import PROMPTS, tiny_policy, tiny_scorer, tiny_tokenizer, weights
from transformers import AutoModelForCausalLM

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.ppo import trl_0_11

TOKENIZER = tiny_tokenizer()
trainer = functools.partial(tiny.trainer, TOKENIZER)
NOTHING = {"reward_model": None, "train_dataset": None}  # the loop samples and scores

# The loop of TRL's sentiment notebook, as many articles have it.
SENTIMENT = """
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.core import LengthSampler

config = PPOConfig(model_name="model", learning_rate=2e-3, batch_size=16, mini_batch_size=4, log_with=None)
tokenizer = AutoTokenizer.from_pretrained(config.model_name)
tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
ref_model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)

dataset = Dataset.from_dict({"query": ["the film", "the plot was", "nobody", "the cast"] * 8})
dataset = dataset.map(lambda row: {"input_ids": tokenizer.encode(row["query"])})
dataset.set_format(type="torch")

def collator(data):
    return {key: [d[key] for d in data] for key in data[0]}

ppo_trainer = PPOTrainer(config, model, ref_model, tokenizer, dataset=dataset, data_collator=collator)
output_length_sampler = LengthSampler(6, 12)
generation_kwargs = {
    "min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": tokenizer.eos_token_id,
}
history = []
for epoch in range(15):
    for batch in ppo_trainer.dataloader:
        query_tensors = batch["input_ids"]
        response_tensors = []
        for query in query_tensors:
            gen_len = output_length_sampler()
            generation_kwargs["max_new_tokens"] = gen_len
            response = ppo_trainer.generate(query, **generation_kwargs)
            response_tensors.append(response.squeeze()[len(query):])
        batch["response"] = [tokenizer.decode(r.squeeze()) for r in response_tensors]
        rewards = [torch.tensor(float("o" in text)) for text in batch["response"]]
        stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
        ppo_trainer.log_stats(stats, batch, rewards)
        history.append(stats["ppo/mean_scores"])
model.save_pretrained("trained")
tokenizer.save_pretrained("trained")
"""

# TRL's example of 0.12, and that of 0.15 to 1.12.
TRAINER_0_12 = """
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import PPOConfig, PPOTrainer

training_args = PPOConfig(
    output_dir="trained", exp_name="ppo", learning_rate=1e-3, per_device_train_batch_size=4, total_episodes=16,
    gradient_accumulation_steps=2, num_ppo_epochs=1, num_mini_batches=1, response_length=5, stop_token="eos",
    missing_eos_penalty=1.0, report_to="none", num_sample_generations=0, save_strategy="no",
)
tokenizer = AutoTokenizer.from_pretrained("model", padding_side="left")
policy, ref_policy = (AutoModelForCausalLM.from_pretrained("model") for _ in range(2))
value_model, reward_model = (AutoModelForSequenceClassification.from_pretrained("scorer") for _ in range(2))
dataset = Dataset.from_dict({"input_ids": tokenizer(["the film was", "the plot"] * 8)["input_ids"]})
trainer = PPOTrainer(
    config=training_args, processing_class=tokenizer, policy=policy, ref_policy=ref_policy, reward_model=reward_model,
    value_model=value_model, train_dataset=dataset, eval_dataset=dataset,
)
trainer.train()
trainer.save_model(training_args.output_dir)
trainer.create_model_card(dataset_name="stanfordnlp/imdb")
trainer.generate_completions()
"""
TRAINER_0_15 = (
    TRAINER_0_12.replace("config=", "args=")
    .replace("ref_policy=ref", "ref_model=ref")
    .replace("policy=pol", "model=pol")
)
# A loop of one's own, with today's settings and no reward.
OWN_LOOP = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import PPOConfig, PPOTrainer

tokenizer = AutoTokenizer.from_pretrained("model")
policy = AutoModelForCausalLM.from_pretrained("model")
args = PPOConfig(per_device_train_batch_size=8, total_episodes=16, stop_token="eos", report_to="none")
trainer = PPOTrainer(args, tokenizer, policy, None)
queries = tokenizer(["the film", "nobody"] * 4)["input_ids"]
for _ in range(2):
    responses = trainer.generate(queries, max_new_tokens=8, return_prompt=False)
    scores = [text.count("o") for text in tokenizer.batch_decode(responses)]
    stats = trainer.step(queries, responses, scores)
    print(stats["objective/scores"], stats["objective/kl"])
trainer.save_model("trained")
"""
SCRIPTS = {
    "TRL 0.7 to 0.11": SENTIMENT, "TRL 0.12 to 0.14": TRAINER_0_12, "TRL 0.15 to 1.12": TRAINER_0_15,
    "a loop of your own": OWN_LOOP,
}  # fmt: skip


README = (ROOT / "rlhf_pipeline" / "ppo" / "README.md").read_text(encoding="utf-8")
IMPORTS = dict(re.findall(r"^\| ([^|]+) \| `(from rlhf_pipeline[^`]+)` \|", README, re.M))  # of each row of its table


def with_import_changed(script: str, new: str) -> str:
    """The script with the README's import in place of all of TRL's."""
    changed = re.sub(r"^from trl import .*$", new, script, count=1, flags=re.M)
    return re.sub(r"^from trl.* import .*\n", "", changed, flags=re.M)


@pytest.fixture
def models(workplace: Path) -> Path:
    """A current folder with a policy and a reward model."""
    for folder, model in (("model", tiny_policy(TOKENIZER)), ("scorer", tiny_scorer(TOKENIZER))):
        model.save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
    return workplace


@pytest.mark.parametrize("generation", IMPORTS)
def test_a_script_of_each_generation_runs_with_its_import_changed(generation: str, models: Path) -> None:
    assert IMPORTS.keys() == SCRIPTS.keys()
    names: dict[str, Any] = {}
    exec(with_import_changed(SCRIPTS[generation], IMPORTS[generation]), names)
    saved, start = (AutoModelForCausalLM.from_pretrained(folder) for folder in ("trained", "model"))
    assert not torch.equal(saved.transformer.wte.weight, start.transformer.wte.weight)
    if generation == "TRL 0.7 to 0.11":  # it learns
        history = names["history"]
        assert sum(history[-4:]) / 4 > sum(history[:4]) / 4 + 0.05
        assert names["stats"]["objective/kl"] > 0
    else:
        assert names["trainer"].state.episode == 16
    if "create_model_card" in SCRIPTS[generation]:
        card = ModelCard.load("trained/README.md")
        assert card.data.datasets == ["stanfordnlp/imdb"]
        assert {"ppo", "trl", "rlhf_pipeline"} <= set(card.data.tags)
        assert "learning_rate: 0.001" in card.text


def test_steps_on_what_train_sampled_are_those_of_train(tmp_path: Path) -> None:
    """`step` computes what `train` does, from token ids and scores alone."""
    whole = trainer(tmp_path / "whole", total_episodes=32)
    rollouts, own = [], whole._roll_out
    whole._roll_out = lambda update: rollouts.append(own(update)) or rollouts[-1]
    whole.train()
    stepped = trainer(tmp_path / "stepped", total_episodes=32, given=NOTHING)
    for rollout in rollouts:
        batch = rollout.batch
        rows = zip(batch.tokens, batch.prompt_lengths.tolist(), batch.response_lengths.tolist(), strict=True)
        parts = [(row[:start], row[start : start + length]) for row, start, length in rows]
        stats = stepped.step(*map(list, zip(*parts, strict=True)), list(rollout.scores))
    assert len(rollouts) == 4
    assert torch.equal(weights(whole), weights(stepped))
    last = [row for row in whole.state.log_history if "objective/kl" in row][-1]
    assert stats["objective/kl"] == last["objective/kl"]


def test_what_generate_draws_is_what_step_takes_it_for(tmp_path: Path) -> None:
    """Probabilities are those of the distribution that was sampled from: temperature, ends, suppressed tokens."""
    ppo = trainer(tmp_path, stop_token=None, given=NOTHING)
    torch.manual_seed(0)
    ids = [torch.tensor(row) for row in PROMPTS * 2]
    found = ppo.generate(
        ids, return_prompt=False, max_new_tokens=9, temperature=0.5, eos_token_id=[7, 99999], suppress_tokens=[3, 4]
    )
    assert len(found) == 8
    assert ppo.sampling.stop_ids == (7,)
    assert ppo.sampling.temperature == 0.5
    assert not any(token in (3, 4) for row in found for token in row.tolist())
    assert all(7 not in row[:-1] and len(row) <= 9 for row in found)
    one = ppo.generate(ids[0], max_new_tokens=3, eos_token_id=-1)
    assert one.shape == (1, len(ids[0]) + 3)
    assert one[0, : len(ids[0])].tolist() == PROMPTS[0]
    ppo.generate(ids[:1], temperature=0.5, suppress_tokens=[3, 4])
    with pytest.raises(UserError, match="response 1 holds the token 3"):
        ppo.step(ids, [torch.tensor([9, 8]), torch.tensor([3]), *found[2:]], [0.0] * 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_k": 50}, "top_k=50.*it takes 0 or None"),
        ({"top_p": 0.9}, "top_p=0.9.*it takes 1 or None"),
        ({"num_beams": 4}, "num_beams=4.*leave it out"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_other_ways_to_sample_are_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    ppo = trainer(tmp_path, given=NOTHING)
    with pytest.raises(UserError, match=said):
        ppo.generate(torch.tensor([5, 6]), **options)


def test_what_step_cannot_learn_from_is_refused(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, given=NOTHING)
    rows, scores = [[5, 6]] * 8, [0.0] * 8
    with pytest.raises(UserError, match="7 queries, 8 responses and 8 scores; it takes 8"):
        ppo.step(rows[1:], rows, scores)
    with pytest.raises(UserError, match=r"row 0 of .* has an empty response"):
        ppo.step(rows, [[], *rows[1:]], scores)
    with pytest.raises(UserError, match="is nan; it must be finite"):
        ppo.step(rows, rows, [float("nan"), *scores[1:]])
    with pytest.raises(UserError, match="64 positions"):
        ppo.step(rows, [[5] * 70, *rows[1:]], scores)
    with pytest.raises(UserError, match=r"train\(\) needs a reward_model and a train_dataset"):
        ppo.train()
    with pytest.raises(UserError, match="total_episodes= or max_steps="):
        trainer(tmp_path, given=NOTHING, total_episodes=None).step(rows, rows, scores)


def test_old_settings_become_todays() -> None:
    config = trl_0_11.PPOConfig(batch_size=16, mini_batch_size=2, gradient_accumulation_steps=4, early_stopping=True)
    args = config.current()
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.num_mini_batches) == (2, 8, 2)
    assert (args.kl_coef, args.kl_target, args.max_update_kl, args.max_grad_norm) == (0.2, 6.0, 1.5, 0.0)
    assert trl_0_11.PPOConfig(adap_kl_ctrl=False).current().kl_target is None
    with pytest.raises(UserError, match="not a multiple"):
        trl_0_11.PPOConfig(batch_size=10, mini_batch_size=4).current()
    with pytest.raises(UserError, match="kl_penalty='full'"):
        trl_0_11.PPOConfig(kl_penalty="full").current()


def test_the_small_helpers() -> None:
    policy = tiny_policy(TOKENIZER)
    copied = trl_0_11.create_reference_model(policy)
    assert copied is not policy
    assert not any(p.requires_grad for p in copied.parameters())
    assert trl_0_11.respond_to_batch(policy, torch.tensor([[5, 6], [7, 8]]), txt_len=4).shape == (2, 4)
    assert {trl_0_11.LengthSampler(2, 4)() for _ in range(50)} == {2, 3}
    assert trl_0_11.AutoModelForCausalLMWithValueHead.from_pretrained(policy) is policy
