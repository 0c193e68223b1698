r"""What collecting costs: time and memory, beside naive hooks and two libraries.

Protocol. Three networks: a language model with gated MLPs (gate, up, down), one with two MLP projections, and a ViT,
each with random weights and random data, float32. All MLP projections are collected. Variants take turns in rounds on
the same batches, and every figure is a ratio within a round: median, and range in brackets.

1. *in training*: forward, backward, AdamW. ``plain`` is that alone; the others add what the name says. "Extra" is the
   time beyond plain, in units of plain; "of naive" is that extra over the one of naive hooks, which add ``x.T @ x`` and
   ``g.T @ g`` of every layer to float32 sums in every step. The "limit" is the time of the products alone: one matrix
   product of each distinct factor's shapes, by half, measured in the same rounds.
2. *one pass over a frozen model*: no weight gradients, 16 batches. ``kronfluence`` and ``curvlinops`` see the same
   model, rows and layers; "sampled" draws labels from the softmax, one for each position (curvlinops:
   ``mc_samples=1``). Theirs stands beside our "sketched", too, which they do not have. The "limit" is forward and
   backward down to the layers' outputs, and the products by half, as above.
3. *memory*: the peak of four training steps beyond that of plain ones, sums included, by torch's profiler, over the
   bytes of the distinct factors in float32; captured tensors (inputs and gradients of the layers in one batch) are
   named beside it.
4. *alone*: plain, naive, ``empirical``, and watching the layers without any product, with no other variant between
   them; *blocks*: products of 1024 and 4096 rows, block columns that end at the diagonal, alone and added to a sum,
   against the full product.
5. *sizes*: the gated model at growing width, depth and sequence length: extra of ``empirical`` and of naive hooks.
6. *peak*, on a GPU: operations that one update of a factor needs (``d^2`` for each of 8192 positions, bfloat16) in a
   second, over those of one 8192 x 8192 x 8192 product of bfloat16 matrices.

    pip install -e ".[bench]"
    python benchmarks/bench_collect.py --out benchmarks/results/collect.json
    python benchmarks/bench_collect.py --device cuda --dtype bfloat16 --width 1024 --length 512 --rows 16 \
        --parts training memory peak --out benchmarks/results/collect-gpu.json
"""

import argparse
import copy
import itertools
import logging
import statistics
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from measuring import in_turn, peak_bytes, ratios, spread, write
from tabulate import tabulate
from torch import Tensor, nn

from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.moments import SecondMoment, block_columns
from lightning_curvature.collect.passes import collect
from lightning_curvature.recording.options import CollectorOptions

STEPS = 4  # training steps of a round
PASS = 4  # times that a pass goes over their batches


