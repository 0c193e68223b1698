"""Arguments of the commands on a saved model."""

from lightning_curvature.cli.parser import main


def arguments(folder, tmp_path, command):
    model, corpus = ["--model", folder / "model"], ["--corpus", folder / "c.jsonl"]
    asked, factors = ["--sequences", folder / "s.jsonl"], ["--factors", folder / "f.safetensors"]
    return {
        "collect": [*model, *corpus, "--out", tmp_path / "o.safetensors"],
        "mine": [*model, *corpus, "--prefix", 8, "--suffix", 8, "--out", tmp_path / "o.jsonl"],
        "evaluate": [*model, *corpus, *asked, "--out", tmp_path / "o.json"],
        "sweep": [*model, *corpus, *asked, *factors, "--out", tmp_path / "o"],
        "detect": [*model, *corpus, *factors, "--out", tmp_path / "o.csv"],
    }[command]


def run(*args):
    main([str(arg) for arg in args])


def replaced(args, option, value):
    """Arguments with another value of an option, or with one more option; None takes it away."""
    args = list(args)
    if option in args:
        place = args.index(option)
        args[place : place + 2] = []
    return args if value is None else [*args, option, value]
