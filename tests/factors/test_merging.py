"""Factors of several texts or machines together: weights, errors, tied inputs, and what does not go together."""

import dataclasses
import math

import pytest
import torch
from safetensors import safe_open

from lightning_curvature import KroneckerFactors, LayerFactors
from lightning_curvature.factors.fingerprints import fingerprint
from lightning_curvature.factors.merging import merge_files
from tests.support.factors import layer
from tests.support.gated import Gated, batches, gathered

TENSORS = ("A", "G", "A_coupled", "G_coupled")


def stream(seed, n, **extra):
    """Factors of n positions in float64, with those of the score "coupled"."""
    torch.manual_seed(seed)
    a, g = torch.randn(n, 3).double(), torch.randn(n, 2).double()
    coupled = {"A_coupled": a.T @ a / n * 2, "G_coupled": g.T @ g / n * 3}
    return LayerFactors(A=a.T @ a / n, G=g.T @ g / n, num_inputs=n, num_gradients=n, num_seen=n + 1, **coupled, **extra)


def of(*layers):
    return [KroneckerFactors({"fc": one}) for one in layers]


def weight(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return fingerprint(torch.nn.Parameter(torch.randn(2, 3).bfloat16().to(dtype)))


def saved(folder, *layers, **provenance):
    """Files with the factors of one layer each."""
    paths = [folder / f"{number}.safetensors" for number in range(len(layers))]
    for number, (path, one) in enumerate(zip(paths, layers, strict=True)):
        facts = {key: values[number] for key, values in provenance.items()}
        KroneckerFactors({"fc": one}, {"fisher": "sketched", "positions": "contributing", **facts}).save(path)
    return paths


def test_weights_count_whatever_the_positions():
    layers = [stream(seed, n) for seed, n in enumerate((5, 500, 50))]
    first, *others = of(*layers)
    weights = [1, 2, 0.5]
    merged = first.merge(*others, weights=weights)["fc"]
    for name in TENSORS:
        expected = sum(w * getattr(one, name) for w, one in zip(weights, layers, strict=True)) / 3.5
        torch.testing.assert_close(getattr(merged, name), expected)
    assert (merged.num_inputs, merged.num_gradients, merged.num_seen) == (555, 555, 558)
    scaled = first.merge(*others, weights=[4e200 * weight for weight in weights])
    by_positions, as_weights = first.merge(*others)["fc"], first.merge(*others, weights=[5, 500, 50])["fc"]
    for name in TENSORS:
        torch.testing.assert_close(getattr(scaled["fc"], name), getattr(merged, name))
        torch.testing.assert_close(getattr(as_weights, name), getattr(by_positions, name))
    one_by_one = first.merge(others[0]).merge(others[1])["fc"]
    torch.testing.assert_close(by_positions.A, one_by_one.A)
    without = of(dataclasses.replace(layers[0], A_coupled=None, G_coupled=None))
    assert first.merge(*without, weights=[1, 1])["fc"].A_coupled is None


def test_weights_below_one_in_sum_are_normalised():
    first, second = of(stream(0, 5), stream(1, 9))
    merged, expected = first.merge(second, weights=[0.1, 0.3]), first.merge(second, weights=[1, 3])
    torch.testing.assert_close(merged["fc"].A, expected["fc"].A)


def test_the_error_of_a_weighted_mean_is_that_of_independent_streams():
    """Each stream is a known moment and noise of a known size; the error is what the merged ones are off by."""
    torch.manual_seed(0)
    truths = [torch.diag(torch.tensor([3.0, 1.0, 0.5])).double(), torch.diag(torch.tensor([1.0, 2.0, 4.0])).double()]
    sizes, weights, counts = (0.02, 0.1), (1, 3), (10, 1000)
    mean = (truths[0] + 3 * truths[1]) / 4
    off, told = [], []
    for _ in range(400):
        layers = []
        for truth, size, count in zip(truths, sizes, counts, strict=True):
            noise = torch.randn(3, 3).double() / 3 * size * truth.norm()  # of the expected square (size |truth|)^2
            factors = {"A": truth + noise, "G": torch.eye(2), "num_inputs": count, "num_gradients": count}
            layers.append(LayerFactors(**factors, A_error=size, G_error=0.1))
        first, second = of(*layers)
        merged = first.merge(second, weights=weights)["fc"]
        off.append(float((merged.A - mean).norm() / mean.norm()))
        told.append(merged.A_error)
    assert math.sqrt(sum(error**2 for error in off) / 400) == pytest.approx(sum(told) / 400, rel=0.05)
    assert merged.G_error == pytest.approx(0.1 * math.hypot(1, 3) / 4)
    unknown = of(dataclasses.replace(layers[0], A_error=None))[0]
    assert unknown.merge(second, weights=weights)["fc"].A_error is None


def test_tied_inputs_stay_tied(tmp_path):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, data in zip(paths, (batches(), batches(seed=5)), strict=True):
        gathered(Gated(), data).save(path)
    merged = merge_files(paths, [1, 2])
    assert merged["gate"].A is merged["up"].A
    assert merged["gate"].A is not merged["down"].A
    merged.save(tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["down.A", "down.G", "gate.A", "gate.G", "up.G"]
    first, second = (KroneckerFactors.load(path) for path in paths)
    torch.testing.assert_close(merged["up"].A, (first["up"].A + 2 * second["up"].A) / 3)
    alone = {name: dataclasses.replace(one, A=one.A.clone()) for name, one in second.items()}
    untied = first.merge(KroneckerFactors(alone), weights=[1, 2])
    assert untied["gate"].A is not untied["up"].A
    assert torch.equal(untied["gate"].A, merged["gate"].A)


@pytest.mark.parametrize("wrong", [0, -1, math.nan, math.inf, "1", True])
def test_weights_are_positive_numbers(wrong):
    first, second = of(layer(), layer())
    with pytest.raises(ValueError, match="weights must be positive numbers, found"):
        first.merge(second, weights=[1, wrong])


def test_what_has_no_weighted_mean():
    first, second = of(layer(), layer())
    with pytest.raises(ValueError, match="weights must be 2 numbers, one for each, found 1"):
        first.merge(second, weights=[1])
    nothing = of(LayerFactors(A=torch.zeros(3, 3), G=torch.zeros(2, 2), num_inputs=0, num_gradients=0))[0]
    with pytest.raises(ValueError, match="Layer 'fc': factors that rest on no position cannot count with a weight"):
        first.merge(nothing, weights=[1, 1])
    torch.testing.assert_close(first.merge(nothing)["fc"].A, first["fc"].A)


def test_files_of_one_model(tmp_path):
    same = weight(0)
    layers = [stream(0, 5, weight=same), stream(1, 500, weight=same)]
    paths = saved(tmp_path, *layers, corpus=["a.txt", "b.txt"], tokens=[8, 8], model=["Llama", "Llama"], draws=[1, 2])
    merged = merge_files(paths)
    expected = KroneckerFactors({"fc": layers[0]}).merge(KroneckerFactors({"fc": layers[1]}))
    assert merged.digest() == expected.digest()
    assert merged.fingerprints() == {"fc": same}
    sources = [
        {"file": "0.safetensors", "corpus": "a.txt", "tokens": 8, "draws": 1},
        {"file": "1.safetensors", "corpus": "b.txt", "tokens": 8, "draws": 2},
    ]
    common = {"fisher": "sketched", "positions": "contributing", "model": "Llama"}
    assert merged.provenance == {**common, "sources": sources}
    weighted = merge_files(paths, [1, 2])
    assert weighted.provenance["sources"][1] == {**sources[1], "weight": 2.0}
    torch.testing.assert_close(weighted["fc"].G, (layers[0].G + 2 * layers[1].G) / 3)
    weighted.save(tmp_path / "c.safetensors")
    assert KroneckerFactors.load(tmp_path / "c.safetensors").provenance == weighted.provenance
    again = merge_files([tmp_path / "c.safetensors", paths[0]])
    assert again.provenance["sources"][0] == {"file": "c.safetensors", "sources": weighted.provenance["sources"]}
    with pytest.raises(ValueError, match="name two factor files or more, found 1"):
        merge_files(paths[:1])


def test_files_of_other_weights(tmp_path):
    paths = saved(tmp_path, *(layer(weight=weight(seed)) for seed in (0, 0, 1)))
    merge_files(paths[:2])
    with pytest.raises(ValueError, match=r"Layer 'fc': .*2\.safetensors was collected on other weights than .*0\.safe"):
        merge_files(paths)
    assert merge_files(paths, force=True).fingerprints() == {}
    paths = saved(tmp_path, layer(), layer(weight=weight(0)), layer(weight=weight(1)))  # the first one does not say
    with pytest.raises(ValueError, match=r"2\.safetensors was collected on other weights than .*1\.safetensors"):
        merge_files(paths)
    half = layer(weight=weight(0, torch.bfloat16))  # the same numbers
    merge_files(saved(tmp_path, layer(weight=weight(0)), half))


@pytest.mark.parametrize(
    ("key", "values", "said"),
    [
        ("fisher", ["sketched", "empirical"], "another Fisher kind: .*0.safetensors has 'sketched', .*1.*'empirical'"),
        ("positions", ["all", "first"], "another rule of the positions that count: .* Collect both with one --positio"),
    ],
)
def test_files_that_were_collected_in_another_way(tmp_path, key, values, said):
    paths = saved(tmp_path, layer(), layer(), **{key: values})
    for force in (False, True):
        with pytest.raises(ValueError, match=said):
            merge_files(paths, force=force)


def test_files_of_other_layers(tmp_path):
    paths = saved(tmp_path, layer(), layer(d_in=4))
    with pytest.raises(ValueError, match=r"Layer 'fc': cannot merge factors of a \(2, 3\) and a \(2, 4\) weight"):
        merge_files(paths)
    KroneckerFactors({"head": layer()}).save(paths[1])
    with pytest.raises(ValueError, match=r"other layers: only in one are \['fc', 'head'\]"):
        merge_files(paths)
