"""Model cards: the right figures, metadata that the hub can read, and nothing in a file that leaves its place."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.numpy import save_file
from tiny import tiny_policy, tiny_tokenizer
from transformers import GPT2Config, GPT2ForSequenceClassification

from rlhf_pipeline.data.records import Turn
from rlhf_pipeline.data.templates import TEMPLATES, format_prompt
from rlhf_pipeline.files import write_json
from rlhf_pipeline.models.classifiers import RewardModel, RewardModelConfig, Scorer
from rlhf_pipeline.models.policies import Policy
from rlhf_pipeline.ppo.watch import CollapseWatch
from rlhf_pipeline.report.cards import model_card, with_model_id, write_cards

SHA = "ab" * 32
DATA = {"name": "imdb", "path": None, "train": 25_000, "test": 100, "sha256": SHA}
MODEL = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 1,
         "n_positions": 64, "vocab_size": 300}  # fmt: skip
HOSTILE = (
    "# x\n---\nlicense: mit\n---\n# Owned\n```\n</td><script>alert(1)</script>| a | `b` ![i](http://e) [l](http://e)\n"
    "\n<!-- ~~~ **bold** _em_ __strong__ $$1$$ \\| &lt; \u202e' \" {{ x }} \x00\r\n| --- |\n- item\n1. item\n> quote"
    " \\${x}"  # which Hydra would read as the name of a setting, were it not escaped
)


def made(
    runs: Path, stage: str = "ppo", *, config: Any = None, model: Any = None, name: str = "demo", **run: Any
) -> Path:
    """What a stage of a run leaves, as far as a card looks at it; `run` goes into its run.json."""
    folder = runs / name / stage
    (folder / "model").mkdir(parents=True)
    record = {
        "stage": stage, "name": name, "experiment": "demo", "status": "done", "seed": 7, "data": DATA, "seconds": 150.0,
        "started": "2026-01-01T10:00:00+00:00", "finished": "2026-01-01T11:00:00+00:00", "parents": {},
        "hardware": {"cpu": "A CPU", "cores": 2, "gpu": None}, "versions": {"trl": "1.12.0"},
        "git": {"commit": "c0ffee", "dirty": False}, "results": {},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps({**record, **run}))
    settings = config or {"stage": stage, "reward": {"name": "classifier"}, "trainer": {"learning_rate": 1e-5}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, allow_unicode=True))
    (folder / "model" / "config.json").write_text(json.dumps(MODEL if model is None else model))
    save_file({"a": np.ones((3, 2), np.float32), "b": np.ones(4, np.float32)}, folder / "model" / "model.safetensors")
    save_file({"v": np.ones(8, np.float32)}, folder / "model" / "value_head.safetensors")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 12}\n{"step": 1')
    return folder


def judge(runs: Path, *, changed: Any = None, **run: Any) -> None:
    """A stage=evaluate of the demo that compared pretrain and ppo, with changed keys in its evaluation.json."""
    parents = {"base": {"path": "runs/demo/pretrain/model"}, "ppo": {"path": "runs/demo/ppo/model"}}
    record = {"stage": "evaluate", "name": "demo", "status": "done", "started": "2026-01-01T12:00:00+00:00",
              "data": {**DATA, "test": 50}, "parents": parents, **run}  # fmt: skip
    row = {"reward_mean": 0.25, "reward_stderr": 0.01, "reward_median": 0.2, "positive": 0.5, "kl": 1.5,
           "perplexity": 20.0, "distinct_2": 0.75, "length": 9.0}  # fmt: skip
    evaluation = {
        "prompts": 24, "reward": "runs/demo/reward/model", "reference": "base",
        "metrics": {"base": {**row, "reward_mean": 0.125}, "ppo": row},
        "paired_gain": {"ppo - base": {"mean": 0.125, "low": 0.1, "high": 0.15, "win_rate": 0.7}},
        "examples": [{"prompt": "This film", "responses": {"base": "bad", "ppo": "good"}, "rewards": {}}],
    }  # fmt: skip
    write_json(runs / "demo" / "evaluate" / "run.json", record)
    write_json(runs / "demo" / "evaluate" / "evaluation.json", {**evaluation, **(changed or {})})


# The value head beside a policy is none of its parameters.
LINES = f"""# demo, ppo
| Architecture | GPT2LMHeadModel |
| Layers | 2 |
| Width | 8 |
| Heads | 1 |
| Positions | 64 |
| Parameters | 10 |
| imdb | stanfordnlp/imdb | 25000 | 100 | {SHA} |
| Updates | 12 |
| Time | 2 min 30 s |
| Seed | 7 |
| Hardware | A CPU, 2 cores |
| Versions | trl 1.12.0 |
| Commit | c0ffee |
| policy | runs/demo/sft/model | {"cd" * 32} |
| ppo | 0.25 | 0.01 | 0.2 | 0.5 | 1.5 | 20 | 0.75 | 9 |
| base | 0.125 | 0.01 | 0.2 | 0.5 | 1.5 | 20 | 0.75 | 9 |
| ppo - base | 0.125 | 0.1 | 0.15 | 0.7 |
| This film | bad | good |
- During training, the KL to the initial policy grew very fast.
- During training, most answers were given to more than one prompt.
model_id = "runs/demo/ppo/model\""""


