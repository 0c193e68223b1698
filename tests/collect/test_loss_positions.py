"""How many loss positions stand behind the gradients of a layer, wherever its sums go."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_curvature import KroneckerFactors
from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.sums import LayerSums
from lightning_curvature.collect.windows import WindowedFactors
from lightning_curvature.distributed import Ranks
from lightning_curvature.factors.layer import LayerFactors
from lightning_curvature.recording.options import CollectorOptions
from tests.support import language, models, processes
from tests.support.processes import here
from tests.support.steps import gather, images
from tests.support.trunk import Net, tokens

IMAGES, TOKENS = 12, 5
"""Images of a batch; the patches of one, and its class token."""
FISHERS = {"sketched": {}, "sampled": {"draws": 3}, "exact": {}, "empirical": {}}


def counts(layer):
    return layer.num_losses, layer.num_gradients


@pytest.mark.parametrize("fisher", FISHERS)
def test_an_image_is_one_loss_position_whatever_its_patches(fisher):
    torch.manual_seed(0)
    model, (x, y) = models.vit(), images(IMAGES)
    options = {"layers": ["blocks.*.fc?"], "fisher": fisher, **FISHERS[fisher]}
    step = lambda batch: F.cross_entropy(model(x[batch]), y[batch])  # noqa: E731
    factors = gather(model, step, torch.arange(IMAGES).split(5), **options)
    assert counts(factors["blocks.0.fc1"]) == counts(factors["blocks.0.fc2"]) == (IMAGES, IMAGES * TOKENS)
    assert counts(factors["blocks.1.fc2"]) == (IMAGES, IMAGES)  # behind it only the class token is read
    assert factors["blocks.0.fc1"].positions_per_loss == TOKENS
    assert factors["blocks.1.fc2"].positions_per_loss == 1


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_token_of_a_language_model_is_one_loss_position(fisher, padded):
    """The last token of a text has no target, padding has none, and neither has a gradient."""
    model, rows = language.model(), language.tokens(3, 6)
    labels, mask = rows.clone(), torch.ones_like(rows)
    if padded:
        labels[0, 4:], mask[0, 4:] = -100, 0
    step = lambda _: model(input_ids=rows, attention_mask=mask, labels=labels).loss  # noqa: E731
    factors = gather(model, step, layers="mlp", fisher=fisher, **FISHERS[fisher])
    for layer in factors.values():
        assert counts(layer) == (13, 13) if padded else (15, 15)
        assert layer.positions_per_loss == 1
    of_all = gather(model, step, layers="mlp", fisher=fisher, positions="all", **FISHERS[fisher])
    assert of_all["model.layers.0.mlp.up_proj"].positions_per_loss == 18 / (13 if padded else 15)


def test_the_pixels_of_a_convolution_serve_one_loss():
    torch.manual_seed(0)
    model, (x, y) = models.cnn(), images(IMAGES)
    factors = gather(model, lambda _: F.cross_entropy(model(x), y), layers=["1", "5", "8"])
    assert {name: counts(layer) for name, layer in factors.items()} == {"1": (12, 768), "5": (12, 48), "8": (12, 12)}


@pytest.mark.parametrize("fisher", ["sketched", "empirical"])
def test_positions_without_a_target_or_with_a_weight_of_zero_do_not_count(fisher):
    model, (x, y) = Net().double(), tokens()
    y[0, :2] = -100
    weights = torch.ones(3, 4).double()
    weights[2] = 0

    def weighted(_):
        losses = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none")
        return (losses * weights.flatten()).sum()

    assert counts(gather(model, weighted, layers=["fc"], fisher=fisher)["fc"]) == (6, 6)


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("cut", ["one loss", "one loss for each token", "a loss and its mixed twin"])
def test_losses_of_one_step_are_counted_once(fisher, cut):
    """A layer that is called once for three texts of four tokens, or again for each token."""
    model, (x, y) = Net().double(), tokens()

    def step(_):
        if cut == "one loss for each token":
            return sum(F.cross_entropy(model(x[:, i]), y[:, i]) for i in range(4))
        logits = model(x).flatten(0, 1)
        loss = F.cross_entropy(logits, y.flatten())
        return loss if cut == "one loss" else 0.5 * loss + 0.5 * F.cross_entropy(logits, y.flatten().roll(1))

    assert counts(gather(model, step, layers=["fc"], fisher=fisher, **FISHERS[fisher])["fc"]) == (12, 12)


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_layer_that_is_called_again_for_one_loss(fisher):
    """A cell that reads four tokens one after the other, for one label."""
    model, (x, y) = Net().double(), tokens()
    step = lambda _: F.cross_entropy(model.head(sum(torch.tanh(model.fc(x[:, i])) for i in range(4))), y[:, 0])  # noqa: E731
    layer = gather(model, step, layers=["fc"], fisher=fisher, **FISHERS[fisher])["fc"]
    assert (*counts(layer), layer.positions_per_loss) == (3, 12, 4)


@pytest.mark.parametrize("fisher", ["exact", "empirical", "sketched"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_losses_above_a_detached_trunk(fisher, chunks):
    """The head reads means of two tokens, chunk by chunk; the trunk gets the gradients of all losses."""
    model, (x, y) = Net().double(), tokens()
    collector = Collector(model, CollectorOptions(layers=["fc"], fisher=fisher))
    with collector.step():
        h = torch.tanh(model.fc(x))
        copy = h.detach().requires_grad_(True)
        for part, labels in zip(copy.split(4 // chunks, 1), y[:, ::2].split(2 // chunks, 1), strict=True):
            means = part.unflatten(1, (-1, 2)).mean(2)
            F.cross_entropy(model.head(means).flatten(0, 1), labels.flatten(), reduction="sum").backward()
        h.backward(copy.grad)
    assert counts(collector.factors()["fc"]) == (6, 12)


@pytest.mark.filterwarnings("ignore:Chosen layers 'other' did not run")
def test_only_losses_that_a_backward_pass_goes_through_count_for_its_layers():
    """Each of two layers below one head has a backward pass of its own."""
    model, (x, y) = Net().double(), tokens()
    model.other = nn.Linear(5, 6).double()
    collector = Collector(model, CollectorOptions(layers=["fc", "other"]))
    with collector.step():
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        F.cross_entropy(model.head(torch.tanh(model.other(x[:1]))).flatten(0, 1), y[:1].flatten()).backward()
    assert {name: counts(layer) for name, layer in collector.factors().items()} == {"fc": (12, 12), "other": (4, 4)}


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_share_of_the_positions_leaves_their_number_per_loss(share):
    """Also if a batch holds few images: 12 images of 5 tokens in batches of 3, over and over."""
    torch.manual_seed(0)
    model, (x, y) = models.vit(), images(IMAGES)
    step = lambda batch: F.cross_entropy(model(x[batch]), y[batch])  # noqa: E731
    options = {"layers": ["blocks.*.fc2"], "fisher": "sketched", "share": share}
    factors = gather(model, step, 40 * list(torch.arange(IMAGES).split(3)), **options)
    first, last = (factors[f"blocks.{i}.fc2"] for i in (0, 1))
    assert first.num_losses == pytest.approx(40 * IMAGES * share, rel=0.15)
    assert first.positions_per_loss == pytest.approx(TOKENS, rel=0.01)
    assert last.num_losses == first.num_losses
    assert last.positions_per_loss == pytest.approx(1, abs=0.25)  # of the class tokens by chance more or fewer


@pytest.mark.filterwarnings("ignore:A batch with NaN")
def test_a_batch_that_is_left_out_counts_no_losses():
    torch.manual_seed(0)
    model, (x, y) = models.vit(), images(IMAGES)
    collector = Collector(model, CollectorOptions(layers=["blocks.0.fc1"]))
    for images_of_batch in (x, x * float("nan")):
        with collector.step() as step:
            step.backward(F.cross_entropy(model(images_of_batch), y))
    assert counts(collector.factors()["blocks.0.fc1"]) == (IMAGES, IMAGES * TOKENS)


def vit_windows(ranks, shard):
    """A collection of a ViT by one process of several."""
    torch.manual_seed(0)
    model = models.vit()
    collector = Collector(model, CollectorOptions(layers=["blocks.*.fc2"]), ranks=ranks, shard=shard)
    return model, WindowedFactors(collector, None, {})


def numbers(factors):
    return {name: layer.numbers for name, layer in factors.items()}


def collect_and_resume(folder, shard):
    """Collect a window of 12 images and one that goes on, of 6; return the counts of both, also after a restart."""
    ranks = Ranks() if shard is None else here()
    model, windows = vit_windows(ranks, bool(shard))
    x, y = images(18)
    for window in (range(12), range(12, 18)):
        mine = [index for index in window if index % ranks.num_data == ranks.data]
        with windows.collector.step() as step:
            step.backward(F.cross_entropy(model(x[mine]), y[mine]))
        if window[0] == 0:
            windows.start(complete=True)
    factors, state = windows.snapshot()
    told, going_on = [numbers(factors)], [state["collector"]]
    if ranks.rank == 0:
        factors.save(folder / "f.safetensors", state)
    ranks.gather(None)
    _, resumed = vit_windows(ranks, bool(shard))
    assert resumed.resume(windows.state_dict(), folder / "f.safetensors") is None
    again, state = resumed.snapshot()
    told.append(numbers(again))
    going_on.append(state["collector"])
    return told, [{name: sums["num_losses"] for name, sums in each["sums"].items()} for each in going_on]


@pytest.mark.parametrize(("size", "shard"), [(1, None), (2, False), (3, False), (2, True), (3, True)])
def test_windows_of_several_processes_and_after_a_restart(size, shard, tmp_path):
    one = size == 1
    results = [collect_and_resume(tmp_path, shard)] if one else processes.run(size, collect_and_resume, tmp_path, shard)
    told_of, going_on = results[0]
    for told in told_of:
        assert {name: (layer["num_losses"], layer["num_gradients"]) for name, layer in told.items()} == {
            "blocks.0.fc2": (12, 60),
            "blocks.1.fc2": (12, 12),
        }
    for sums in going_on:
        assert sums == {"blocks.0.fc2": 6, "blocks.1.fc2": 6}


def test_merged_factors_and_sums_of_factors():
    A, G = torch.eye(3), torch.eye(2)
    layer = LayerFactors(A=A, G=G, num_inputs=20, num_gradients=20, num_losses=4)
    factors = KroneckerFactors({"fc": layer})
    assert counts(factors.merge(factors)["fc"]) == (8, 40)
    assert counts(LayerSums.of(layer).factors()) == (4, 20)
    assert counts(LayerSums.from_state_dict(LayerSums.of(layer).state_dict()).factors()) == (4, 20)


def test_what_counted_no_losses_is_read_as_one_for_each_position():
    A, G = torch.eye(3), torch.eye(2)
    layer = LayerFactors(A=A, G=G, num_inputs=20, num_gradients=15)
    assert (*counts(layer), layer.positions_per_loss) == (15, 15, 1)
    state = LayerSums.of(layer).state_dict()
    del state["num_losses"]
    assert counts(LayerSums.from_state_dict(state).factors()) == (15, 15)
    assert LayerFactors(A=A, G=G, num_inputs=20, num_gradients=15, num_losses=0).positions_per_loss == 15
