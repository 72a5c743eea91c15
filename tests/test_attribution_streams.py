"""Gemma 3n's stack of residual streams: edges against the model's own modules, with what graphs hold held in them."""

import contextlib
import itertools

import pytest
import torch
from helpers_models import one_thread, tiny_folder
from helpers_saes import make
from test_attribution_graph import ALL, prompt_of, transcoders

from scope.attribution import build_graph, graph_faithfulness, logit_components, prune, verify
from scope.attribution.freezing import freeze
from scope.attribution.frozen import attention_as_frozen
from scope.attribution.path_patching import path_patching
from scope.errors import InvalidInputError
from scope.models import LanguageModel
from scope.models.taps import tapped
from scope.saes.base import SAEMetadata

__all__ = ["one_thread"]

LENGTH = 10


class FrozenModules:
    """The modules of transformers themselves, with norms' denominators, attention patterns, the router of AltUp, gates
    of per-layer embeddings and what MLPs write held at what they are on a prompt. The lengths that its streams begin
    with need no holding: they go with the embedding's."""

    def __init__(self, model, prompt):
        self.model, self.prompt = model, prompt
        self.frozen, _ = freeze(model, prompt)
        hf, layers = model.hf.model, model.hf.model.layers
        norms = [hf.norm, hf.per_layer_projection_norm]
        for layer in layers:
            norms += [layer.input_layernorm, layer.post_attention_layernorm, layer.pre_feedforward_layernorm]
            norms += [layer.laurel.post_laurel_norm, layer.post_per_layer_input_norm]
            if not layer.self_attn.is_kv_shared_layer:
                norms.append(layer.self_attn.v_norm)
        seen = {norm: [] for norm in norms}
        routed = {layer.altup: [] for layer in layers}
        with contextlib.ExitStack() as held:
            for norm, into in seen.items():
                handle = norm.register_forward_pre_hook(lambda module, args, into=into: into.append(args[0]))
                held.callback(handle.remove)
            for altup, into in routed.items():
                own = altup.compute_router_modalities
                altup.compute_router_modalities = lambda x, own=own, into=into: into.append(own(x)) or into[-1]
                held.callback(altup.__dict__.pop, "compute_router_modalities")
            hooks = [f"blocks.{i}.{name}" for i in range(model.n_layers) for name in ("hook_mlp_out", "ple.hook_gate")]
            attention = [f"blocks.{i}.hook_attn_out" for i in range(model.n_layers)]
            last = f"blocks.{model.n_layers - 1}.hook_streams_post"
            values = model.run(prompt, hooks=[*hooks, *attention, last]).activations
        self.held = {hook: values[hook] for hook in hooks}
        self.attention = {hook: values[hook] for hook in attention}
        self.stack = values[last]
        self.norms = {
            norm: (read[0].square().mean(-1, keepdim=True) + norm.eps).rsqrt() * getattr(norm, "weight", 1.0)
            for norm, read in seen.items()
        }
        self.routed = routed

    def run(self, changes, attention=False):
        """What MLPs read, by layer, and the final norm's output, with something made of what stands at some hooks;
        `attention`: what attention writes is held too."""
        model, table = self.model, self.model.hook_table
        reads, stacks = {}, []
        held = {**self.held, **(self.attention if attention else {})}

        def at(hook):
            change = changes.get(hook, lambda value: value)
            if hook in held:
                return lambda value: change(held[hook][None].clone())
            return lambda value: change(value.clone())

        hooks = {*held, *changes}
        handlers = {table[hook]: at(hook) for hook in sorted(hooks, key=table.rank)}
        for layer in range(model.n_layers):
            handlers[table[f"blocks.{layer}.ln2.hook_out"]] = lambda value, layer=layer: reads.update({layer: value[0]})
        last = table[f"blocks.{model.n_layers - 1}.hook_streams_post"]
        handlers[last] = lambda value: stacks.append(value[0])
        with contextlib.ExitStack() as patched:
            for norm, factor in self.norms.items():
                norm.forward = lambda x, factor=factor: x * factor
                patched.callback(norm.__dict__.pop, "forward")
            for altup, found in self.routed.items():
                again = itertools.cycle(found)
                altup.compute_router_modalities = lambda x, again=again: next(again)
                patched.callback(altup.__dict__.pop, "compute_router_modalities")
            with torch.no_grad(), attention_as_frozen(self.frozen), tapped(model.hf, handlers, stop=False):
                model.hidden_states(self.prompt[None])
        return reads, self._end(stacks[0])

    def _end(self, stack):
        """What the final norm gives of a stack, with the lengths of its streams held."""
        hf = self.model.hf.model
        parts = [stack[:, 0]]
        for number, project in enumerate(hf.altup_unembed_projections, start=1):
            length = self.stack[:, 0].square().mean(-1).sqrt()
            own = project(self.stack[:, number]).square().mean(-1).clamp_min(1e-5).sqrt()
            parts.append(project(stack[:, number]) * (length / own)[:, None])
        return (torch.stack(parts).mean(0) * self.norms[hf.norm][0]).detach()


