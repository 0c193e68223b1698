"""What the metrics cost: strict recitation by one forward pass against generation, and edit distances.

Protocol. A random OLMo-2 (4 blocks, 256/1024, 2000 tokens), and sequences of 32 + 48 tokens of which a part is what the
model itself says (it recites them) and the rest is random. Variants take turns in rounds; medians, and ranges in
brackets. "Generation" decodes every suffix with the key-value cache, as one would without teacher forcing. Edit
distances: 10,000 pairs of 48 tokens, half of which agree, by the package (rapidfuzz) and by textbook dynamic
programming in Python, of 100 pairs of them.

    python benchmarks/bench_metrics.py --out benchmarks/results/metrics.json
"""

import argparse
import statistics
from pathlib import Path

import torch
from measuring import in_turn, ratios, spread, write
from tabulate import tabulate
from transformers import Olmo2Config, Olmo2ForCausalLM

from lightning_curvature.metrics.functional import normalized_edit_distance
from lightning_curvature.text.decoding import continuations, greedy_continuation
from lightning_curvature.text.sequences import PromptedSequence

VOCABULARY, PREFIX, SUFFIX = 2000, 32, 48


def network() -> Olmo2ForCausalLM:
    """Return a random language model."""
    torch.manual_seed(0)
    return Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=128,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            initializer_range=0.2,
        )
    ).eval()


def plain_distance(one: list[int], two: list[int]) -> int:
    """Return the Levenshtein distance by the textbook."""
    above = list(range(len(two) + 1))
    for i, left in enumerate(one, 1):
        row = [i]
        for j, right in enumerate(two, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (left != right)))
        above = row
    return above[-1]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    args = parser.parse_args()
    model, results, rows = network(), {}, []
    prompts = torch.randint(VOCABULARY, (args.sequences, PREFIX))
    own = greedy_continuation(model, prompts, SUFFIX)
    for recited in (0.0, 0.1, 0.5, 1.0):
        here = (torch.arange(args.sequences) < recited * args.sequences)[:, None]
        suffixes = torch.where(here, own, torch.randint(VOCABULARY, own.shape))
        sequences = [
            PromptedSequence(tuple(p), tuple(s)) for p, s in zip(prompts.tolist(), suffixes.tolist(), strict=True)
        ]

        def by_forward(sequences=sequences):
            found = 0
            for batch in continuations(model, sequences, strict_only=True):
                found += int((batch.greedy == batch.target).all(1).sum())
            return found

        def by_generation(suffixes=suffixes):
            said = torch.cat([greedy_continuation(model, part, SUFFIX) for part in prompts.split(32)])
            return int((said == suffixes).all(1).sum())

        same = by_forward() == by_generation()
        seconds = in_turn({"forward": by_forward, "generation": by_generation}, args.rounds)
        results[f"strict, {recited:.0%} recited"] = seconds
        rows.append(
            [
                f"{recited:.0%}",
                *(f"{statistics.median(seconds[name]):.2f}" for name in seconds),
                spread(ratios(seconds, "generation", "forward"), 1),
                "yes" if same else "NO",
            ]
        )
    print(f"\nStrict recitation of {args.sequences} sequences, s\n")
    print(
        tabulate(
            rows,
            ["recited", "one forward pass", "generation", "ratio", "same"],
            tablefmt="github",
            disable_numparse=True,
        ),
        flush=True,
    )

    target = torch.randint(VOCABULARY, (10_000, SUFFIX))
    said = torch.where(torch.rand(target.shape) < 0.5, target, torch.randint(VOCABULARY, target.shape))
    few = said[:100].tolist(), target[:100].tolist()
    distances = [plain_distance(one, two) / SUFFIX for one, two in zip(*few, strict=True)]
    same = abs(float(normalized_edit_distance(said[:100], target[:100])) - statistics.mean(distances)) < 1e-6
    seconds = in_turn(
        {
            "package": lambda: normalized_edit_distance(said, target),
            "textbook": lambda: [plain_distance(one, two) for one, two in zip(*few, strict=True)],
        },
        args.rounds,
    )
    results["edit distance"] = seconds
    package, textbook = statistics.median(seconds["package"]), 100 * statistics.median(seconds["textbook"])
    print("\nEdit distance of 10,000 pairs of 48 tokens, s\n")
    row = [f"{package:.3f}", f"{textbook:.1f}", f"{textbook / package:.0f}", "yes" if same else "NO"]
    headers = ["package", "textbook (from 100 pairs)", "ratio", "same"]
    print(tabulate([row], headers, tablefmt="github", disable_numparse=True))
    write(args.out, results)


if __name__ == "__main__":
    main()
