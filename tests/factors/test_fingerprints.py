"""Factors know which weights they were collected on: other weights are refused, the same in another dtype are not."""

import json

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lightning_curvature import CurvatureEditor, KFACEditCallback, KroneckerFactors
from lightning_curvature.checkpoints.facts import checkpoint_note, folder_note
from lightning_curvature.cli.parser import main
from lightning_curvature.collect.passes import collect
from lightning_curvature.editing import streaming as files
from lightning_curvature.factors.fingerprints import fingerprint
from tests.support import language, models

EDITOR = CurvatureEditor(0.8)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def factors_of(model, **options):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 6, generator=generator), torch.randint(3, (40,), generator=generator)
    model = model.double() if options.pop("double", False) else model
    x = x.to(next(model.parameters()).dtype)
    return collect(model, [(x, y)], lambda b: F.cross_entropy(model(b[0]).float(), b[1]), layers=["0", "2"], **options)


@pytest.fixture
def folder(tmp_path):
    save_file(network().state_dict(), tmp_path / "m.safetensors")
    factors_of(network()).save(tmp_path / "f.safetensors")
    return tmp_path


def opened(folder):
    return KroneckerFactors.open(folder / "f.safetensors")


def changed(folder, change):
    """A checkpoint of the same architecture with other weights."""
    state = {name: tensor.clone() for name, tensor in network().state_dict().items()}
    change(state)
    save_file(state, folder / "other.safetensors")
    return folder / "other.safetensors"


def scale(name, factor):
    def change(state):
        state[name] *= factor

    return change


def test_factors_of_a_frozen_pass_say_what_they_were_collected_on(folder):
    recorded = opened(folder).fingerprints()
    assert recorded == KroneckerFactors.load(folder / "f.safetensors").fingerprints() != {}
    weight = network()[0].weight.detach()
    assert recorded["0"]["sample"] == [float(entry) for entry in weight.flatten()[torch.arange(30)]]
    assert recorded == {name: dict(fingerprint(network()[int(name)].weight)) for name in ("0", "2")}
    EDITOR.edit_checkpoint(folder / "m.safetensors", opened(folder), folder / "o.safetensors")
    merged = opened(folder).merge(opened(folder))
    assert merged.fingerprints() == recorded
    assert opened(folder).merge(factors_of(network(1))).fingerprints() == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(network(1).state_dict()), r"2 of 2 layers .*: '0', '2'; the furthest is 1\.\d"),
        (scale("2.weight", 1.25), r"1 of 2 layers .*: '2'; the furthest is 0\.25 of its norm away"),
        (scale("0.weight", -1.0), r"1 of 2 layers .*: '0'; the furthest is 2 of its norm away"),
        (lambda state: state["2.weight"].view(-1)[4].add_(1), "1 of 2 layers .*: '2'; few entries"),
        (lambda state: state.update({"0.weight": state["0.weight"].flip(0)}), "1 of 2 layers"),
    ],
    ids=["seed", "scale", "sign", "one entry", "order"],
)
def test_other_weights_are_refused_before_anything_is_worked_out(folder, change, message, monkeypatch):
    checkpoint, out = changed(folder, change), folder / "o.safetensors"
    edit = CurvatureEditor.edit_weight
    monkeypatch.setattr(CurvatureEditor, "edit_weight", None)
    for refused in (
        lambda: EDITOR.edit_checkpoint(checkpoint, opened(folder), out, delta=folder / "d.safetensors"),
        lambda: files.plan_edit(EDITOR, checkpoint, opened(folder)),
    ):
        with pytest.raises(ValueError, match=message) as error:
            refused()
        assert "fine-tune of the model that they were collected on" in str(error.value)
        assert "--force" in str(error.value)
    assert {path.name for path in folder.iterdir()} == {"m.safetensors", "f.safetensors", "other.safetensors"}
    monkeypatch.setattr(CurvatureEditor, "edit_weight", edit)
    with pytest.warns(UserWarning, match=message):
        report = EDITOR.edit_checkpoint(checkpoint, opened(folder), out, force=True)
    assert list(report.layers) == ["0", "2"]


