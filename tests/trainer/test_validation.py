"""Collecting in the validation loop: with a plain Trainer, inside fit, and without a trace."""

import contextlib

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F

from lightning_curvature import KFACEditCallback
from lightning_curvature.collect.passes import collect
from tests.support import language, models


def frozen(module, data, batch_size=32, **options):
    module.eval()
    step = lambda batch: F.cross_entropy(module(batch[0]), batch[1])  # noqa: E731
    return collect(module, models.loader(data, batch_size), step, **options)


@pytest.mark.parametrize("fisher", ["sketched", "sampled", "exact", "empirical"])
def test_validate_with_a_plain_trainer_is_a_pass_over_the_frozen_model(fisher, tmp_path):
    module, data = models.Validated("cnn"), models.images(128)
    callback = KFACEditCallback(layers="mlp", fisher=fisher)
    trainer = models.trainer(tmp_path, callback)
    trainer.validate(module, models.loader(data), verbose=False)
    expected = frozen(module, data, layers="mlp", fisher=fisher)
    assert set(callback.factors) == set(expected)
    for name, layer in expected.items():
        collected = callback.factors[name]
        assert collected.num_inputs == layer.num_inputs
        torch.testing.assert_close(collected.A, layer.A)
        torch.testing.assert_close(collected.G, layer.G)
    assert callback.factors.provenance["loop"] == "validation"
    assert set(callback.report.layers) == set(expected)
    assert trainer.validate_loop.inference_mode  # as it was before
    assert "validation_step" not in vars(module)


@pytest.mark.parametrize("layers", ["mlp", "linear"])
def test_a_frozen_module_is_collected_from_like_another(layers, tmp_path):
    """As one that was loaded to be used is, by peft for example. Nothing about it changes."""
    module, loader = models.Classifier("vit"), models.loader(models.images(64))
    factors = []
    for freeze in (False, True):
        module.requires_grad_(not freeze)
        callback = KFACEditCallback(layers=layers, min_positions=0)
        models.trainer(tmp_path, callback).validate(module, loader, verbose=False)
        factors.append(callback.factors)
    assert list(factors[0]) == list(factors[1])
    for name in factors[0]:
        torch.testing.assert_close(factors[0][name].G, factors[1][name].G)
        torch.testing.assert_close(factors[0][name].A, factors[1][name].A)
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_validate_leaves_module_metrics_and_random_state_alone(tmp_path):
    class Random(models.Validated):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("noise", torch.rand(()))

    def validate(*callbacks):
        pl.seed_everything(0)
        module = Random("cnn")
        (results,) = models.trainer(tmp_path, *callbacks).validate(
            module, models.loader(models.images(64)), verbose=False
        )
        return module, results, torch.get_rng_state()

    module, results, state = validate(KFACEditCallback())
    plain, expected, plain_state = validate()
    assert results == pytest.approx(expected, rel=1e-6)
    assert results["noise"] == expected["noise"]
    assert torch.equal(state, plain_state)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_validation_inside_fit_gives_the_factors_of_the_saved_weights(tmp_path):
    """Exact for the checkpoint, although training goes on; the sanity check does not count."""
    calls = []

    class Counting(models.Validated):
        def validation_step(self, batch, batch_idx):
            calls.append(torch.is_grad_enabled())
            super().validation_step(batch, batch_idx)

    module, callback, data = Counting(), KFACEditCallback(loop="validation", energy=0.85), models.images(64, 1)
    trainer = models.trainer(tmp_path, callback, max_epochs=3, num_sanity_val_steps=1)
    trainer.fit(module, models.loader(models.images(96)), models.loader(data))
    assert calls == [False, *[True] * 6]  # each step ran once
    path = trainer.checkpoint_callback.best_model_path
    saved = models.Classifier.load_from_checkpoint(path, weights_only=True)
    expected = frozen(saved, data)["net.3"]
    # The random draws differ: the collector has seen two validations before. Inputs do not.
    torch.testing.assert_close(callback.factors["net.3"].A, expected.A)
    assert callback.factors["net.3"].num_inputs == 64
    assert callback.factors.provenance["step"] == 9
    edited = torch.load(path.replace(".ckpt", "-edited.ckpt"), weights_only=True)["state_dict"]
    with callback.editor.applied(saved, callback.factors):
        assert torch.equal(edited["net.3.weight"], saved.net[3].weight)


def test_training_is_the_same_with_collection_in_validation(tmp_path):
    def fit(*callbacks):
        pl.seed_everything(0)
        module = models.Validated("cnn")
        shuffled = torch.utils.data.DataLoader(models.images(96), batch_size=16, shuffle=True)
        trainer = models.trainer(tmp_path, *callbacks, enable_checkpointing=False)
        trainer.fit(module, shuffled, models.loader(models.images(64, 1)))
        return module.state_dict()

    plain = fit()
    assert all(torch.equal(v, plain[k]) for k, v in fit(KFACEditCallback(loop="validation")).items())


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_sums_are_not_taken_in_the_precision_of_the_step(precision, tmp_path):
    """Products of large inputs overflow float16, and lose digits in bfloat16."""
    x, y = models.images(64).tensors
    data = torch.utils.data.TensorDataset(500 * x, y)
    seen = []

    class Watch(models.Validated):
        def validation_step(self, batch, batch_idx):
            handle = self.net[3].register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach().float()))
            super().validation_step(batch, batch_idx)
            handle.remove()

    callback = KFACEditCallback(energy=1.0, fisher="empirical", positions="all")
    with contextlib.ExitStack() as stack:
        if precision == "16-mixed":  # Lightning has no float16 on a CPU; the autocast is the same
            stack.enter_context(torch.autocast("cpu", torch.float16))
        options = {} if precision == "16-mixed" else {"precision": precision}
        models.trainer(tmp_path, callback, **options).validate(Watch(), models.loader(data), verbose=False)
    rows = torch.cat(seen)
    torch.testing.assert_close(callback.factors["net.3"].A, rows.T @ rows / 64, rtol=1e-5, atol=0)


