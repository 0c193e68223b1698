"""What is no causal language model, and layers that never run: told by name, from the command line and from Python."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from lightning_curvature.cli.parser import main
from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.passes import collect, run_collector
from lightning_curvature.recording.options import CollectorOptions
from lightning_curvature.text import collecting
from lightning_curvature.text.models import load_model, load_tokenizer
from lightning_curvature.text.saved import SavedModel
from tests.support import language

SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = hf.BertConfig(**SMALL)
LLAMA = hf.LlamaConfig(**SMALL, eos_token_id=0)
TIED = hf.LlamaConfig(**SMALL, eos_token_id=0, tie_word_embeddings=True)
BART = hf.BartConfig(
    vocab_size=40,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
)
T5 = hf.T5Config(vocab_size=40, d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8)
XLM = hf.XLMConfig(vocab_size=40, emb_dim=16, n_layers=2, n_heads=2)
REFUSED = {
    "masked": (hf.BertForMaskedLM, BERT, "no causal language model but a BertForMaskedLM"),
    "masked, RoBERTa": (hf.RobertaForMaskedLM, hf.RobertaConfig(**SMALL), "but a RobertaForMaskedLM"),
    "masked, DistilBERT": (
        hf.DistilBertForMaskedLM,
        hf.DistilBertConfig(vocab_size=40, dim=16, hidden_dim=24, n_layers=1, n_heads=2),
        "but a DistilBertForMaskedLM",
    ),
    "masked, with a causal head": (hf.BertLMHeadModel, BERT, "depends on the tokens that come later"),
    "masked, XLM": (hf.XLMWithLMHeadModel, XLM, "depends on the tokens that come later"),
    "encoder and decoder": (hf.BartForConditionalGeneration, BART, "but a BartForConditionalGeneration"),
    "encoder and decoder, T5": (hf.T5ForConditionalGeneration, T5, "but a T5ForConditionalGeneration"),
    "classifier": (hf.LlamaForSequenceClassification, LLAMA, "but a LlamaForSequenceClassification"),
    "classifier, tied": (hf.LlamaForSequenceClassification, TIED, "but a LlamaForSequenceClassification"),
    "tagger": (hf.LlamaForTokenClassification, TIED, "but a LlamaForTokenClassification"),
    "no head": (hf.LlamaModel, LLAMA, "weights of a LlamaForCausalLM: 'lm_head.weight'. They would be random"),
    "images": (
        hf.ViTForImageClassification,
        hf.ViTConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2),
        "but a ViTForImageClassification",
    ),
}
TAKEN = {
    "decoder of BERT": (hf.BertLMHeadModel, hf.BertConfig(**SMALL, is_decoder=True)),
    "decoder of BART": (hf.BartForCausalLM, BART),
    "no head, tied": (hf.LlamaModel, TIED),
    "tied": (hf.LlamaForCausalLM, TIED),
    "GPT-2": (hf.GPT2LMHeadModel, language.FAMILIES["gpt2"][1]),
    "sliding window": (hf.Gemma3ForCausalLM, language.FAMILIES["gemma3"][1]),
    "state space": (
        hf.MambaForCausalLM,
        hf.MambaConfig(
            vocab_size=40,
            hidden_size=8,
            state_size=4,
            time_step_rank=3,
            num_hidden_layers=2,
            eos_token_id=0,
            bos_token_id=0,
        ),
    ),
    "half precision": (hf.LlamaForCausalLM, LLAMA),
}


def save(path, kind, config, dtype=torch.float32):
    torch.manual_seed(0)
    kind(config).to(dtype).save_pretrained(path)
    language.tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("case", REFUSED)
def test_no_causal_language_model(case, tmp_path):
    kind, config, message = REFUSED[case]
    save(tmp_path / "m", kind, config)
    with pytest.raises(ValueError, match=rf"/m:? .*{message}"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("case", TAKEN)
def test_causal_language_models(case, tmp_path):
    kind, config = TAKEN[case]
    save(tmp_path / "m", kind, config, torch.bfloat16 if case == "half precision" else torch.float32)
    model = load_model(tmp_path / "m")
    assert not model.training


def test_every_command_refuses_it(tmp_path, capsys):
    save(tmp_path / "m", hf.BertForMaskedLM, BERT)
    text, out = tmp_path / "c.txt", str(tmp_path / "out.safetensors")
    text.write_text(language.words(list(range(1, 30)) * 9))
    (tmp_path / "s.jsonl").write_text(json.dumps({"prefix_ids": [1], "suffix_ids": [2]}))
    net = language.model("llama")
    step = lambda batch: net(input_ids=batch, labels=batch).loss  # noqa: E731
    collect(net, [language.tokens(2, 8)], step).save(tmp_path / "f.safetensors")
    model, corpus = ("--model", str(tmp_path / "m")), ("--corpus", str(text))
    factors, asked = ("--factors", str(tmp_path / "f.safetensors")), ("--sequences", str(tmp_path / "s.jsonl"))
    for command in (
        ["collect", *model, *corpus, "--out", out],
        ["mine", *model, *corpus, "--out", out],
        ["evaluate", *model, *corpus],
        ["sweep", *model, *corpus, *factors, *asked, "--out", out],
        ["detect", *model, *corpus, *factors, "--out", out],
        ["edit", "--checkpoint", *model[1:], *corpus, *factors, "--perplexity", "1.1", "--force", "--out", out[:-12]],
    ):
        with pytest.raises(SystemExit, match="holds no causal language model but a BertForMaskedLM"):
            main(command)
    assert not (tmp_path / "out.safetensors").exists()


def test_weights_that_are_missing_from_a_file(tmp_path):
    save(tmp_path / "m", hf.LlamaForCausalLM, LLAMA)
    state = load_file(tmp_path / "m" / "model.safetensors")
    complete = dict(state)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"m lacks weights of a LlamaForCausalLM: 'model.layers.1.mlp.up_proj.weight'"):
        load_model(tmp_path / "m")
    save_file(complete, tmp_path / "w.safetensors")  # a checkpoint brings all of them
    loaded = load_model(tmp_path / "m", tmp_path / "w.safetensors").state_dict()
    assert all(torch.equal(loaded[key].cpu(), value) for key, value in complete.items())


def test_folders_that_are_damaged(tmp_path):
    save(tmp_path / "m", hf.LlamaForCausalLM, LLAMA)
    weights = tmp_path / "m" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"m: its weights cannot be loaded \(.*\)\. Copy or save the folder again"):
        load_model(tmp_path / "m")
    weights.unlink()
    with pytest.raises(ValueError, match="m: its weights cannot be loaded"):
        load_model(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"m holds no tokenizer that transformers can load .* \(tokenizer.save_pret"):
        load_tokenizer(tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    for broken in ("{", "{}", '{"model_type": "nothing"}', "[]"):
        config.write_text(broken)
        with pytest.raises(ValueError, match=r"m: its config\.json describes no model that transformers knows"):
            load_model(tmp_path / "m")
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"m holds no config.json; expected a folder written by save_pretrain"):
        SavedModel(tmp_path / "m")


# Layers that never run ------------------------------------------------------------------------------------------------


class Idle(torch.nn.Module):
    """A language model with layers that no forward pass calls."""

    def __init__(self):
        super().__init__()
        self.net = language.model("llama")
        self.idle = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(3)])
        self.config, self.generation_config = self.net.config, self.net.generation_config

    def get_input_embeddings(self):
        return self.net.get_input_embeddings()

    def forward(self, input_ids, **options):
        return self.net(input_ids=input_ids, **options)


@pytest.mark.filterwarnings("ignore:Chosen layers")  # of a group that has others
@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("layers", [["net.*.mlp.*", "idle.*"], ["idle.0", "net.*down_proj"]])
def test_layers_that_never_run_are_an_error(tmp_path, layers, passes):
    """Also where a group of layers has none other."""
    (tmp_path / "c.txt").write_text(language.words(language.tokens(1, 100)[0].tolist()))
    with pytest.raises(RuntimeError, match=r"Chosen layers 'idle.0'.* never ran, so they have no factors"):
        collecting.collect_text(
            Idle(),
            language.tokenizer(),
            tmp_path / "c.txt",
            tmp_path / "f.safetensors",
            context=10,
            layers=layers,
            passes=passes,
        )
    assert not (tmp_path / "f.safetensors").exists()


def test_a_group_of_layers_that_never_runs_in_python_too():
    net, rows = Idle(), language.tokens(4, 8)
    step = lambda batch: net(input_ids=batch, labels=batch).loss  # noqa: E731
    collector = Collector(net, CollectorOptions(layers=["net.*down_proj", "idle.*"]), group=(1, 2))
    with pytest.raises(RuntimeError, match=r"Chosen layers 'idle.1', 'idle.2' never ran"):
        run_collector(collector, [rows], step)


@pytest.mark.filterwarnings("ignore:Chosen layers")
def test_a_command_ends_with_an_error(tmp_path, capsys):
    """In a Mamba model the projection of the time step is read without a call."""
    kind, config = TAKEN["state space"]
    save(tmp_path / "m", kind, config)
    (tmp_path / "c.txt").write_text(language.words(language.tokens(1, 200)[0].tolist()))
    command = [
        "collect",
        "--model",
        tmp_path / "m",
        "--corpus",
        tmp_path / "c.txt",
        "--context",
        "10",
        "--layers",
        "*.in_proj",
        "*.dt_proj",
        "--out",
        tmp_path / "f.safetensors",
    ]
    for passes in ("1", "4"):
        with pytest.raises(SystemExit, match=r"layers.0.mixer.dt_proj.* (never ran|without a call)"):
            main([*map(str, command), "--passes", passes])
    assert not (tmp_path / "f.safetensors").exists()