def test_the_fields_of_a_policys_card(workplace: Path) -> None:
    runs = Path("runs")
    made(runs, "sft", parents={"policy": {"path": "lvwerra/gpt2-imdb", "sha256": None}})
    parents = {"policy": {"path": "runs/demo/sft/model", "sha256": "cd" * 32}, "reward": {"path": "me/judge"}}
    signs = {"scores": 0.5, "collapse_watch": ["kl", "repeated"]}
    folder = made(runs, parents=parents, results=signs)
    judge(runs)
    text = model_card(folder)
    (folder / "model" / "README.md").write_text(text)
    assert ModelCard.load(folder / "model" / "README.md").data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["rlhf_pipeline", "rlhf", "trl", "ppo"], "datasets": ["stanfordnlp/imdb"],
        "base_model": "lvwerra/gpt2-imdb",  # by way of runs/demo/sft
        "model-index": [{"name": "demo ppo", "results": [{
            "task": {"type": "text-generation"},
            "dataset": {"name": "imdb", "type": "stanfordnlp/imdb", "split": "test", "args": {"sha256": SHA}},
            "metrics": [
                {"type": "mean_reward", "value": 0.25, "name": "reward"}, {"type": "kl", "value": 1.5, "name": "KL"},
                {"type": "perplexity", "value": 20.0, "name": "perplexity"},
                {"type": "distinct_2", "value": 0.75, "name": "distinct-2"},
            ],
        }]}],
    }  # fmt: skip
    missing = set(LINES.splitlines()) - set(text.splitlines())
    assert not missing
    assert "AutoModelForCausalLM" in text
    assert "distinct bigrams fell" not in text
    assert "license" not in ModelCard(text).data.to_dict()  # the model's is not known


def test_the_fields_of_a_rewards_card(workplace: Path) -> None:
    quality = {"accuracy": 0.75, "calibration_error": 0.125, "length_correlation": -0.5, "rows": 100}
    data = {**DATA, "name": "sentiment", "path": "reviews.csv"}
    start = {"start": {"path": "distilbert-base-uncased", "sha256": None}}
    folder = made(Path("runs"), "reward", results=quality, data=data, parents=start)
    (folder / "quality.json").write_text('{"calibration": [{"predicted": 0.6, "observed": 0.5, "count": 40}]}')
    judge(Path("runs"), parents={"reward": {"path": "runs/demo/reward/model"}})
    text = model_card(folder)
    head = ModelCard(text).data
    assert (head.pipeline_tag, head.base_model) == ("text-classification", "distilbert-base-uncased")
    assert head.datasets is None
    assert [(r.metric_type, r.metric_value, r.dataset_type) for r in head.eval_results] == [
        ("accuracy", 0.75, "sentiment"), ("calibration_error", 0.125, "sentiment"), ("pearsonr", -0.5, "sentiment"),
    ]  # fmt: skip
    assert "| 1 | 0.6 | 0.5 | 40 |" in text
    assert "- It is wrong on 25.0 % of the held-out rows." in text
    assert "- Shorter texts score higher (the correlation of score and length is -0.50)." in text
    assert "## Evaluation" not in text  # that is of the policies that it judged
    assert "softmax" in text
    assert "register" not in text


