"""The registry of policies: language models with their tokenizers, from a folder, the hub or scratch."""

import copy
import importlib.util
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rlhf_pipeline.data.templates import TEMPLATES
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.hub import model_folder, open_pretrained
from rlhf_pipeline.progress import parts
from rlhf_pipeline.registry import Range, Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Policy:
    """A language model and its tokenizer."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"

    def save(self, folder: Path, weights: dict[str, Any] | None = None) -> None:
        """Write both for AutoModel... and AutoTokenizer; give `weights` if the model holds only a shard."""
        self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Source:
    """The `path` of a policy's model. Without a path, a GPT-2 of this `shape` is made from scratch."""

    path: str | None
    tokenizer: Literal["bytes", "characters"] = "bytes"
    shape: dict[str, Any] = field(default_factory=dict)  # fields of GPT2Config


# `lora` has fields of peft's LoraConfig, to train an adapter; with `quantize` its base is quantized (QLoRA).
# `template` is the chat template; null: the tokenizer's own, or one made of its special tokens.
registry: Registry[Source] = Registry(
    "policy",
    common={
        "lora": dict[str, Any] | None,
        "quantize": Literal["4bit", "8bit"] | None,
        "template": Literal["dialogue", "instruction"] | None,
    },
)

# small and larger are GPT-2's sizes (Radford et al. 2019, table 2). In smaller models its vocabulary would dominate.
_SHAPE = ("n_layer", "n_embd", "n_head", "vocab_size", "n_positions")
SIZES = {
    "tiny": (4, 144, 4, 4096, 256),
    "mini": (4, 192, 4, 4096, 256),
    "mid": (6, 384, 6, 4096, 256),
    "small": (12, 768, 12, 50_257, 1024),
    "medium": (24, 1024, 16, 50_257, 1024),
    "large": (36, 1280, 20, 50_257, 1024),
    "xl": (48, 1600, 25, 50_257, 1024),
}


@registry.register
def gpt2_scratch(
    *,
    size: Literal["tiny", "mini", "mid", "small", "medium", "large", "xl"] = "tiny",
    tokenizer: Literal["bytes", "characters"] = "bytes",
    vocabulary: Annotated[int, Range(6)] | None = None,
    positions: Annotated[int, Range(1)] | None = None,
    dropout: Annotated[float, Range(0, 1)] = 0.0,
    path: str | None = None,
) -> Source:
    """A GPT-2 from its configuration, with a tokenizer trained on the data: GPT-2's byte-level BPE, or `characters`."""
    shape: dict[str, Any] = dict(zip(_SHAPE, SIZES[size], strict=True))
    shape |= {key: value for key, value in (("vocab_size", vocabulary), ("n_positions", positions)) if value}
    shape |= {"activation_function": "gelu_pytorch_tanh"}  # GPT-2's own formula, in one fused kernel
    shape |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return Source(path, tokenizer, {**shape, "bos_token_id": None, "eos_token_id": None})


@registry.register
def causal_lm(*, path: str) -> Source:
    """Any causal language model, by folder or hub id."""
    return Source(path)


def _on_the_hub(hub_id: str) -> Callable[..., Source]:
    def entry(*, path: str = hub_id) -> Source:
        return Source(path)

    return entry


registry.entries |= {
    "gpt2": _on_the_hub("openai-community/gpt2"),
    "gpt2_imdb": _on_the_hub("lvwerra/gpt2-imdb"),  # the policy of TRL's classic sentiment demo
    # A Chinese GPT-2 that chats: [CLS] utterance [SEP] utterance [SEP], 300 positions, BERT's vocabulary.
    "gpt2_dialog_chinese": _on_the_hub("shibing624/gpt2-dialogbot-base-chinese"),
}


def policy_folder(choice: dict[str, Any], upstream: Path | None) -> str | None:
    """Return the policy at `path`, else the one that an earlier stage made, else the entry's own; None: make one."""
    where = choice.get("path") or upstream or registry.build(choice).path
    return None if where is None else model_folder(str(where))


