"""The registry of policies: from the hub, from a folder, from scratch; with their special tokens."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rlhf_pipeline.data.templates import TEMPLATES
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.hub import explained, model_folder, open_pretrained
from rlhf_pipeline.progress import parts
from rlhf_pipeline.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Policy:
    """A language model and the tokenizer that belongs to it."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"

    def save(self, folder: Path, weights: dict[str, Any] | None = None) -> None:
        """Write both so that AutoModel... and AutoTokenizer open them; `weights` where the model has a shard."""
        self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)


class Source(Protocol):
    """What a policy's entry gives: where it lies, or how to make it from texts."""

    @property
    def path(self) -> str | None:
        """Where the entry's own model lies; None where it has none."""

    def make(self, texts: Sequence[str], seed: int) -> Policy:
        """A new policy, untrained, with a tokenizer trained on `texts`."""

    def config(self) -> Any:
        """The configuration of its model, of which no weights are read or made."""


# `lora` holds the fields of peft's LoraConfig; with it the stages that take an adapter train one, on `quantize`d
# weights (QLoRA) if so asked. `template` is how conversations are written; null: the tokenizer's own, else by its
# special tokens.
registry: Registry[Source] = Registry(
    "policy",
    common={
        "lora": dict[str, Any] | None,
        "quantize": Literal["4bit", "8bit"] | None,
        "template": Literal["dialogue", "instruction"] | None,
    },
)

# layers, width, heads: GPT-2's own sizes (Radford et al. 2019, table 2), and smaller ones for CPUs.
SIZES = {
    "tiny": (4, 144, 4),
    "mini": (4, 192, 4),
    "mid": (6, 384, 6),
    "small": (12, 768, 12),
    "medium": (24, 1024, 16),
    "large": (36, 1280, 20),
    "xl": (48, 1600, 25),
}
# tokens, positions: GPT-2's own from small on; with fewer parameters they would be most of the work.
_SMALL_TABLES, _OWN_TABLES = (4096, 256), (50_257, 1024)


@dataclass(frozen=True)
class _Pretrained:
    path: str | None

    def make(self, texts: Sequence[str], seed: int) -> Policy:
        raise UserError(
            f"stage=pretrain makes a policy from scratch, and {self.path} is made already. Use policy=gpt2_scratch."
        )

    def config(self) -> Any:
        return open_config(str(self.path), "policy.path")


@dataclass(frozen=True)
class _FromScratch:
    size: str
    tokenizer: str
    vocabulary: int
    positions: int
    dropout: float
    path: str | None

    def make(self, texts: Sequence[str], seed: int) -> Policy:
        if self.path is not None:
            raise UserError("stage=pretrain starts from nothing; drop policy.path, or go on from it with stage=sft.")
        import torch
        from transformers import GPT2LMHeadModel

        from rlhf_pipeline.processes import agree

        train = train_tokenizer if self.tokenizer == "bytes" else train_character_tokenizer
        print(f"training a tokenizer of {self.vocabulary} tokens on {len(texts)} texts", flush=True)
        tokenizer = agree(lambda: train(texts, self.vocabulary, self.positions))
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        config = self.config(vocab_size=len(tokenizer), **ids)
        torch.manual_seed(seed)
        return Policy(GPT2LMHeadModel(config), tokenizer)

    def config(self, **tokens: int) -> Any:
        from transformers import GPT2Config

        layers, width, heads = SIZES[self.size]
        return GPT2Config(
            **{"vocab_size": self.vocabulary, "bos_token_id": None, "eos_token_id": None, **tokens},
            n_positions=self.positions,
            n_layer=layers,
            n_embd=width,
            n_head=heads,
            activation_function="gelu_pytorch_tanh",  # GPT-2's own formula, in one fused kernel
            resid_pdrop=self.dropout,
            embd_pdrop=self.dropout,
            attn_pdrop=self.dropout,
        )


