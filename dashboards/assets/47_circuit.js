/* A circuit graph as a picture: columns are token positions, rows are layers, what is written comes from below.

   Plain SVG: each node is an element that a keyboard and a screen reader reach, and the picture is a file as it stands.
   `window.scope.circuit.picture(data, options)` lays it out and draws it; assets/49_circuit_page.js does what happens on
   it. `data` is what /api/circuit answers. */
(function () {
  "use strict";
  const { number } = window.scope;
  const SPACE = "http://www.w3.org/2000/svg";
  const SIZE = { axis: 44, gap: 3, line: 17, pad: 7, empty: 9, least: 30, cap: 70, foot: 24, right: 10, font: 11.5, label: 150 };
  /* Edges that are drawn at once, at most: more are a blur. */
  const DRAWN = 700;
  const measure = document.createElement("canvas").getContext("2d");

  function shape(tag, attributes, parent) {
    const element = document.createElementNS(SPACE, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (parent) parent.append(element);
    return element;
  }

  function words(text, attributes, parent) {
    const element = shape("text", attributes, parent);
    element.textContent = text;
    return element;
  }

  /** A token on one line. */
  function token(text) {
    const plain = String(text).replace(/\n/g, "⏎").replace(/\t/g, "⇥");
    return plain.trim() ? plain.trim() : "␣".repeat(plain.length);
  }

  function widthOf(text) {
    measure.font = SIZE.font + "px " + getComputedStyle(document.body).fontFamily;
    return measure.measureText(text).width;
  }

  function cut(text, width) {
    if (widthOf(text) <= width) return text;
    const letters = Array.from(text);
    while (letters.length && widthOf(letters.join("") + "…") > width) letters.pop();
    return letters.length ? letters.join("") + "…" : "";
  }

  function median(values) {
    const sorted = values.slice().sort((a, b) => a - b);
    return sorted[Math.floor(sorted.length / 2)];
  }

  const rowOf = (nodes, n, layers) => nodes.kind[n] === "logit" ? layers + 1 : nodes.kind[n] === "embedding" ? 0 : nodes.layer[n] + 1;

  /** What is drawn: nodes by themselves and supernodes. key, kind, row, column, text, members (numbers of nodes). */
  function itemsOf(data, hidden) {
    const { nodes } = data;
    const place = new Map(nodes.id.map((id, n) => [id, n]));
    const grouped = new Map();
    const items = [];
    for (const [name, ...ids] of data.supernodes) {
      const members = ids.map((id) => place.get(id)).filter((n) => n !== undefined && !hidden.has(nodes.id[n]));
      if (!members.length) continue;
      for (const n of members) grouped.set(n, items.length);
      items.push({
        key: "group:" + name, kind: "group", text: cut(name, SIZE.label), name, members,
        row: median(members.map((n) => rowOf(nodes, n, data.n_layers))), column: median(members.map((n) => nodes.position[n])),
        influence: Math.max(...members.map((n) => nodes.influence[n] || 0)), holds: null,
      });
    }
    const most = Math.max(1e-12, ...nodes.id.map((_, n) => (nodes.kind[n] === "logit" ? 0 : nodes.influence[n] || 0)));
    nodes.id.forEach((id, n) => {
      if (grouped.has(n) || hidden.has(id)) return;
      const text = nodes.kind[n] === "logit" ? cut(token(nodes.label[n]), 90) + " " + number(100 * nodes.probability[n]) + "%" : "";
      grouped.set(n, items.length);
      items.push({
        key: id, kind: nodes.kind[n], text, members: [n], row: rowOf(nodes, n, data.n_layers), column: nodes.position[n],
        influence: nodes.influence[n] || 0, radius: 3.4 + 3.4 * Math.sqrt((nodes.influence[n] || 0) / most), holds: nodes.holds[n],
      });
    });
    for (const item of items) item.width = item.text ? widthOf(item.text) + 14 : 2 * (item.radius || 5) + 1;
    return { items, of: grouped };
  }

  /** Edges between items, those with the most influence first; edges within a supernode are gone, others added up. */
  function edgesOf(data, items, of) {
    const { source, target, weight, holds } = data.edges;
    const found = new Map();
    source.forEach((from, n) => {
      const s = of.get(from);
      const t = of.get(target[n]);
      if (s === undefined || t === undefined || s === t) return;
      const key = s * items.length + t;
      const known = found.get(key);
      const single = items[s].members.length === 1 && items[t].members.length === 1;
      if (known) { known.weight += weight[n]; known.holds = null; }
      else found.set(key, { source: s, target: t, weight: weight[n], holds: single ? holds[n] : null });
    });
    return Array.from(found.values());
  }

  /** Widths of columns: as wide as their fullest row if all fit, else cut back to a common limit. */
  function columnWidths(items, n, top, available) {
    const cells = new Map();
    for (const item of items) {
      if (item.row === top) continue;
      const key = item.row * n + item.column;
      cells.set(key, (cells.get(key) || 2 * SIZE.pad) + item.width + SIZE.gap);
    }
    const wanted = Array.from({ length: n }, () => SIZE.least);
    for (const [key, width] of cells) wanted[key % n] = Math.max(wanted[key % n], width);
    const total = (limit) => wanted.reduce((sum, width) => sum + Math.min(width, limit), 0);
    let limit = Math.max(...wanted);
    if (total(limit) > available) {
      let low = SIZE.cap;
      for (let n = 0; n < 24; n += 1) {
        const middle = (low + limit) / 2;
        if (total(middle) > available) limit = middle; else low = middle;
      }
      limit = low;
    }
    const widths = wanted.map((width) => Math.min(width, limit));
    const spare = available - widths.reduce((a, b) => a + b, 0);
    return widths.map((width) => width + Math.max(0, spare) / n);
  }

  /** Give every item x and y. */
  function layout(data, items, available) {
    const n = data.tokens.length;
    const top = data.n_layers + 1;
    const widths = columnWidths(items, n, top, available - SIZE.axis - SIZE.right);
    const starts = widths.reduce((found, width) => found.concat(found[found.length - 1] + width), [SIZE.axis]);
    const width = starts[n] + SIZE.right;
    const rows = Array.from({ length: top + 1 }, () => ({ lines: 0, cells: new Map() }));
    for (const item of items) {
      const cells = rows[item.row].cells;
      const column = item.row === top ? -1 : item.column;
      if (!cells.has(column)) cells.set(column, []);
      cells.get(column).push(item);
    }
    for (const row of rows) {
      for (const [column, cell] of row.cells) {
        const room = column < 0 ? width - SIZE.axis - SIZE.right : widths[column] - SIZE.pad;
        let line = 0;
        let used = 0;
        for (const item of cell) {
          if (used && used + item.width > room) { line += 1; used = 0; }
          item.line = line;
          item.offset = used;
          used += item.width + SIZE.gap;
        }
        row.lines = Math.max(row.lines, line + 1);
        for (let at = 0; at <= line; at += 1) {
          const own = cell.filter((item) => item.line === at);
          const full = own[own.length - 1].offset + own[own.length - 1].width;
          const left = column < 0 ? starts[n] - full : starts[column] + (widths[column] - full) / 2;
          for (const item of own) item.x = left + item.offset + item.width / 2;
        }
      }
    }
    let y = 4;
    for (const row of rows.slice().reverse()) {
      row.height = row.lines ? row.lines * SIZE.line + SIZE.pad : SIZE.empty;
      row.y = y;
      for (const cell of row.cells.values()) for (const item of cell) item.y = y + SIZE.pad / 2 + SIZE.line * (row.lines - item.line - 0.5);
      y += row.height;
    }
    return { width, height: y + SIZE.foot, body: y, rows, starts, widths, top };
  }

  function backdrop(svg, data, plan) {
    const lines = shape("g", { class: "rules", "aria-hidden": "true" }, svg);
    plan.rows.forEach((row) => shape("line", { x1: SIZE.axis, x2: plan.width, y1: row.y + row.height, y2: row.y + row.height }, lines));
    const tokens = shape("g", { class: "tokens", "aria-hidden": "true" }, svg);
    data.tokens.forEach((text, n) => {
      if (n) shape("line", { x1: plan.starts[n], x2: plan.starts[n], y1: 0, y2: plan.body }, tokens);
      const label = words(cut(token(text), plan.widths[n] - 4), {
        x: plan.starts[n] + plan.widths[n] / 2, y: plan.body + 16, "text-anchor": "middle", "font-size": SIZE.font }, tokens);
      shape("title", {}, label).textContent = text;
    });
  }

  /** Names of the rows, which stay in sight while the picture scrolls sideways. */
  function axis(svg, plan) {
    const box = shape("g", { class: "axis", "aria-hidden": "true" }, svg);
    shape("rect", { x: 0, y: 0, width: SIZE.axis - 2, height: plan.height }, box);
    plan.rows.forEach((row, n) => {
      if (!row.lines) return;
      const name = n === plan.top ? "logits" : n === 0 ? "input" : "L" + (n - 1);
      words(name, { x: SIZE.axis - 8, y: row.y + row.height / 2 + 4, "text-anchor": "end", "font-size": SIZE.font }, box);
    });
    return box;
  }

  function path(from, to) {
    const a = from.y - 5;
    const b = to.y + 5;
    const bend = Math.max(12, Math.abs(a - b) * 0.45);
    const f = (value) => value.toFixed(1);
    return "M" + f(from.x) + " " + f(a) + "C" + f(from.x) + " " + f(a - bend) + " " + f(to.x) + " " + f(b + bend) + " " + f(to.x) + " " + f(b);
  }

  function edge(one, items, most, parent) {
    const names = ["edge", one.weight < 0 ? "negative" : "positive"];
    if (one.holds === false) names.push("fails");
    return shape("path", {
      class: names.join(" "), d: path(items[one.source], items[one.target]),
      "stroke-width": (0.5 + 3.5 * Math.pow(Math.abs(one.weight) / most, 0.6)).toFixed(2),
    }, parent);
  }

  function mark(item, parent) {
    const r = item.radius || 5;
    if (item.text) return shape("rect", { x: item.x - item.width / 2, y: item.y - 7.5, width: item.width, height: 15, rx: item.kind === "group" ? 7.5 : 3 }, parent);
    if (item.kind === "feature") return shape("circle", { cx: item.x, cy: item.y, r }, parent);
    if (item.kind === "error") return shape("path", { d: "M" + item.x + " " + (item.y - r) + "l" + r + " " + r + "l" + -r + " " + r + "l" + -r + " " + -r + "z" }, parent);
    if (item.kind === "intervention") return shape("path", { d: "M" + item.x + " " + (item.y - r) + "l" + r + " " + 2 * r + "h" + -2 * r + "z" }, parent);
    return shape("rect", { x: item.x - r, y: item.y - r, width: 2 * r, height: 2 * r, rx: 1 }, parent);
  }

  function node(item, n, describe, parent) {
    const names = ["node", "kind-" + item.kind];
    if (item.holds === false) names.push("fails");
    const box = shape("g", { class: names.join(" "), role: "option", "aria-label": describe(item), "aria-selected": "false", "data-node": item.key }, parent);
    box.id = "circuit-node-" + n;
    // More to aim at than the mark, and not as much as would cover a neighbour.
    shape("circle", { class: "target", cx: item.x, cy: item.y, r: 7 }, box);
    mark(item, box);
    if (item.text) words(item.text, { x: item.x, y: item.y + 4, "text-anchor": "middle", "font-size": SIZE.font }, box);
    return box;
  }

  /** Draw a graph. options: hidden (Set of ids), width (pixels), describe (item -> words for a screen reader). */
  function picture(data, options) {
    const { items, of } = itemsOf(data, options.hidden);
    const edges = edgesOf(data, items, of);
    const plan = layout(data, items, options.width);
    const svg = shape("svg", {
      class: "circuit-svg", width: plan.width, height: plan.height, viewBox: "0 0 " + plan.width + " " + plan.height,
      role: "listbox", tabindex: "0", "aria-label": options.label,
    });
    backdrop(svg, data, plan);
    const most = edges.reduce((found, one) => Math.max(found, Math.abs(one.weight)), 1e-12);
    const drawn = shape("g", { class: "edges", "aria-hidden": "true" }, svg);
    edges.slice(0, DRAWN).reverse().forEach((one) => edge(one, items, most, drawn));
    const near = shape("g", { class: "near-edges", "aria-hidden": "true" }, svg);
    const marks = items.map((item, n) => node(item, n, options.describe, svg));
    const names = axis(svg, plan);
    return {
      svg, items, edges, marks, near, names, plan, drawn: Math.min(DRAWN, edges.length),
      byKey: new Map(items.map((item, n) => [item.key, n])),
      drawNear(list) { near.replaceChildren(); list.forEach((one) => edge(one, items, most, near)); },
    };
  }

  /* --- as a file ------------------------------------------------------------------------------------------------- */

  const COPIED = ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-weight"];

  /** The picture with its colours written into it. */
  function standalone(svg) {
    const pixel = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    pixel.canvas.width = pixel.canvas.height = 1;
    const plain = new Map();
    const colour = (value) => {
      if (value === "none") return value;
      if (!plain.has(value)) {
        pixel.clearRect(0, 0, 1, 1);
        pixel.fillStyle = value;
        pixel.fillRect(0, 0, 1, 1);
        const [red, green, blue, alpha] = pixel.getImageData(0, 0, 1, 1).data;
        plain.set(value, alpha ? "#" + [red, green, blue].map((one) => one.toString(16).padStart(2, "0")).join("") : "none");
      }
      return plain.get(value);
    };
    const copy = svg.cloneNode(true);
    const pairs = [[svg, copy]];
    const gone = [];
    while (pairs.length) {
      const [from, to] = pairs.pop();
      const style = getComputedStyle(from);
      if (style.display === "none" || from.matches(".target")) { gone.push(to); continue; }
      for (const name of COPIED) {
        const value = style.getPropertyValue(name);
        to.setAttribute(name, name === "fill" || name === "stroke" ? colour(value) : value);
      }
      for (const name of ["class", "role", "tabindex", "id", "aria-label", "aria-selected", "aria-hidden", "aria-activedescendant", "data-node", "transform"]) to.removeAttribute(name);
      Array.from(from.children).forEach((child, n) => pairs.push([child, to.children[n]]));
    }
    gone.forEach((one) => one.remove());
    copy.setAttribute("xmlns", SPACE);
    copy.setAttribute("font-family", getComputedStyle(document.body).fontFamily);
    const page = shape("rect", { width: svg.getAttribute("width"), height: svg.getAttribute("height"), fill: colour(getComputedStyle(document.body).backgroundColor) });
    copy.prepend(page);
    return new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" });
  }

  async function pixels(svg) {
    const address = URL.createObjectURL(standalone(svg));
    try {
      const image = new Image();
      image.src = address;
      await image.decode();
      const width = Number(svg.getAttribute("width"));
      const height = Number(svg.getAttribute("height"));
      const scale = Math.min(2, 16000 / Math.max(width, height));
      const canvas = document.createElement("canvas");
      canvas.width = Math.ceil(width * scale);
      canvas.height = Math.ceil(height * scale);
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      return await new Promise((done) => canvas.toBlob(done, "image/png"));
    } finally {
      URL.revokeObjectURL(address);
    }
  }

  async function save(svg, kind, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(kind === "png" ? await pixels(svg) : standalone(svg));
    link.download = name + "." + kind;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  window.scope.circuit = { picture, save, token };
})();
