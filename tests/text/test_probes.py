"""Probes of a language model in the callback."""

import pytest
import torch

from lightning_curvature import KFACEditCallback
from lightning_curvature.storage import jsonl
from lightning_curvature.text.probes import JsonlProbe
from tests.support import language, models


def test_probes_of_a_language_model_in_the_callback(folder, tmp_path):
    """Before and after, at each validation, without disturbing training."""
    probes = {
        "recited": str(folder / "sequences.jsonl"),
        "some": {"path": str(folder / "sequences.jsonl"), "metrics": ["strict"]},
        "text": {"path": str(folder / "long.jsonl"), "tokenizer": str(folder / "model")},
        "facts": str(folder / "recall.jsonl"),
    }
    jsonl.write_jsonl(folder / "long.jsonl", [{"text": language.words(language.tokens(1, 300)[0].tolist())}])

    def fit(*callbacks):
        torch.manual_seed(0)
        module = language.LitLM()
        module.tokenizer = language.tokenizer()
        module.net.config.max_position_embeddings = 256
        rows = language.loader(language.tokens(16, 12))
        module.probe_dataloader = lambda: {
            "loader": [
                {"input_ids": language.tokens(2, 6)},
                {"input_ids": language.tokens(2, 6), "attention_mask": torch.tensor([[1] * 4 + [0] * 2, [1] * 6])},
            ]
        }
        models.trainer(tmp_path, *callbacks, enable_checkpointing=False).fit(module, rows, rows)
        return module

    callback = KFACEditCallback(probes=probes)
    module, plain = fit(callback), fit()
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in module.state_dict().items())
    measured = {
        name.removeprefix("curvature/").removesuffix("/before")
        for name in callback.probe_results
        if name.endswith("/before")
    }
    assert measured == {
        "recited/strict",
        "recited/loose",
        "recited/edit_distance",
        "recited/extraction_strength",
        "recited/min_k",
        "some/strict",
        "text/perplexity",
        "facts/recall",
        "loader/perplexity",
    }
    assert set(callback.probe_results) <= set(module.trainer.callback_metrics) | set(callback.probe_results)
    assert "curvature/recited/strict/after" in module.trainer.callback_metrics
    before, after = (callback.probe_results[f"curvature/text/perplexity/{when}"] for when in ("before", "after"))
    assert before != after


def test_bad_probes(folder, tmp_path):
    for probes, error, message in [
        ({"p": str(tmp_path / "none.jsonl")}, FileNotFoundError, "Probe 'p': there is no file .*none.jsonl"),
        ({"p": {"metrics": ["strict"]}}, ValueError, "Probe 'p' has no 'path'"),
        ({"p": {"path": "x", "metric": "strict"}}, ValueError, "An entry of probe 'p' must be one of .*Did you mean"),
    ]:
        trainer = models.trainer(tmp_path, KFACEditCallback(probes=probes))
        with pytest.raises(error, match=message):  # before the first step
            trainer.fit(language.LitLM(), language.loader(language.tokens(8, 8)))
        assert trainer.global_step == 0
    with pytest.raises(ValueError, match=r"metric of .* must be one of .*'strict'.* found 'perplexity'"):
        JsonlProbe(folder / "sequences.jsonl", ["perplexity"])
    with pytest.raises(ValueError, match=r"corpus.jsonl needs a tokenizer"):
        JsonlProbe(folder / "corpus.jsonl")
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"line 1: found the fields \['a'\]; a probe has"):
        JsonlProbe(path)
