"""Code that opens a model and asks it something, for each kind that the stages make."""

import re

from rlhf_pipeline.cards.made import Made, json_object
from rlhf_pipeline.cards.markdown import block, literal

_POLICY = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model_id = {model_id}
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForCausalLM.from_pretrained(model_id)
{prompt}
ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
answer = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=24)
print(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))"""
_WORDS = 'prompt = "I saw this film"'
_TURNS = """\
turns = [{"role": "user", "content": "Hello."}]
prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)"""

_REWARD = """\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
{register}
model_id = {model_id}
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForSequenceClassification.from_pretrained(model_id)
{ask}"""
_REGISTER = """
from rlhf_pipeline.reward_model import register

register()
"""
_CLASSES = """\
ids = torch.tensor([tokenizer("A film that I liked.", truncation=True)["input_ids"]])
with torch.no_grad():
    probabilities = model(input_ids=ids).logits[0].softmax(-1).tolist()
print({model.config.id2label[index]: p for index, p in enumerate(probabilities)})"""
_SCORE = """\
text = "I saw this film" + " and liked it."  # a prompt and its answer
ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
with torch.no_grad():
    print(model(input_ids=ids).logits[0, 0].item())  # more is better; its zero and its scale mean nothing"""


def loading(made: Made) -> str:
    """How to open the model, as code that runs where its folder is."""
    model_id = literal(str(made.model))
    if made.causal:
        own = json_object(made.model / "tokenizer_config.json").get("chat_template")
        talks = own or (made.model / "chat_template.jinja").exists()
        return block("python", _POLICY.format(model_id=model_id, prompt=_TURNS if talks else _WORDS))
    ask, register = _SCORE if made.scalar else _CLASSES, _REGISTER if made.own_class else ""
    code = block("python", _REWARD.format(model_id=model_id, ask=ask, register=register))
    needs = (
        "Its head or its pooling is not transformers' own, so `rlhf_pipeline` has to be installed and `register()`ed."
    )
    return f"{needs}\n\n{code}" if made.own_class else code


def named(card: str, repository: str) -> str:
    """A card whose code opens the model by its id on the hub."""
    line = f"model_id = {literal(repository)}"
    return re.sub(r'^model_id = ".*"$', lambda _: line, card, count=1, flags=re.MULTILINE)
