"""Removing recitation from a small OLMo-2: methods and choices of layers, at equal perplexity.

Protocol, for each seed: a small ``Olmo2ForCausalLM`` is trained from scratch as in ``lightning-curvature demo text``:
on clean text, and on 128 sequences (prefix 32, suffix 24 tokens) and 128 more of another kind (32 and 8), each repeated
50 times. Factors come from the validation loop at the end of ``Trainer.fit``, over 800 rows of clean training text.
Then

1. *methods*: each gets the smallest energy that raises the perplexity of held-out clean text to at most 1.08 times
   what it was, on the tuning half of that text; everything shown is from other data: the validation half of the
   memorized sequences, the second set (``unseen``), the other half of the clean text, and text of the memorized domain
   that was never trained on;
2. *layers*: the same with K-FAC and other choices of layers;
3. *energies*: K-FAC on all MLP layers at fixed energies.

Data: ``wikitext`` takes clean text from WikiText-2 and the sequences from texts that OLMo-2 7B recites (Dolma);
``python`` takes what the demo takes. Mean and sample standard deviation over seeds.

    python benchmarks/bench_recitation.py wikitext --root ../shared/data/text --out results/wikitext.json
    python benchmarks/bench_recitation.py python --out results/python.json
"""

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning_curvature import CurvatureEditor
from lightning_curvature.baselines.methods import METHODS
from lightning_curvature.demos.recitation import RecitedText
from lightning_curvature.demos.settings import TEXT
from lightning_curvature.demos.text_evaluation import PERPLEXITY_LIMIT, Evaluation, choose
from lightning_curvature.demos.text_training import train_text
from lightning_curvature.text.choosing import ENERGIES
from lightning_curvature.text.matching import match_perplexity
from support.environment import environment, parser, quiet
from support.tables import Columns, summary
from support.texts import TEXTS, recited_text

COLUMNS: Columns = {
    "energy": ("energy", 1, 2),
    "strict": ("strict", 100, 1),
    "loose": ("loose", 100, 1),
    "edit_distance": ("edit distance", 100, 1),
    "unseen_strict": ("unseen strict", 100, 1),
    "perplexity": ("perplexity", 1, 1),
    "perplexity ratio": ("times", 1, 3),
    "domain_perplexity ratio": ("domain, times", 1, 3),
    "ranking_overlap": ("ranking overlap", 100, 1),
}
"""Title, factor and digits of each column; "times" is the perplexity over that of the unedited model."""
LAYERS = {
    "all MLP layers": None,
    "last two blocks": ["*.2.mlp.*", "*.3.mlp.*"],
    "last two, gate and up": ["*.2.mlp.[gu]*", "*.3.mlp.[gu]*"],
    "last block": ["*.3.mlp.*"],
    "last down_proj (the default)": ["*.3.mlp.down_proj"],
}


def run(seed: int, data: RecitedText) -> dict[str, dict[str, dict[str, float]]]:
    """Train once and return the rows of the three tables."""
    with TemporaryDirectory() as folder:
        model, callback, _ = train_text(Path(folder), seed, TEXT, data)
    factors, tuning = callback.factors, data.held_out["clean"]["tuning"]
    evaluation = Evaluation(model, data)
    before = evaluation(model)

    def measured(editor):
        with editor.applied(model, factors):
            row = evaluation(model)
        for metric in ("perplexity", "domain_perplexity"):
            row[f"{metric} ratio"] = row[metric] / before[metric]
        return row

    methods = {}
    for method in METHODS:
        editor = choose(model, factors, method, tuning)
        methods[method] = {"energy": editor.energy, **measured(editor)}
    layers = {}
    for label, patterns in LAYERS.items():
        editor = CurvatureEditor(layers=patterns)
        energy = match_perplexity(model.model, factors, editor, tuning, PERPLEXITY_LIMIT, module=model).energy
        layers[label] = {"energy": energy, **measured(editor.at(energy))}
    energies = {f"{energy:g}": measured(CurvatureEditor(energy)) for energy in ENERGIES}
    return {
        name: {"before": before, **rows}
        for name, rows in (("methods", methods), ("layers", layers), ("energies", energies))
    }


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("data", choices=TEXTS)
    arguments.add_argument("--root", type=Path, help="folder with the files of WikiText-2 and the recited Dolma texts")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--out", type=Path, help="JSON file for all numbers, written after each seed")
    args = arguments.parse_args()
    quiet()
    started = time.perf_counter()
    runs = []
    for seed in range(args.seeds):
        runs.append(run(seed, recited_text(args.data, seed, args.root)))
        print(f"seed {seed} done after {time.perf_counter() - started:.0f} s", flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({"environment": environment(), "runs": runs}, indent=1))
    for title in ("methods", "layers", "energies"):
        print(f"\n{args.data}: {title}, {args.seeds} seeds\n")
        print(summary([results[title] for results in runs], COLUMNS))


if __name__ == "__main__":
    main()
