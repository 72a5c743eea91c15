/* The feature page: whole documents, read a part at a time as one scrolls; copying an example; sorting the table of
   co-firing features; saving a figure; the live test box; the address of which examples are shown. */
(function () {
  "use strict";
  const { el, getJson, copy, refine } = window.scope;

  /* --- a whole document ------------------------------------------------------------------------------------------
     `<div class="document" data-document='{"index", "feature", "document", "row", "m"}'>` is filled when it comes into
     view: the part around the row first, then what one scrolls to, at either end. */

  function strip(run, asked, origin) {
    const span = el("span", "strip");
    const place = asked.row - run.r;
    const inside = place >= 0 && place < run.t.length;
    const spec = {
      t: run.t, v: run.v, m: asked.m, k: "activation", r: run.r, f: asked.feature, i: asked.index, from: origin,
      c: inside ? place : null, p: inside ? run.p + place : run.p, more: [false, false],
    };
    span.setAttribute("data-strip", JSON.stringify(spec));
    return span;
  }

  async function part(asked, where) {
    const { index, feature, document: number } = asked;
    return getJson("/api/document", { index, feature, document: number, ...where });
  }

  function open(box) {
    if (box.opened) return;
    box.opened = true;
    const asked = JSON.parse(box.dataset.document);
    const text = el("div", "document-text");
    text.setAttribute("dir", "auto");
    const status = el("div", "document-status");
    let from = 0;
    let to = 0;
    let total = 0;
    let busy = false;

    function say() {
      const words = (n) => n.toLocaleString("en-US");
      status.textContent = from === 0 && to === total
        ? "the whole document, " + words(total) + (total === 1 ? " token" : " tokens")
        : "tokens " + words(from) + " to " + words(to - 1) + " of " + words(total) + "; scroll for more";
    }

    async function load(where, before) {
      if (busy) return;
      busy = true;
      try {
        const found = await part(asked, where);
        const height = box.scrollHeight;
        const pieces = found.runs.map((run) => strip(run, asked, found.origin));
        if (before) text.prepend(...pieces); else text.append(...pieces);
        if (before) box.scrollTop += box.scrollHeight - height;
        from = before ? found.start : (to ? from : found.start);
        to = before ? to : found.stop;
        total = found.n_tokens;
        say();
      } catch (error) {
        status.textContent = error.message;
        status.setAttribute("role", "alert");
      }
      busy = false;
    }

    function more() {
      if (!total || busy) return;
      if (to < total && box.scrollTop + box.clientHeight > box.scrollHeight - 240) load({ start: to }, false);
      else if (from > 0 && box.scrollTop < 120) load({ before: from }, true);
    }

    load({ around: asked.row }, false).then(() => {
      box.textContent = "";
      box.append(text);
      box.after(status);
      requestAnimationFrame(() => {
        const centre = text.querySelector(".tok.centre");
        if (centre) box.scrollTop = Math.max(0, centre.offsetTop - box.clientHeight / 2);
        box.addEventListener("scroll", more, { passive: true });
        more();
      });
    });
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); open(entry.target); }
  }, { rootMargin: "200px" });

  new MutationObserver((records) => {
    for (const record of records) record.addedNodes.forEach((node) => {
      if (node.nodeType !== 1) return;
      if (node.matches("[data-document]")) seen.observe(node);
      node.querySelectorAll("[data-document]").forEach((box) => seen.observe(box));
    });
  }).observe(document.documentElement, { subtree: true, childList: true });

  function unfold(button) {
    const card = button.closest(".example");
    const open_ = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!open_));
    if (open_) {
      card.classList.remove("unfolded");
      card.querySelectorAll(".document, .document-status").forEach((one) => one.remove());
      return;
    }
    const box = el("div", "document");
    box.setAttribute("data-document", button.dataset.unfold);
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", "The whole document");
    box.tabIndex = 0;
    card.classList.add("unfolded");
    card.querySelector(".from").before(box);
  }

  /* --- copying ------------------------------------------------------------------------------------------------- */

  /** The tokens of some strips as one text; a character that is spread over several tokens is written once. */
  function textOf(card) {
    const strips = Array.from(card.querySelectorAll(card.matches(".whole") ? ".document .strip" : ":scope > .strip"));
    return strips.map((one) => window.scope.stripSpec(one).t.map((token) => {
      const share = token.match(/^([^]*) ([⁰¹²³⁴⁵⁶⁷⁸⁹]+)⁄[₀₁₂₃₄₅₆₇₈₉]+$/);
      return share ? (share[2] === "¹" ? share[1] : "") : token;
    }).join("")).join("");
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-unfold], [data-copy-example], [data-sort], [data-save-figure]");
    if (!button) return;
    if (button.dataset.unfold) unfold(button);
    else if (button.dataset.copyExample) copy(textOf(button.closest(".example")) + "\n(" + button.dataset.copyExample + ")", "Example");
    else if (button.matches("button[data-sort]")) sortBy(button);
    else if (button.dataset.saveFigure) save(button);
  });

  /* --- a table sorted by one of its columns -------------------------------------------------------------------- */

  function sortBy(button) {
    const table = button.closest("table");
    const body = table.tBodies[0];
    const head = button.closest("th");
    const down = head.getAttribute("aria-sort") !== "descending";
    table.querySelectorAll("th[aria-sort]").forEach((one) => one.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => Number(row.querySelector('td[data-sort="' + button.dataset.sort + '"]').dataset.value);
    body.append(...Array.from(body.rows).sort((a, b) => (down ? value(b) - value(a) : value(a) - value(b))));
  }

  /* --- figures as files ---------------------------------------------------------------------------------------- */

  async function save(button) {
    const figure = button.closest(".figure");
    const plot = figure.querySelector(".js-plotly-plot");
    const feature = location.pathname.match(/\d+$/);
    const filename = (feature ? "feature-" + feature[0] + "-" : "") + figure.dataset.name.replace(/^feature-/, "");
    if (plot && window.Plotly) {
      await window.Plotly.downloadImage(plot, { format: button.dataset.saveFigure, filename, scale: 2 });
    }
  }

  /* --- callbacks ----------------------------------------------------------------------------------------------- */

  const clientside = (window.dash_clientside = window.dash_clientside || {});
  const stay = () => window.dash_clientside.no_update;
  clientside.scope = Object.assign(clientside.scope || {}, {
    /** Which examples of a feature are shown, in the address. */
    examplesAddress(request) {
      if (!request) return stay();
      const band = request.show === "band";
      refine({
        show: request.show === "top" ? null : request.show,
        language: request.language,
        source: request.source,
        role: request.role,
        content: request.content,
        document: request.document,
        context: request.context === "document" ? "document" : null,
        n: request.n === 20 ? null : request.n,
        seed: request.seed || null,
        low: band ? request.low : null,
        high: band ? request.high : null,
      }, true);
      return stay();
    },

    /** Which examples over the whole sample are shown, in the address. */
    excerptAddress(shown) {
      if (shown) refine({ whole: shown === "top" ? null : shown }, true);
      return stay();
    },

    /** All logits have been asked for: the next feature shows them too. */
    askLogits(clicks) {
      if (!clicks) return stay();
      refine({ logits: "all" }, false);
      return { ask: clicks + 1 };
    },

    /** A text for the live test box. What stands in the box counts: Dash may not have heard of the last keys yet. */
    runLive(clicks, request) {
      if (!clicks || !request) return stay();
      const text = document.getElementById("live-text").value;
      refine({ try: text || null }, false);
      return { ...request, text, run: (request.run || 0) + 1 };
    },
  });
})();
