"""Policies of any family: their special tokens settled in one place, opened, sampled from and trained."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PROMPTS, TEXTS, tiny_gguf, tiny_tokenizer, trainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf_pipeline.data import templates
from rlhf_pipeline.data.records import Turn
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.policies import (
    load_policy,
    open_config,
    open_policy,
    policy_config,
    train_tokenizer,
)
from rlhf_pipeline.models.rewards import load_reward
from rlhf_pipeline.models.sampling import Sampling, sample

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


def saved(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def gpt2(**options: Any) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(**{"vocab_size": 300, "n_positions": 64, "n_layer": 1, "n_embd": 16, "n_head": 2} | options)
    )


FAMILIES = {
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {"vocab_size": 300}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"vocab_size": 320, "num_key_value_heads": 1}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_of_any_family_goes_through_ppo(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config, model, shape = FAMILIES[family]
    where = saved(tmp_path / "model", model(config(**SHAPE, **shape, bos_token_id=0, eos_token_id=0)), tiny_tokenizer())
    policy, found = load_policy({"name": "causal_lm", "path": where}, None, [], 0)
    assert found == where
    ppo = trainer(
        policy.tokenizer, tmp_path / "out", given={"model": policy.model}, total_episodes=320,
        per_device_train_batch_size=32, num_ppo_epochs=4, learning_rate=2e-3, temperature=0.7, kl_coef=0.0,
    )  # fmt: skip
    ppo.train()
    assert ppo.state.log_history[-1]["objective/scores"] > ppo.state.log_history[0]["objective/scores"]
    ppo.save_model(str(tmp_path / "trained"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    ids = torch.tensor([PROMPTS[0]])
    assert torch.allclose(again.eval()(ids).logits, policy.model.eval()(ids).logits, atol=1e-5)


def test_ids_beyond_the_tokenizers_tokens_are_never_sampled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    where = saved(tmp_path / "model", gpt2(vocab_size=500), tiny_tokenizer())
    policy = open_policy(where)
    ppo = trainer(policy.tokenizer, tmp_path, given={"model": policy.model}, total_episodes=8)
    ppo.train()
    assert int(ppo.last_rollout.batch.tokens.max()) < len(policy.tokenizer) < 500


@pytest.mark.parametrize("pad", [None, "<|endoftext|>"])
def test_the_end_may_pad(pad: str | None, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = pad
    policy = open_policy(saved(tmp_path, gpt2(eos_token_id=0, bos_token_id=0), tokenizer))
    assert policy.tokenizer.pad_token_id == policy.tokenizer.eos_token_id == 0
    assert policy.model.config.pad_token_id == policy.model.generation_config.pad_token_id == 0
    policy.save(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").pad_token_id == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generation_config.eos_token_id == 0


def test_ids_outside_the_vocabulary_count_as_none(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["你好 hello"] * 9, 300, 64, characters=True)
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.bos_token = None
    model = gpt2(vocab_size=len(tokenizer), eos_token_id=None, bos_token_id=None)
    where = saved(tmp_path, model, tokenizer)
    config = (tmp_path / "config.json").read_text().replace('"eos_token_id": null', '"eos_token_id": 50256')
    (tmp_path / "config.json").write_text(config)
    policy = open_policy(where)
    assert policy.tokenizer.eos_token == "[SEP]"
    assert policy.model.config.eos_token_id == policy.tokenizer.sep_token_id == 3
    assert policy.model.config.bos_token_id is None


def test_the_end_comes_from_the_configuration_where_the_tokenizer_names_none(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.bos_token = None
    policy = open_policy(saved(tmp_path / "a", gpt2(eos_token_id=[999, 0], bos_token_id=None), tokenizer))
    assert policy.tokenizer.eos_token == "<|endoftext|>"
    assert policy.model.config.eos_token_id == 0
    with pytest.raises(UserError, match="has no token that ends a text"):
        open_policy(saved(tmp_path / "b", gpt2(eos_token_id=None, bos_token_id=None), tokenizer))


def test_tokens_added_to_the_tokenizer_alone_get_embeddings(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    before = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<a new pad>"})
    model = gpt2(vocab_size=before, eos_token_id=0, bos_token_id=0)
    policy = open_policy(saved(tmp_path, model, tokenizer))
    assert policy.model.get_input_embeddings().num_embeddings == policy.model.config.vocab_size == before + 1
    assert policy.model.config.pad_token_id == before
    logits = policy.model(torch.tensor([[5, before]])).logits
    assert logits.shape == (1, 2, before + 1)
    old = policy.model.get_input_embeddings().weight[:before]
    assert torch.equal(old, model.get_input_embeddings().weight)


def test_a_gguf_file_opens_as_a_model_that_can_be_trained_and_saved(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    file = tmp_path / "tiny.gguf"
    written = tiny_gguf(file)
    policy = open_policy(str(file))
    assert open_config(str(file), "policy.path").hidden_size == 32
    assert (policy.model.name_or_path, policy.model.dtype) == (str(file), torch.float32)
    embeddings = policy.model.get_input_embeddings().weight
    assert torch.allclose(embeddings, torch.from_numpy(written["token_embd"]), atol=0.03)  # 8 bits of up to 4
    ids = policy.tokenizer(TEXTS[0])["input_ids"]
    assert ids == tiny_tokenizer()(TEXTS[0])["input_ids"]
    policy.model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.backward()
    assert embeddings.grad is not None
    policy.save(tmp_path / "saved")
    again = open_policy(str(tmp_path / "saved"))
    assert all(map(torch.equal, policy.model.state_dict().values(), again.model.state_dict().values()))
    assert again.tokenizer(TEXTS[0])["input_ids"] == ids


def test_a_file_that_is_no_gguf_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    (file := tmp_path / "odd.gguf").write_bytes(b"GGUF and then nothing that is")
    with pytest.raises(UserError, match=f"policy.path={file}.*could not be opened"):
        open_policy(str(file))


def test_a_scratch_policys_tables_follow_its_size() -> None:
    texts = ["some words to learn from"] * 20
    tiny, where = load_policy({"name": "gpt2_scratch", "size": "tiny"}, None, texts, 0)
    assert where == "gpt2_scratch, untrained"
    assert tiny.model.config.n_positions == 256
    given, _ = load_policy({"name": "gpt2_scratch", "positions": 32, "vocabulary": 280}, None, texts, 0)
    assert given.model.config.n_positions == 32
    small, _ = policy_config({"name": "gpt2_scratch", "size": "small"}, None)
    assert (small.vocab_size, small.n_positions) == (50_257, 1024)


@pytest.mark.parametrize(
    ("option", "takes"),
    [
        ({"positions": -5}, "positions is -5; it takes a whole number of at least 1 or null"),
        ({"vocabulary": 3, "tokenizer": "characters"}, "vocabulary is 3; it takes a whole number of at least 6 "),
        ({"vocabulary": 100}, "vocabulary is 100; it takes at least 258: 256 bytes and two special tokens"),
        ({"dropout": 3.0}, "dropout is 3.0; it takes a number from 0 to 1"),
    ],
)
def test_a_shape_that_no_policy_has_is_refused(option: dict[str, Any], takes: str) -> None:
    with pytest.raises(UserError, match=f"policy.{takes}"):
        load_policy({"name": "gpt2_scratch", **option}, None, TEXTS, 0)


def test_a_character_tokenizer_writes_chinese_without_blanks(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["今天天气真好！ hello, world. iphone"] * 9, 300, 64, characters=True)
    text = "天气好！iphone hello, 今天"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == "天气好！iphone hello,今天"
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).decode(ids) == "天气好！iphone hello,今天"
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "[SEP]"


def test_a_template_asked_for_travels_with_the_tokenizer(tmp_path: Path) -> None:
    where = saved(tmp_path / "a", gpt2(eos_token_id=0, bos_token_id=0), train_tokenizer(TEXTS, 300, 64))
    policy, _ = load_policy({"name": "causal_lm", "path": where, "template": "dialogue"}, None, [], 0)
    policy.save(tmp_path / "b")
    again = open_policy(str(tmp_path / "b")).tokenizer
    said = again.apply_chat_template(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tokenize=False
    )
    assert said == "a<|endoftext|>b<|endoftext|>"


def test_code_beside_a_checkpoint_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask at the terminal whether to run it."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    tokenizer_config = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    opened: list[Callable[[], Any]] = [
        lambda: open_policy(str(tmp_path)),
        lambda: open_config(str(tmp_path), "policy.path"),
        lambda: load_reward({"name": "classifier", "path": str(tmp_path)}, None),
    ]
    for tokenizer in (False, True):  # with a whole tokenizer it is the model's turn
        if tokenizer:
            tiny_tokenizer().save_pretrained(tmp_path)
        for call in opened:
            with pytest.raises(UserError, match=r"custom code|trust_remote_code"):
                call()
    assert not (tmp_path / "ran").exists()


ODD_FILES = {
    "config.json": ["null", "[]", "{", '{"n_layer": null}', '{"n_layer": 1e30}', '{"model_type": []}'],
    "tokenizer.json": ["null", "[]", '{"model": 3}', '{"added_tokens": {}}', "9" * 400],
    "tokenizer_config.json": ["[]", "7", '{"model_max_length": []}', '{"eos_token": 3}', '{"tokenizer_class": {}}'],
    "generation_config.json": ["[]"],
}
HUGE = [{"model_type": "gpt2", part: 10**30} for part in ("n_layer", "num_labels", "n_head")]  # would take for ever
LEADING_OUT = ["../x.safetensors", "/tmp/x.safetensors", "a/../../x.safetensors"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        *((name, each, "could not be opened .*; if a file in") for name in ODD_FILES for each in ODD_FILES[name]),
        *(("config.json", json.dumps(each), f"has more than 10000 for {[*each][1]}") for each in HUGE),
        *(
            ("model.safetensors.index.json", f'{{"weight_map": {{"wte": "{place}"}}}}', "only files in its own folder")
            for place in LEADING_OUT
        ),
        ("generation_config.json", None, "generation_config.json is not a regular file"),  # a pipe: nobody waits for it
    ],
)
def test_an_odd_file_is_one_line_that_names_the_folder(
    name: str, content: str | None, said: str, tmp_path: Path
) -> None:
    folder = Path(saved(tmp_path, gpt2(), train_tokenizer(TEXTS, 300, 64)))
    (folder / name).unlink(missing_ok=True)
    if content is None:
        os.mkfifo(folder / name)
    else:
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=f"policy.path={folder}.*{said}"):
        open_policy(str(folder))


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "it takes more than 3 s"),
        ("{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}", "much memory"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'x' * 2 * 10**7 }}", "its output has 20000000 bytes"),
        ("{{ raise_exception('no') }}", "no"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{% include 'x' %}", "no loader"),
        ("{{ messages", "unexpected end of template"),
        ("{{ '\\ud83d' }}", "surrogates not allowed"),
    ],
)
def test_a_template_that_fails_or_does_not_end_is_one_line(
    template: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "SECONDS", 3.0)
    monkeypatch.setattr(templates, "MEMORY", 1 << 28)
    tokenizer = train_tokenizer(TEXTS, 300, 64)
    tokenizer.chat_template = template
    folder = saved(tmp_path, gpt2(), tokenizer)
    with pytest.raises(UserError, match=f"chat template of {folder}/chat_template.jinja cannot .*{why}"):
        templates.render(open_policy(folder).tokenizer, [Turn("user", "hello")], reply_follows=True)


def test_damaged_weights_are_not_sampled_from(tmp_path: Path) -> None:
    model, tokenizer = gpt2(), train_tokenizer(TEXTS, 300, 64)
    for damage in (float("nan"), float("inf")):
        model.transformer.ln_f.weight.data[0] = damage
        with pytest.raises(UserError, match=r"probabilities of .* are not finite numbers"):
            sample(
                model,
                [[1, 2], [3]],
                torch.tensor([5, 2]),
                Sampling(stop_ids=(tokenizer.eos_token_id,)),
                torch.rand(5, 2),
            )
