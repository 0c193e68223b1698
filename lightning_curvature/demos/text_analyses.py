"""The analyses of the text demo: bands of the spectrum, detection, directions."""

import logging

import torch

from lightning_curvature.analysis.detection import detect
from lightning_curvature.analysis.directions import direction_use
from lightning_curvature.analysis.files import Analyses
from lightning_curvature.demos.analyses import bands_of
from lightning_curvature.demos.language_model import LitCausalLM
from lightning_curvature.demos.recitation import PREFIX, SUFFIX, RecitedText
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.text.detection import distinct_inputs, window_activations, window_scores
from lightning_curvature.text.evaluation import recited

log = logging.getLogger(__name__)


def analyse_text(model: LitCausalLM, factors: KroneckerFactors, data: RecitedText) -> Analyses:
    """Analyse a language model that recites some windows.

    A sequence of the validation half is memorized if the model recites it exactly. It is compared with windows of as
    many tokens that the model was never trained on. Bands and directions are about positions behind the prompt.

    Args:
        model: The model.
        factors: Its factors.
        data: Data of the demo.

    Returns:
        The analyses; they are empty, with a line in the log, if nothing is recited.
    """
    lm, length = model.model, PREFIX + SUFFIX
    memorized = recited(lm, data.half("validation"))
    if not memorized:
        log.info("No sequence was recited: there is nothing to analyse.")
        return Analyses()
    kinds = {"memorized": torch.tensor([sequence.ids for sequence in memorized])}
    for kind in ("clean", "domain"):
        held = data.held_out[kind]["report"]
        kinds[kind] = torch.cat([held[:, start : start + length] for start in (0, data.context - length)])
    lm_factors = KroneckerFactors({name.removeprefix("model."): layer for name, layer in factors.items()})
    inputs = {kind: window_activations(lm, windows, list(lm_factors), PREFIX - 1) for kind, windows in kinds.items()}
    layers = distinct_inputs(lm_factors)
    scored = KroneckerFactors({name: lm_factors[name] for name in layers})
    scores = {kind: window_scores(lm, scored, windows) for kind, windows in kinds.items()}
    last = layers[-1]
    windows = torch.cat([kinds["memorized"], kinds["domain"]])
    rows = torch.cat([inputs["memorized"][last], inputs["domain"][last]])
    labels = [index < len(memorized) for index in range(len(windows))]
    uses = tuple(direction_use(last, lm_factors[last], rows, labels, flat) for flat in (False, True))
    shown = {index for use in uses for top in use.top for index in top}
    return Analyses(
        tuple(bands_of(lm, lm_factors, inputs["memorized"], inputs["clean"])),
        {
            "never-memorized text of the same domain": detect(scores["memorized"], scores["domain"]),
            "ordinary text": detect(scores["memorized"], scores["clean"]),
        },
        uses,
        {index: data.tokenizer.decode(windows[index, PREFIX:].tolist()) for index in sorted(shown)},
    )