def load_policy(choice: dict[str, Any], upstream: Path | None, texts: Sequence[str], seed: int) -> tuple[Policy, str]:
    """Load the policy in `policy_folder`, or make one. Return it with its origin."""
    if (where := policy_folder(choice, upstream)) is None:
        return make_policy(choice, texts, seed), f"{choice['name']}, untrained"
    return _with_template(open_policy(where, choice.get("quantize")), choice), where


def policy_config(choice: dict[str, Any], upstream: Path | None) -> tuple[Any, str]:
    """Return the configuration of the policy that `load_policy` would return, and its origin, without its weights."""
    if (where := policy_folder(choice, upstream)) is not None:
        return open_config(where, "policy.path"), where
    from transformers import GPT2Config

    return GPT2Config(**registry.build(choice).shape), f"{choice['name']}, untrained"


def open_config(path: str, setting: str) -> Any:
    """The configuration of a model in a folder or on the hub."""
    from transformers import AutoConfig

    return open_pretrained(AutoConfig, model_folder(path), setting)


def make_policy(choice: dict[str, Any], texts: Sequence[str], seed: int) -> Policy:
    """A new, untrained policy, with a tokenizer trained on `texts`."""
    source = registry.build(choice)
    if source.path is not None:
        raise UserError(
            f"stage=pretrain makes a policy from scratch, but {source.path} is already trained. Use "
            "policy=gpt2_scratch without policy.path, or train it further with stage=sft."
        )
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from rlhf_pipeline.processes import agree

    size, characters = source.shape["vocab_size"], source.tokenizer == "characters"
    print(f"training a tokenizer of {size} tokens on {len(texts)} texts", flush=True)
    tokenizer = agree(lambda: train_tokenizer(texts, size, source.shape["n_positions"], characters))
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**{**source.shape, **ids, "vocab_size": len(tokenizer)}))
    return _with_template(Policy(model, tokenizer), choice)


def _with_template(policy: Policy, choice: dict[str, Any]) -> Policy:
    if choice.get("template"):
        policy.tokenizer.chat_template = TEMPLATES[choice["template"]]
    return policy


def open_policy(path: str, quantize: str | None = None) -> Policy:
    """Open a causal language model and its tokenizer, and settle its special tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = model_folder(path)
    tokenizer = open_pretrained(AutoTokenizer, where, "policy.path")
    options = {"quantization_config": quantization(quantize)} if quantize else {}
    model = open_pretrained(AutoModelForCausalLM, where, "policy.path", **options)
    settle_special_tokens(model, tokenizer)
    settle_ideographs(tokenizer)
    return Policy(model, tokenizer)


def quantization(bits: str) -> Any:
    """How QLoRA (arXiv 2305.14314) stores the weights that are not trained."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"policy.quantize={bits} needs bitsandbytes: pip install 'rlhf_pipeline[quantize]'.")
    import torch
    from transformers import BitsAndBytesConfig

    from rlhf_pipeline.models.precision import native_bf16

    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if native_bf16() else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def lora_config(choice: dict[str, Any]) -> Any:
    """peft's configuration from `policy.lora`; None if it is not set."""
    if not (asked := choice.get("lora")):
        return None
    from peft import LoraConfig

    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **asked})
    except (TypeError, ValueError) as error:
        raise UserError(f"peft's LoraConfig refuses policy.lora={asked}: {error}") from error


