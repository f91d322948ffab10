"""Reward models: heads, pooling, and a shift of all scores that outlives saving."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import good_share, tiny_tokenizer, trainer
from tiny_rewards import distilbert, llama, tiny_model

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.classifiers import RewardModel, Scorer, shift_scores, with_head
from rlhf_pipeline.models.rewards import Reward


def padded(side: str) -> dict[str, torch.Tensor]:
    rows = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
    fill = [[1] * (5 - len(row)) for row in rows]
    ids = [row + f if side == "right" else f + row for row, f in zip(rows, fill, strict=True)]
    mask = [[int(i > 1) for i in row] for row in ids]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize("make", [tiny_model, llama, distilbert])
@pytest.mark.parametrize(("head", "pooling"), [("mlp", "last"), ("linear", "mean"), ("mlp", "mean")])
@torch.no_grad()
def test_scores_do_not_see_padding(make: Any, head: Any, pooling: Any) -> None:
    torch.manual_seed(0)
    model = with_head(make(), head, pooling).eval()
    assert isinstance(model, RewardModel)
    right, left = (model(**padded(side)).logits for side in ("right", "left"))
    alone = [model(input_ids=torch.tensor([row])).logits[0] for row in ([5, 6, 7, 8, 9], [10, 11], [12, 13, 14])]
    assert right.shape == (3, 1)
    torch.testing.assert_close(right, left)
    torch.testing.assert_close(right, torch.stack(alone))


@torch.no_grad()
def test_the_mean_weighs_the_later_tokens_more() -> None:
    model = with_head(tiny_model(), "linear", "mean").eval()
    states = model.base_model(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state[0]
    expected = model.score((1 * states[0] + 2 * states[1] + 3 * states[2]) / 6)
    torch.testing.assert_close(model(input_ids=torch.tensor([[5, 6, 7]])).logits[0], expected)


def test_the_plain_class_where_it_has_that_head() -> None:
    for make in (tiny_model, distilbert, llama):
        model = make()
        assert with_head(model, "linear", "last") is model
    own = with_head(tiny_model(), "mlp", "mean")
    assert with_head(own, "mlp", "mean") is own
    with pytest.raises(UserError, match=r"reward\.head=mlp and reward\.pooling=mean, not linear and last"):
        with_head(own, "linear", "last")


@pytest.mark.parametrize(("make", "head"), [(tiny_model, "linear"), (llama, "linear"), (tiny_model, "mlp")])
def test_a_shift_moves_all_scores_alike_and_outlives_saving(make: Any, head: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer, texts = tiny_tokenizer(), ["the film was good", "bad", "nobody liked it"]
    model = with_head(make(), head, "last")
    before = Scorer(model, tokenizer, 8, append_eos=True).logits(texts)
    shift_scores(model, -1.2)
    shift_scores(model, -0.5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reopened = Scorer.open(str(tmp_path), 8, append_eos=True)
    assert type(reopened.model) is type(model)
    torch.testing.assert_close(reopened.logits(texts), before - 1.7)
    assert (tmp_path / "model.safetensors").exists()


@torch.no_grad()
def test_a_critic_starts_at_the_shifted_scores(tmp_path: Path) -> None:
    ids, tokenizer = torch.tensor([[5, 6, 7]]), tiny_tokenizer()
    for model, shift in ((tiny_model(), -1.7), (with_head(tiny_model(), "mlp", "last"), -1.7), (tiny_model(), 0.0)):
        shift_scores(model, shift)
        judge = Reward(good_share, "r", scorer=Scorer(model, tokenizer, 8, append_eos=True), readout=(1.0,))
        ppo = trainer(tokenizer, tmp_path, given={"reward_model": judge}, critic="separate", critic_init="reward")
        values = ppo.value_model.eval()(input_ids=ids).logits
        assert not any(mine is other for mine in ppo.value_model.parameters() for other in model.parameters())
        torch.testing.assert_close(values, model.eval()(input_ids=ids).logits + shift)
