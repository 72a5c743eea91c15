"""What the circuit page asks of the model worker: making a graph, verifying one, and what explains its attention.

1. `make` explains a prompt's next token with transcoders of the workspace, prunes the graph to what its file keeps, and
   puts it into the workspace; the job's result is its id.
2. `verify` intervenes on every feature of a graph in the model itself, and puts what it measured beside the graph.
3. `heads` splits one edge by the attention heads on its way, or what one node reads by those that wrote it.
4. `pairs` splits the score of one head for one query and key by what was written at the two.
5. `writes` says how strongly a feature of a cross-layer transcoder writes each layer.
6. `test` path-patches the edges out of one node, and puts what it measured beside the graph.

A graph may be made under interventions that the workspace keeps; all that is asked of it is then asked of the model
under them.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dashboards.circuits import circuits
from dashboards.context import Context
from dashboards.dictionaries import Dictionary, dictionaries, require_one_model
from dashboards.format import plural
from dashboards.prompts import prompt_jobs
from dashboards.steering import SteerJobs
from dashboards.worker import Job
from scope.attribution.graph_settings import GraphSettings
from scope.errors import InvalidInputError, MismatchError, OutOfRangeError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

    from scope.attribution.graph import CircuitGraph
    from scope.attribution.query_key import QkPairs
    from scope.interventions.spec import InterventionSpec

__all__ = ["KEPT_EDGES", "KEPT_NODES", "CircuitJobs", "HeadPlace", "MakeRequest", "circuit_jobs"]

MAX_GRAPH_TOKENS = 256
"""Longest prompt that the page makes a graph of; the command line takes longer ones."""
KEPT_NODES, KEPT_EDGES = 0.9, 0.99
"""Shares of influence that the file of a graph keeps; the page shows less of it on demand."""
TIME_LIMIT = 3600.0
"""Seconds."""
MAX_VERIFIED = 256
"""Feature nodes that are intervened on, those with the most influence."""
MAX_NAME = 40
MAX_PAIRS = 60
"""Pairs of a head's score that are listed."""


class MakeRequest(NamedTuple):
    """A graph to make."""

    prompt: str
    transcoders: tuple[str, ...]
    """Ids of SAEs in the workspace."""
    targets: tuple[str, ...] = ()
    """Next tokens to explain; none for the likeliest."""
    max_features: int = GraphSettings.max_features
    interventions: str = ""
    """Name of interventions that the workspace keeps, to be in force; "" for the model as it is."""


class HeadPlace(NamedTuple):
    """An attention head at a query position, and the key position that is asked about."""

    layer: int
    head: int
    query: int
    key: int

    def __str__(self) -> str:
        """As in an address: LAYER.HEAD.QUERY.KEY."""
        return ".".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> "HeadPlace":
        """What `str` wrote.

        Raises:
            InvalidInputError: it is not four whole numbers.
        """
        parts = text.split(".")
        if len(parts) != len(cls._fields) or not all(part.isdecimal() and len(part) < 9 for part in parts):
            raise InvalidInputError(
                f"The head is {text[:40]!r}; expected LAYER.HEAD.QUERY.KEY as whole numbers, such as 3.1.7.4."
            )
        return cls(*map(int, parts))