class Block(nn.Module):
    """A pre-norm transformer block; a gated MLP or one of two projections."""

    def __init__(self, width: int, gated: bool, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = width // 32, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.ModuleDict({"up": nn.Linear(width, 4 * width, bias=False)})
        if gated:
            self.mlp["gate"] = nn.Linear(width, 4 * width, bias=False)
        self.mlp["down"] = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[b, t, width]`` to the same."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
        h = self.norm2(x)
        up = self.mlp["up"](h)
        return x + self.mlp["down"](F.silu(self.mlp["gate"](h)) * up if "gate" in self.mlp else F.gelu(up))


class Network(nn.Module):
    """Blocks between an embedding and a head; logits are ``[rows, classes]``, so that all three libraries read them."""

    def __init__(self, kind: str, width: int, depth: int, length: int) -> None:
        super().__init__()
        self.image, classes = kind == "vit", 10 if kind == "vit" else 2048
        self.embed = nn.Linear(48, width, bias=False) if self.image else nn.Embedding(classes, width)
        self.place = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, kind == "gated", not self.image) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Token ids ``[b, t]``, or patches ``[b, t, 48]``, to logits."""
        x = self.embed(x) + self.place
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, 0]) if self.image else self.head(x).flatten(0, 1)


class Subject:
    """A network, its data, and the steps that are timed."""

    def __init__(
        self,
        kind: str,
        width: int = 256,
        depth: int = 4,
        length: int = 256,
        rows: int = 4,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        self.model = Network(kind, width, depth, length).to(device, dtype)
        shape = (STEPS * rows, length)
        if kind == "vit":
            inputs, labels = torch.randn(*shape, 48, dtype=dtype), torch.randint(10, shape[:1])
        else:
            inputs, labels = torch.randint(2048, shape), torch.randint(2048, shape)
        inputs, labels = inputs.to(device), labels.view(STEPS * rows, -1).to(device)
        self.batches = [(x, y.flatten()) for x, y in zip(inputs.split(rows), labels.split(rows), strict=True)]
        self.rows = [*zip(inputs, labels, strict=True)]
        self.names = [name for name, module in self.model.named_modules() if ".mlp." in name]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)

    @property
    def layers(self) -> dict[str, nn.Linear]:
        """The collected layers."""
        return {name: self.model.get_submodule(name) for name in self.names}

    def step(self, batch: tuple[Tensor, Tensor], collector: Collector | None = None) -> None:
        """One training step."""
        if collector is not None:
            recording = collector.step(batch)
            recording.open()
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        if collector is not None:
            recording.before_backward(loss)
            recording.stop_recording()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if collector is not None:
            recording.close()

    def trained(self, **options: object) -> object:
        """Return work that trains on all batches and collects from them."""
        collector = Collector(self.model, CollectorOptions(layers=self.names, **options))

        def work() -> None:
            for batch in self.batches:
                self.step(batch, collector)

        return work

    def plain(self) -> None:
        """Train on all batches."""
        for batch in self.batches:
            self.step(batch)

    def naive(self) -> object:
        """Return work that trains with the hooks that anyone would write first."""
        sums = {
            name: tuple(torch.zeros(size, size, device=m.weight.device) for size in m.weight.shape[::-1])
            for name, m in self.layers.items()
        }

        def hook(A: Tensor, G: Tensor):
            @torch.no_grad()
            def forward(_module, args, output):
                x = args[0].flatten(0, -2)
                A.add_(x.T @ x)

                def backward(gradient):
                    g = gradient.flatten(0, -2)
                    G.add_(g.T @ g)

                output.register_hook(backward)

            return forward

        def work() -> None:
            handles = [module.register_forward_hook(hook(*sums[name])) for name, module in self.layers.items()]
            self.plain()
            for handle in handles:
                handle.remove()

        return work

    def products(self) -> object:
        """Return the products alone that a step cannot do without: one of each distinct factor, counted by half."""
        positions = self.batches[0][0].shape[0] * self.batches[0][0].shape[1]
        widths = []
        for name, module in self.layers.items():
            widths += [module.out_features] + ([] if name.endswith("gate") else [module.in_features])
        data = {width: torch.randn(positions, width).to(self.model.place) for width in set(widths)}

        def work() -> None:
            for _ in self.batches:
                for width in widths:
                    data[width].T @ data[width]

        return work

    def bare_pass(self) -> None:
        """Go forward, and backward to the outputs of the layers, and take nothing."""
        outputs: list[Tensor] = []
        handles = [
            module.register_forward_hook(lambda *call: outputs.append(call[-1])) for module in self.layers.values()
        ]
        for batch in self.batches * PASS:
            torch.autograd.grad(F.cross_entropy(self.model(batch[0]), batch[1]), outputs)
            outputs.clear()
        for handle in handles:
            handle.remove()

    def pass_over(self, fisher: str) -> None:
        """Collect in one pass over the frozen model."""
        collect(
            self.model,
            self.batches * PASS,
            lambda batch: F.cross_entropy(self.model(batch[0]), batch[1]),
            layers=self.names,
            fisher=fisher,
            positions="all",
        )

    def curvlinops(self, fisher: str) -> None:
        """The same pass by curvlinops."""
        from curvlinops import KFACLinearOperator

        kind = {"sampled": "mc", "empirical": "empirical"}[fisher]
        KFACLinearOperator(
            self.model,
            nn.CrossEntropyLoss(),
            [module.weight for module in self.layers.values()],
            self.batches * PASS,
            fisher_type=kind,
            kfac_approx="expand",
            check_deterministic=False,
            num_data=PASS * len(self.rows),
            num_per_example_loss_terms=self.batches[0][1].numel() // len(self.batches[0][0]),
        ).compute_kronecker_factors()

    def kronfluence(self, fisher: str) -> object:
        """Return work that makes the same pass by kronfluence, on a copy of the model, which it wraps."""
        from kronfluence import prepare_model
        from kronfluence.arguments import FactorArguments
        from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
        from kronfluence.task import Task
        from kronfluence.utils.state import State

        names = self.names

        class Pass(Task):
            def compute_train_loss(self, batch, model, sample=False):
                logits, labels = model(batch[0]), batch[1]
                if sample:
                    labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
                return F.cross_entropy(logits, labels, reduction="sum")

            def compute_measurement(self, batch, model):
                raise NotImplementedError

            def get_influence_tracked_modules(self):
                return names

        task, model_on_gpu = Pass(), self.model.place.is_cuda
        model = prepare_model(copy.deepcopy(self.model), task).to(self.model.place.device)  # what it adds is on the CPU
        arguments = FactorArguments(use_empirical_fisher=fisher == "empirical")
        return lambda: fit_covariance_matrices_with_loader(
            model, State(cpu=not model_on_gpu), task, self.batches * PASS, arguments, disable_tqdm=True
        )

    def captured_bytes(self) -> int:
        """Bytes of the layers' distinct inputs and of the gradients at their outputs, in one batch."""
        positions = self.batches[0][0].shape[0] * self.batches[0][0].shape[1]
        return self.model.place.dtype.itemsize * positions * self._widths(self.layers)

    def factor_bytes(self) -> int:
        """Bytes of the distinct factors, float32."""
        return 4 * self._widths(self.layers, power=2)

    @staticmethod
    def _widths(layers: dict[str, nn.Linear], power: int = 1) -> int:
        return sum(
            module.out_features**power + (0 if name.endswith("gate") else module.in_features**power)
            for name, module in layers.items()
        )


