"""The definition behind each "?": what a number means, and its formula."""

from typing import NamedTuple

__all__ = ["GLOSSARY", "Definition"]


class Definition(NamedTuple):
    """What a term means."""

    name: str
    definition: str
    formula: str = ""


GLOSSARY: dict[str, Definition] = {
    "strength": Definition(
        "firing strength",
        "How strongly a feature fires on a token, in the model's own units: what the feature adds to the activation "
        "has this length. It does not depend on how the SAE was scaled when it was stored.",
        "strength = feature activation × ‖W_dec row‖",
    ),
    "density": Definition(
        "density",
        "The share of tokens that the feature fires on. BOS and other special tokens are not counted. The interval "
        "is Wilson's, 95%.",
        "density = firings / indexed tokens",
    ),
    "firings": Definition("firings", "Tokens on which the feature is not zero, in the text of this index."),
    "max": Definition("maximum", "The strongest firing in the text of this index."),
    "mean": Definition("mean", "Mean strength over the tokens that the feature fires on, zeros left out."),
    "token_share": Definition(
        "share of the top token",
        "How much of all that the feature adds, over the whole text, goes to its commonest token. Near 100% the "
        "feature detects one token.",
        "Σ strength on the token / Σ strength",
    ),
    "token_entropy": Definition(
        "token entropy",
        "How many different tokens the feature fires on: 0 bits for a single one, one bit more for each doubling.",
        "−Σ p log₂ p over tokens, p = share of firings",
    ),
    "encoder_decoder_cosine": Definition(
        "encoder–decoder cosine",
        "Whether what the feature looks for is what it writes. Low values mark features that detect one thing and "
        "write another.",
        "cos(W_enc column, W_dec row)",
    ),
    "logits": Definition(
        "direct logit effect",
        "How far one unit of firing strength moves each next token's logit along the residual stream alone, later "
        "layers left out, before the final norm divides by its scale (which depends on the token; the prompt page "
        "puts it in). The mean over the vocabulary is taken out.",
        "(unit decoder row × final norm gain) · W_U − mean",
    ),
    "neighbours": Definition(
        "decoder neighbours",
        "Features whose decoder rows point the same way.",
        "cos(W_dec row, other W_dec row)",
    ),
    "cofiring": Definition(
        "co-firing",
        "Features that fire on the same tokens, by Jaccard similarity.",
        "tokens with both / tokens with either",
    ),
    "rate": Definition(
        "rate",
        "How often the feature fires within a group, per 1,000 of that group's tokens, with Wilson's 95% interval. "
        "Rates can be compared between groups of unlike size; counts cannot.",
        "1000 × firings in the group / tokens in the group",
    ),
    "fvu": Definition(
        "fraction of variance unexplained",
        "What the SAE's reconstruction misses, on held-out text, over rows whose norm is at most ten times the "
        "median (attention sinks would drown everything else).",
        "fvu = Σ‖x − x̂‖² / Σ‖x − mean‖²",
    ),
    "fvu_all": Definition(
        "fvu over all rows",
        "The same over all rows but BOS, attention sinks included: a few rows of huge norm decide it.",
        "fvu = Σ‖x − x̂‖² / Σ‖x − mean‖²",
    ),
    "l0": Definition("l0", "Features that fire on a token, on average.", "l0 = firings / indexed tokens"),
    "delta_ce": Definition(
        "delta CE",
        "How much the model's loss rises, in nats, when the SAE's reconstruction stands in for the activation.",
        "delta_ce = CE with the SAE spliced in − CE",
    ),
    "ce_recovered": Definition(
        "cross-entropy recovered",
        "Of the loss that replacing the activation by its mean costs, the share that the SAE avoids.",
        "(CE_mean − CE_sae) / (CE_mean − CE)",
    ),
    "dead": Definition("dead features", "Features that never fire in the text of this index."),
    "dead_in_training": Definition(
        "dead features",
        "Features without a firing in the last rows that were trained on (a million by default).",
        "dead features / d_sae",
    ),
    "grad_norm": Definition(
        "gradient norm",
        "The length of a step's gradient before it is clipped, with the loss divided by the variance of the data. A "
        "run that is about to diverge shows here first.",
        "‖∇ loss / variance‖",
    ),
    "pareto": Definition(
        "L0–FVU front",
        "An SAE is on the front where no other one of the same hook, measured on the same kind of rows, explains more "
        "with as few features. SAEs below and to the left are better.",
        "no other with l0 ≤ and fvu <",
    ),
    "best_cosine": Definition(
        "nearest cosine",
        "For each feature the cosine between its decoder row and the nearest one of the other dictionary. The dotted "
        "line is the threshold from which two features count as the same.",
        "max over j of cos(W_dec row i, other W_dec row j)",
    ),
    "matched": Definition(
        "matched features",
        "Pairs whose decoder rows are each other's nearest, at the threshold or above.",
        "i = nearest(j), j = nearest(i), cos(i, j) ≥ threshold",
    ),
    "unique": Definition(
        "unique features",
        "Features that the other dictionary has nothing like. Of two checkpoints of a training, those only in the "
        "later one are births.",
        "max cos < threshold",
    ),
    "split": Definition(
        "splits and merges",
        "A split: one feature of A is the nearest of two or more of B, all at the threshold or above. A merge: the "
        "other way round.",
    ),
    "firing_correlation": Definition(
        "firing correlation",
        "Pearson's correlation of the strengths of two matched features over all indexed tokens, tokens on which they "
        "do not fire included. Shown where both SAEs have an index over the same text.",
        "cov(x, y) / √(var x · var y)",
    ),
    "over_dense": Definition("over-dense features", "Features that fire on more than one token in ten."),
    "effect": Definition(
        "direct effect",
        "How far the feature's firing on this token moves the logit of the chosen next token, along the residual "
        "stream alone, later layers left out. The final norm's scale is held as it is in this run.",
        "strength × (unit decoder row × gain / rms) · (W_U[target] − mean)",
    ),
}
