/* Grids with tokens (or experts) as columns: features by tokens, layers by tokens. A grid arrives as
   `<div class="token-grid" data-grid="JSON">` and becomes a table here; text goes in as text.

   JSON: what "feature" | "layer" (what a row is, and its name in the address), token (the name of a column in the
   address), cols [{t token, n position, pin, special, said what it is in a chat}], rows [{id, name, href, pin, mark, v values, c colours
   from 0 to 1 where they are not v / m, w words of the cells, h what the card says}], m end of the colour scale, k "activation" | "effect", at selected position, row
   selected row, pins pinned rows, text whether cells show their words, near how those stand to the column, caption, unit. */
(function () {
  "use strict";
  const { el, number, tokenText } = window.scope;
  const specs = new WeakMap();
  const left = new Map();
  let entered = null;

  function columnHead(spec, col) {
    const head = el("th", "col");
    head.scope = "col";
    const button = el("button", "col-token");
    button.type = "button";
    button.tabIndex = -1;
    button.append(tokenText(col.t));
    button.dataset.select = JSON.stringify({ [spec.token]: col.n });
    const said = col.t === String(col.n) ? "" : " " + (col.t.trim() || "blank");
    button.setAttribute("aria-label", spec.token + " " + col.n + said + (col.said ? ", " + col.said : "") + (col.pin ? ", pinned" : ""));
    head.append(button);
    if (col.pin) head.classList.add("pinned");
    if (col.special) head.classList.add("special");
    if (col.said) {
      head.dataset.role = col.said.split(" ")[0];
      head.title = col.said;
    }
    if (col.n === spec.at) head.classList.add("at");
    return head;
  }

  function rowHead(spec, row) {
    const head = el("th", "row-head");
    head.scope = "row";
    const line = el("div");
    if (spec.pins) {
      const pin = el("button", "pin icon-only");
      pin.type = "button";
      pin.setAttribute("aria-pressed", String(row.pin));
      pin.setAttribute("aria-label", (row.pin ? "Unpin " : "Pin ") + spec.what + " " + row.id);
      const others = spec.pins.filter((one) => one !== row.id);
      pin.dataset.select = JSON.stringify({ pins: (row.pin ? others : spec.pins.concat(row.id)).join(",") || null });
      pin.append(el("span", "icon icon-pin"));
      line.append(pin);
    }
    if (row.href) {
      const link = el("a", "number", String(row.id));
      link.href = row.href;
      line.append(link);
    }
    const chosen = row.id === spec.row;
    const label = el("button", "row-name");
    label.type = "button";
    label.append(tokenText(row.name));
    label.dir = "auto";
    label.setAttribute("aria-pressed", String(chosen));
    label.dataset.select = JSON.stringify({ [spec.what]: chosen ? null : row.id });
    line.append(label);
    if (row.mark) line.append(el("span", "row-mark", row.mark));
    head.append(line);
    return head;
  }

  function cell(spec, row, place) {
    const value = row.v[place];
    const box = el("td");
    box.tabIndex = -1;
    box.dataset.place = place;
    const share = row.c ? row.c[place] : Math.min(1, Math.abs(value || 0) / (spec.m > 0 ? spec.m : 1));
    if (share > 0) {
      box.dataset.on = spec.k === "effect" ? (value > 0 ? "pos" : "neg") : "act";
      box.style.setProperty("--v", share.toFixed(3));
    }
    const words = row.w ? row.w[place] : number(value);
    if (spec.text) {
      const text = el("span", "cell-text");
      text.dir = "auto";
      text.append(spec.plain ? document.createTextNode(words) : tokenText(words));
      box.append(text);
    } else {
      box.append(el("span", "visually-hidden", value ? words : "–"));
    }
    const col = spec.cols[place];
    if (col.n === spec.at) box.classList.add("at");
    if (col.n === spec.at && row.id === spec.row) box.setAttribute("aria-selected", "true");
    return box;
  }

  function build(box) {
    const source = box.getAttribute("data-grid");
    const known = specs.get(box);
    if (known && known.source === source) return;
    const spec = Object.assign(JSON.parse(source), { source });
    specs.set(box, spec);
    const held = entered && entered.id === box.id ? entered : null;
    entered = null;
    const table = el("table");
    table.setAttribute("role", "grid");
    table.append(el("caption", "visually-hidden", spec.caption));
    const head = el("tr");
    const corner = el("th", "corner", spec.corner);
    corner.scope = "col";
    head.append(corner, ...spec.cols.map((col) => columnHead(spec, col)));
    const top = el("thead");
    top.append(head);
    const body = el("tbody");
    for (const row of spec.rows) {
      const line = el("tr");
      line.dataset.id = row.id;
      if (row.id === spec.row) line.classList.add("chosen");
      if (row.pin) line.classList.add("pinned");
      line.append(rowHead(spec, row), ...spec.cols.map((_, place) => cell(spec, row, place)));
      body.append(line);
    }
    table.append(top, body);
    box.classList.toggle("with-text", Boolean(spec.text));
    box.replaceChildren(table);
    const at = spec.cols.findIndex((col) => col.n === spec.at);
    const first = body.querySelector("tr");
    const entry = (held && at_(body, held)) || body.querySelector("[aria-selected]") || (first && first.children[Math.max(0, at) + 1]);
    if (entry) entry.tabIndex = 0;
    if (held && entry) entry.focus({ preventScroll: true });
    // The page is drawn anew with every choice: what was in sight stays there.
    const place = left.get(box.id);
    if (place && place.first === spec.cols[0].n && place.n === spec.cols.length) box.scrollLeft = place.left;
    else if (at > 0) reveal(box, head.children[at + 1]);
  }
  document.addEventListener("scroll", (event) => {
    const spec = event.target instanceof HTMLElement && specs.get(event.target);
    if (spec) left.set(event.target.id, { first: spec.cols[0].n, n: spec.cols.length, left: event.target.scrollLeft });
  }, { capture: true, passive: true });

  /** Bring a column into the part that is seen, beside the names. */
  function reveal(box, head) {
    const names = box.querySelector(".corner").offsetWidth;
    box.scrollLeft = Math.max(0, head.offsetLeft - names - (box.clientWidth - names) * 0.6);
  }

  function at_(body, where) {
    const line = where && body.children[where.row];
    return line && line.children[where.place + 1];
  }

  function scan(root) {
    if (root.nodeType !== 1) return;
    if (root.matches("[data-grid]")) build(root);
    root.querySelectorAll("[data-grid]").forEach(build);
  }
  new MutationObserver((records) => {
    for (const record of records) {
      if (record.type === "attributes") build(record.target);
      else record.addedNodes.forEach(scan);
    }
  }).observe(document.documentElement, { subtree: true, childList: true, attributes: true, attributeFilter: ["data-grid"] });

  function found(target) {
    const td = target.closest && target.closest(".token-grid td");
    const box = td && td.closest("[data-grid]");
    const spec = box && specs.get(box);
    if (!spec) return null;
    const row = spec.rows.find((one) => String(one.id) === td.parentElement.dataset.id);
    return { td, spec, row, place: Number(td.dataset.place), col: spec.cols[Number(td.dataset.place)] };
  }

  function choose(at) {
    window.scope.select({ [at.spec.token]: at.col.n, [at.spec.what]: at.row.id });
  }

  function card(at) {
    const box = el("div");
    const head = el("div", "tip-head");
    const name = el("span", "tip-token");
    name.append(tokenText(at.spec.text && !at.spec.plain ? at.row.w[at.place] : at.col.t));
    head.append(name, el("span", "tip-value", at.spec.value ? at.spec.value + " " + number(at.row.v[at.place]) : number(at.row.v[at.place])));
    const about = el("div", "tip-from");
    const row = at.spec.what + " " + at.row.id;
    about.append(at.spec.text ? at.spec.near + " " : at.spec.token + " " + at.col.n + " · ");
    if (at.spec.text) about.append(tokenText(at.col.t), " · " + row);
    else about.append((at.col.said ? at.col.said + " · " : "") + row + " ", ...(at.row.name === row ? [] : [tokenText(at.row.name)]));
    box.append(head, about);
    if (at.row.h) box.append(el("div", "tip-rank", at.row.h[at.place]));
    window.scope.tip.showNodes(at.td, box);
  }

  document.addEventListener("click", (event) => {
    const at = found(event.target);
    if (at) choose(at);
  });
  document.addEventListener("mouseover", (event) => {
    const at = found(event.target);
    if (at) card(at);
  });
  document.addEventListener("mouseout", (event) => {
    if (found(event.target) && !(event.relatedTarget && found(event.relatedTarget))) window.scope.tip.leave();
  });
  document.addEventListener("focusin", (event) => {
    const at = found(event.target);
    if (at && at.td.matches(":focus-visible")) card(at);
  });
  document.addEventListener("focusout", (event) => {
    if (found(event.target)) window.scope.tip.leave();
  });

  /* Arrow keys walk over the cells, Enter chooses one. */
  document.addEventListener("keydown", (event) => {
    const at = found(event.target);
    if (!at) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      const box = at.td.closest("[data-grid]");
      entered = { id: box.id, row: Array.from(at.td.closest("tbody").children).indexOf(at.td.parentElement), place: at.place };
      choose(at);
      return;
    }
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -1e6], End: [0, 1e6] };
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const body = at.td.closest("tbody");
    const row = Math.min(body.children.length - 1, Math.max(0, Array.from(body.children).indexOf(at.td.parentElement) + step[0]));
    const place = Math.min(at.spec.cols.length - 1, Math.max(0, at.place + step[1]));
    const next = body.children[row].children[place + 1];
    at.td.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
})();
