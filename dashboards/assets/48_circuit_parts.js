/* What stands around a circuit graph: thresholds, buttons, the legend; beside it the list of what is pinned, of its
   strongest inputs and outputs, and of supernodes. assets/49_circuit_page.js extends `Parts` by what happens. */
(function () {
  "use strict";
  const { el, number, getJson, setProps, refine } = window.scope;
  const LISTED = 9;
  const WAIT = 180;

  const percent = (share) => (share === null || share === undefined ? "–" : number(100 * share) + "%");

  class Parts {
    /* --- parts ----------------------------------------------------------------------------------------------------- */

    build() {
      this.tools = el("div", "circuit-tools");
      this.view = el("div", "circuit-view");
      this.note = el("p", "small muted circuit-note");
      this.note.setAttribute("role", "status");
      this.panel = document.getElementById("circuit-panel");
      this.tools.append(this.slider("nodes", "Nodes"), this.slider("edges", "Edges"), this.buttons(), this.naming());
      this.view.append(el("div", "skeleton circuit-skeleton"));
      this.box.replaceChildren(this.tools, this.view, this.legend(), this.note);
      this.view.addEventListener("scroll", () => this.keepAxis(), { passive: true });
      this.resized = new ResizeObserver(() => {
        if (!this.box.isConnected) { this.resized.disconnect(); return; }
        if (this.data && Math.abs(this.view.clientWidth - this.width) > 1) this.draw();
      });
      this.resized.observe(this.view);
    }

    slider(name, title) {
      const label = el("label", "circuit-slider");
      label.title = "Share of the influence on the logits that the shown " + name + " have";
      const input = el("input");
      const value = el("output", "number", percent(this.thresholds[name]));
      Object.assign(input, { type: "range", min: "0.05", max: "1", step: "0.01", value: String(this.thresholds[name]), id: "circuit-" + name });
      input.setAttribute("aria-label", title + ": share of influence shown");
      input.addEventListener("input", () => {
        this.thresholds[name] = Number(input.value);
        value.textContent = percent(this.thresholds[name]);
        this.moved = { ...this.moved, [name]: input.value }; // both sliders wait for one answer
        clearTimeout(this.timer);
        this.timer = setTimeout(() => { refine(this.moved); this.moved = {}; this.load(); }, WAIT);
      });
      label.append(el("span", "", title), input, value);
      return label;
    }

    button(text, key, action, title) {
      const button = el("button", "button tiny", text);
      button.type = "button";
      if (key) button.append(" ", el("kbd", "", key));
      if (title) button.title = title;
      button.addEventListener("click", action);
      return button;
    }

    buttons() {
      const bar = el("div", "circuit-buttons");
      this.several = this.button("Select", "", () => { this.selecting = !this.selecting; this.paint(); }, "Each click selects another node; Shift and a click do so too");
      this.shown = this.button("Show hidden", "", () => { this.hidden.clear(); this.keep(); this.draw(); });
      this.shown.hidden = true;
      bar.append(
        this.several,
        this.button("Group", "g", () => this.askName(), "Put the selected nodes, or the pinned one, together under a name"),
        this.button("Hide", "h", () => this.hide(), "Hide the selected nodes, or the pinned one"),
        this.shown,
      );
      for (const kind of ["png", "svg"]) {
        const save = this.button(kind.toUpperCase(), "", () => window.scope.circuit.save(this.picture.svg, kind, this.name), "Save the picture as " + kind.toUpperCase());
        save.dataset.saveCircuit = kind;
        bar.append(save);
      }
      this.json = el("a", "button tiny", "JSON");
      this.json.setAttribute("download", "");
      this.json.title = "What is shown, in circuit-tracer's JSON, which Neuronpedia opens; supernodes in it";
      bar.append(this.json);
      return bar;
    }

    naming() {
      const form = el("form", "circuit-naming");
      const input = el("input");
      input.setAttribute("aria-label", "Name of the supernode");
      input.placeholder = "Name of the supernode";
      input.maxLength = 120;
      const done = el("button", "button tiny", "Group");
      form.append(input, done);
      form.hidden = true;
      form.addEventListener("submit", (event) => { event.preventDefault(); this.group(input.value.trim()); });
      input.addEventListener("keydown", (event) => { if (event.key === "Escape") { form.hidden = true; this.focus(); event.stopPropagation(); } });
      this.form = form;
      return form;
    }

    legend() {
      const box = el("div", "legend circuit-legend");
      const sample = (name, text) => {
        const item = el("span", "circuit-sample");
        item.append(el("i", name), text);
        box.append(item);
        return item;
      };
      sample("line positive", "raises");
      sample("line negative", "lowers (wider: more)");
      sample("dot feature", "feature (larger: more influence)");
      sample("dot error", "error");
      sample("dot embedding", "embedding");
      this.tables = sample("dot table", "what a layer's own table wrote");
      this.tables.hidden = true;
      this.edited = sample("dot intervention", "what an intervention puts there");
      this.edited.hidden = true;
      this.verdicts = sample("line fails", "does not hold in the model");
      const label = el("label", "");
      const check = el("input");
      check.type = "checkbox";
      check.checked = this.marked;
      check.addEventListener("change", () => { this.marked = check.checked; refine({ verdicts: this.marked ? null : "off" }); this.paint(); });
      label.append(check, " mark");
      this.verdicts.append(label);
      this.verdicts.hidden = true;
      return box;
    }

    /* --- the list beside ------------------------------------------------------------------------------------------- */

    list() {
      const { items, byKey, edges } = this.picture;
      const pinned = byKey.get(this.pin);
      const parts = [];
      if (pinned === undefined) {
        parts.push(el("p", "muted small", this.pin
          ? "The pinned node is not shown at these thresholds."
          : "Point at a node to see what it is; click it, or press Enter on it, to list what goes into it and what it does."));
      } else {
        const item = items[pinned];
        parts.push(this.head(item));
        const into = edges.filter((one) => one.target === pinned);
        const from = edges.filter((one) => one.source === pinned);
        parts.push(this.table("Strongest inputs", into, "source", "in"), this.table("Strongest outputs", from, "target", "out"));
      }
      parts.push(this.groups());
      this.panel.replaceChildren(...parts.filter(Boolean));
      this.aboutEdge();
      this.aboutHead();
    }

    head(item) {
      const box = el("div", "circuit-head");
      box.append(el("h2", "", this.title(item)), ...this.about(item));
      if (item.kind === "feature") {
        const n = item.members[0];
        const index = this.data.indexes[this.data.nodes.layer[n]];
        if (index) {
          const link = el("a", "small", "Feature page");
          link.href = "/feature/" + this.data.nodes.feature[n] + "?index=" + encodeURIComponent(index);
          box.append(link);
        }
        const place = el("div", "");
        box.append(place);
        this.examples(item.key).then((found) => { const drawn = this.drawExamples(found, true); if (drawn) place.replaceChildren(drawn); }).catch(() => null);
      }
      if (item.kind === "group") {
        const members = el("ul", "circuit-members");
        for (const n of item.members) members.append(el("li", "", this.title({ kind: this.data.nodes.kind[n], members: [n] })));
        box.append(members);
      }
      const actions = el("div", "chips");
      if (item.kind === "feature" || item.kind === "logit") actions.append(this.headsOf(":" + item.key, "Which attention heads write what it reads", "Heads that write " + this.title(item)));
      if (item.kind === "feature" && this.data.writes[this.data.nodes.layer[item.members[0]]]) actions.append(this.aboutOf("Layers", item.key + ":", "How strongly it writes each layer", "Layers that " + this.title(item) + " writes"));
      actions.append(this.button("Let go", "", () => this.setPin(null)), this.button("Hide", "", () => this.hide()));
      box.append(actions);
      return box;
    }

    /* --- examples of a feature ------------------------------------------------------------------------------------- */

    examples(key) {
      if (!this.known.has(key)) this.known.set(key, getJson("/api/circuit/examples", { graph: this.graph, node: key }));
      return this.known.get(key);
    }

    /** Examples, or why there are none: `whole` says also what to do about it. */
    drawExamples(found, whole) {
      if (!found) return null;
      const box = el("div", "circuit-examples");
      for (const one of found.examples) {
        const strip = el("div", "strip");
        strip.setAttribute("role", "group");
        strip.setAttribute("aria-label", "Example from " + one.from);
        strip.dataset.strip = JSON.stringify({ t: one.tokens, v: one.values, m: found.scale, k: "activation", c: one.centre, special: [] });
        box.append(strip);
      }
      if (!found.examples.length) box.append(el("p", "small muted", found.why));
      if (whole && found.command) {
        const command = el("div", "code");
        const copy = el("button", "button icon-only tiny copy");
        copy.type = "button";
        copy.dataset.copy = found.command;
        copy.setAttribute("aria-label", "Copy");
        copy.append(el("span", "icon icon-copy"));
        command.append(el("pre", "", found.command), copy);
        box.append(command);
      }
      return box;
    }

    /* --- tables of edges ------------------------------------------------------------------------------------------- */

    table(title, edges, end, side) {
      const box = el("section", "circuit-list");
      box.append(el("h3", "", title + (edges.length ? " (" + edges.length.toLocaleString("en-US") + ")" : "")));
      if (!edges.length) { box.append(el("p", "muted small", "None at these thresholds.")); return box; }
      const sorted = edges.slice().sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
      const most = Math.abs(sorted[0].weight) || 1;
      const table = el("table", "");
      const head = el("tr");
      const judged = !this.verdicts.hidden;
      for (const name of ["Node", "Weight", ...(judged ? ["Holds"] : []), "Heads"]) {
        const cell = el("th", name === "Weight" ? "number" : "", name);
        cell.scope = "col";
        head.append(cell);
      }
      table.append(el("thead"), el("tbody"));
      table.tHead.append(head);
      for (const one of sorted.slice(0, this.all[side] ? sorted.length : LISTED)) {
        const other = this.picture.items[one[end]];
        const row = el("tr");
        const name = el("td");
        const go = el("button", "circuit-go", this.title(other));
        go.type = "button";
        go.title = this.describe(other);
        go.addEventListener("click", () => this.setPin(other.key));
        name.append(go);
        const label = other.kind === "feature" && this.data.nodes.name[other.members[0]];
        if (label) name.append(el("div", "small muted circuit-label", label));
        const weight = el("td", "number circuit-weight " + (one.weight < 0 ? "negative" : "positive"), (one.weight > 0 ? "+" : "") + number(one.weight));
        weight.style.setProperty("--v", Math.abs(one.weight) / most);
        weight.title = String(one.weight);
        row.append(name, weight);
        if (judged) row.append(el("td", one.holds === false ? "circuit-fails" : "", one.holds === null ? "–" : one.holds ? "yes" : "no"));
        row.append(this.ask(one));
        table.tBodies[0].append(row);
      }
      box.append(table);
      if (sorted.length > LISTED) box.append(this.button(this.all[side] ? "Show fewer" : "Show all", "", () => { this.all[side] = !this.all[side]; this.list(); }));
      return box;
    }

    /** The button that asks which heads carry an edge. */
    ask(one) {
      const cell = el("td");
      const [source, target] = [this.picture.items[one.source], this.picture.items[one.target]];
      if ([source.kind, target.kind].some((kind) => kind === "group" || kind === "intervention")) return cell;
      cell.append(this.headsOf(source.key + ":" + target.key, "Which attention heads carry this edge", "Heads of " + this.title(source) + " to " + this.title(target)));
      return cell;
    }

    /** A button that asks for the heads of an edge (SOURCE:TARGET) or of what a node reads (:NODE). */
    headsOf(key, title, label) { return this.aboutOf("Heads", key, title, label); }

    /** A button that asks about an edge, or about one node: (NODE:) is for the layers that it writes. */
    aboutOf(words, key, title, label) {
      const button = this.button(words, "", () => {
        this.edge = this.edge === key ? null : key;
        this.asked = null;
        this.keep();
        this.list();
        if (this.edge) this.follow("circuit-edge-part");
      }, title);
      button.setAttribute("aria-pressed", String(this.edge === key));
      button.setAttribute("aria-label", label);
      return button;
    }

    /** Show a part that was asked for, which may be out of sight; its answer too when it has come (`arrived`). */
    follow(id) {
      this.awaited = id;
      // In the next frame, when the lists above it stand as high as they will.
      requestAnimationFrame(() => document.getElementById(id)?.scrollIntoView({ block: "nearest" }));
    }

    arrived(answer) {
      if (!this.awaited || !answer.closest("#" + this.awaited)) return;
      this.awaited = null;
      answer.scrollIntoView({ block: "nearest" });
    }

    /** The edge of the address goes to the server, once, with its ends in words. */
    aboutEdge() {
      const part = document.getElementById("circuit-edge-part");
      if (!part) return;
      const [from, to] = (this.edge || "").split(":");
      const [source, target] = [from, to].map((id) => this.picture.byKey.get(id));
      const shown = (id, n) => !id || n !== undefined;
      part.hidden = !(from || to) || !shown(from, source) || !shown(to, target);
      if (part.hidden || part.dataset.edge === this.edge) return;
      part.dataset.edge = this.edge;
      const words = [source, target].filter((n) => n !== undefined).map((n) => this.title(this.picture.items[n])).join(" → ");
      setProps("circuit-edge", { data: { graph: this.graph, source: from, target: to, words } });
    }

    /** The head of the address (LAYER.HEAD.QUERY.KEY) goes to the server, once. */
    aboutHead() {
      const part = document.getElementById("circuit-pairs-part");
      if (!part) return;
      part.hidden = !this.asked;
      const at = (this.asked || "").split(".").slice(0, 3).join(".") + ".";
      document.querySelectorAll("[data-head]").forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.head.startsWith(at))));
      if (part.hidden || part.dataset.asked === this.asked) return;
      part.dataset.asked = this.asked;
      setProps("circuit-head", { data: { graph: this.graph, head: this.asked } });
    }

    groups() {
      if (!this.data.supernodes.length) return null;
      const box = el("section", "circuit-list");
      box.append(el("h3", "", "Supernodes"));
      const list = el("ul", "circuit-groups");
      this.data.supernodes.forEach(([name, ...ids], place) => {
        const line = el("li");
        const input = el("input");
        input.value = name;
        input.maxLength = 120;
        input.setAttribute("aria-label", "Name of the supernode " + name);
        input.addEventListener("change", () => {
          const changed = input.value.trim();
          const twice = this.data.supernodes.some(([other], n) => n !== place && other === changed);
          if (!changed || twice) { input.value = name; return; }
          this.regroup(this.data.supernodes.map((one, n) => (n === place ? [changed, ...ids] : one)), "group:" + changed);
        });
        line.append(input, el("span", "small muted number", String(ids.length)),
          this.button("Ungroup", "", () => this.regroup(this.data.supernodes.filter((_, n) => n !== place), null)));
        list.append(line);
      });
      box.append(list);
      return box;
    }
  }

  Object.assign(window.scope.circuit, { Parts, percent });
})();