def test_layers_that_are_not_edited_may_differ(folder):
    checkpoint = changed(folder, scale("2.weight", 1.25))
    CurvatureEditor(0.8, ["0"]).edit_checkpoint(checkpoint, opened(folder), folder / "o.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_weights_in_another_dtype_are_the_same(folder, dtype):
    def cast(state):
        state |= {name: tensor.to(dtype) for name, tensor in state.items()}

    EDITOR.edit_checkpoint(changed(folder, cast), opened(folder), folder / "o.safetensors")
    rounded = network().to(dtype)
    factors_of(network().to(dtype).float()).save(folder / "g.safetensors")  # collected on what was rounded before
    save_file(rounded.state_dict(), folder / "r.safetensors")
    EDITOR.edit_checkpoint(
        folder / "r.safetensors", KroneckerFactors.open(folder / "g.safetensors"), folder / "p.safetensors"
    )

    def other(state):
        state |= {name: (1.05 * tensor).to(dtype) for name, tensor in state.items()}

    with pytest.raises(ValueError, match=r"2 of 2 layers .* 0\.0\d+ of its norm away"):
        EDITOR.edit_checkpoint(changed(folder, other), opened(folder), folder / "q.safetensors")


def test_files_without_a_record_work_as_before(folder):
    """Older files, those of the paper's code, and factors made by hand."""
    with safe_open(folder / "f.safetensors", "pt") as file:
        header = json.loads(file.metadata()["lightning_curvature.factors"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for layer in header["layers"].values():
        del layer["weight"]
    save_file(tensors, folder / "f.safetensors", {"lightning_curvature.factors": json.dumps(header)})
    checkpoint = changed(folder, scale("2.weight", 1.25))
    EDITOR.edit_checkpoint(checkpoint, opened(folder), folder / "o.safetensors")


def test_editing_twice_says_so_and_needs_no_force(folder):
    """Also through names behind a prefix, and through two edits."""
    once, twice, thrice = (folder / f"{i}.ckpt" for i in range(3))
    torch.save(
        {"state_dict": {f"net.{key}": value for key, value in network().state_dict().items()}}, folder / "m.ckpt"
    )
    CurvatureEditor(0.8, ["0"]).edit_checkpoint(folder / "m.ckpt", opened(folder), once)
    with pytest.warns(UserWarning, match=r"0.ckpt is edited already \(kfac, layers '0'\); this edits the edited"):
        CurvatureEditor(0.8, ["2"]).edit_checkpoint(once, opened(folder), twice)
    with pytest.warns(UserWarning, match="is edited already"):
        CurvatureEditor(0.6).edit_checkpoint(twice, opened(folder), thrice)
    content = torch.load(thrice, weights_only=True)
    note = checkpoint_note(content)
    assert note.startswith("This checkpoint is an edited copy (method kfac, layers '0', '2')")
    assert "NAME.ckpt of NAME-edited.ckpt" in note
    assert checkpoint_note(torch.load(folder / "m.ckpt", weights_only=True)) is None
    assert checkpoint_note({"lightning_curvature": 3}) is None


def test_factors_that_move_with_training_ask_for_nothing(tmp_path):
    """The callback's own file edits the checkpoint beside it, and later ones."""
    module, data = models.Classifier("mlp"), models.images(64)
    callback = KFACEditCallback(layers="mlp")
    trainer = models.trainer(tmp_path, callback, max_epochs=2)
    trainer.fit(module, models.loader(data))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    factors = KroneckerFactors.load(tmp_path / "x-edited-factors.safetensors")
    assert factors.fingerprints() == {}
    EDITOR.edit_checkpoint(tmp_path / "x.ckpt", factors, tmp_path / "y.ckpt")
    assert isinstance(trainer, pl.Trainer)


def test_the_command_line_forces(folder, capsys):
    checkpoint = changed(folder, scale("2.weight", 1.25))
    command = [
        "edit",
        "--checkpoint",
        str(checkpoint),
        "--factors",
        str(folder / "f.safetensors"),
        "--out",
        str(folder / "o.safetensors"),
    ]
    with pytest.raises(SystemExit, match=r"1 of 2 layers of .* add --force"):
        main(command)
    with pytest.raises(SystemExit, match=r"1 of 2 layers of .* add --force"):
        main([*command, "--dry-run"])
    with pytest.warns(UserWarning, match="1 of 2 layers of"):
        main([*command, "--force"])
    assert "Written to" in capsys.readouterr().out


def test_a_language_model_and_its_neighbour(tmp_path):
    rows = language.tokens(8, 12)
    net, neighbour = language.model("llama", seed=0), language.model("llama", seed=1)
    factors = collect(net, [rows], lambda ids: net(input_ids=ids, labels=ids).loss, layers="mlp")
    for name, model in (("one", net), ("two", neighbour)):
        model.save_pretrained(tmp_path / name)
    EDITOR.edit_checkpoint(tmp_path / "one", factors, tmp_path / "a")
    with pytest.raises(ValueError, match=r"6 of 6 layers of .*two have other weights"):
        EDITOR.edit_checkpoint(tmp_path / "two", factors, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    assert folder_note(tmp_path / "one") is None
    note = folder_note(tmp_path / "a")
    assert note.startswith(f"The model in {tmp_path / 'a'} is an edited copy (method kfac, layers 'model.layers.0.mlp.")


def test_other_weights_are_refused_before_a_model_is_run(tmp_path, monkeypatch):
    """An energy that is chosen by perplexity takes long to find."""
    rows = language.tokens(8, 12)
    net, neighbour = language.model("llama", seed=0), language.model("llama", seed=1)
    collect(net, [rows], lambda ids: net(input_ids=ids, labels=ids).loss, layers="mlp").save(tmp_path / "f.safetensors")
    neighbour.save_pretrained(tmp_path / "two")
    (tmp_path / "t.txt").write_text("w1 w2")
    monkeypatch.setattr("lightning_curvature.text.choosing.Chooser.__init__", None)
    with pytest.raises(SystemExit, match="6 of 6 layers"):
        main(
            [
                "edit",
                "--checkpoint",
                str(tmp_path / "two"),
                "--factors",
                str(tmp_path / "f.safetensors"),
                "--out",
                str(tmp_path / "o"),
                "--perplexity",
                "1.1",
                "--corpus",
                str(tmp_path / "t.txt"),
            ]
        )


def test_what_has_no_fingerprint():
    assert fingerprint(nn.Parameter(torch.full((2, 2), torch.nan))) is None
    assert fingerprint(nn.Parameter(torch.empty(2, 2, device="meta"))) is None
    assert fingerprint(nn.Parameter(torch.empty(0, 2))) is None
    assert fingerprint(torch.ones(2, 2)) is None