@pytest.fixture(scope="module", params=[(3, 0), (4, 1)], ids=["3 streams", "4 streams, the second active"])
def case(request):
    n_streams, active = request.param
    folder = tiny_folder("gemma3n", n_streams=n_streams, active_stream=active)
    model = LanguageModel.load(str(folder), device="cpu", dtype="float32")
    made = transcoders(model)
    prompt = prompt_of(model, LENGTH)
    return model, made, prompt, build_graph(model, prompt, made, ALL), FrozenModules(model, prompt)


def plus(position, what):
    def add(value):
        value[0, position] += what
        return value

    return add


def times(position, factor):
    def scale(value):
        value[0, position] *= factor
        return value

    return scale


def changes_of(made, source):
    """What doubles a source, or for a table takes it away, and by what its edges count then."""
    block = f"blocks.{source.layer}."
    if source.kind == "embedding":
        return {"hook_embed": times(source.position, 2.0)}, 1.0
    if source.kind == "table":
        return {f"{block}ple.hook_table": times(source.position, 0.0)}, -1.0
    row = source.activation * made[source.layer].W_dec.detach()[source.feature]
    return {f"{block}hook_mlp_out": plus(source.position, row)}, 1.0


def test_the_held_modules_give_what_the_model_gives(case):
    model, _, prompt, _, modules = case
    reads, final = modules.run({})
    hooks = [f"blocks.{i}.ln2.hook_out" for i in range(model.n_layers)]
    own = model.run(prompt, hooks=[*hooks, "ln_final.hook_out"]).activations
    for layer, hook in enumerate(hooks):
        torch.testing.assert_close(reads[layer], own[hook], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(final, own["ln_final.hook_out"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["embedding", "table", "feature"])
def test_a_changed_source_changes_each_target_by_its_edge(case, kind):
    model, made, _, graph, modules = case
    base, final = modules.run({})
    nodes = graph.nodes
    edges = {(s, t): w for s, t, w in zip(graph.source, graph.target, graph.weight, strict=True)}
    sources = nodes[(nodes["kind"] == kind) & (nodes["layer"] < model.n_layers - 1)]
    targets = nodes[nodes["kind"].isin(["feature", "logit"])]
    moved_at_all = 0
    for source in sources.sample(6, random_state=0).itertuples():
        changes, sign = changes_of(made, source)
        reads, moved = modules.run(changes)
        for target in [*targets.sample(40, random_state=1).itertuples(), targets.iloc[-1]]:
            if target.kind == "logit":
                change = float((moved - final)[-1] @ (model.W_U[target.feature] - model.W_U.mean(0)))
            else:
                shift = (reads[target.layer] - base[target.layer])[target.position]
                change = float(shift @ made[target.layer].W_enc.detach()[:, target.feature])
            moved_at_all += abs(change) > 3e-5
            assert sign * edges.get((source.node, target.node), 0.0) == pytest.approx(change, rel=1e-3, abs=2e-5)
    assert moved_at_all > 10


def test_components_of_a_logit_are_what_it_loses_along_the_streams_without_them(case):
    """Attention held as well: the direct path alone."""
    model, _, prompt, _, modules = case
    at = 6
    row = model.W_U[300] - model.W_U.mean(0)
    found = logit_components(model, prompt, 300, position=at)
    assert found.table["effect"].sum() == pytest.approx(found.value, abs=1e-5)
    assert abs(found.table.set_index("component")["effect"]["rounding"]) < 1e-4
    whole = found.by_component().set_index(["component", "layer"])["effect"]
    _, final = modules.run({}, attention=True)
    places = {"attention": "hook_attn_out", "mlp": "hook_mlp_out", "table": "ple.hook_table"}
    places["projection"] = "ple.hook_projection"
    cases = [(kind, layer) for kind in places for layer in range(model.n_layers)]
    for kind, layer in cases:
        hook = f"blocks.{layer}.{places[kind]}"
        _, moved = modules.run({hook: times(at, 0.0)}, attention=True)
        assert whole[kind, layer] == pytest.approx(float((final - moved)[at] @ row), rel=1e-3, abs=1e-4)
    sae = transcoders(model)[1]
    parts = logit_components(model, prompt, 300, position=at, dictionaries=[sae]).table
    of_layer = parts[(parts["layer"] == 1) & parts["component"].isin(["feature", "error", "bias"])]
    assert of_layer["effect"].sum() == pytest.approx(whole["mlp", 1], rel=1e-3, abs=1e-4)


def test_an_sae_of_one_of_the_streams_does_not_stand_for_all_before_it(case):
    model, _, prompt, _, _ = case
    sae = make("topk", d_in=model.d_model, metadata=SAEMetadata(hook_name="blocks.1.hook_resid_post"))
    with pytest.raises(InvalidInputError, match=f"one of {model.layout.n_streams} residual streams"):
        logit_components(model, prompt, 300, dictionaries=[sae])


def test_edges_come_true_in_the_model_and_a_circuit_is_measured(case):
    model, made, _, graph, _ = case
    features = graph.nodes[graph.nodes["kind"] == "feature"]
    sources = features[features["node"].isin(graph.source)]["node"].tolist()
    found = path_patching(graph, model, made, sources)
    assert found.attention_frozen.correlation > 0.5  # routers and other norms are live
    assert found.model.correlation > found.random.correlation + 0.3
    small = prune(graph, 0.6, 0.9)
    assert verify(small, model, made).attention_frozen.n > 10
    assert len(graph_faithfulness(small, model, made, sizes=[2], n_random=2).table)
