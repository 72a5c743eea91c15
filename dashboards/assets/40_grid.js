/* Cells of the feature browser, drawn as React elements (text is data), and the address that follows its state. */
(function () {
  "use strict";
  const { number, oneIn } = window.scope;
  const h = (...all) => window.React.createElement(...all);

  function loading() {
    return h("span", { className: "skeleton loading" });
  }

  function shown(token) {
    return token.replace(/\n/g, "⏎").replace(/\t/g, "⇥").trim() || "␣";
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

  const cells = {
    FeatureLink(props) {
      if (!props.data) return loading();
      const address = "/feature/" + props.data.feature + "?index=" + encodeURIComponent(props.context.index);
      return h("a", { href: address, className: "number" }, props.data.feature);
    },
    Tokens(props) {
      if (!props.data) return loading();
      if (props.data.label) return h("div", { className: "cell-tokens", title: props.data.label }, props.data.label);
      if (props.data.dead) return h("span", { className: "muted small" }, "never fires");
      return tokens(props.data.tokens, "cell-tokens");
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
  const components = (window.dashAgGridComponentFunctions = window.dashAgGridComponentFunctions || {});
  Object.assign(components, cells);

  function grid() {
    try { return window.dash_ag_grid && window.dash_ag_grid.getApi("features-grid"); } catch (error) { return null; }
  }

  /* A click anywhere in a row opens its feature. */
  document.addEventListener("click", (event) => {
    const row = event.target.closest && event.target.closest(".features-grid .ag-row");
    if (!row || event.target.closest("a") || String(getSelection())) return;
    if (event.metaKey || event.ctrlKey) { const link = row.querySelector("a[href]"); if (link) window.open(link.href); return; }
    const link = row.querySelector("a[href]");
    if (link) window.scope.go(link.href);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    const row = event.target.closest && event.target.closest(".features-grid .ag-row");
    const link = row && row.querySelector("a[href]");
    if (link) window.scope.go(link.href);
  });

  /* The order of the grid, in the address. */
  document.addEventListener("click", (event) => {
    if (!event.target.closest || !event.target.closest(".features-grid .ag-header-cell")) return;
    setTimeout(() => {
      const api = grid();
      if (!api) return;
      const sorted = api.getColumnState().filter((column) => column.sort);
      window.scope.refine({ sort: sorted.map((column) => column.colId + ":" + column.sort).join(",") });
    }, 50);
  });

  const clientside = (window.dash_clientside = window.dash_clientside || {});
  clientside.scope = Object.assign(clientside.scope || {}, {
    filterFeatures(text, show, language, source) {
      window.scope.refine({ q: text, show: show === "all" ? null : show, language, source });
      const api = grid();
      if (api) {
        api.ensureIndexVisible(0, "top");
        api.purgeInfiniteCache();
      }
      return window.dash_clientside.no_update;
    },
  });
})();