def test_an_evaluation_is_of_the_model_that_it_judged(workplace: Path) -> None:
    runs = Path("runs")
    folder = made(runs)
    assert "It was not compared with the other policies" in model_card(folder)
    assert ModelCard(model_card(folder)).data.eval_results is None
    judge(runs)
    assert "## Evaluation" in model_card(folder)
    for unfit in (
        {"status": "running"},
        {"started": "2026-01-01T10:59:59+00:00"},  # the model was made after it
        {"parents": {"base": {"path": "runs/other/ppo/model"}}},
    ):
        judge(runs, **unfit)
        assert "## Evaluation" not in model_card(folder), unfit


def test_an_evaluation_rewrites_the_cards_of_its_own_policies_alone(workplace: Path) -> None:
    runs = Path("runs")
    stages = ("pretrain", "sft", "ppo", "reward")
    for stage in stages:
        write_cards(made(runs, stage))
    judge(runs)
    write_cards(runs / "demo" / "evaluate")
    after = {stage: (runs / "demo" / stage / "model" / "README.md").read_text() for stage in stages}
    assert {stage for stage in stages if "This model is" in after[stage]} == {"pretrain", "ppo"}
    assert "This model is base." in after["pretrain"]
    assert not list(runs.rglob(".card*"))


def test_every_sign_of_a_collapse_has_its_words(workplace: Path) -> None:
    watch = CollapseWatch(4)
    for update in range(8):
        said = ["one two three four", "five six seven eight"] if update < 2 else ["no no no no no", "no no no no no"]
        watch.update(said, 20.0 if update < 2 else 1.0, 20.0 * update, 0.0)
    folder = made(Path("runs"), results={"collapse_watch": sorted(watch.warned)})
    assert model_card(folder).count("- During training, ") == len(watch.warned) == 5


def shape(text: str) -> list[tuple[str, str]]:
    """What a Markdown reader sees: the blocks, the cells of each table, no text."""
    body = ModelCard(text).text
    found = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body)
    blocks = [(token.type, token.info) for token in found if token.type != "inline"]
    inline = [(part.type, "") for token in found for part in token.children or () if part.type != "text"]
    return blocks + inline


def block(language: str, text: str) -> str:
    """A card's block of code in a language."""
    found = re.search(rf"^(`{{3,}}){language}\n(.*?)\n\1$", text, re.MULTILINE | re.DOTALL)
    assert found
    return found[2]


def test_nothing_in_a_file_breaks_out(workplace: Path) -> None:
    """Hostile names, paths and answers leave the same headings, tables and blocks as harmless ones."""

    def text(runs: str, word: str) -> str:
        config = {"stage": "ppo", "name": word, "reward": {"name": word}, "trainer": {"run_name": word}, word: word}
        data = {**DATA, "name": word, "path": word, "sha256": word}
        parents = {"policy": {"path": word, "sha256": None}, word: {"path": word, "sha256": word}}
        run = {"experiment": word, "data": data, "parents": parents, "versions": {word: word},
               "results": {word: 1.0, "eval_loss": 2.0}}  # fmt: skip
        model = {**MODEL, "architectures": [word], "vocab_size": word}
        folder = made(Path(runs), config=config, model=model, **run, hardware={"cpu": word}, git={"commit": word})
        changed = dict.fromkeys(("prompts", "reward", "reference"), word) | {"paired_gain": {word: {}}}
        changed["metrics"] = {word: {}, "ppo": {"reward_mean": 0.25, "kl": 1.5}}
        changed["examples"] = [{"prompt": word, "responses": {word: word, "ppo": word}, "rewards": {}}]
        judge(Path(runs), changed=changed)
        return model_card(folder)

    harmless, hostile = text("runs", "a word"), text("other", HOSTILE)
    assert shape(hostile) == shape(harmless)
    assert not [kind for kind, _ in shape(hostile) if kind in ("html_block", "html_inline", "link_open", "image")]
    heads = [ModelCard(each).data.to_dict() for each in (harmless, hostile)]
    assert heads[0].keys() == heads[1].keys() == {"library_name", "pipeline_tag", "tags", "model-index"}
    assert "\u202e" not in hostile
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&#124; a &#124; &#96;b&#96;" in hostile  # shown, as what it is
    assert yaml.safe_load(block("yaml", hostile))["reward"]["name"] == HOSTILE  # whole, and still in its block


