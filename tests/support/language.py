"""Small causal language models of several families, and a tokenizer for them."""

import copy
import functools

import lightning.pytorch as pl
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader

VOCABULARY = 40
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "attn_implementation": "eager",
    "initializer_range": 0.2,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_GPT2 = hf.GPT2Config(
    vocab_size=VOCABULARY,
    n_embd=16,
    n_inner=24,
    n_layer=2,
    n_head=2,
    n_positions=64,
    bos_token_id=0,
    eos_token_id=0,
    attn_pdrop=0.0,
    embd_pdrop=0.0,
    resid_pdrop=0.0,
    attn_implementation="eager",
    initializer_range=0.2,
)
_SWIGLU = [f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up", "down")]
FAMILIES = {
    "olmo2": (hf.Olmo2ForCausalLM, hf.Olmo2Config(**_GROUPED), _SWIGLU),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**_GROUPED, tie_word_embeddings=True), _SWIGLU),
    "gpt2": (
        hf.GPT2LMHeadModel,
        _GPT2,
        [f"transformer.h.{i}.mlp.{name}" for i in (0, 1) for name in ("c_fc", "c_proj")],
    ),
    "neox": (
        hf.GPTNeoXForCausalLM,
        hf.GPTNeoXConfig(**_SIZES, hidden_dropout=0.0, attention_dropout=0.0),
        [f"gpt_neox.layers.{i}.mlp.dense_{name}" for i in (0, 1) for name in ("h_to_4h", "4h_to_h")],
    ),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config(**_GROUPED), _SWIGLU),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=8), _SWIGLU),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig(**_GROUPED), _SWIGLU),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**_GROUPED, head_dim=8), _SWIGLU),
}
EXPERTS = {
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig(**_GROUPED, num_local_experts=4)),
    "qwen3_moe": (
        hf.Qwen3MoeForCausalLM,
        hf.Qwen3MoeConfig(**_GROUPED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
    ),
    "olmoe": (hf.OlmoeForCausalLM, hf.OlmoeConfig(**_GROUPED, num_experts=4, num_experts_per_tok=2)),
}


def model(family="olmo2", seed=0):
    torch.manual_seed(seed)
    kind, config = (FAMILIES | EXPERTS)[family][:2]
    return kind(copy.deepcopy(config)).eval()  # a test may change it


def tokens(rows, length, seed=0):
    """Random tokens without the end-of-text token."""
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def tokenizer(size=VOCABULARY):
    """Words w1 w2 ... as tokens 1, 2, ..., and the end-of-text token 0."""
    words = {"<end>": 0} | {f"w{i}": i for i in range(1, size)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w1"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<end>")


def fronted_tokenizer(template, size=VOCABULARY):
    """The same words, but the last two are special tokens, <s> and <i>, which a template may put around a text."""
    ids = {"<end>": 0, "<i>": size - 2, "<s>": size - 1}
    plain = Tokenizer(models.WordLevel(ids | {f"w{i}": i for i in range(1, size - 2)}, unk_token="w1"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(ids.items()))
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="<end>", pad_token="<end>", additional_special_tokens=["<i>"]
    )


def interrupt(monkeypatch, number):
    """Interrupt one forward pass of Llama models, as the user does; return a list that grows with each."""
    passes, forward = [], hf.LlamaForCausalLM.forward

    @functools.wraps(forward)
    def counted(self, *args, **options):
        passes.append(self)
        if len(passes) == number:
            raise KeyboardInterrupt
        return forward(self, *args, **options)

    monkeypatch.setattr(hf.LlamaForCausalLM, "forward", counted)
    return passes


def words(ids):
    return " ".join(f"w{i}" for i in ids)


def train(network, rows, steps=300, lr=0.01):
    """Overfit a model to rows of tokens until it recites them."""
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    for _ in range(steps):
        network(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return network


class LitLM(pl.LightningModule):
    """Any causal LM; batches are token tensors or dicts."""

    def __init__(self, family="olmo2", lr=0.01):
        super().__init__()
        self.save_hyperparameters()
        self.net = model(family).train()
        self.lr = lr

    def inputs(self, batch):
        return batch if isinstance(batch, dict) else {"input_ids": batch, "labels": batch}

    def training_step(self, batch, batch_idx):
        return self.net(**self.inputs(batch)).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(**self.inputs(batch)).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def loader(rows, batch_size=4):
    return DataLoader(rows, batch_size=batch_size)
