/* Token strips. A strip arrives as `<div class="strip" data-strip="JSON">` and is filled here, so that thousands of
   tokens cost Dash one component. Text goes in as text.

   JSON: t tokens, v values, m end of the scale, k "activation" | "effect", c centre, s selected, r row of the first token,
   f feature, i index, p position of the centre, more whether text was cut off on either side, from provenance, pick
   whether a click selects, name what a selected token is called in the address, lets names that it lets go of, special:
   positions of special tokens, pins: positions of pinned ones, turns {position: what begins there in a chat}, said what
   each token is in a chat (numbers of words), words, differs: positions of tokens that
   another text does not have there. A token that is part of a character ends in its share of the character's bytes, as in "é ¹⁄₂". */
(function () {
  "use strict";
  const { el, borne, setProps, unseen } = window.scope;
  const specs = new WeakMap();

  /** The blank before a word stays uncoloured, so that the highlight begins where the word does. */
  function fillToken(span, token) {
    const share = token.match(/^([^]*) ([⁰¹²³⁴⁵⁶⁷⁸⁹]+⁄[₀₁₂₃₄₅₆₇₈₉]+)$/);
    const text = share ? share[1] : token;
    const word = text.replace(/^ +(?=\S)/, "");
    if (word.length < text.length) span.append(document.createTextNode(text.slice(0, text.length - word.length)));
    const ink = el("span", "ink");
    const names = unseen(word);
    if (names) ink.append(el("span", "mark names", names));
    for (const piece of names ? [] : word.split(/(\n|\t|\r)/)) {
      if (!piece) continue;
      if (piece === "\n" || piece === "\r") {
        ink.append(el("span", "mark", "⏎"));
        ink.append(el("span", "break", "\n"));
      } else if (piece === "\t") {
        ink.append(el("span", "mark", "⇥"), document.createTextNode("\t"));
      } else {
        // Nothing but marks has no width of its own: neither colour nor pointer would find it.
        ink.append(document.createTextNode(borne(piece, /^[\p{Mn}\p{Me}]+$/u)));
      }
    }
    if (share) {
      ink.append(el("span", "share", share[2]));
      span.title = "part " + share[2] + " of the bytes of a character";
    }
    span.append(ink);
  }

  function build(strip) {
    const source = strip.getAttribute("data-strip");
    const known = specs.get(strip);
    if (known && known.source === source) return;
    const spec = JSON.parse(source);
    spec.source = source;
    if (known && known.t.join("\u0000") === spec.t.join("\u0000")) {
      specs.set(strip, spec);
      paint(strip, spec);
      return;
    }
    specs.set(strip, spec);
    strip.textContent = "";
    const special = new Set(spec.special || []);
    const turns = spec.turns || {};
    const fragment = document.createDocumentFragment();
    spec.t.forEach((token, place) => {
      const span = el("span", "tok");
      span.dataset.n = place;
      fillToken(span, token);
      if (special.has(place)) span.classList.add("special");
      if (turns[place]) {
        const turn = el("span", "turn", turns[place]);
        turn.dataset.role = turns[place].split(" ")[0];
        fragment.append(turn);
      }
      if (spec.said && spec.words[spec.said[place]].endsWith("markup")) span.classList.add("markup");
      if (spec.pick) {
        span.setAttribute("role", "option");
        if (!token.trim()) span.setAttribute("aria-label", token.includes("\n") ? "line break" : "blank");
      }
      fragment.append(span);
    });
    if (spec.more && spec.more[0]) strip.append(el("span", "cut", "…"));
    strip.append(fragment);
    if (spec.more && spec.more[1]) strip.append(el("span", "cut", "…"));
    strip.setAttribute("dir", "auto");
    paint(strip, spec);
  }

  function paint(strip, spec) {
    const scale = spec.m > 0 ? spec.m : 1;
    strip.querySelectorAll(".tok").forEach((span, place) => {
      const value = spec.v[place] || 0;
      const share = Math.min(1, Math.abs(value) / scale);
      if (share > 0) {
        span.dataset.on = spec.k === "effect" ? (value > 0 ? "pos" : "neg") : "act";
        span.style.setProperty("--v", share.toFixed(3));
      } else {
        delete span.dataset.on;
      }
      span.classList.toggle("centre", place === spec.c);
      span.classList.toggle("is-pinned", (spec.pins || []).includes(place));
      span.classList.toggle("differs", (spec.differs || []).includes(place));
      if (spec.pick) span.setAttribute("aria-selected", place === spec.s ? "true" : "false");
    });
  }

  /** Colour a strip by other values, without asking the server. */
  function repaint(strip, changes) {
    const spec = Object.assign(specs.get(strip) || {}, changes);
    paint(strip, spec);
  }

  function scan(root) {
    if (root.nodeType !== 1) return;
    if (root.matches("[data-strip]")) build(root);
    root.querySelectorAll("[data-strip]").forEach(build);
  }

  new MutationObserver((records) => {
    for (const record of records) {
      if (record.type === "attributes") build(record.target);
      else record.addedNodes.forEach(scan);
    }
  }).observe(document.documentElement, { subtree: true, childList: true, attributes: true, attributeFilter: ["data-strip"] });

  function pick(strip, place) {
    const spec = specs.get(strip);
    if (!spec || !spec.pick || place < 0 || place >= spec.t.length) return;
    // A page may take it its own way.
    if (!strip.dispatchEvent(new CustomEvent("scope-pick", { bubbles: true, cancelable: true, detail: { spec, place } }))) return;
    window.scope.select(Object.assign({ [spec.name || "token"]: place }, Object.fromEntries((spec.lets || []).map((name) => [name, null]))));
  }

  document.addEventListener("click", (event) => {
    const span = event.target.closest(".strip.pick .tok");
    if (span) pick(span.parentElement, Number(span.dataset.n));
  });

  /* Arrow keys step through the tokens of a focused strip. */
  document.addEventListener("keydown", (event) => {
    const strip = event.target;
    if (!(strip instanceof HTMLElement) || !strip.matches("[data-strip]")) return;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 }[event.key];
    const spec = specs.get(strip);
    if (!step || !spec) return;
    event.preventDefault();
    event.stopPropagation();
    const now = strip.querySelector(".tok.at");
    const from = now ? Number(now.dataset.n) : spec.pick ? spec.s : spec.c - step;
    const place = Math.max(0, Math.min(spec.t.length - 1, from + step));
    if (now) now.classList.remove("at");
    const span = strip.querySelectorAll(".tok")[place];
    span.classList.add("at");
    if (spec.pick) pick(strip, place);
    window.scope.tip.showToken(span, spec, false);
  });
  document.addEventListener("focusout", (event) => {
    if (!(event.target instanceof HTMLElement) || !event.target.matches("[data-strip]")) return;
    event.target.querySelectorAll(".tok.at").forEach((span) => span.classList.remove("at"));
    window.scope.tip.leave();
  });

  /* What is selected on a page (token, feature, target, …): in its store and in the address. */
  function select(changes) {
    const store = document.getElementById("selection-box");
    if (!store) return;
    window.scope.refine(Object.fromEntries(Object.entries(changes).map(([k, v]) => [k, v === null ? null : String(v)])), false);
    setProps(store.dataset.store, { data: Object.fromEntries(new URL(location.href).searchParams) });
  }
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-select]");
    if (button) select(JSON.parse(button.getAttribute("data-select")));
  });

  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-break-lines]");
    if (!button) return;
    const on = document.body.classList.toggle("break-lines");
    window.scope.remember("break-lines", on ? "1" : "0");
    button.setAttribute("aria-pressed", String(on));
  });
  if (window.scope.recall("break-lines") === "1") document.body.classList.add("break-lines");

  Object.assign(window.scope, { stripSpec: (strip) => specs.get(strip), repaint, select });
})();
