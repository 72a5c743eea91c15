"""What the terms of the pages about a model mean: its parameters, per-layer embeddings, and experts."""

__all__ = ["MODEL_TERMS"]

MODEL_TERMS: dict[str, tuple[str, str, str]] = {
    "parameters": (
        "parameters",
        "The numbers that a model has learnt. Each is counted once: an unembedding that is the embedding itself is "
        "one table. scope info MODEL says the same.",
        "",
    ),
    "parameters_total": (
        "parameters in all",
        "Every learnt number of the model, parts for other modalities included.",
        "",
    ),
    "parameters_active": (
        "parameters active per token",
        "What one token of text takes part in: everything outside of tables, experts and other modalities, one row of"
        " each table, the experts that it goes to, and the whole unembedding, as every logit is computed.",
        "rest + rows of tables + k / n × experts + unembedding",
    ),
    "parameters_effective": (
        "effective parameters",
        "Everything but per-layer tables and parts for other modalities: what has to lie on the accelerator where the"
        " tables lie in the host's memory. It is the E in names such as E2B.",
        "total − per-layer tables − other modalities",
    ),
    "parameters_tables": (
        "parameters in lookup tables",
        "Embeddings that a token reads one row of: the main one, positions, and per-layer embeddings.",
        "",
    ),
    "parameters_experts": (
        "parameters in experts",
        "The weights of mixtures of experts, of which a token uses a few in each layer.",
        "",
    ),
    "parameters_towers": (
        "parameters for other modalities",
        "Towers that read images and sounds; text does not use them.",
        "",
    ),
    "parameters_place": (
        "where parameters lie",
        "The devices that hold the weights of the model as this dashboard has loaded it. Lookup tables can lie in the"
        " host's memory while the rest is on the accelerator (--embeddings host), with equal outputs.",
        "",
    ),
    "per_layer": (
        "per-layer embeddings",
        "Beside its main embedding a token has a row of a second table, with a piece for every layer. Each layer adds"
        " to it a projection of the main embedding, gates the sum by what the residual stream holds by then, and "
        "writes the product back into the stream.",
        "written = norm(W_out (gate × (table + projection) / √2))",
    ),
    "per_layer_share": (
        "share of the stream's norm",
        "How long the part that was written is, beside the residual stream right after the addition. What the layer's"
        " table and what the projection wrote add up to the whole write, their norms need not.",
        "‖written‖ / ‖stream‖",
    ),
    "per_layer_parts": (
        "table against computed part",
        "Which token it is, looked up in the layer's own table, against what the projection makes of the main "
        "embedding. Both pass the same gate and norm, which are held, so that the two writes add up to the layer's "
        "exactly.",
        "written = from the table + from the projection",
    ),
    "per_layer_effect": (
        "effect on a feature",
        "How much each part of the write adds to what makes the feature fire, along the skip connection alone: what "
        "later layers make of it in other ways is not in it. Only features that fire on this token are listed.",
        "effect = c w · W_enc[:, f]",
    ),
    "table_effect": (
        "effect of a row",
        "What the next token's logit (less the mean over all tokens) loses when a token's row in a layer's table is set"
        " to zero, everything after it reacting. It is estimated by integrated gradients with all rows moving together:"
        " over all layers and tokens the effects add up to what the tables did. The main embedding and BOS stay.",
        "effect = r · mean over α of ∂logit/∂r at α r",
    ),
    "experts": (
        "experts",
        "In a layer with experts, a router gives each token a logit for every expert; the token goes to the k "
        "likeliest, and their outputs are summed by the router's weights.",
        "y = Σ w_j E_j(x), j among the k likeliest",
    ),
    "expert_load": (
        "load",
        "The share of the store's tokens that went to the expert; BOS and special tokens are left out. The shares of "
        "a layer add up to the number of experts that a token goes to.",
        "share = tokens that went to it / tokens",
    ),
    "expert_information": (
        "specialisation, in bits",
        "How far the groups of the expert's tokens differ from those of all tokens: 0 where it gets of every group "
        "its due. Where groups are small it is above 0 by chance too: see the column beside it.",
        "Σ P(group | expert) log₂(P(group | expert) / P(group))",
    ),
    "expert_chance": (
        "specialisation by chance",
        "The same, on average, after the tokens' groups have been shuffled. What is not clearly above it says nothing.",
        "",
    ),
    "expert_share": (
        "share of the feature's tokens",
        "Of the tokens that the feature fires on, how many went to the expert.",
        "firings on its tokens / firings",
    ),
    "expert_lift": (
        "lift",
        "The share of the expert among these tokens over its share of all: 2 means twice its due, 1 that they have "
        "nothing to do with each other.",
        "share here / share of all tokens",
    ),
    "expert_weight": (
        "router weight",
        "What the expert's output is multiplied by: the router's probabilities of the chosen experts, normed as the "
        "model does it.",
        "w = p[chosen] / Σ p[chosen]",
    ),
    "dense_share": (
        "share of the dense MLP",
        "Where experts stand beside a dense MLP, both are normed and added. The part of that sum, along itself, that "
        "is the dense MLP's: 1 where the experts add nothing to it.",
        "dense · (dense + experts) / ‖dense + experts‖²",
    ),
    "expert_edit": (
        "an edit of the router's choice",
        "Forbid: the expert is never chosen, the next likeliest takes its place, with the weights that the router "
        "then gives. Force: where it was not chosen it takes the place of the least likely one that was. Swap: tokens"
        " of one expert go to the other, and the other way round. Everything after that layer sees the change.",
        "",
    ),
    "expert_flips": (
        "features that flip",
        "Features of this SAE that fire on a token with the edit and not without it, or the other way round; "
        "activations before and after. An SAE that reads a layer before the edit sees none of it.",
        "",
    ),
}