@registry.register
def gpt2_scratch(
    *,
    size: Literal["tiny", "mini", "mid", "small", "medium", "large", "xl"] = "tiny",
    tokenizer: Literal["bytes", "characters"] = "bytes",
    vocabulary: int | None = None,
    positions: int | None = None,
    dropout: float = 0.0,
    path: str | None = None,
) -> Source:
    """A GPT-2 from its configuration, with a tokenizer trained on the data; without `vocabulary` and `positions` those
    that its size is used to.

    The tokenizer is a byte-level BPE as GPT-2's own, or one of `characters` as Chinese models have: each ideograph a
    token, other words in pieces, [CLS] and [SEP] around what is said.
    """
    tables = _OWN_TABLES if size in ("small", "medium", "large", "xl") else _SMALL_TABLES
    return _FromScratch(size, tokenizer, vocabulary or tables[0], positions or tables[1], dropout, path)


@registry.register
def gpt2(*, path: str = "openai-community/gpt2") -> Source:
    """OpenAI's GPT-2, 124 M parameters."""
    return _Pretrained(path)


@registry.register
def gpt2_imdb(*, path: str = "lvwerra/gpt2-imdb") -> Source:
    """GPT-2 fine-tuned on IMDB reviews: the policy of TRL's classic sentiment demo."""
    return _Pretrained(path)


@registry.register
def gpt2_dialog_chinese(*, path: str = "shibing624/gpt2-dialogbot-base-chinese") -> Source:
    """A Chinese GPT-2 that chats: `[CLS] utterance [SEP] utterance [SEP]`, 300 positions, BERT's vocabulary."""
    return _Pretrained(path)


@registry.register
def causal_lm(*, path: str) -> Source:
    """Any causal language model, by folder or hub id."""
    return _Pretrained(path)


def load_policy(choice: dict[str, Any], upstream: Path | None, texts: Sequence[str], seed: int) -> tuple[Policy, str]:
    """The policy chosen by hand, else the one an earlier stage made, else the entry's own; and where it came from."""
    source = registry.build(choice)
    by_hand = choice.get("path")
    where = by_hand or (str(upstream) if upstream else None) or source.path
    if where is None:
        policy, where = source.make(texts, seed), f"{choice['name']}, untrained"
    else:
        where = model_folder(where)
        policy = open_policy(where, choice.get("quantize"))
    return _with_template(policy, choice), where


def policy_config(choice: dict[str, Any], upstream: Path | None) -> tuple[Any, str]:
    """The configuration of what `load_policy` would give, and where it lies; no weights are read."""
    source = registry.build(choice)
    where = choice.get("path") or (str(upstream) if upstream else None) or source.path
    if where is None:
        return source.config(), f"{choice['name']}, untrained"
    return open_config(where, "policy.path"), model_folder(where)


def open_config(path: str, setting: str) -> Any:
    """The configuration of a model in a folder or on the hub."""
    from transformers import AutoConfig

    where = model_folder(path)
    with explained(where, setting):
        return AutoConfig.from_pretrained(where)


def make_policy(choice: dict[str, Any], texts: Sequence[str], seed: int) -> Policy:
    """A new policy, untrained, whatever there is already."""
    return _with_template(registry.build(choice).make(texts, seed), choice)


def _with_template(policy: Policy, choice: dict[str, Any]) -> Policy:
    if choice.get("template"):
        policy.tokenizer.chat_template = TEMPLATES[choice["template"]]
    return policy


def open_policy(path: str, quantize: str | None = None) -> Policy:
    """Open a causal language model and its tokenizer, and settle its special tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = model_folder(path)
    with explained(where, "policy.path"):
        tokenizer = AutoTokenizer.from_pretrained(where)
    options = {"quantization_config": quantization(quantize)} if quantize else {}
    model = open_pretrained(AutoModelForCausalLM, where, "policy.path", **options)
    settle_special_tokens(model, tokenizer)
    settle_ideographs(tokenizer)
    return Policy(model, tokenizer)


def quantization(bits: str) -> Any:
    """How QLoRA (arXiv 2305.14314) stores the weights that are not trained."""
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"policy.quantize={bits} needs bitsandbytes: pip install 'rlhf_pipeline[quantize]'.")
    import torch
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def lora_config(choice: dict[str, Any], task: str = "CAUSAL_LM") -> Any:
    """peft's configuration from `policy.lora`; None where there is none."""
    asked = choice.get("lora")
    if not asked:
        return None
    from peft import LoraConfig

    try:
        return LoraConfig(**{"task_type": task, **asked})
    except (TypeError, ValueError) as error:
        raise UserError(f"policy.lora={asked} is refused by peft's LoraConfig: {error}") from error


