/* The card that follows the pointer: a token's value, rank and origin; pinned by a click, what else fires there. Also
   the definitions behind each "?". */
(function () {
  "use strict";
  const { el, number, tokenText, getJson } = window.scope;
  const box = el("div", "tip");
  box.id = "tip";
  box.hidden = true;
  let pinned = null;
  let shown = null;
  let timer = null;
  const known = new Map();

  function place(anchor) {
    const word = anchor.querySelector(".ink") || anchor;
    const rect = word.getClientRects()[0] || anchor.getBoundingClientRect();
    box.hidden = false;
    const width = box.offsetWidth;
    const height = box.offsetHeight;
    const left = Math.max(12, Math.min(rect.left, document.documentElement.clientWidth - width - 12));
    const below = rect.bottom + 8;
    const top = below + height > innerHeight - 8 && rect.top - height - 8 > 0 ? rect.top - height - 8 : below;
    box.style.left = left + "px";
    box.style.top = top + "px";
  }

  function hide() {
    clearTimeout(timer);
    box.hidden = true;
    box.classList.remove("pinned");
    box.removeAttribute("role");
    shown = null;
    if (pinned) {
      pinned.classList.remove("pinned");
      pinned.removeAttribute("aria-expanded");
      pinned = null;
    }
  }

  function tokenHead(spec, n) {
    const head = el("div", "tip-head");
    const token = el("span", "tip-token");
    token.append(tokenText(spec.t[n]));
    const value = spec.v[n] || 0;
    const label = spec.k === "effect" ? (value > 0 ? "+" : "") + number(value) : number(value);
    head.append(token, el("span", "tip-value", value ? label : spec.k === "count" ? "none" : "does not fire"));
    head.lastChild.title = String(value);
    return head;
  }

  function about(spec, n) {
    const parts = [];
    if (spec.said) parts.push(spec.words[spec.said[n]]);
    if (spec.from) parts.push(spec.from);
    if (spec.p !== undefined && spec.p !== null) parts.push("position " + (spec.p + n - spec.c).toLocaleString("en-US"));
    return parts.join(" · ");
  }

  async function details(spec, n) {
    const row = spec.r + n;
    const key = spec.i + "/" + row + "/" + spec.f;
    if (!known.has(key)) {
      if (known.size > 500) known.clear();
      known.set(key, getJson("/api/token", { index: spec.i, row, feature: spec.f }));
    }
    return known.get(key);
  }

  function showToken(span, spec, pin) {
    const n = Number(span.dataset.n);
    clearTimeout(timer);
    shown = span;
    box.textContent = "";
    box.append(tokenHead(spec, n));
    const rank = el("div", "tip-rank");
    box.append(rank);
    const origin = about(spec, n);
    if (origin) box.append(el("div", "tip-from", origin));
    place(span);
    if (spec.r === undefined || spec.r === null) return;
    const fill = () => details(spec, n).then((found) => {
      if (shown !== span) return;
      const own = found.features.find((one) => one.feature === spec.f);
      const features = found.n_features.toLocaleString("en-US") + (found.n_features === 1 ? " feature" : " features");
      rank.textContent = own ? "rank " + own.rank + " of " + features + " here" : features + " fire here";
      if (found.said) rank.append(" · " + found.said);
      if (found.push && found.push.effect !== null) {
        const effect = found.push.effect;
        const push = el("div", "tip-push", (effect > 0 ? "+" : "") + number(effect) + " on the logit of the next token ");
        push.append(tokenText(found.push.token));
        box.append(push);
      }
      if (pin) {
        const list = el("ol");
        for (const one of found.features) {
          const item = el("li");
          const link = el("a", "", String(one.feature));
          link.href = "/feature/" + one.feature + "?index=" + encodeURIComponent(spec.i);
          item.append(link, el("span", "", one.label), el("span", "number", number(one.value)));
          list.append(item);
        }
        box.append(list);
      }
      place(span);
    }).catch((error) => { rank.textContent = error.message; });
    if (pin) fill();
    else timer = setTimeout(fill, 120);
  }

  function pinToken(span, spec) {
    hide();
    pinned = span;
    span.classList.add("pinned");
    box.classList.add("pinned");
    showToken(span, spec, true);
  }

  function define(button) {
    const again = pinned === button;
    hide();
    if (again) return;
    pinned = button;
    button.setAttribute("aria-expanded", "true");
    box.textContent = "";
    box.setAttribute("role", "note");
    box.append(el("div", "tip-token", button.dataset.term), el("p", "", button.dataset.define));
    if (button.dataset.formula) box.append(el("div", "formula", button.dataset.formula));
    box.classList.add("pinned");
    place(button);
  }

  document.addEventListener("mouseover", (event) => {
    if (pinned) return;
    const span = event.target.closest && event.target.closest(".strip .tok");
    if (!span) return;
    const spec = window.scope.stripSpec(span.parentElement);
    if (spec && span !== shown) showToken(span, spec, false);
  });
  document.addEventListener("mouseout", (event) => {
    if (pinned || !shown) return;
    const to = event.relatedTarget;
    if (!to || !to.closest || to.closest(".tok") !== shown) hide();
  });
  /* In the head of a grid, what else a click or a tap means there (sorting) must not hear of it. */
  for (const kind of ["click", "pointerdown", "mousedown", "touchstart", "touchend"]) {
    document.addEventListener(kind, (event) => {
      const button = event.target.closest && event.target.closest(".ag-header .define");
      if (!button) return;
      event.stopPropagation();
      if (kind === "click") define(button);
    }, true);
  }
  document.addEventListener("click", (event) => {
    const button = event.target.closest(".define");
    if (button) { define(button); return; }
    const span = event.target.closest(".strip:not(.pick) .tok");
    if (span) {
      const spec = window.scope.stripSpec(span.parentElement);
      if (pinned === span) hide();
      else if (spec) pinToken(span, spec);
      return;
    }
    if (pinned && !event.target.closest("#tip")) hide();
    if (event.target.closest("#tip a")) hide();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !box.hidden) hide();
    if (event.key === "Enter" && event.target instanceof HTMLElement && event.target.matches(".strip:not(.pick)")) {
      const spec = window.scope.stripSpec(event.target);
      const span = event.target.querySelector(".tok.at") || event.target.querySelectorAll(".tok")[spec.c];
      if (span) pinToken(span, spec);
    }
  });
  /* What is pinned moves with its token, until that leaves the window. */
  addEventListener("scroll", () => {
    if (!pinned) { if (shown) hide(); return; }
    const rect = pinned.getBoundingClientRect();
    if (!pinned.isConnected || rect.bottom < 0 || rect.top > innerHeight) hide();
    else place(pinned);
  }, { passive: true });

  document.addEventListener("DOMContentLoaded", () => document.body.append(box));
  if (document.body) document.body.append(box);

  /** Anything else that has something to say about an element. */
  function showNodes(anchor, nodes) {
    if (pinned) return;
    clearTimeout(timer);
    shown = anchor;
    box.replaceChildren(nodes);
    place(anchor);
  }

  window.scope.tip = { showToken, showNodes, hide, leave() { if (!pinned) hide(); } };
})();
