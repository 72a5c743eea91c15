/* Cells of the feature browser, drawn as React elements (text is data), and the address that follows its state. */
(function () {
  "use strict";
  const { number, oneIn, setProps, unseen } = window.scope;
  const h = (...all) => window.React.createElement(...all);

  function loading() {
    return h("span", { className: "skeleton loading" });
  }

  function shown(token) {
    return unseen(token) || token.replace(/\n/g, "⏎").replace(/\t/g, "⇥").trim() || "␣";
  }

  function tokens(list, className) {
    const unique = Array.from(new Set(list.map(shown)));
    const parts = [];
    unique.forEach((token, place) => {
      if (place) parts.push(h("span", { className: "sep", key: "s" + place }, "·"));
      parts.push(h("bdi", { key: place }, token));
    });
    return h("div", { className, title: unique.join(" · ") }, parts);
  }

  /** A feature's page, which goes on in the order of this list: the list's query travels with the address. */
  function address(feature, index) {
    const list = new URL(location.href).searchParams;
    list.delete("index");
    const query = new URLSearchParams({ index });
    if (list.toString()) query.set("in", list.toString());
    return "/feature/" + feature + "?" + query.toString();
  }

  const cells = {
    FeatureLink(props) {
      if (!props.data) return loading();
      return h("a", { href: address(props.data.feature, props.context.index), className: "number" }, props.data.feature);
    },
    Tokens(props) {
      if (!props.data) return loading();
      const { label, dead, feature } = props.data;
      const text = label ? h("div", { className: "cell-tokens label", title: label, dir: "auto" }, label)
        : dead ? h("span", { className: "muted small" }, "never fires") : tokens(props.data.tokens, "cell-tokens");
      const edit = h("button", {
        type: "button", className: "edit", title: "Edit the label", "aria-label": "Edit the label of feature " + feature,
        tabIndex: -1,
        // The button goes when the editor comes: were it focused, the grid would take its leaving for the end of editing.
        onMouseDown: (event) => event.preventDefault(),
        onClick: () => {
          props.api.setFocusedCell(props.node.rowIndex, "label");
          setTimeout(() => props.api.startEditingCell({ rowIndex: props.node.rowIndex, colKey: "label" }), 50);
        },
      }, "✎");
      return h("div", { className: "cell-name" }, text, edit);
    },
    Star(props) {
      if (!props.data) return null;
      const on = Boolean(props.data.starred);
      return h("button", {
        type: "button", className: "star" + (on ? " on" : ""), "aria-pressed": String(on),
        title: on ? "Take the star away" : "Star it", "aria-label": "Star feature " + props.data.feature,
        onClick: () => props.node.setDataValue("starred", !on),
      }, h("span", { className: "icon icon-" + (on ? "star-filled" : "star"), "aria-hidden": "true" }));
    },
    Rate(props) {
      if (!props.data) return loading();
      const name = props.colDef.field;
      const value = props.data[name];
      if (value === undefined || value === null) return null;
      const low = props.data[name + "_low"];
      const high = props.data[name + "_high"];
      const words = [value, low, high].map((one) => number(1000 * one));
      const end = Math.max(props.data.rate_a_high || 0, props.data.rate_b_high || 0) || 1;
      return h("div", { className: "cell-rate", title: words[0] + " per 1,000 tokens, 95% interval " + words[1] + " to " + words[2] },
        h("span", { className: "number" }, words[0]),
        h("i", { style: { "--v": value / end, "--low": low / end, "--high": Math.min(1, high / end) } }));
    },
    Share(props) {
      if (!props.data) return loading();
      const value = props.value;
      return h("span", { title: String(value) }, value === null || value === undefined ? "–" : number(100 * value) + "%");
    },
    Logits(props) {
      return props.data ? tokens(props.data.logits, "cell-tokens quiet") : loading();
    },
    Density(props) {
      if (!props.data) return loading();
      const density = props.data.density;
      const share = density > 0 ? Math.max(0.02, 1 + Math.log10(density) / 6) : 0;
      return h("div", { className: "cell-density", title: density + " of tokens" },
        h("span", { className: "number" }, oneIn(density), props.data.over_dense ? h("span", { className: "flag" }, "  over-dense") : null),
        h("i", { style: { "--v": share } }));
    },
    Spark(props) {
      if (!props.data) return loading();
      const bars = props.data.spark;
      if (!bars.length) return null;
      const width = 92 / bars.length;
      const path = bars.map((height, place) => height > 0
        ? "M" + (place * width).toFixed(1) + " 24v-" + Math.max(1, height * 22).toFixed(1) + "h" + (width - 0.6).toFixed(1) + "V24z" : "").join("");
      return h("svg", { className: "cell-spark", viewBox: "0 0 92 24", role: "img", "aria-label": "histogram of strengths" },
        h("path", { d: path, fill: "currentColor" }), h("path", { d: "M0 23.5H92", stroke: "currentColor", strokeOpacity: 0.25 }));
    },
    Number(props) {
      return props.data ? h("span", { title: String(props.value) }, number(props.value)) : loading();
    },
    Plain(props) {
      return props.data ? h("span", {}, props.value || "–") : loading();
    },
  };
  /** The name of a column and its "?"; assets/30_tip.js shows the definition, and keeps the click from sorting. */
  cells.Head = function Head(props) {
    return h("span", { className: "head" }, h("span", { className: "head-name" }, props.displayName), props.define ? h("button", {
      type: "button", className: "define", tabIndex: -1, "aria-label": "What is " + props.define + "?",
      "data-term": props.define, "data-define": props.definition, "data-formula": props.formula,
    }, "?") : null);
  };
  const components = (window.dashAgGridComponentFunctions = window.dashAgGridComponentFunctions || {});
  Object.assign(components, cells);

  function grid() {
    try { return window.dash_ag_grid && window.dash_ag_grid.getApi("features-grid"); } catch (error) { return null; }
  }

  /* A click anywhere in a row opens its feature. */
  document.addEventListener("click", (event) => {
    const row = event.target.closest && event.target.closest(".features-grid .ag-row");
    if (!row || event.target.closest("a, button, input, .ag-cell-inline-editing") || String(getSelection())) return;
    if (event.metaKey || event.ctrlKey) { const link = row.querySelector("a[href]"); if (link) window.open(link.href); return; }
    const link = row.querySelector("a[href]");
    if (link) window.scope.go(link.href);
  });
  /* Rows stay when filters change; the list that their links carry is that of the moment. */
  for (const kind of ["pointerdown", "focusin", "click", "keydown"]) {
    document.addEventListener(kind, (event) => {
      const row = event.target.closest && event.target.closest(".features-grid .ag-row[row-id]");
      const link = row && row.querySelector('a[href^="/feature/"]');
      if (link) link.setAttribute("href", address(row.getAttribute("row-id"), new URL(link.href).searchParams.get("index")));
    }, true);
  }
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.defaultPrevented || event.target.matches("input, button, [col-id=label]")) return;
    const row = event.target.closest && event.target.closest(".features-grid .ag-row");
    const link = row && row.querySelector("a[href]");
    if (link) window.scope.go(link.href);
  });

  /* Enter keeps what was typed into a label. */
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.isComposing || !event.target.closest(".features-grid .ag-cell-inline-editing")) return;
    event.preventDefault();
    event.stopPropagation();
    grid()?.stopEditing();
  }, true);

  /* The order of the grid, in the address. */
  document.addEventListener("click", (event) => {
    if (!event.target.closest || !event.target.closest(".features-grid .ag-header-cell")) return;
    setTimeout(() => {
      const api = grid();
      if (!api) return;
      const sorted = api.getColumnState().filter((column) => column.sort);
      change({ sort: sorted.map((column) => column.colId + ":" + column.sort).join(",") });
    }, 50);
  });

  /** Change what is listed: the address, the copy of it that the server gets, the plot. */
  function change(changes, push) {
    const before = location.search;
    window.scope.refine(changes, push);
    if (location.search === before) return;
    setProps("features-query", { data: Object.fromEntries(new URL(location.href).searchParams) });
    document.dispatchEvent(new CustomEvent("scope:features"));
  }

  /* What is downloaded is what is listed. */
  for (const kind of ["pointerdown", "focusin", "click"]) {
    document.addEventListener(kind, (event) => {
      const link = event.target.closest && event.target.closest("a[data-export]");
      if (!link) return;
      const query = new URL(location.href).searchParams;
      query.delete("index");
      const text = query.toString();
      link.href = "/export/" + encodeURIComponent(link.dataset.index) + "/features." + link.dataset.export + (text ? "?" + text : "");
    }, true);
  }

  /* A row that is pointed at or focused is marked in the plot, a point in the grid. */
  function rowFeature(target) {
    const row = target.closest && target.closest(".features-grid .ag-row[row-id]");
    const id = row ? Number(row.getAttribute("row-id")) : NaN;
    return Number.isFinite(id) ? id : null;
  }
  for (const kind of ["mouseover", "focusin"]) {
    document.addEventListener(kind, (event) => {
      if (document.querySelector(".features-grid") && window.scope.markPoint) window.scope.markPoint(rowFeature(event.target));
    });
  }
  function markRow(feature) {
    document.querySelectorAll(".features-grid .ag-row.at").forEach((row) => row.classList.remove("at"));
    if (feature === null) return;
    document.querySelectorAll('.features-grid .ag-row[row-id="' + feature + '"]').forEach((row) => row.classList.add("at"));
  }

  function densityWords(ends) {
    const box = document.getElementById("features-density-words");
    if (!box) return;
    const [low, high] = ends;
    const any = low <= -6 && high >= 0;
    const from = low <= -6 ? "never" : "1 in " + number(10 ** -low);
    box.textContent = any ? "any" : from + " to " + (high >= 0 ? "every token" : "1 in " + number(10 ** -high));
  }

  function showColumns(columns, contrasts) {
    const api = grid();
    if (!api) return;
    const rates = ["rate_a", "rate_b", "log_ratio", "z"];
    const fixed = ["starred", "feature", "label", "spark", "logits"];
    const narrow = innerWidth < 760;
    const state = api.getColumns().map((column) => column.getColId());
    const spared = contrasts ? ["spark", "logits"] : narrow ? ["logits"] : [];
    const visible = state.filter((id) => rates.includes(id) ? contrasts
      : fixed.includes(id) ? !spared.includes(id) : columns.includes(id));
    api.setColumnsVisible(state.filter((id) => !visible.includes(id)), false);
    api.setColumnsVisible(visible, true);
    api.sizeColumnsToFit();
  }

  const clientside = (window.dash_clientside = window.dash_clientside || {});
  clientside.scope = Object.assign(clientside.scope || {}, {
    /** The inputs of the browser, in the address. */
    filterFeatures(text, show, language, source, kind, starred, list, density, a, b, plot, x, y, colour, columns,
      role, content) {
      const [low, high] = density || [-6, 0];
      const power = (value) => Number((10 ** value).toPrecision(3));
      densityWords([low, high]);
      const now = new URL(location.href).searchParams;
      const axes = {
        x: x === "density" ? null : x, y: y === "max_value" ? null : y, plot: plot === "statistics" ? null : plot,
      };
      const moved = Object.entries(axes).some(([name, value]) => (value || null) !== now.get(name));
      const chosen = columns || [];
      const usual = chosen.length === 3 && ["density", "max_value", "top_language"].every((one) => chosen.includes(one));
      change({
        q: text, show: show === "all" ? null : show, language, source, role, content, kind, list, a, b, colour,
        starred: starred ? "1" : null,
        low: low > -6 ? power(low) : null, high: high < 0 ? power(high) : null,
        cols: usual ? null : chosen.join(","),
        ...axes, ...(moved ? { area: null } : {}),
      });
      showColumns(chosen, Boolean(a));
      return window.dash_clientside.no_update;
    },

    /** The list has changed: its rows are asked for anew. */
    askRows() {
      const api = grid();
      if (api) {
        api.ensureIndexVisible(0, "top");
        api.purgeInfiniteCache();
      }
      return window.dash_clientside.no_update;
    },
  });

  window.scope.features = { change, markRow, address };
})();