def settle_special_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Make model and tokenizer agree on BOS, EOS, pad and the number of tokens.

    An id outside the vocabulary counts as none. What ends a text is the tokenizer's EOS, else the configuration's, else
    [SEP]; what pads is the tokenizer's pad, else the configuration's, else EOS: masks come from lengths. Tokens that
    were added to the tokenizer alone get embeddings; rows beyond the tokenizer's tokens stay, and are never sampled.
    """
    config = model.config
    for name, others in (("eos", ("sep_token",)), ("pad", ("eos_token",)), ("bos", ())):
        if getattr(tokenizer, f"{name}_token_id") is not None:
            continue
        own = getattr(config, f"{name}_token_id", None)
        candidates = [i for i in (own if isinstance(own, list) else [own]) if i is not None and 0 <= i < len(tokenizer)]
        token = tokenizer.convert_ids_to_tokens(candidates[0]) if candidates else None
        token = token or next((t for other in others if (t := getattr(tokenizer, other))), None)
        if token is not None:
            setattr(tokenizer, f"{name}_token", token)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{model.name_or_path} names no token that ends a text; its tokenizer needs an eos_token.")
    embeddings = model.get_input_embeddings().num_embeddings
    if 2 * len(tokenizer) < embeddings:
        raise UserError(
            f"{model.name_or_path} has {embeddings} embeddings and its tokenizer {len(tokenizer)} tokens: the "
            "tokenizer's files are not all there, or of another model."
        )
    if len(tokenizer) > embeddings:
        model.resize_token_embeddings(len(tokenizer))
    for each in (config, model.generation_config):
        each.bos_token_id = tokenizer.bos_token_id
        each.eos_token_id, each.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    tokenizer.padding_side = "right"


def settle_ideographs(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Let a BERT vocabulary write Chinese without blanks, and read the signs that it lacks as those it has."""
    from tokenizers import Regex, decoders, models, normalizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, models.WordPiece):
        return
    chinese = r"\p{Han}\u3000-\u303f\uff00-\uffef"  # ideographs and full-width signs
    no_blanks = decoders.Replace(Regex(rf"(?<=[{chinese}]) +| +(?=[{chinese}])"), "")
    backend.decoder = decoders.Sequence([decoders.WordPiece(cleanup=True), decoders.Fuse(), no_blanks])
    tokenizer.clean_up_tokenization_spaces = False
    vocabulary = tokenizer.get_vocab()
    stand_ins = {sign: sign_for for sign, sign_for in (("…", "..."), ("—", "-"), ("`", "'")) if sign not in vocabulary}
    if stand_ins and isinstance(backend.normalizer, normalizers.BertNormalizer):
        replaced = [normalizers.Replace(sign, sign_for) for sign, sign_for in stand_ins.items()]
        backend.normalizer = normalizers.Sequence([*replaced, backend.normalizer])


def train_tokenizer(texts: Sequence[str], vocabulary: int, positions: int) -> "PreTrainedTokenizerBase":
    """A byte-level BPE as GPT-2 has it, with a pad token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|pad|>"]
    if vocabulary < 256 + len(specials):
        raise UserError(
            f"policy.vocabulary is {vocabulary}; a byte-level one has at least {256 + len(specials)} tokens."
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_read(texts), trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=specials[0],
        eos_token=specials[0],
        pad_token=specials[1],
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )


def _read(texts: Sequence[str]) -> Iterator[str]:
    """The texts for a tokenizer to be trained on, with a bar."""
    return itertools.chain.from_iterable(parts(texts, 100, "read", "text"))


def train_character_tokenizer(texts: Sequence[str], vocabulary: int, positions: int) -> "PreTrainedTokenizerBase":
    """A BERT tokenizer: each ideograph a token, other words in pieces; lower case; [SEP] ends, [PAD] pads."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary, special_tokens=specials, limit_alphabet=vocabulary - len(specials), show_progress=False
    )
    pieces.train_from_iterator(_read(texts), trainer, length=len(texts))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        bos_token="[CLS]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )
    settle_ideographs(tokenizer)
    return tokenizer