def in_training(subject: Subject, rounds: int) -> tuple[list[list[object]], dict[str, list[float]]]:
    """Measure the variants of a training step."""
    seconds = in_turn(
        {
            "plain": subject.plain,
            "naive hooks": subject.naive(),
            "empirical": subject.trained(fisher="empirical"),
            "empirical, half of the positions": subject.trained(fisher="empirical", share=0.5),
            "sketched": subject.trained(fisher="sketched"),
            "sketched, its backward pass alone": subject.trained(fisher="sketched", share=1e-9),
            "sampled": subject.trained(fisher="sampled"),
            "sketched, 2 draws": subject.trained(fisher="sketched", draws=2),
            "sketched, coupled": subject.trained(fisher="sketched", coupled=True),
            "the products alone": subject.products(),
        },
        rounds,
    )
    limit = [0.5 * own / plain for own, plain in zip(seconds["the products alone"], seconds["plain"], strict=True)]
    rows: list[list[object]] = [["limit", spread(limit), ""]]
    naive = [ratio - 1 for ratio in ratios(seconds, "naive hooks", "plain")]
    for name in [*seconds][1:-1]:
        extra = [ratio - 1 for ratio in ratios(seconds, name, "plain")]
        rows.append([name, spread(extra), spread([o / n for o, n in zip(extra, naive, strict=True)])])
    return rows, seconds


def alone(subject: Subject, rounds: int) -> tuple[list[str], dict[str, list[float]]]:
    """Measure ``empirical`` and naive hooks with nothing else in turn."""
    seconds = in_turn(
        {
            "plain": subject.plain,
            "naive": subject.naive(),
            "ours": subject.trained(fisher="empirical"),
            "watching": subject.trained(fisher="empirical", share=1e-9),
        },
        rounds,
    )
    extras = [[ratio - 1 for ratio in ratios(seconds, name, "plain")] for name in ("naive", "ours", "watching")]
    of_naive = [[own / naive for naive, own in zip(extras[0], part, strict=True)] for part in extras[1:]]
    return [*map(spread, extras), *map(spread, of_naive)], seconds


