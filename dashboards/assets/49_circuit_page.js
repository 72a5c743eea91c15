/* What happens on a circuit graph: pointing, pinning, grouping, hiding, thresholds, keys, and the address that keeps it.

   `.circuit[data-circuit]` is filled here. Its address: graph, nodes and edges (thresholds), pin (a node's id, or
   group:NAME), edge (SOURCE:TARGET, or :NODE for all that comes into one), head (LAYER.HEAD.QUERY.KEY), hide (ids),
   verdicts ("off": what does not hold is not marked). */
(function () {
  "use strict";
  const { el, number, getJson, setProps, refine } = window.scope;
  const { Parts, percent } = window.scope.circuit;
  const NEAR = 60;
  let now = null;

  /** Layers in words: "L3 to L17", or one by one where some are left out. */
  function layersOf(layers) {
    const [first, last] = [layers[0], layers[layers.length - 1]];
    const whole = layers.length > 2 && last - first === layers.length - 1;
    return whole ? "L" + first + " to L" + last : layers.map((layer) => "L" + layer).join(", ");
  }

  class Circuit extends Parts {
    constructor(box) {
      super();
      const given = JSON.parse(box.dataset.circuit);
      const query = new URL(location.href).searchParams;
      this.box = box;
      this.graph = given.graph;
      this.name = given.name;
      this.thresholds = given.thresholds;
      this.pin = query.get("pin");
      this.edge = query.get("edge");
      this.asked = query.get("head");
      this.hidden = new Set((query.get("hide") || "").split(",").filter(Boolean));
      this.marked = query.get("verdicts") !== "off";
      this.selected = new Set();
      this.selecting = false;
      this.known = new Map();
      this.all = { in: false, out: false };
      this.visit = 0;
      this.build();
      this.load();
    }

    /* --- data ------------------------------------------------------------------------------------------------------ */

    async load() {
      const visit = (this.visit += 1);
      this.view.setAttribute("aria-busy", "true");
      try {
        const data = await getJson("/api/circuit", { graph: this.graph, nodes: this.thresholds.nodes, edges: this.thresholds.edges });
        if (visit !== this.visit || !this.box.isConnected) return;
        this.data = data;
        this.place = new Map(data.nodes.id.map((id, n) => [id, n]));
        this.tables.hidden = !data.nodes.kind.includes("table");
        this.edited.hidden = !data.nodes.kind.includes("intervention");
        this.verdicts.hidden = !data.nodes.holds.concat(data.edges.holds).some((one) => one !== null);
        this.draw();
      } catch (error) {
        if (visit !== this.visit) return;
        const trouble = el("div", "state error");
        trouble.setAttribute("role", "alert");
        trouble.append(el("h2", "", "The graph could not be shown"), el("p", "", error.message));
        this.view.replaceChildren(trouble);
      } finally {
        if (visit === this.visit) this.view.removeAttribute("aria-busy");
      }
    }

    title(item) {
      if (item.kind === "group") return item.name;
      const n = item.members[0];
      const { nodes, tokens } = this.data;
      if (item.kind === "logit") return "Logit “" + window.scope.circuit.token(nodes.label[n]) + "”";
      const at = "“" + window.scope.circuit.token(tokens[nodes.position[n]]) + "”";
      if (item.kind === "embedding") return "Embedding of " + at;
      if (item.kind === "intervention") return nodes.label[n].replace(/\.$/, "") + ", at " + at;
      return "L" + nodes.layer[n] + ({ error: " error", table: " table" }[item.kind] || " feature " + nodes.feature[n]) + " at " + at;
    }

    describe(item) {
      if (item.kind === "group") return "Supernode " + item.name + ", " + item.members.length + " nodes";
      const name = this.data.nodes.name[item.members[0]];
      return this.title(item) + (name ? ", " + name : "") + (item.holds === false ? ", does not hold in the model" : "");
    }

    /* --- drawing --------------------------------------------------------------------------------------------------- */

    draw() {
      this.width = this.view.clientWidth;
      const old = this.picture;
      const focused = old && old.svg === document.activeElement;
      const at = old && this.at !== null && this.at !== undefined ? old.items[this.at]?.key : null;
      this.picture = window.scope.circuit.picture(this.data, {
        hidden: this.hidden, width: this.width - 2, describe: (item) => this.describe(item),
        label: "Nodes of the circuit. Arrow keys step through them, Enter pins one, Space selects, h hides, g groups, Escape lets go.",
      });
      this.at = this.picture.byKey.get(at);
      const left = old ? this.view.scrollLeft : null;
      this.view.replaceChildren(this.picture.svg);
      this.view.scrollLeft = left ?? this.start();
      this.listen(this.picture.svg);
      this.keepAxis();
      if (focused) this.picture.svg.focus({ preventScroll: true });
      const { whole, n_edges } = this.data;
      const edges = this.picture.edges.length;
      this.note.textContent =
        this.data.nodes.id.length.toLocaleString("en-US") + " of " + whole.nodes.toLocaleString("en-US") + " nodes, " +
        n_edges.toLocaleString("en-US") + " of " + whole.edges.toLocaleString("en-US") + " edges" +
        (this.hidden.size ? ", " + this.hidden.size + " hidden" : "") +
        (this.picture.drawn < edges ? ". Drawn are the " + this.picture.drawn.toLocaleString("en-US") + " edges with the most influence; a node that is pointed at shows its own " + NEAR + " strongest." : ".");
      this.paint();
    }

    /** Where a picture that is wider than its box is looked at first: at what is pinned, else at the logits. */
    start() {
      const pinned = this.picture.items[this.picture.byKey.get(this.pin)];
      return pinned ? pinned.x - this.view.clientWidth / 2 : this.picture.plan.width;
    }

    keepAxis() {
      this.picture?.names.setAttribute("transform", "translate(" + this.view.scrollLeft + " 0)");
    }

    /** Which node the picture is about: the one that is pointed at, or pinned. */
    get centre() {
      return this.over ?? this.picture.byKey.get(this.pin);
    }

    paint() {
      const { svg, marks, edges, items, byKey } = this.picture;
      const pinned = byKey.get(this.pin);
      const centre = this.centre;
      svg.classList.toggle("has-focus", centre !== undefined);
      svg.classList.toggle("unmarked", !this.marked);
      const near = new Map();
      let shown = [];
      if (centre !== undefined) {
        const own = edges.filter((one) => one.source === centre || one.target === centre);
        own.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
        shown = own.slice(0, NEAR);
        for (const one of shown) near.set(one.source === centre ? one.target : one.source, one.weight < 0 ? "negative" : "positive");
      }
      this.picture.drawNear(shown);
      marks.forEach((mark, n) => {
        const list = mark.classList;
        list.toggle("pinned", n === pinned);
        list.toggle("at", n === this.at);
        list.toggle("centre", n === centre);
        list.toggle("chosen", this.selected.has(items[n].key));
        list.toggle("near-positive", near.get(n) === "positive");
        list.toggle("near-negative", near.get(n) === "negative");
        mark.setAttribute("aria-selected", String(n === pinned || this.selected.has(items[n].key)));
      });
      if (this.at !== undefined && this.at !== null) svg.setAttribute("aria-activedescendant", marks[this.at].id);
      else svg.removeAttribute("aria-activedescendant");
      this.several.setAttribute("aria-pressed", String(this.selecting));
      this.shown.hidden = !this.hidden.size;
      this.several.textContent = this.selected.size ? this.selected.size + " selected" : "Select";
      const file = new URL("/export/circuit/" + this.graph + ".json", location.href);
      for (const name of ["nodes", "edges"]) file.searchParams.set(name, this.thresholds[name]);
      if (this.hidden.size) file.searchParams.set("hide", Array.from(this.hidden).join(","));
      if (this.pin && !this.pin.startsWith("group:")) file.searchParams.set("pin", this.pin);
      this.json.href = file.pathname + file.search;
      if (!this.hovering) this.list();
    }

    /** The address says what is shown. */
    keep() {
      refine({ pin: this.pin, edge: this.edge, head: this.asked, hide: Array.from(this.hidden).join(",") });
    }

    /* --- pointing -------------------------------------------------------------------------------------------------- */

    listen(svg) {
      const found = (target) => {
        const mark = target.closest && target.closest(".node");
        return mark ? this.picture.marks.indexOf(mark) : -1;
      };
      svg.addEventListener("mouseover", (event) => {
        const n = found(event.target);
        if (n >= 0 && n !== this.over) this.point(n);
      });
      svg.addEventListener("mouseout", (event) => {
        if (this.over !== undefined && found(event.target) === this.over && !(event.relatedTarget && found(event.relatedTarget) === this.over)) this.point(undefined);
      });
      svg.addEventListener("click", (event) => {
        const n = found(event.target);
        if (n < 0) return;
        this.at = n;
        if (event.shiftKey || this.selecting) this.select(n);
        else this.setPin(this.picture.items[n].key === this.pin ? null : this.picture.items[n].key);
      });
      svg.addEventListener("keydown", (event) => this.key(event));
      svg.addEventListener("blur", () => { if (this.at !== undefined) window.scope.tip.leave(); });
    }

    point(n) {
      this.over = n;
      this.hovering = true;
      this.paint();
      this.hovering = false;
      if (n === undefined) { window.scope.tip.leave(); return; }
      this.card(n);
    }

    /** What a node is, beside it; its feature's examples when they come. */
    card(n) {
      const item = this.picture.items[n];
      const box = el("div", "circuit-card");
      const head = el("div", "tip-head");
      head.append(el("span", "tip-token", this.title(item)));
      box.append(head, ...this.about(item));
      window.scope.tip.showNodes(this.picture.marks[n], box);
      if (item.kind !== "feature") return;
      clearTimeout(this.asking);
      this.asking = setTimeout(async () => {
        const examples = await this.examples(item.key).catch(() => null);
        if (this.over !== n && this.at !== n) return;
        const drawn = this.drawExamples(examples);
        if (drawn) { box.append(drawn); window.scope.tip.showNodes(this.picture.marks[n], box); }
      }, 120);
    }

    about(item) {
      const parts = [];
      const { nodes } = this.data;
      if (item.kind === "group") {
        parts.push(el("div", "", item.members.length + (item.members.length === 1 ? " node" : " nodes")));
        return parts;
      }
      const n = item.members[0];
      if (nodes.name[n]) parts.push(el("div", "circuit-name", nodes.name[n]));
      if (item.kind === "feature" && this.data.writes[nodes.layer[n]]) {
        parts.push(el("div", "circuit-layers", "reads L" + nodes.layer[n] + " · writes " + layersOf(this.data.writes[nodes.layer[n]])));
      }
      const facts = [];
      if (item.kind === "feature") facts.push("activation " + number(nodes.activation[n]));
      else if (item.kind === "logit") facts.push("probability " + percent(nodes.probability[n]), "logit " + number(nodes.activation[n]));
      else facts.push("length " + number(nodes.activation[n]));
      facts.push("position " + nodes.position[n]);
      if (item.kind !== "logit") facts.push("influence " + percent(nodes.influence[n]));
      parts.push(el("div", "tip-from", facts.join(" · ")));
      if (item.holds !== null && item.holds !== undefined) parts.push(el("div", item.holds ? "tip-from" : "circuit-fails", item.holds ? "Holds in the model" : "Does not hold in the model"));
      return parts;
    }

    /* --- pinning, selecting, hiding, grouping ---------------------------------------------------------------------- */

    setPin(key) {
      this.pin = key;
      this.edge = this.asked = null;
      this.all = { in: false, out: false };
      this.over = undefined;
      setProps("circuit-edge", { data: null });
      this.keep();
      this.paint();
    }

    select(n) {
      const key = this.picture.items[n].key;
      if (!this.selected.delete(key)) this.selected.add(key);
      this.paint();
    }

    /** Ids of the nodes that a button or a key is about. */
    subjects() {
      const keys = this.selected.size ? Array.from(this.selected) : [this.pin || this.picture.items[this.at]?.key];
      return keys.flatMap((key) => {
        const n = this.picture.byKey.get(key);
        return n === undefined ? [] : this.picture.items[n].members.map((one) => this.data.nodes.id[one]);
      });
    }

    hide() {
      const ids = this.subjects();
      if (!ids.length) { window.scope.toast("Pin or select a node first"); return; }
      ids.forEach((id) => this.hidden.add(id));
      this.selected.clear();
      this.pin = this.edge = this.asked = null;
      this.keep();
      this.draw();
    }

    askName() {
      if (!this.subjects().length) { window.scope.toast("Pin or select a node first"); return; }
      this.form.hidden = false;
      const input = this.form.querySelector("input");
      input.value = "";
      input.focus();
    }

    group(name) {
      const ids = this.subjects();
      if (!name || !ids.length) return;
      if (this.data.supernodes.some(([other]) => other === name)) { window.scope.toast("There is a supernode of this name"); return; }
      const taken = new Set(ids);
      const others = this.data.supernodes.map(([other, ...members]) => [other, ...members.filter((id) => !taken.has(id))]);
      this.regroup([...others.filter((one) => one.length > 1), [name, ...ids]], "group:" + name);
      this.form.hidden = true;
      this.selected.clear();
      this.selecting = false;
      this.paint();
      this.focus();
    }

    regroup(supernodes, pin) {
      this.data.supernodes = supernodes;
      setProps("circuit-groups", { data: { graph: this.graph, supernodes, at: Date.now() } });
      this.pin = pin;
      this.edge = this.asked = null;
      this.keep();
      this.draw();
    }

    /** Why a head looked where it did: asked, or asked no more. */
    why(head) {
      this.asked = this.asked === head ? null : head;
      this.keep();
      this.aboutHead();
      if (this.asked) this.follow("circuit-pairs-part");
    }

    focus() { this.picture.svg.focus({ preventScroll: true }); }

    /* --- keys ------------------------------------------------------------------------------------------------------ */

    key(event) {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const { items } = this.picture;
      const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      const acts = {
        Enter: () => { if (items[this.at]) this.setPin(items[this.at].key === this.pin ? null : items[this.at].key); },
        " ": () => { if (items[this.at]) this.select(this.at); },
        Escape: () => {
          window.scope.tip.hide();
          if (this.selected.size) { this.selected.clear(); this.selecting = false; this.paint(); } else this.setPin(null);
        },
        h: () => this.hide(),
        g: () => this.askName(),
        c: () => window.scope.copy(location.href, "Link"),
      };
      if (steps[event.key]) this.step(...steps[event.key]);
      else if (acts[event.key]) acts[event.key]();
      else return;
      event.preventDefault();
      event.stopPropagation();
    }

    step(across, up) {
      const { items, byKey, marks } = this.picture;
      let from = this.at ?? byKey.get(this.pin);
      if (from === undefined || from === null) {
        from = items.findIndex((item) => item.kind === "logit");
        if (from < 0) from = 0;
        if (!items.length) return;
        this.at = from;
      } else {
        const here = items[from];
        let best = Infinity;
        items.forEach((item, n) => {
          const x = item.x - here.x;
          const y = item.y - here.y;
          const along = across ? x * across : y * up;
          const beside = Math.abs(across ? y : x);
          if (along < 1 || (across && beside > 40)) return;
          const cost = along + 3 * beside;
          if (cost < best) { best = cost; this.at = n; }
        });
      }
      marks[this.at].scrollIntoView({ block: "nearest", inline: "nearest" });
      this.over = this.at;
      this.hovering = true;
      this.paint();
      this.hovering = false;
      this.card(this.at);
    }
  }

  function scan(root) {
    if (root.nodeType !== 1) return;
    const box = root.matches("[data-circuit]") ? root : root.querySelector("[data-circuit]");
    if (box) now = new Circuit(box);
    const go = root.matches("[data-go]") ? root : root.querySelector("[data-go]");
    if (go) window.scope.go(go.dataset.go);
    if (now && now.picture && root.querySelector("[data-head]")) now.aboutHead();
    if (now && root.closest("#circuit-heads-result, #circuit-pairs-result")) now.arrived(root);
    if (now && (root.matches("[data-verified]") || root.querySelector("[data-verified]")) && now.data) now.load();
  }
  document.addEventListener("click", (event) => {
    const button = event.target.closest && event.target.closest("[data-head]");
    if (button && now) now.why(button.dataset.head);
  });
  document.addEventListener("scope-pick", (event) => {
    const { spec, place } = event.detail;
    if (!spec.head || !now) return;
    event.preventDefault();
    if (place !== spec.s) now.why(spec.head + "." + place);
  });
  new MutationObserver((records) => records.forEach((record) => record.addedNodes.forEach(scan))).observe(
    document.documentElement, { subtree: true, childList: true });
})();