def test_a_hostile_name_of_the_run_stays_a_string_in_the_code(workplace: Path) -> None:
    folder = made(Path("runs"), name='a"b\n```\n# c')
    text = model_card(folder)
    line = next(line for line in block("python", text).split("\n") if line.startswith("model_id"))
    scope: dict[str, Any] = {}
    exec(line, scope)
    assert scope["model_id"] == str(folder / "model")
    assert 'model_id = "me/x"\n' in with_model_id(text, "me/x")
    assert with_model_id(text, "me/x").count("model_id = ") == 1


JUNK = [None, 3, "text", [], ["a", 1], {}, {"a": {"b": []}}, float("inf"), True]


@pytest.mark.parametrize("junk", JUNK, ids=repr)
def test_what_files_should_not_hold_stops_no_run(junk: Any, workplace: Path) -> None:
    run = dict.fromkeys(("experiment", "data", "parents", "versions", "hardware", "git", "results", "seconds"), junk)
    keys = ("architectures", "vocab_size", "n_layer", "trunk")
    model, config = {**MODEL, **dict.fromkeys(keys, junk)}, {"trainer": junk, "reward": junk}
    folder = made(Path("runs"), model=model, config=config, **run)
    judge(Path("runs"), changed={"metrics": junk, "examples": junk, "paired_gain": junk})
    assert ModelCard(model_card(folder)).data.library_name == "transformers"


def test_the_home_folder_is_not_told(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    path = "/home/somebody/secret/x.jsonl"
    config = {"stage": "sft", "data": {"name": "text", "path": path}}
    folder = made(Path("runs"), "sft", config=config, data={**DATA, "name": "text", "path": path})
    text = model_card(folder)
    assert "somebody" not in text
    assert "~/secret/x.jsonl" in text.replace("&#126;", "~")


@pytest.mark.parametrize("template", [None, *TEMPLATES])
def test_a_policys_code_asks_it_as_it_was_taught(template: str | None, workplace: Path) -> None:
    folder, tokenizer = made(Path("runs")), tiny_tokenizer()
    (folder / "model" / "model.safetensors").unlink()
    tokenizer.chat_template = TEMPLATES[template] if template else None
    Policy(tiny_policy(tokenizer), tokenizer).save(folder / "model")
    names: dict[str, Any] = {}
    exec(block("python", model_card(folder)), names)
    assert names["prompt"] == format_prompt(tokenizer, (Turn("user", "Hello."),) if template else "I saw this film")
    assert names["answer"].shape[1] > names["ids"].shape[1]


@pytest.mark.parametrize("kind", ["own class", "score", "classes"])
def test_a_reward_models_code_opens_it_and_scores_as_the_stages_do(kind: str, workplace: Path) -> None:
    tokenizer, own_class, scalar = tiny_tokenizer(), kind == "own class", kind != "classes"
    labels = {0: "score"} if scalar else {0: "negative", 1: "positive"}
    trunk = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_layer=1, n_embd=8, n_head=1, pad_token_id=1,
                       id2label=labels)  # fmt: skip
    config = {"stage": "reward", "reward": {"name": "preference_model" if scalar else "classifier"}}
    folder = made(Path("runs"), "reward", config=config)
    shutil.rmtree(folder / "model")
    torch.manual_seed(0)
    model: Any = GPT2ForSequenceClassification(trunk)
    if own_class:
        model = RewardModel(RewardModelConfig(trunk, "mlp", "mean", pad_token_id=1))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    text = model_card(folder)
    assert ModelCard(text).data.library_name == ("rlhf_pipeline" if own_class else "transformers")
    assert ("`register()`" in text) == own_class
    assert f"| Parameters | {model.num_parameters():,} |" in text
    command = [sys.executable, "-c", block("python", text)]  # where nothing has called register() before
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    scorer = Scorer.open(str(folder / "model"), 1, 64, append_eos=scalar)
    if scalar:
        assert float(done.stdout) == pytest.approx(float(scorer.logits(["I saw this film and liked it."])), abs=1e-5)
    else:
        expected = scorer.logits(["A film that I liked."])[0].softmax(-1).tolist()
        assert eval(done.stdout) == {labels[place]: pytest.approx(p, abs=1e-5) for place, p in enumerate(expected)}