def test_checkpoints_between_validations_are_warned_about(tmp_path):
    saver = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    trainer = models.trainer(tmp_path, KFACEditCallback(loop="validation"), saver, max_epochs=2)
    with pytest.warns(UserWarning, match="checkpoint of step") as caught:
        trainer.fit(models.Validated(), models.loader(models.images(96)), models.loader(models.images(32)))
    messages = "".join(str(warning.message) for warning in caught)
    assert "The checkpoint of step 2 has no edited copy: it was saved before the first validation" in messages
    assert "A checkpoint of step 4 was saved, and the factors are those of the validation at step 3" in messages
    assert "of step 6" not in messages or "validation at step 3" in messages


def test_validate_after_fit_keeps_the_factors_of_the_fit(tmp_path):
    module, callback = models.Classifier(), KFACEditCallback()  # its validation step computes no loss
    trainer = models.trainer(tmp_path, callback, enable_checkpointing=False)
    trainer.fit(module, models.loader(models.images(64)), models.loader(models.images(32)))
    fitted = callback.factors["net.3"].A
    trainer.validate(module, models.loader(models.images(32)), verbose=False)
    assert torch.equal(callback.factors["net.3"].A, fitted)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, models.loader(models.images(64)), models.loader(models.images(32)))
    assert not torch.equal(callback.factors["net.3"].A, fitted)


def test_language_model_in_validation(tmp_path):
    module, callback = language.LitLM(), KFACEditCallback(layers="mlp")
    rows = language.tokens(8, 12)
    models.trainer(tmp_path, callback).validate(module, language.loader(rows), verbose=False)
    assert len(callback.factors) == 6
    assert callback.factors["net.model.layers.1.mlp.down_proj"].num_inputs == 8 * 11


def test_a_validation_step_of_its_own_instance_comes_back(tmp_path):
    module = models.Validated()
    replacement = vars(module)["validation_step"] = module.validation_step
    models.trainer(tmp_path, KFACEditCallback()).validate(module, models.loader(models.images(64)), verbose=False)
    assert vars(module)["validation_step"] is replacement


# Errors -------------------------------------------------------------------------------------------------------------


def test_a_validation_without_a_loss_is_an_error(tmp_path):
    class Accuracy(models.Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    module = Accuracy()
    with pytest.raises(RuntimeError, match="No loss whose curvature is known reaches"):
        models.trainer(tmp_path, KFACEditCallback()).validate(module, models.loader(models.images(64)), verbose=False)
    assert not module._forward_hooks
    assert "validation_step" not in vars(module)


def test_a_loss_without_gradients_is_named(tmp_path):
    class Decorated(models.Validated):
        @torch.no_grad()
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match=r"loss without gradients: take torch.no_grad\(\) or detach\(\) away"):
        models.trainer(tmp_path, KFACEditCallback()).validate(
            Decorated(), models.loader(models.images(64)), verbose=False
        )


def test_two_losses_need_the_one_that_counts(tmp_path):
    class Two(models.Classifier):
        answer = None

        def validation_step(self, batch, batch_idx):
            logits = self(batch[0])
            losses = F.cross_entropy(logits, batch[1]), F.cross_entropy(logits[:, :2], batch[1] % 2)
            return None if self.answer is None else losses[self.answer]

    def validate(answer):
        module, callback = Two(), KFACEditCallback()
        module.answer = answer
        models.trainer(tmp_path, callback).validate(module, models.loader(models.images(64)), verbose=False)
        return callback.factors

    with pytest.raises(RuntimeError, match=r"2 losses .* may also return the loss that counts"):
        validate(None)
    assert len(validate(0)) == 1


@pytest.mark.filterwarnings("ignore:The checkpoint of step 1 has no edited copy")
@pytest.mark.parametrize("stage", ["validate", "fit"])
def test_no_batch_is_an_error(stage, tmp_path):
    empty = models.loader(models.images(0))
    callback, module = KFACEditCallback(loop="validation"), models.Validated()
    trainer = models.trainer(tmp_path, callback, limit_val_batches=0 if stage == "fit" else 1.0, max_epochs=1)
    if stage == "fit":
        with pytest.warns(UserWarning, match="collected no data: no validation ran"):
            trainer.fit(module, models.loader(models.images(32)), models.loader(models.images(32)))
    else:

        class Broken(models.Validated):
            def validation_step(self, batch, batch_idx):
                return F.cross_entropy(self(batch[0]) * torch.nan, batch[1])

        with (
            pytest.raises(RuntimeError, match="collected no data: no validation step computed a loss"),
            pytest.warns(UserWarning, match="NaN or infinite"),
        ):
            trainer.validate(Broken(), models.loader(models.images(32)), verbose=False)
    assert len(empty) == 0


def test_loop_is_checked():
    with pytest.raises(ValueError, match=r"loop must be one of \['auto', 'train', 'validation'\], found 'val'"):
        KFACEditCallback(loop="val")


def test_no_hook_survives_an_exception_in_validation(tmp_path):
    class Failing(models.Validated):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            raise ValueError("stop")

    module = Failing()
    trainer = models.trainer(tmp_path, KFACEditCallback())
    with pytest.raises(ValueError, match="stop"):
        trainer.validate(module, models.loader(models.images(32)), verbose=False)
    assert all(not m._forward_hooks for m in module.modules())
    assert not torch.overrides._get_current_function_mode_stack()
    assert "validation_step" not in vars(module)
    assert trainer.validate_loop.inference_mode
