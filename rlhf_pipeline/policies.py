"""The registry of policies: from the hub, from a folder, from scratch; with their special tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.hub import explained, open_pretrained
from rlhf_pipeline.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Policy:
    """A language model and the tokenizer that belongs to it."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"

    def save(self, folder: Path) -> None:
        """Write both so that AutoModelForCausalLM and AutoTokenizer open them."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


class Source(Protocol):
    """What a policy's entry gives: how to open it from a folder or hub id, or to make it from texts."""

    @property
    def path(self) -> str | None:
        """Where the entry's own model lies; None where it has none."""

    def open(self, path: str) -> Policy:
        """The policy that lies at `path`."""

    def make(self, texts: Sequence[str], seed: int) -> Policy:
        """A new policy, untrained, with a tokenizer trained on `texts`."""


# `lora` holds the fields of peft's LoraConfig; with it the stages that take an adapter train one.
registry: Registry[Source] = Registry("policy", common={"lora": dict[str, Any] | None})

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


@dataclass(frozen=True)
class _Pretrained:
    path: str | None

    def open(self, path: str) -> Policy:
        return open_policy(path)

    def make(self, texts: Sequence[str], seed: int) -> Policy:
        raise UserError(
            f"stage=pretrain makes a policy from scratch, and {self.path} is made already. Use policy=gpt2_scratch."
        )


@dataclass(frozen=True)
class _FromScratch:
    size: str
    vocabulary: int
    positions: int
    dropout: float
    path: str | None

    def open(self, path: str) -> Policy:
        return open_policy(path)

    def make(self, texts: Sequence[str], seed: int) -> Policy:
        if self.path is not None:
            raise UserError("stage=pretrain starts from nothing; drop policy.path, or go on from it with stage=sft.")
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        tokenizer = train_tokenizer(texts, self.vocabulary, self.positions)
        layers, width, heads = SIZES[self.size]
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=self.positions,
            n_layer=layers,
            n_embd=width,
            n_head=heads,
            activation_function="gelu_pytorch_tanh",  # GPT-2's own formula, in one fused kernel
            resid_pdrop=self.dropout,
            embd_pdrop=self.dropout,
            attn_pdrop=self.dropout,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        torch.manual_seed(seed)
        return Policy(GPT2LMHeadModel(config), tokenizer)


@registry.register
def gpt2_scratch(
    *,
    size: Literal["tiny", "mini", "mid", "small", "medium", "large", "xl"] = "tiny",
    vocabulary: int = 4096,
    positions: int = 256,
    dropout: float = 0.0,
    path: str | None = None,
) -> Source:
    """A GPT-2 from its configuration, with a byte-level BPE trained on the data."""
    return _FromScratch(size, vocabulary, positions, dropout, path)


@registry.register
def gpt2(*, path: str = "openai-community/gpt2") -> Source:
    """OpenAI's GPT-2, 124 M parameters."""
    return _Pretrained(path)


@registry.register
def gpt2_imdb(*, path: str = "lvwerra/gpt2-imdb") -> Source:
    """GPT-2 fine-tuned on IMDB reviews: the policy of TRL's classic sentiment demo."""
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
        return source.make(texts, seed), f"{choice['name']}, untrained"
    from rlhf_pipeline.rundir import model_folder

    where = model_folder(where)
    return source.open(where), where


def open_policy(path: str) -> Policy:
    """Open a causal language model and its tokenizer, and settle its special tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf_pipeline.rundir import model_folder

    where = model_folder(path)
    with explained(where, "policy.path"):
        tokenizer = AutoTokenizer.from_pretrained(where)
    model = open_pretrained(AutoModelForCausalLM, where, "policy.path")
    settle_special_tokens(model, tokenizer)
    return Policy(model, tokenizer)


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
    """Make model and tokenizer agree on EOS and pad; an id outside the vocabulary counts as none."""
    if tokenizer.eos_token_id is None:
        eos = model.config.eos_token_id
        if isinstance(eos, int) and eos < len(tokenizer):
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
        elif tokenizer.sep_token is not None:
            tokenizer.eos_token = tokenizer.sep_token
        else:
            raise UserError(f"{model.name_or_path} names no token that ends a text; its tokenizer needs an eos_token.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless here: masks come from lengths
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        if config.bos_token_id is not None and config.bos_token_id >= len(tokenizer):
            config.bos_token_id = tokenizer.bos_token_id
    tokenizer.padding_side = "right"


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
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=specials[0],
        eos_token=specials[0],
        pad_token=specials[1],
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )
