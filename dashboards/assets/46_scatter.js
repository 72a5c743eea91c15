/* The scatter plot of the feature browser, on a canvas: WebGL libraries compile code at run time, which the page's
   content security policy forbids, and SVG is too slow for 65,536 points.

   `<div class="scatter" data-scatter='{"index", "umap"}'>` is drawn from the address: x, y, colour, plot, area, and the
   filters of the list, which say which points stand out. Dragging selects an area (a box or a lasso), which becomes a
   filter; pointing at a point names it, a click opens it. */
(function () {
  "use strict";
  const { el, number, getJson, go } = window.scope;
  const EDGE = { left: 58, right: 12, top: 10, bottom: 44 };
  const STEPS = [1, 2, 5];
  let tool = window.scope.recall("scatter-tool") === "lasso" ? "lasso" : "box";
  let current = null;

  function array(text, type) {
    const raw = atob(text);
    const bytes = new Uint8Array(raw.length);
    for (let at = 0; at < raw.length; at++) bytes[at] = raw.charCodeAt(at);
    return new type(bytes.buffer);
  }

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue("--scope-" + name).trim();
  }

  /* --- axes ---------------------------------------------------------------------------------------------------- */

  function superscript(power) {
    return String(power).replace(/./g, (sign) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(sign)]);
  }

  function ticks(low, high, log, room) {
    if (log) {
      const first = Math.ceil(low - 1e-9);
      const last = Math.floor(high + 1e-9);
      const step = Math.max(1, Math.ceil((last - first + 1) / Math.max(2, room)));
      const found = [];
      for (let power = first; power <= last; power += step) {
        const text = power >= -3 && power <= 5 ? number(10 ** power).replace(/\.00$/, "") : "10" + superscript(power);
        found.push({ at: power, text: power >= -3 && power < 0 ? String(10 ** power) : text.replace(/\.0+$/, "") });
      }
      if (found.length > 1) return found;
      const between = [];
      for (let power = Math.floor(low); power <= high; power++) {
        for (const one of [1, 1.5, 2, 3, 5, 7]) between.push(Number((one * 10 ** power).toPrecision(2)));
      }
      const inside = between.filter((one) => Math.log10(one) >= low && Math.log10(one) <= high);
      const every = Math.ceil(inside.length / Math.max(2, room));
      return inside.filter((_, n) => n % every === 0).map((one) => ({ at: Math.log10(one), text: number(one).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "") }));
    }
    const rough = (high - low) / Math.max(2, room);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = STEPS.map((one) => one * power).find((one) => one >= rough) || 10 * power;
    const found = [];
    for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) {
      found.push({ at: value, text: number(Math.abs(value) < step * 1e-6 ? 0 : Number(value.toPrecision(12))).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "") });
    }
    return found;
  }

  function range(values) {
    let low = Infinity;
    let high = -Infinity;
    for (const value of values) { if (value < low) low = value; if (value > high) high = value; }
    if (!(high >= low)) return [0, 1];
    const room = (high - low) * 0.04 || Math.abs(high) * 0.1 || 1;
    return [low - room, high + room];
  }

  /* --- one plot ------------------------------------------------------------------------------------------------ */

  function start(box) {
    const { index, umap } = JSON.parse(box.dataset.scatter);
    const part = box.closest(".plot-part");
    const note = part.querySelector(".scatter-note");
    const canvas = el("canvas");
    canvas.setAttribute("role", "img");
    const legend = el("div", "scatter-legend");
    const tip = el("div", "tip scatter-tip");
    tip.hidden = true;
    box.append(canvas, tip);
    box.after(legend);
    const plot = { box, canvas, data: null, kept: null, marked: null, path: null, key: "", names: new Map() };

    const query = () => Object.fromEntries(new URL(location.href).searchParams);
    const kind = () => query().plot || "statistics";
    const off = () => kind() === "none" || (kind() === "umap" && !umap);

    function wanted() {
      const now = query();
      const axes = kind() === "umap" ? { x: "umap_x", y: "umap_y" } : { x: now.x || "density", y: now.y || "max_value" };
      return { index, ...axes, colour: now.colour || "" };
    }

    async function loadPoints() {
      const asked = wanted();
      const key = JSON.stringify(asked);
      if (key === plot.key) return;
      plot.key = key;
      const found = await getJson("/api/points", asked);
      if (plot.key !== key) return;
      plot.data = {
        feature: array(found.feature, Uint32Array), x: array(found.x, Float32Array), y: array(found.y, Float32Array),
        axes: found.axes, n: found.n, drawable: found.n_drawable, total: found.d_sae, colour: found.colour || null,
      };
      const paint = plot.data.colour;
      if (paint) paint.own = paint.codes ? array(paint.codes, Uint8Array) : array(paint.values, Float32Array);
      plot.ranges = [range(plot.data.x), range(plot.data.y)];
    }

    async function loadKept() {
      const now = query();
      const filters = ["q", "show", "language", "source", "role", "content", "kind", "starred", "list", "low", "high", "a", "b", "area"];
      if (!filters.some((name) => now[name])) { plot.kept = null; plot.keptKey = ""; return; }
      const key = location.search;
      plot.keptKey = key;
      const found = await getJson("/api/kept", { ...now, index });
      if (plot.keptKey === key) plot.kept = array(found.bits, Uint8Array);
    }

    async function refresh() {
      part.dataset.plot = kind();
      box.classList.toggle("off", off());
      part.querySelector("[data-clear-area]").hidden = !query().area;
      if (off()) { plot.data = null; plot.key = ""; note.textContent = ""; legend.textContent = ""; draw(); return; }
      try {
        await Promise.all([loadPoints(), loadKept()]);
        say();
      } catch (error) {
        note.textContent = error.message;
      }
      draw();
    }

    function say() {
      const data = plot.data;
      if (!data) return;
      const words = (n) => n.toLocaleString("en-US");
      const missing = data.total - data.drawable;
      const parts = [data.n < data.drawable ? "a sample of " + words(data.n) + " of " + words(data.drawable) + " features" : words(data.n) + " features"];
      if (missing) parts.push(words(missing) + " without a place on these axes");
      note.textContent = parts.join(", ");
      canvas.setAttribute("aria-label", data.axes[1].title + " against " + data.axes[0].title + ", one point per feature: " + note.textContent);
      legend.textContent = "";
      const paint = data.colour;
      if (!paint) return;
      legend.append(el("span", "muted", paint.title));
      if (paint.groups) paint.groups.forEach((name, code) => {
        const item = el("span", "key", name);
        item.style.setProperty("--key", "var(--scope-category-" + (code + 1) + ")");
        legend.append(item);
      });
      else {
        const ends = paint.ends.map((end) => number(paint.log ? 10 ** end : end));
        legend.append(el("span", "number", ends[0]), el("span", "ramp"), el("span", "number", ends[1]));
      }
    }

    /* --- drawing: `pen` has the methods of a canvas that are used here; one that writes SVG stands in for it -------- */

    function place() {
      const width = canvas.clientWidth;
      const height = canvas.clientHeight;
      const [[x0, x1], [y0, y1]] = plot.ranges;
      return {
        width, height,
        x: (value) => EDGE.left + (value - x0) / (x1 - x0) * (width - EDGE.left - EDGE.right),
        y: (value) => height - EDGE.bottom - (value - y0) / (y1 - y0) * (height - EDGE.top - EDGE.bottom),
        backX: (pixel) => x0 + (pixel - EDGE.left) / (width - EDGE.left - EDGE.right) * (x1 - x0),
        backY: (pixel) => y0 + (height - EDGE.bottom - pixel) / (height - EDGE.top - EDGE.bottom) * (y1 - y0),
      };
    }

    const isKept = (feature) => !plot.kept || Boolean(plot.kept[feature >> 3] & (1 << (feature & 7)));

    function brushes() {
      const paint = plot.data.colour;
      if (!paint) return { of: () => 0, colours: [colour("accent-text")] };
      if (paint.groups) return { of: (n) => paint.own[n], colours: paint.groups.map((_, code) => colour("category-" + (code + 1))) };
      const [low, high] = paint.ends;
      const steps = 12;
      const colours = Array.from({ length: steps }, (_, step) =>
        "color-mix(in oklab, " + colour("accent-text") + " " + Math.round(20 + 80 * step / (steps - 1)) + "%, " + colour("page") + ")");
      return {
        of: (n) => Number.isFinite(paint.own[n]) ? Math.min(steps - 1, Math.max(0, Math.floor((paint.own[n] - low) / (high - low || 1) * steps))) : 0,
        colours,
      };
    }

    function paint(pen, at) {
      const data = plot.data;
      pen.font = "12px " + getComputedStyle(document.body).fontFamily;
      axes(pen, at);
      const { of, colours } = brushes();
      const sorted = colours.map(() => []);
      const faded = [];
      for (let n = 0; n < data.n; n++) (isKept(data.feature[n]) ? sorted[of(n)] : faded).push(n);
      const size = data.n > 20000 ? 2 : data.n > 5000 ? 2.5 : 3.5;
      const dots = (list, radius) => {
        for (const n of list) pen.fillRect(at.x(data.x[n]) - radius / 2, at.y(data.y[n]) - radius / 2, radius, radius);
      };
      pen.globalAlpha = 0.28;
      pen.fillStyle = colour("muted");
      dots(faded, Math.max(1.5, size - 1));
      pen.globalAlpha = plot.kept ? 0.9 : 0.62;
      colours.forEach((one, code) => { pen.fillStyle = one; dots(sorted[code], size); });
      pen.globalAlpha = 1;
    }

    function axes(pen, at) {
      const data = plot.data;
      const right = at.width - EDGE.right;
      const bottom = at.height - EDGE.bottom;
      pen.strokeStyle = colour("rule");
      pen.lineWidth = 1;
      line(pen, EDGE.left, bottom, right, bottom);
      line(pen, EDGE.left, EDGE.top, EDGE.left, bottom);
      pen.fillStyle = colour("muted");
      if (kind() !== "umap") {
        pen.textAlign = "center";
        for (const tick of ticks(...plot.ranges[0], data.axes[0].log, (right - EDGE.left) / 90)) {
          line(pen, at.x(tick.at), bottom, at.x(tick.at), bottom + 4);
          pen.fillText(tick.text, at.x(tick.at), bottom + 17);
        }
        pen.textAlign = "right";
        for (const tick of ticks(...plot.ranges[1], data.axes[1].log, (bottom - EDGE.top) / 50)) {
          line(pen, EDGE.left - 4, at.y(tick.at), EDGE.left, at.y(tick.at));
          pen.fillText(tick.text, EDGE.left - 7, at.y(tick.at) + 4);
        }
      }
      pen.textAlign = "center";
      pen.fillText(data.axes[0].title, (EDGE.left + right) / 2, at.height - 8);
      pen.save();
      pen.translate(12, (EDGE.top + bottom) / 2);
      pen.rotate(-Math.PI / 2);
      pen.fillText(data.axes[1].title, 0, 0);
      pen.restore();
    }

    function line(pen, x0, y0, x1, y1) {
      pen.beginPath();
      pen.moveTo(x0, y0);
      pen.lineTo(x1, y1);
      pen.stroke();
    }

    function corners() {
      const text = query().area || "";
      const [shape, rest] = text.split(":");
      if (!rest) return null;
      if (shape === "box") {
        const [x0, x1, y0, y1] = rest.split(",").map(Number);
        return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]];
      }
      return rest.split(";").map((one) => one.split(",").map(Number));
    }

    function outline(pen, points) {
      if (!points || points.length < 2) return;
      pen.beginPath();
      points.forEach(([x, y], n) => (n ? pen.lineTo(x, y) : pen.moveTo(x, y)));
      pen.closePath();
      pen.strokeStyle = colour("text");
      pen.lineWidth = 1.25;
      pen.stroke();
    }

    let picture = null;

    function draw() {
      const ratio = devicePixelRatio || 1;
      const [width, height] = [canvas.clientWidth, canvas.clientHeight];
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      const pen = canvas.getContext("2d");
      pen.scale(ratio, ratio);
      picture = null;
      if (!plot.data || !width) return;
      paint(pen, place());
      picture = document.createElement("canvas");
      picture.width = canvas.width;
      picture.height = canvas.height;
      if (canvas.width && canvas.height) picture.getContext("2d").drawImage(canvas, 0, 0);
      over();
    }

    /** What changes under the pointer, over the points that do not. */
    function over() {
      if (!picture || !plot.data) return;
      const ratio = devicePixelRatio || 1;
      const pen = canvas.getContext("2d");
      pen.setTransform(1, 0, 0, 1, 0, 0);
      pen.clearRect(0, 0, canvas.width, canvas.height);
      pen.drawImage(picture, 0, 0);
      pen.scale(ratio, ratio);
      const at = place();
      const scale = (value, log) => (log ? Math.log10(value) : value);
      const fixed = corners();
      outline(pen, plot.path || (fixed && fixed.map(([x, y]) => [at.x(scale(x, plot.data.axes[0].log)), at.y(scale(y, plot.data.axes[1].log))])));
      const n = plot.marked === null ? -1 : find(plot.marked);
      if (n >= 0) {
        pen.beginPath();
        pen.arc(at.x(plot.data.x[n]), at.y(plot.data.y[n]), 7, 0, 7);
        pen.strokeStyle = colour("text");
        pen.lineWidth = 2;
        pen.stroke();
      }
    }

    function find(feature) {
      let low = 0;
      let high = plot.data.n - 1;
      while (low <= high) {
        const middle = (low + high) >> 1;
        const own = plot.data.feature[middle];
        if (own === feature) return middle;
        if (own < feature) low = middle + 1; else high = middle - 1;
      }
      return -1;
    }

    function nearest(x, y) {
      const at = place();
      let best = -1;
      let distance = 14 * 14;
      for (let n = 0; n < plot.data.n; n++) {
        const dx = at.x(plot.data.x[n]) - x;
        const dy = at.y(plot.data.y[n]) - y;
        const penalty = isKept(plot.data.feature[n]) ? 0 : 60;
        const own = dx * dx + dy * dy + penalty;
        if (own < distance) { distance = own; best = n; }
      }
      return best;
    }

    /* --- pointing ------------------------------------------------------------------------------------------------ */

    let timer = null;
    function hover(n, x, y) {
      clearTimeout(timer);
      const feature = n < 0 ? null : plot.data.feature[n];
      canvas.style.cursor = n < 0 ? "crosshair" : "pointer";
      plot.marked = feature;
      window.scope.features.markRow(feature);
      over();
      if (n < 0) { tip.hidden = true; return; }
      const shown = (value, axis) => axis.title + " " + number(axis.log ? 10 ** value : value);
      const name = el("div", "", plot.names.get(feature) || " ");
      name.setAttribute("dir", "auto");
      tip.replaceChildren(el("div", "tip-token", "Feature " + feature), name);
      if (kind() !== "umap") tip.append(el("div", "tip-from", shown(plot.data.x[n], plot.data.axes[0])), el("div", "tip-from", shown(plot.data.y[n], plot.data.axes[1])));
      tip.hidden = false;
      const rect = canvas.getBoundingClientRect();
      const left = Math.min(rect.left + x + 14, document.documentElement.clientWidth - tip.offsetWidth - 8);
      tip.style.left = Math.max(8, left) + "px";
      tip.style.top = Math.min(rect.top + y + 14, innerHeight - tip.offsetHeight - 8) + "px";
      if (!plot.names.has(feature)) timer = setTimeout(async () => {
        const found = await getJson("/api/name", { index, feature });
        plot.names.set(feature, found.name || "never fires");
        if (plot.marked === feature) name.textContent = plot.names.get(feature);
      }, 90);
    }

    const where = (event) => {
      const rect = canvas.getBoundingClientRect();
      return [event.clientX - rect.left, event.clientY - rect.top];
    };
    let from = null;
    canvas.addEventListener("pointerdown", (event) => {
      if (!plot.data || event.button) return;
      from = where(event);
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!plot.data) return;
      const [x, y] = where(event);
      if (!from) { hover(nearest(x, y), x, y); return; }
      if (!plot.path && Math.hypot(x - from[0], y - from[1]) < 5) return;
      hover(-1);
      if (tool === "box") plot.path = [from, [x, from[1]], [x, y], [from[0], y]];
      else {
        plot.path = plot.path || [from];
        const last = plot.path[plot.path.length - 1];
        if (Math.hypot(x - last[0], y - last[1]) >= 5) plot.path.push([x, y]);
      }
      over();
    });
    function stop() { from = null; plot.path = null; over(); }
    canvas.addEventListener("pointercancel", stop);
    canvas.addEventListener("pointerleave", () => { if (!from && plot.data) hover(-1); });
    canvas.addEventListener("pointerup", (event) => {
      if (!plot.data || !from) return;
      const path = plot.path;
      stop();
      if (path) { if (path.length >= 3) select(path); return; }
      const n = nearest(...where(event));
      if (n >= 0) go(window.scope.features.address(plot.data.feature[n], index));
      else window.scope.features.change({ area: null }, true);
    });

    function select(path) {
      const at = place();
      const value = (scaled, log) => Number((log ? 10 ** scaled : scaled).toPrecision(4));
      const [logX, logY] = plot.data.axes.map((axis) => axis.log);
      const step = Math.max(1, Math.ceil(path.length / 60));
      const points = path.filter((_, n) => n % step === 0).map(([x, y]) => [value(at.backX(x), logX), value(at.backY(y), logY)]);
      const xs = points.map((one) => one[0]);
      const ys = points.map((one) => one[1]);
      const area = tool === "box"
        ? "box:" + [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)].join(",")
        : "lasso:" + points.map((one) => one.join(",")).join(";");
      window.scope.features.change({ area }, true);
    }

    /* --- files ----------------------------------------------------------------------------------------------------- */

    function svg() {
      const at = place();
      const shapes = [];
      const text = (words) => words.replace(/&/g, "&amp;").replace(/</g, "&lt;");
      let trail = [];
      const state = [];
      const pen = {
        globalAlpha: 1, fillStyle: "", strokeStyle: "", lineWidth: 1, textAlign: "left", font: "", turn: "",
        fillRect(x, y, w, h) { shapes.push('<rect x="' + x.toFixed(1) + '" y="' + y.toFixed(1) + '" width="' + w + '" height="' + h + '" fill="' + this.fillStyle + '" opacity="' + this.globalAlpha + '"/>'); },
        fillText(words, x, y) {
          const anchor = { center: "middle", right: "end", left: "start" }[this.textAlign];
          shapes.push('<text x="' + x.toFixed(1) + '" y="' + y.toFixed(1) + '" fill="' + this.fillStyle + '" text-anchor="' + anchor + '" font-size="12" font-family="sans-serif"' + (this.turn ? ' transform="' + this.turn + '"' : "") + ">" + text(words) + "</text>");
        },
        beginPath() { trail = []; }, moveTo(x, y) { trail.push("M" + x.toFixed(1) + " " + y.toFixed(1)); }, lineTo(x, y) { trail.push("L" + x.toFixed(1) + " " + y.toFixed(1)); },
        stroke() { shapes.push('<path d="' + trail.join("") + '" fill="none" stroke="' + this.strokeStyle + '" stroke-width="' + this.lineWidth + '"/>'); },
        save() { state.push(this.turn); }, restore() { this.turn = state.pop(); },
        translate(x, y) { this.turn += "translate(" + x + " " + y + ") "; }, rotate(angle) { this.turn += "rotate(" + (angle * 180 / Math.PI).toFixed(0) + ") "; },
      };
      paint(pen, at);
      const ground = '<rect width="100%" height="100%" fill="' + colour("page") + '"/>';
      return '<svg xmlns="http://www.w3.org/2000/svg" width="' + at.width + '" height="' + at.height + '">' + ground + shapes.join("") + "</svg>";
    }

    async function save(format) {
      if (!plot.data) return;
      let file;
      if (format === "svg") file = new Blob([svg()], { type: "image/svg+xml" });
      else {
        const solid = document.createElement("canvas");
        solid.width = canvas.width;
        solid.height = canvas.height;
        const pen = solid.getContext("2d");
        pen.fillStyle = colour("page");
        pen.fillRect(0, 0, solid.width, solid.height);
        pen.drawImage(canvas, 0, 0);
        file = await new Promise((done) => solid.toBlob(done, "image/png"));
      }
      const link = el("a");
      link.href = URL.createObjectURL(file);
      link.download = "features-" + wanted().y + "-against-" + wanted().x + "." + format;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    }

    Object.assign(plot, { refresh, draw, over, save, part });
    new ResizeObserver(() => draw()).observe(box);
    part.querySelectorAll("[data-tool]").forEach((one) => one.setAttribute("aria-pressed", String(one.dataset.tool === tool)));
    current = plot;
    refresh();
  }

  /* --- what is the same for every plot ------------------------------------------------------------------------------ */

  document.addEventListener("scope:features", () => { if (current && current.box.isConnected) current.refresh(); });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-tool], [data-clear-area], [data-save-scatter]");
    if (!button || !current) return;
    if (button.dataset.tool) {
      tool = button.dataset.tool;
      window.scope.remember("scatter-tool", tool);
      current.part.querySelectorAll("[data-tool]").forEach((one) => one.setAttribute("aria-pressed", String(one.dataset.tool === tool)));
    } else if (button.dataset.saveScatter) current.save(button.dataset.saveScatter);
    else window.scope.features.change({ area: null }, true);
  });
  window.scope.markPoint = (feature) => {
    if (!current || !current.box.isConnected || current.marked === feature || current.box.matches(":hover")) return;
    current.marked = feature;
    current.over();
  };
  new MutationObserver(() => { if (current && current.box.isConnected) current.draw(); })
    .observe(document.documentElement, { attributes: true, attributeFilter: ["data-mantine-color-scheme"] });
  new MutationObserver((records) => {
    for (const record of records) record.addedNodes.forEach((node) => {
      if (node.nodeType !== 1) return;
      const box = node.matches("[data-scatter]") ? node : node.querySelector("[data-scatter]");
      if (box) start(box);
    });
  }).observe(document.documentElement, { subtree: true, childList: true });
})();