class CircuitJobs:
    """The jobs of the circuit page."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._transcoders: dict[str, Any] = {}

    # --- called by the page ---------------------------------------------------------------------------------------

    def submit_make(self, asked: MakeRequest) -> Job:
        """Queue the making of a graph; the job's result is its id in the workspace.

        Raises:
            InvalidInputError: there is no prompt, or the transcoders do not go together.
            UnknownNameError: the workspace has no such transcoder, or keeps no such interventions.
        """
        if not asked.prompt.strip():
            raise InvalidInputError("Type the text whose next token the graph is to explain.")
        known = {one.entry.id: one for one in dictionaries(self.context)}
        missing = next((id for id in asked.transcoders if id not in known), None)
        if missing is not None:
            raise UnknownNameError("transcoder", missing, known)
        chosen = [known[id] for id in asked.transcoders]
        model = require_one_model(chosen)
        settings = GraphSettings(max_features=asked.max_features)
        spec = self.context.workspace.intervention(asked.interventions) if asked.interventions else None
        return self.context.worker.submit(
            ("make-graph", asked, repr(spec)),
            lambda job: self._make(job, asked, chosen, model, settings, spec),
            TIME_LIMIT,
        )

    def submit_verify(self, id: str) -> Job:
        """Queue the verification of a graph; the job's result is its id.

        Raises:
            UnknownNameError: there is no such graph, or its transcoders are not in the workspace.
        """
        chosen = self._dictionaries(id)
        return self.context.worker.submit(("verify-graph", id), lambda job: self._verify(job, id, chosen), TIME_LIMIT)

    def submit_heads(self, id: str, source: str, target: str) -> Job:
        """Queue the splitting of an edge, or with "" for its source of all that comes into a node, by attention heads;
        the job's result is a frame of layer, head, key, weight.

        Raises:
            UnknownNameError: there is no such graph or node, or its transcoders are not in the workspace.
        """
        numbers = [circuits(self.context).number(id, node) for node in (source, target) if node]
        chosen = self._dictionaries(id)
        return self.context.worker.submit(
            ("heads", id, source, target), lambda job: self._heads(job, id, numbers, chosen), TIME_LIMIT
        )

    def submit_pairs(self, id: str, place: HeadPlace) -> Job:
        """Queue the splitting of a head's score by pairs of what was written; the job's result is a `QkPairs`.

        Raises:
            UnknownNameError: there is no such graph, or its transcoders are not in the workspace.
            OutOfRangeError: the graph has no such layer or position.
            InvalidInputError: the graph is under interventions, which queries and keys are not split by.
        """
        graph = circuits(self.context).graph(id)
        if graph.spec is not None:
            raise InvalidInputError(
                "Why a head looks where it does is told of the model as it is, and this graph is of the model under "
                "interventions. Make a graph of the same text without them."
            )
        for name, value, end in (
            ("layer", place.layer, graph.n_layers),
            ("query", place.query, len(graph.tokens)),
            ("key", place.key, place.query + 1),
        ):
            if not 0 <= value < end:
                raise OutOfRangeError(f"The head's {name} is {value}; expected 0 to {end - 1}.")
        chosen = self._dictionaries(id)
        return self.context.worker.submit(
            ("pairs", id, place), lambda job: self._pairs(job, id, place, chosen), TIME_LIMIT
        )

    def submit_writes(self, id: str, node: str) -> Job:
        """Queue what a feature writes, layer by layer; the job's result is a frame of `layer_writes`.

        Raises:
            UnknownNameError: there is no such graph or node, or its transcoders are not in the workspace.
        """
        number = circuits(self.context).number(id, node)
        chosen = self._dictionaries(id)
        return self.context.worker.submit(
            ("writes", id, node), lambda job: self._writes(job, id, number, chosen), TIME_LIMIT
        )

    def submit_test(self, id: str, source: str) -> Job:
        """Queue the path patching of all edges out of a node; the job's result is the graph's id.

        Raises:
            UnknownNameError: there is no such graph or node, or its transcoders are not in the workspace.
        """
        number = circuits(self.context).number(id, source)
        chosen = self._dictionaries(id)
        return self.context.worker.submit(
            ("test-edges", id, source), lambda job: self._test(job, id, number, chosen), TIME_LIMIT
        )

    def _dictionaries(self, id: str) -> list[Dictionary]:
        """The transcoders of a graph, all of which have to be in the workspace."""
        known = circuits(self.context)
        graph = known.graph(id)
        missing = known.missing(graph)
        if missing or not graph.transcoders:
            more = f" and {plural(len(missing) - 1, 'other')}" if len(missing) > 1 else ""
            raise UnknownNameError(
                "transcoder",
                f"{missing[0]}{more}" if missing else "any",
                hint="The graph's transcoders have to be in the workspace: scope workspace add FOLDER, for each. Or "
                f"run scope graph verify {self.context.workspace.find(id, 'circuit-graph').path}",
            )
        return list({one.entry.id: one for one in known.used(graph).values()}.values())

    # --- run by the worker ----------------------------------------------------------------------------------------

    def _make(
        self,
        job: Job,
        asked: MakeRequest,
        chosen: Sequence[Dictionary],
        name: str,
        settings: GraphSettings,
        spec: "InterventionSpec | None",
    ) -> str:
        from scope.attribution.graph import build_graph
        from scope.attribution.graph_json import save_graph
        from scope.attribution.pruning import prune

        model = prompt_jobs(self.context).model(job, name)
        n_tokens = len(model.tokenize(asked.prompt))
        if n_tokens > min(MAX_GRAPH_TOKENS, model.max_context_size):
            raise InvalidInputError(
                f"The prompt has {n_tokens:,} tokens; this page takes up to {MAX_GRAPH_TOKENS}. Shorten it, or make "
                "the graph on the command line: scope graph --model … --transcoders … --prompt … --out GRAPH"
            )
        loaded = [self._loaded(job, one) for one in chosen]
        targets = [_token(model, typed) for typed in asked.targets]
        steering = SteerJobs(self.context)
        whole = build_graph(
            model,
            asked.prompt,
            loaded,
            settings,
            targets=targets,
            spec=None if spec is None else self._with_paths(spec),
            saes=self._sae,
            maxima=lambda sae, feature: steering.maximum(steering.index_of(self._sae(sae).fingerprint), feature),
            progress=lambda *now: job.report(*now),
        )
        job.report("pruning")
        paths = tuple(str(one.entry.path.resolve()) for one in chosen)
        graph = replace(prune(whole, KEPT_NODES, KEPT_EDGES), transcoders=paths, model_name=name)
        path = self.context.workspace.path_for("circuit-graph", self._free_name(asked.prompt))
        save_graph(graph, path, KEPT_NODES)
        return self.context.workspace.find(path.stem, "circuit-graph").id

    def _free_name(self, prompt: str) -> str:
        """A name for a graph, from its prompt: one that no other graph has."""
        words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")[:MAX_NAME].strip("-") or "graph"
        taken = {entry.name for entry in self.context.workspace.graphs()}
        return next(
            name for n in range(1, len(taken) + 2) if (name := words if n == 1 else f"{words}-{n}") not in taken
        )

    def _verify(self, job: Job, id: str, chosen: Sequence[Dictionary]) -> str:
        from scope.attribution.verdicts import save_verification
        from scope.attribution.verification import verify

        graph, model, loaded = self._opened(job, id, chosen)
        job.report("running the model without interventions")
        found = verify(
            graph,
            model,
            loaded,
            saes=self._sae,
            max_features=MAX_VERIFIED,
            progress=lambda done, total: job.report("intervening", done, total),
        )
        save_verification(found, self.context.workspace.verification_path(id))
        return id

    def _heads(self, job: Job, id: str, numbers: Sequence[int], chosen: Sequence[Dictionary]) -> "pd.DataFrame":
        from scope.attribution.attention import edge_heads, node_heads

        graph, model, loaded = self._opened(job, id, chosen)
        job.report("splitting by heads")
        return (edge_heads if len(numbers) > 1 else node_heads)(graph, model, loaded, *numbers, saes=self._sae)

    def _pairs(self, job: Job, id: str, place: HeadPlace, chosen: Sequence[Dictionary]) -> "QkPairs":
        from scope.attribution.query_key import qk_pairs

        graph, model, loaded = self._opened(job, id, chosen)
        job.report("reading what was written")
        return qk_pairs(
            model,
            list(graph.token_ids),
            loaded,
            *place,
            top=MAX_PAIRS,
            progress=lambda done, total: job.report("comparing with the other keys", done, total),
        )

    def _writes(self, job: Job, id: str, number: int, chosen: Sequence[Dictionary]) -> "pd.DataFrame":
        from scope.attribution.writes import layer_writes

        graph, model, loaded = self._opened(job, id, chosen)
        job.report("reading what it writes")
        return layer_writes(graph, model, loaded, [number], saes=self._sae)

    def _test(self, job: Job, id: str, source: int, chosen: Sequence[Dictionary]) -> str:
        from scope.attribution.path_patching import merged, path_patching
        from scope.attribution.verdicts import load_verification, save_verification

        graph, model, loaded = self._opened(job, id, chosen)
        job.report("patching the paths out of the node")
        found = path_patching(graph, model, loaded, [source], saes=self._sae)
        path = self.context.workspace.edge_tests_path(id)
        save_verification(merged(load_verification(path), found), path)
        return id

    def _opened(self, job: Job, id: str, chosen: Sequence[Dictionary]) -> "tuple[CircuitGraph, Any, list[Any]]":
        graph = circuits(self.context).graph(id)
        loaded = [self._loaded(job, one) for one in chosen]
        model = prompt_jobs(self.context).model(job, graph.model_name or chosen[0].model)
        if model.n_layers != graph.n_layers:
            raise MismatchError(
                f"The graph is of a model with {graph.n_layers} layers; {graph.model_name} has {model.n_layers}."
            )
        return graph, model, loaded

    def _with_paths(self, spec: "InterventionSpec") -> "InterventionSpec":
        """Interventions that say where the SAEs of their features lie, so that other programs find them too."""
        workspace = self.context.workspace
        named = (
            replace(one, sae=str(workspace.find(one.sae, "sae").path.resolve()))
            if one.features and one.sae and not Path(one.sae).exists()
            else one
            for one in spec.interventions
        )
        return replace(spec, interventions=tuple(named))

    def _sae(self, name: str) -> Any:
        """The SAE of an intervention's features: one of the workspace, or at a path; loaded once."""
        if not name:
            raise InvalidInputError("The interventions do not name the SAE of their features.")
        key = str(Path(name).resolve()) if Path(name).exists() else name
        if key not in self._transcoders:
            self._transcoders[key] = self.context.workspace.sae(key)
        return self._transcoders[key]

    def _loaded(self, job: Job, one: Dictionary) -> Any:
        """A transcoder, loaded once."""
        fingerprint = one.entry.manifest["fingerprint"]
        if fingerprint not in self._transcoders:
            where = f"layers {one.layers[0]} to {one.layers[-1]}" if one.across else f"layer {one.layers[0]}"
            job.report(f"loading the transcoder of {where}")
            self._transcoders[fingerprint] = self.context.workspace.sae(one.entry.id)
        return self._transcoders[fingerprint]


def _token(model: Any, typed: str) -> int:
    """The token that someone typed: with a blank in front where there is such a token, as words have within a text."""
    word = typed.strip()
    for reading in [typed] if not word else [f" {word}", word]:
        (ids,) = model.encode_documents([reading])
        if len(ids) == 1:
            return int(ids[0])
    pieces = ", ".join(f"“{piece}”" for piece in model.vocabulary_strings(ids))
    raise InvalidInputError(f"“{word}” is {len(ids)} tokens ({pieces}); a graph explains single ones.")


def circuit_jobs(context: Context) -> CircuitJobs:
    """The one `CircuitJobs` of a dashboard."""
    return context.once("circuit-jobs", lambda: CircuitJobs(context))