def merged(model: Any) -> "PreTrainedModel":
    """Return a new model in fp32 and in main memory: a peft model's base with the adapter merged in.

    A base in fewer bits (quantized or bf16) is read again from its folder or the hub. Without such a place, its rounded
    weights are used.
    """
    import torch
    from peft import PeftModel

    base = model.get_base_model()
    if base.name_or_path and any(p.dtype != torch.float32 for p in base.parameters()):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return PeftModel.from_pretrained(open_policy(base.name_or_path).model, folder).merge_and_unload()
    # Weight by weight, because the device may have no room for a second model.
    copies: dict[int, Any] = {
        id(p): torch.nn.Parameter(p.detach().to("cpu", torch.float32, copy=True), p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, copies).merge_and_unload()


def without_adapter(trained: Any, policy: Policy) -> Policy:
    """Return a trained policy as a standalone model, so that the next stage can add its own adapter."""
    from peft import PeftModel

    return Policy(merged(trained), policy.tokenizer) if isinstance(trained, PeftModel) else policy


def settle_special_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Make model and tokenizer agree on BOS, EOS, pad and the number of tokens.

    A token that the tokenizer does not name is taken from the configuration, if its id is in the vocabulary. Otherwise
    EOS is [SEP], and pad is EOS; masks come from lengths. Tokens that only the tokenizer has get embeddings. Embeddings
    beyond the tokenizer's tokens stay, but are never sampled.
    """
    config = model.config
    for name, otherwise in (("eos", "sep_token"), ("pad", "eos_token"), ("bos", "bos_token")):
        if getattr(tokenizer, f"{name}_token_id") is None:
            own = getattr(config, f"{name}_token_id", None)
            known = [i for i in (own if isinstance(own, list) else [own]) if i is not None and 0 <= i < len(tokenizer)]
            token = tokenizer.convert_ids_to_tokens(known[0]) if known else getattr(tokenizer, otherwise)
            setattr(tokenizer, f"{name}_token", token)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{model.name_or_path} has no token that ends a text; set eos_token in its tokenizer.")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    for each in (config, model.generation_config):
        each.bos_token_id = tokenizer.bos_token_id
        each.eos_token_id, each.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    tokenizer.padding_side = "right"


def settle_ideographs(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Make a BERT tokenizer decode Chinese without spaces, and replace punctuation that its vocabulary lacks."""
    from tokenizers import Regex, decoders, models, normalizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, models.WordPiece):
        return
    chinese = r"\p{Han}\u3000-\u303f\uff00-\uffef"  # ideographs and full-width punctuation
    unspaced = decoders.Replace(Regex(rf"(?<=[{chinese}]) +| +(?=[{chinese}])"), "")
    backend.decoder = decoders.Sequence([decoders.WordPiece(cleanup=True), decoders.Fuse(), unspaced])
    tokenizer.clean_up_tokenization_spaces = False
    known = tokenizer.get_vocab()
    replaced = [
        normalizers.Replace(sign, other) for sign, other in (("…", "..."), ("—", "-"), ("`", "'")) if sign not in known
    ]
    if replaced and isinstance(backend.normalizer, normalizers.BertNormalizer):
        backend.normalizer = normalizers.Sequence([*replaced, backend.normalizer])


def train_tokenizer(
    texts: Sequence[str], vocabulary: int, positions: int, characters: bool = False
) -> "PreTrainedTokenizerBase":
    """Train a byte-level BPE tokenizer like GPT-2's, with a pad token of its own.

    With `characters`, it is a BERT tokenizer in lower case: an ideograph is a token, other words are cut into pieces.
    """
    from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer, Tokenizer
    from transformers import PreTrainedTokenizerFast

    if vocabulary < 258 and not characters:
        raise UserError(f"policy.vocabulary is {vocabulary}; it takes at least 258: 256 bytes and two special tokens.")
    backend: Any = ByteLevelBPETokenizer()
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    options: dict[str, Any] = {}
    if characters:
        backend, options = BertWordPieceTokenizer(lowercase=True), {"limit_alphabet": vocabulary - 5}
        special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
        special |= {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    read = itertools.chain.from_iterable(parts(texts, 100, "read", "text"))  # shows a bar
    options |= {"special_tokens": list(dict.fromkeys(special.values())), "show_progress": False, "length": len(texts)}
    backend.train_from_iterator(read, vocabulary, min_frequency=0, **options)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend.to_str()),
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
        **special,
    )
    settle_ideographs(tokenizer)
    return tokenizer