def blocks(rounds: int) -> tuple[list[list[object]], dict[str, object]]:
    """Measure products of block columns, and whole updates, against full products of matrices that leave the cache."""
    rows, results = [], {}
    for positions, width in itertools.product((1024, 4096), (64, 128, 256, 512, 1024, 2048, 4096)):
        data = [torch.randn(positions, width) for _ in range(max(12 * 1024**2 // (positions * width), 2))]
        bounds = block_columns(width)

        def full(data=data):
            for x in data:
                x.T @ x

        def upper(data=data, bounds=bounds):
            for x in data:
                for start, end in bounds:
                    x[:, :end].T @ x[:, start:end]

        sums = [SecondMoment(width) for _ in data]

        def update(data=data, sums=sums):
            for moment, x in zip(sums, data, strict=True):
                moment.add(x)

        seconds = in_turn({"full": full, "columns": upper, "update": update}, rounds)
        results[f"{positions} x {width}"] = seconds
        of_full = [spread(ratios(seconds, name, "full")) for name in ("columns", "update")]
        rows.append([positions, width, len(bounds), *of_full])
    return rows, results


def share_of_peak(rounds: int) -> tuple[list[list[object]], dict[str, object]]:
    """Measure updates of one factor on a GPU against a large matrix product, both in bfloat16."""
    positions, repeats, rows, results = 8192, 20, [], {}
    square = torch.randn(8192, 8192, device="cuda").bfloat16()
    for width in (512, 1024, 2048, 4096, 8192, 11008):
        data, moment = torch.randn(positions, width, device="cuda").bfloat16(), SecondMoment(width, "cuda")
        results[str(width)] = seconds = in_turn(
            {
                "peak": lambda: [square @ square for _ in range(repeats)],
                "update": lambda x=data, m=moment: [m.add(x) for _ in range(repeats)],
                "full": lambda x=data: [torch.mm(x.T, x, out_dtype=torch.float32) for _ in range(repeats)],
            },
            rounds,
        )
        peak = [2 * 8192**3 * repeats / own for own in seconds["peak"]]
        needed = [width**2 * positions * repeats / own for own in seconds["update"]]
        full = [2 * width**2 * positions * repeats / own for own in seconds["full"]]
        rows.append(
            [
                width,
                f"{1000 * statistics.median(seconds['update']) / repeats:.2f}",
                f"{statistics.median(needed) / 1e12:.0f}",
                *(spread([a / b for a, b in zip(own, peak, strict=True)]) for own in (needed, full)),
            ]
        )
    return rows, results


def frozen(subject: Subject, rounds: int) -> tuple[list[list[object]], dict[str, list[float]]]:
    """Measure one pass of ours and of the two libraries."""
    variants = {
        "plain": subject.plain,
        "bare": subject.bare_pass,
        "the products alone": subject.products(),
        "ours, sketched": lambda: subject.pass_over("sketched"),
    }
    for kind in ("empirical", "sampled"):
        variants[f"ours, {kind}"] = lambda kind=kind: subject.pass_over(kind)
        variants[f"kronfluence, {kind}"] = subject.kronfluence(kind)
        variants[f"curvlinops, {kind}"] = lambda kind=kind: subject.curvlinops(kind)
    seconds = in_turn(variants, rounds)
    both = zip(seconds["bare"], seconds["the products alone"], strict=True)
    seconds["limit"] = [bare + PASS * products / 2 for bare, products in both]
    rows = []
    for kind, theirs in (("empirical", "empirical"), ("sampled", "sampled"), ("sketched", "sampled")):
        names = ["limit", f"ours, {kind}", f"kronfluence, {theirs}", f"curvlinops, {theirs}"]
        of_plain = [spread([ratio / PASS for ratio in ratios(seconds, name, "plain")]) for name in names]
        of_theirs = [("limit", names[2]), (names[1], names[2]), (names[1], names[3])]
        rows.append([kind, *of_plain, *(spread(ratios(seconds, *pair)) for pair in of_theirs)])
    return rows, seconds


def memory(subject: Subject) -> tuple[list[list[object]], dict[str, int]]:
    """Measure the peak of training on all batches, with sums that begin empty, beyond that of training alone."""
    subject.plain()
    plain = peak_bytes(subject.plain)
    rows, peaks = [], {"plain": plain, "factors": subject.factor_bytes(), "captured": subject.captured_bytes()}
    variants = {"naive hooks": lambda: subject.naive()()}
    for kind in ("empirical", "sketched"):
        variants[kind] = lambda kind=kind: subject.trained(fisher=kind)()
    for name, work in variants.items():
        peaks[name] = peak_bytes(work)
        extra = peaks[name] - plain
        over = (extra - peaks["captured"]) / peaks["factors"]
        rows.append(
            [
                name,
                *(f"{value / 2**20:.1f}" for value in (plain, extra, peaks["captured"], peaks["factors"])),
                f"{over:.2f}",
            ]
        )
    return rows, peaks


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", nargs="+", default=["training", "pass", "memory", "alone", "blocks", "sizes"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of weights and data")
    parser.add_argument("--width", type=int, default=256, help="of parts training, pass and memory")
    parser.add_argument("--depth", type=int, default=4, help="blocks there")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row there")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch there")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    shape = f"{args.width}/{4 * args.width}, {args.depth} blocks, {args.dtype}, {args.device}"
    kinds = {"gated": f"gated MLP, {shape}", "plain": f"plain MLP, {shape}", "vit": f"ViT, {shape}"}
    results: dict[str, object] = {}
    in_every_step: list[list[str]] = []
    for kind, title in kinds.items():
        subject = Subject(
            kind,
            width=args.width,
            depth=args.depth,
            length=args.length,
            rows=args.rows,
            device=args.device,
            dtype=getattr(torch, args.dtype),
        )
        if "training" in args.parts:
            rows, results[f"training, {kind}"] = in_training(subject, args.rounds)
            print(f"\n{title}: in training\n")
            print(tabulate(rows, ["", "extra", "of naive"], tablefmt="github"), flush=True)
        if "pass" in args.parts:
            rows, results[f"pass, {kind}"] = frozen(subject, args.rounds)
            print(f"\n{title}: one pass over the frozen model, training step = 1\n")
            headers = [
                "",
                "limit",
                "ours",
                "kronfluence",
                "curvlinops",
                "limit / kronfluence",
                "ours / kronfluence",
                "ours / curvlinops",
            ]
            print(tabulate(rows, headers, tablefmt="github"), flush=True)
        if "memory" in args.parts:
            rows, results[f"memory, {kind}"] = memory(subject)
            print(f"\n{title}: peak memory of four steps, MiB\n")
            headers = ["", "plain", "extra", "captured", "factors", "(extra - captured) / factors"]
            print(tabulate(rows, headers, tablefmt="github"), flush=True)
        if "alone" in args.parts:
            row, results[f"alone, {kind}"] = alone(subject, 2 * args.rounds)
            in_every_step.append([kind, *row])
        write(args.out, results)  # a run that is stopped leaves what it has
    if "alone" in args.parts:
        print("\nempirical in every step, alone\n")
        print(
            tabulate(
                in_every_step, ["", "naive", "ours", "watching", "ours / naive", "watching / naive"], tablefmt="github"
            ),
            flush=True,
        )
    if "blocks" in args.parts:
        rows, results["blocks"] = blocks(2 * args.rounds)
        print("\nProducts of block columns, full product = 1\n")
        headers = ["positions", "width", "blocks", "block columns", "with the sum"]
        print(tabulate(rows, headers, tablefmt="github"), flush=True)
    if "peak" in args.parts:
        rows, results["peak"] = share_of_peak(args.rounds)
        print("\nOne update of a factor, 8192 positions, bfloat16\n")
        print(
            tabulate(
                rows, ["width", "ms", "TFLOP/s needed", "of the peak", "full product, of the peak"], tablefmt="github"
            ),
            flush=True,
        )
    if "sizes" in args.parts:
        rows = []
        for sizes in (
            {},
            {"width": 128},
            {"width": 512},
            {"width": 1024, "depth": 2},
            {"depth": 2},
            {"depth": 8},
            {"length": 64, "rows": 16},
            {"length": 1024, "rows": 1},
        ):
            subject = Subject("gated", **sizes)
            seconds = in_turn(
                {
                    "plain": subject.plain,
                    "naive": subject.naive(),
                    "limit": subject.products(),
                    "ours": subject.trained(fisher="empirical"),
                },
                max(args.rounds // 2, 1),
            )
            extras = {name: [r - 1 for r in ratios(seconds, name, "plain")] for name in ("naive", "ours")}
            limit = [r / 2 for r in ratios(seconds, "limit", "plain")]
            of_naive = [ours / naive for ours, naive in zip(extras["ours"], extras["naive"], strict=True)]
            label = {"width": 256, "depth": 4, "length": 256, "rows": 4, **sizes}
            rows.append(
                [*label.values(), spread(limit), spread(extras["naive"]), spread(extras["ours"]), spread(of_naive)]
            )
            results[f"sizes, {label}"] = seconds
        print("\ngated MLP, empirical in every step, growing sizes\n")
        headers = ["width", "blocks", "tokens", "rows", "limit", "naive", "ours", "ours / naive"]
        print(tabulate(rows, headers, tablefmt="github"), flush=True)
    write(args.out, results)


if __name__ == "__main__":
    main()
