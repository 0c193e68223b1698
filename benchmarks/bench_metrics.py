"""What the metrics cost: strict recitation by one forward pass against generation, and edit distances.

Protocol. A random OLMo-2 (4 blocks, 256/1024, 2000 tokens), and sequences of 32 + 48 tokens of which a part is what the
model itself says (it recites them) and the rest is random. Variants take turns in rounds; medians, and ranges in
brackets. "Generation" decodes every suffix with the key-value cache, as one would without teacher forcing. Edit
distances: 10,000 pairs of 48 tokens, half of which agree, by the package (rapidfuzz) and by textbook dynamic
programming in Python, of 100 pairs of them.

    python benchmarks/bench_metrics.py --out benchmarks/results/metrics.json
"""

import statistics
from pathlib import Path

import torch
from transformers import Olmo2Config, Olmo2ForCausalLM

from lightning_curvature.metrics.functional import normalized_edit_distance
from lightning_curvature.text.decoding import continuations, greedy_continuation
from lightning_curvature.text.sequences import PromptedSequence
from support.environment import parser
from support.measuring import in_turn, ratios, show, spread, write

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


def plain_distance(prediction: list[int], target: list[int]) -> int:
    """Return the Levenshtein distance by the textbook."""
    above = list(range(len(target) + 1))
    for i, left in enumerate(prediction, 1):
        row = [i]
        for j, right in enumerate(target, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (left != right)))
        above = row
    return above[-1]


def recitation(rounds: int, count: int) -> dict[str, dict[str, list[float]]]:
    """Measure strict recitation of some sequences, and print its table."""
    model, results, rows = network(), {}, []
    prompts = torch.randint(VOCABULARY, (count, PREFIX))
    greedy = greedy_continuation(model, prompts, SUFFIX)
    for fraction in (0.0, 0.1, 0.5, 1.0):
        is_recited = (torch.arange(count) < fraction * count)[:, None]
        suffixes = torch.where(is_recited, greedy, torch.randint(VOCABULARY, greedy.shape))
        sequences = [
            PromptedSequence(tuple(p), tuple(s)) for p, s in zip(prompts.tolist(), suffixes.tolist(), strict=True)
        ]

        def by_forward(sequences=sequences):
            parts = continuations(model, sequences, strict_only=True)
            return sum(int((part.greedy == part.target).all(1).sum()) for part in parts)

        def by_generation(suffixes=suffixes):
            generated = torch.cat([greedy_continuation(model, part, SUFFIX) for part in prompts.split(32)])
            return int((generated == suffixes).all(1).sum())

        same = by_forward() == by_generation()
        seconds = in_turn({"forward": by_forward, "generation": by_generation}, rounds)
        results[f"strict, {fraction:.0%} recited"] = seconds
        times = [f"{statistics.median(seconds[name]):.2f}" for name in seconds]
        ratio = spread(ratios(seconds, "generation", "forward"), 1)
        rows.append([f"{fraction:.0%}", *times, ratio, "yes" if same else "NO"])
    headers = ["recited", "one forward pass", "generation", "ratio", "same"]
    show(f"Strict recitation of {count} sequences, s", rows, headers)
    return results


def edit_distance(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Measure edit distances, and print their table."""
    target = torch.randint(VOCABULARY, (10_000, SUFFIX))
    predictions = torch.where(torch.rand(target.shape) < 0.5, target, torch.randint(VOCABULARY, target.shape))
    pairs = [*zip(predictions[:100].tolist(), target[:100].tolist(), strict=True)]

    def by_textbook():
        return [plain_distance(*pair) for pair in pairs]

    expected = statistics.mean(by_textbook()) / SUFFIX
    same = abs(float(normalized_edit_distance(predictions[:100], target[:100])) - expected) < 1e-6
    variants = {"package": lambda: normalized_edit_distance(predictions, target), "textbook": by_textbook}
    seconds = in_turn(variants, rounds)
    package, textbook = statistics.median(seconds["package"]), 100 * statistics.median(seconds["textbook"])
    row = [f"{package:.3f}", f"{textbook:.1f}", f"{textbook / package:.0f}", "yes" if same else "NO"]
    headers = ["package", "textbook (from 100 pairs)", "ratio", "same"]
    show("Edit distance of 10,000 pairs of 48 tokens, s", [row], headers)
    return {"edit distance": seconds}


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--sequences", type=int, default=128)
    arguments.add_argument("--out", type=Path, help="JSON file for all numbers")
    args = arguments.parse_args()
    results = recitation(args.rounds, args.sequences) | edit_distance(args.rounds)
    write(args.out, results)


if __name__ == "__main__":
    main()
