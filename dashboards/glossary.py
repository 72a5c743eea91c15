"""The definition behind each "?": what a number means, and its formula."""

from typing import NamedTuple

from dashboards.model_terms import MODEL_TERMS

__all__ = ["GLOSSARY", "Definition"]


class Definition(NamedTuple):
    """What a term means."""

    name: str
    definition: str
    formula: str = ""


GLOSSARY: dict[str, Definition] = {
    "denoising_step": Definition(
        "step of denoising",
        "A model that denoises fills in a canvas of tokens in passes over all of it; a step is one of them, counted "
        "from 0. The rate is over the tokens as they stood when the model read them at that step, noise included; the "
        "band is Wilson's 95% interval. Tokens of one text depend on each other, so it speaks of these texts alone.",
        "rate at step s = firings at step s / indexed tokens at step s",
    ),
    "commit": Definition(
        "committed",
        "At the end of a step the sampler takes some of the tokens that the model proposes: they are committed, and "
        "the others stay noise, or a mask. It may take a commitment back. A token's commit step is the one from which "
        "on it stayed; one that no step committed was filled in when the steps ended.",
    ),
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
    "spark": Definition(
        "distribution of strength",
        "A small histogram of how strongly the feature fires: weak on the left, its maximum on the right. Heights are "
        "on a logarithmic scale, so that a single firing still shows.",
        "height = log(1 + firings in the bin)",
    ),
    "rate_a": Definition(
        "rate on A",
        "How often the feature fires where A holds, per 1,000 such tokens, with Wilson's 95% interval.",
        "1000 × firings on A / tokens of A",
    ),
    "rate_b": Definition(
        "rate on B",
        "How often the feature fires where B holds, or everywhere but on A where no B is given, per 1,000 such tokens, "
        "with Wilson's 95% interval.",
        "1000 × firings on B / tokens of B",
    ),
    "z": Definition(
        "z of the difference",
        "How sure it is that the two rates differ: the signed root of the likelihood ratio, about as many standard "
        "errors. Positive where the feature prefers A; the list starts with the largest.",
        "sign(p_A − p_B) · √(2 Σ n · KL(p ‖ p of both)), Σ over A and B",
    ),
    "firings": Definition("firings", "Tokens on which the feature is not zero, in the text of this index."),
    "excerpt": Definition(
        "the whole sample",
        "What an index over a larger text than this one says of the feature: its figures there, its strongest firings, "
        "and some drawn at random from each band of strength. It ships with the SAE. That index itself is not here, so "
        "what else fires on these tokens cannot be asked.",
    ),
    "max": Definition("maximum", "The strongest firing in the text of this index."),
    "mean": Definition("mean", "Mean strength over the tokens that the feature fires on, zeros left out."),
    "token_share": Definition(
        "share of the top token",
        "How much of all that the feature adds, over the whole text, goes to its commonest token. Near 100% the "
        "feature detects one token.",
        "Σ strength on the token / Σ strength",
    ),
    "std_value": Definition(
        "spread of strength",
        "The standard deviation of the strength over the tokens that the feature fires on.",
        "√(mean of strength² − mean²)",
    ),
    "quantiles": Definition(
        "quantiles of strength",
        "The strength that half, 90% or 99% of the feature's firings do not exceed.",
    ),
    "top_token": Definition(
        "top token", "The token that most of the feature's strength lies on, added up over the whole text."
    ),
    "token_bits": Definition(
        "token dependence",
        "How far the tokens that the feature fires on depart from the tokens of the text. 0 bits: it does not care "
        "which token it is on.",
        "KL(tokens of its firings ‖ tokens of the text), log₂",
    ),
    "position_bits": Definition(
        "position dependence",
        "How far the places in the window that the feature fires at depart from those of all tokens. 0 bits: it fires "
        "anywhere alike.",
        "KL(positions of its firings ‖ positions of the text), log₂",
    ),
    "mean_position": Definition(
        "mean position", "The mean place of its firings in the window that the model saw, BOS being place 0."
    ),
    "modality_rate": Definition(
        "rate by modality",
        "How often the feature fires on tokens of text, on soft tokens of images (each a patch), or on those of sounds "
        "(each a span of time). Shown where the text has images or sounds.",
        "rate = firings on the modality's tokens / its indexed tokens",
    ),
    "soft_token": Definition(
        "soft token",
        "A place among the tokens that holds what a vision or an audio tower made of a patch of an image, or of a span "
        "of a sound, in place of a word's embedding. ▦ stands for one of an image, ♪ for one of a sound.",
    ),
    "special_share": Definition(
        "share of special tokens",
        "How much of the feature's strength would lie on BOS and other special tokens, which are otherwise left out "
        "of the index. Near 100% the feature is about the start of a text, or an attention sink.",
        "Σ strength on special tokens / Σ strength on all",
    ),
    "top_language": Definition(
        "main language",
        "The language that the feature fires most often in, by the lower end of the rate's 95% interval, so that a "
        "language with little text does not win by a lucky firing.",
    ),
    "top_source": Definition(
        "main source", "The source that the feature fires most often in, by the lower end of the rate's 95% interval."
    ),
    "language_entropy": Definition(
        "language entropy",
        "How evenly the feature fires over languages: 0 bits in one alone, log₂ of their number where all rates are "
        "equal. Rates are compared, never counts.",
        "−Σ p log₂ p over languages, p = rate / Σ rates",
    ),
    "language_specific": Definition(
        "specific to a language",
        "The one language that the feature fires in far more often than in every other one; empty where there is none.",
    ),
    "source_entropy": Definition(
        "source entropy",
        "How evenly the feature fires over the sources of the text, as rates.",
        "−Σ p log₂ p over sources, p = rate / Σ rates",
    ),
    "top_role": Definition(
        "main role",
        "Of chats: the role in whose turns the feature fires most often, by the lower end of the rate's 95% interval; "
        "none stands for the template's own words between turns.",
    ),
    "role_entropy": Definition(
        "role entropy",
        "How evenly the feature fires over the roles of a chat, as rates.",
        "−Σ p log₂ p over roles, p = rate / Σ rates",
    ),
    "top_kind": Definition(
        "main kind of content",
        "Of chats: what the feature fires most often on (text, reasoning, calls, answers and definitions of tools, or "
        "the template's markup), by the lower end of the rate's 95% interval.",
    ),
    "kind_entropy": Definition(
        "content entropy",
        "How evenly the feature fires over the kinds of content of a chat, as rates.",
        "−Σ p log₂ p over kinds, p = rate / Σ rates",
    ),
    "umap": Definition(
        "UMAP",
        "A map of the decoder: features that write in alike directions lie near each other. Distances within a "
        "cluster mean something, those between clusters and the axes do not.",
        "umap-learn on the decoder's rows, cosine metric",
    ),
    "contrast": Definition(
        "fires on A and not on B",
        "Features that fire more often where A holds than where B does; without B, than everywhere else. A condition "
        "is language:de, source:handbook, token:cat, regex:^\\d+$ (each token's text), feature:12 (where that one "
        "fires) or document:3; & joins several.",
        "log ratio = log₂(rate on A / rate on B)",
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
        "Features that fire on the same tokens: by Jaccard similarity, by pointwise mutual information (how much "
        "oftener together than by chance), and how often one fires where the other does.",
        "Jaccard = both / either; PMI = log₂(both · N / (this · it)); P(it | this) = both / this",
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
    "ablation": Definition(
        "change of the loss without the feature",
        "The model reads the example twice, as it is and with the feature at 0 on every token; what the SAE misses of "
        "the activation stays. Above 0 the feature helped to predict the token. Before its first firing nothing "
        "changes. The interval comes from bootstrapping documents.",
        "change = loss without the feature − loss with it, nats",
    ),
    "steering": Definition(
        "steering",
        "A feature's direction is added while the model reads and writes, on every token but BOS. How much is told in "
        "multiples of the strongest firing that the index knows: at 1 × the feature is as strong everywhere as it ever "
        "is, below 0 it is pushed the other way.",
        "x → x + times · maximum · unit decoder row",
    ),
    "steer_control": Definition(
        "random direction",
        "A random direction, as long as what is pushed, added at the same place. What it does as well, any push of "
        "that size does: the feature has no part in it.",
    ),
    "steer_kl": Definition(
        "KL divergence",
        "How far the distribution that each new token was taken from has moved from the one that the model by itself "
        "has after the same text; the mean over the new tokens.",
        "KL(steered ‖ by itself), nats",
    ),
    "steer_perplexity": Definition(
        "perplexity",
        "How odd the model by itself finds what was written: 1 for what it was sure of. A push that costs much "
        "perplexity has broken the model rather than steered it.",
        "exp(mean loss of the plain model on the new tokens)",
    ),
    "held_attention": Definition(
        "attention as without the push",
        "The model attends where it attends by itself on the same text; what it reads there is changed. What is left "
        "of an effect did not come about by looking elsewhere.",
    ),
    "named_intervention": Definition(
        "named intervention",
        "What is pushed, kept in the workspace as a file: scope steer --spec NAME and InterventionSpec.load take it "
        "too. A file may hold what the sliders cannot: ablated heads, patches, directions.",
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
    "loss": Definition(
        "loss",
        "What the training makes smaller, a dimension of the activation, in the scaled units that it works in: the "
        "error of the reconstruction and what the architecture adds (a penalty on firings, a term for dead features).",
        "(mean over rows of ‖x − x̂‖² + terms of the architecture) / d_out",
    ),
    "learning_rate": Definition(
        "learning rate", "The size of Adam's steps: it warms up, holds its peak, and decays to zero at the end."
    ),
    "sparsity_coefficient": Definition(
        "sparsity coefficient",
        "The weight of the penalty on firings. It is steered while training, so that the L0 comes to what was asked.",
    ),
    "tokens_per_s": Definition("tokens a second", "Rows that were trained on, by the second of the loop."),
    "data_wait_share": Definition(
        "share of the time waited for data",
        "How much of the loop's time it waited for rows from the store or the model. Near 100% the training is as fast "
        "as its data comes.",
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
    "gradient_x_activation": Definition(
        "gradient × activation",
        "What the logit would lose without the firing if the model were linear from here on: one forward and one "
        "backward pass. The baseline is that the feature does not fire.",
        "effect = activation · ∂logit/∂activation",
    ),
    "attribution_patching": Definition(
        "attribution patching",
        "As gradient × activation, with the gradient taken where no feature fires: how the logit would rise if the "
        "feature began to fire there.",
        "effect = activation · ∂logit/∂activation, at the baseline",
    ),
    "integrated_gradients": Definition(
        "integrated gradients",
        "The gradient averaged over ten steps between no feature firing and the prompt as it is. The effects of all "
        "firings and errors add up to the whole change of the logit.",
        "effect = activation · mean over α of ∂logit/∂activation",
    ),
    "activation_patching": Definition(
        "exact effect",
        "What the logit loses when this one firing is taken out and everything after it reacts: a run of the model "
        "for each firing. The yardstick of the other methods, and by far the slowest.",
        "effect = logit − logit without the firing",
    ),
    "corrected": Definition(
        "density-corrected strength",
        "How much a firing says, in bits: how strong it is for this feature, times how rarely the feature fires at "
        "all. Features that fire everywhere, or are always strong, fall back behind those that say something about "
        "this token. Mean and density are of this index; a feature that never fires there counts as firing once.",
        "strength / mean strength of the feature × log₂(1 / density)",
    ),
    "change": Definition(
        "change between two prompts",
        "The strongest firing in B minus the strongest in A. For “changed on equal tokens” the difference is taken "
        "token by token, over those that both prompts share in the same place (aligned by longest matching runs), "
        "and the largest is shown: the same token, read in another context.",
        "max over B − max over A; on equal tokens: value in B − value in A",
    ),
    "divergence": Definition(
        "Jensen–Shannon divergence",
        "How far apart the two next-token distributions are, over the whole vocabulary.",
        "½ KL(p_A ‖ m) + ½ KL(p_B ‖ m), m = ½ (p_A + p_B), in bits",
    ),
    "lens": Definition(
        "logit lens",
        "What the model would say next if it stopped after this layer: the residual stream, read by the model's own "
        "final norm and unembedding (nostalgebraist 2020). After the last layer it is what the model says.",
        "p_l = softmax(unembed(final_norm(x_l)))",
    ),
    "lens_entropy": Definition(
        "entropy",
        "How undecided the layer is about the next token: 0 nats where one token has all the probability, 12.5 where "
        "262,144 are equally likely.",
        "−Σ p ln p",
    ),
    "lens_kl": Definition(
        "divergence from the end",
        "How far the layer's distribution is from what the plain model says in the end, in nats. With an SAE spliced "
        "in, the last layer's value is what the SAE costs.",
        "KL(p_final ‖ p_l) = Σ p_final ln(p_final / p_l)",
    ),
    "lens_rank": Definition(
        "rank",
        "The place of the followed token among all next tokens of this layer: 1 is the likeliest.",
        "1 + number of tokens that are likelier",
    ),
    "lens_sae": Definition(
        "SAE in the residual's place",
        "Read in place: the model runs as it is, and at the SAE's own layer its reconstruction is read instead of the "
        "residual stream; all other layers are the plain model's. Spliced in: the reconstruction takes the "
        "activation's place while the model runs; layers before the SAE are the plain model's, those from it on are "
        "of the changed run. BOS is left as it is in both.",
        "x_l → decode(encode(x_l))",
    ),
    "circuit_graph": Definition(
        "a circuit graph",
        "Nodes are what wrote into the residual stream on a prompt: token embeddings, features of transcoders, what "
        "these miss (errors), what interventions put there; and the logits of likely next tokens. An edge is what its "
        "target would lose without its source, exactly so in a copy of the model whose attention patterns and norm "
        "denominators are frozen.",
        "edge s → t = a_s d_s · g_t",
    ),
    "replacement": Definition(
        "replacement",
        "Of the influence on the logits that starts somewhere, the share that starts at token embeddings and not at "
        "error nodes. 1: the transcoders explain everything.",
    ),
    "completeness": Definition(
        "completeness",
        "The share of what comes into nodes that does not come from error nodes, nodes weighed by their influence.",
    ),
    "verification": Definition(
        "verification",
        "Each feature is set to 0 and to twice its value in the real model, nothing frozen. Predicted is the total "
        "effect in the signed graph, all paths; measured is the change of every node behind it. The same predictions "
        "with another feature written in each one's place are the control: they should fail.",
        "predicted = (I − D)⁻¹ e_s δ,  D[t, s] = edge s → t / a_s",
    ),
    "slope": Definition(
        "slope",
        "Of measured on predicted changes, through the origin. 1: effects are as large as the graph says.",
        "Σ predicted × measured / Σ predicted²",
    ),
    "correlation": Definition("correlation", "Pearson's, of measured and predicted changes over all pairs."),
    "sign_agreement": Definition(
        "sign agreement",
        "The share of pairs in which the measured change has the sign that the graph predicts. Half is chance.",
    ),
    "holds": Definition(
        "what holds",
        "An effect of one feature on one node holds where it was measured with the predicted sign in each run, and "
        "from half to twice the predicted size over both. A feature holds where its effects on all nodes behind it "
        "are from half to twice the predicted size together, and correlate with what is predicted at 0.5 or more. "
        "Beside it, how many would hold with random features in their place.",
        "½ ≤ Σ predicted × measured / Σ predicted² ≤ 2",
    ),
    "path_patching": Definition(
        "testing an edge",
        "Path patching: the edge's source is set to 0 and to twice its value in the real model, and every MLP is held "
        "at what it wrote, so that nothing of the change goes by way of another node. Attention and norms react. "
        "Predicted is the edge itself, measured the change of its target. It holds where it was measured with the "
        "predicted sign in each run, and from half to twice the predicted size over both. An edge that was tested is "
        "marked by this, other edges by the effect of their source over all paths.",
        "predicted = (factor − 1) × edge,  ½ ≤ Σ predicted × measured / Σ predicted² ≤ 2",
    ),
    "layer_writes": Definition(
        "what a feature writes",
        "A feature of a cross-layer transcoder reads one layer's MLP input and writes the outputs of that layer and of "
        "all later ones, each along a decoder row of its own. The effect is what the row, at the feature's activation, "
        "adds to the graph's likeliest logit with attention patterns and norms held.",
        "effect of layer m = a W_dec(m) · g(m),  Σ = the edge from the feature to the logit",
    ),
    "edge_heads": Definition(
        "the heads of an edge",
        "An edge is the sum of what went along the residual stream alone and of what each attention head moved to the "
        "target's position, by the last head on the way. “Reads” is the token that most of it was read at.",
        "edge = g · (written at the target's position) + Σ g · head(v)",
    ),
    "node_heads": Definition(
        "the heads into a node",
        "What a node reads is the sum of what stands in the residual stream at its position without any head (its "
        "embedding, MLPs, biases) and of what each attention head wrote there. “Reads” is the token that most of it "
        "was read at.",
        "value = g · (stream) + Σ g · head",
    ),
    "qk_pairs": Definition(
        "query–key attribution",
        "With its norms held, a head's score for a query and a key is a sum over pairs of what was written at the two: "
        "embeddings, features, errors, what earlier heads wrote, biases. The softmax does not see what all keys have "
        "in common, so each pair is set against what it comes to, on average, at the other keys that the query can "
        "see. The pairs add up to the score minus its mean over the other keys.",
        "score = Σ scaling (R W_Q xᵢ) · (R W_K xⱼ),  relative = pair here − mean of the pair over other keys",
    ),
}
GLOSSARY |= {term: Definition(*said) for term, said in MODEL_TERMS.items()}
