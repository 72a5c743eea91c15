"""Who caused this logit, this feature, and by which circuit; and what the model would say after each layer.

    from scope.attribution import attribute, build_graph, counterfactual, logit_difference, prune, verify
    attribute(model, prompt, logit_difference(" cold", " small"), sae, baseline=counterfactual(other_prompt)).table
    graph = prune(build_graph(model, prompt, transcoders))
    verify(graph, model, transcoders).model
    graph_faithfulness(graph, model, transcoders, baseline=counterfactual(other_prompt)).table

Names are loaded when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scope.attribution.attention import edge_heads, node_heads
    from scope.attribution.baselines import counterfactual, mean, zero
    from scope.attribution.circuit_curves import GraphFaithfulness, graph_faithfulness
    from scope.attribution.comparison import compare_methods, faithfulness
    from scope.attribution.components import LogitComponents, logit_components
    from scope.attribution.direct import direct_logit_effects
    from scope.attribution.graph import CircuitGraph, build_graph
    from scope.attribution.graph_json import load_graph, save_graph
    from scope.attribution.graph_settings import GraphSettings
    from scope.attribution.lens import LogitLens, logit_lens
    from scope.attribution.methods import Attribution, attribute
    from scope.attribution.path_patching import path_patching
    from scope.attribution.per_layer import PerLayerReport, per_layer_writes
    from scope.attribution.pruning import prune, scores
    from scope.attribution.query_key import qk_pairs
    from scope.attribution.tables import TableEffects, table_effects
    from scope.attribution.targets import (
        feature,
        log_probability,
        logit,
        logit_difference,
        loss,
        projection,
        router_logit,
    )
    from scope.attribution.verification import verify
    from scope.attribution.writes import layer_writes

__all__ = [
    "Attribution",
    "CircuitGraph",
    "GraphFaithfulness",
    "GraphSettings",
    "LogitComponents",
    "LogitLens",
    "PerLayerReport",
    "TableEffects",
    "attribute",
    "build_graph",
    "compare_methods",
    "counterfactual",
    "direct_logit_effects",
    "edge_heads",
    "faithfulness",
    "feature",
    "graph_faithfulness",
    "layer_writes",
    "load_graph",
    "log_probability",
    "logit",
    "logit_components",
    "logit_difference",
    "logit_lens",
    "loss",
    "mean",
    "node_heads",
    "path_patching",
    "per_layer_writes",
    "projection",
    "prune",
    "qk_pairs",
    "router_logit",
    "save_graph",
    "scores",
    "table_effects",
    "verify",
    "zero",
]

_HOMES = {
    "attention": ("edge_heads", "node_heads"),
    "baselines": ("counterfactual", "mean", "zero"),
    "circuit_curves": ("GraphFaithfulness", "graph_faithfulness"),
    "components": ("LogitComponents", "logit_components"),
    "direct": ("direct_logit_effects",),
    "comparison": ("compare_methods", "faithfulness"),
    "graph": ("CircuitGraph", "build_graph"),
    "graph_json": ("load_graph", "save_graph"),
    "graph_settings": ("GraphSettings",),
    "lens": ("LogitLens", "logit_lens"),
    "methods": ("Attribution", "attribute"),
    "path_patching": ("path_patching",),
    "per_layer": ("PerLayerReport", "per_layer_writes"),
    "pruning": ("prune", "scores"),
    "query_key": ("qk_pairs",),
    "tables": ("TableEffects", "table_effects"),
    "targets": ("feature", "log_probability", "logit", "logit_difference", "loss", "projection", "router_logit"),
    "verification": ("verify",),
    "writes": ("layer_writes",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            from importlib import import_module

            return getattr(import_module(f"scope.attribution.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
