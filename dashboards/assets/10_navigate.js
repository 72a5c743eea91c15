/* Addresses. The address is the state of a page: links are followed without reloading (Dash draws the view that
   `#view` asks for), a change within a page rewrites the address, back and forward draw what it says. */
(function () {
  "use strict";
  const { setProps, copy } = window.scope;
  let visits = 0;
  let answered = 0;
  let scrollTo = 0;
  let focusMain = false;

  history.scrollRestoration = "manual";

  function view() {
    visits += 1;
    return { path: location.pathname, search: location.search, visit: visits };
  }

  function draw() {
    document.body.classList.add("navigating");
    setProps("view", { data: view() });
  }

  /** Go to an address of this dashboard. */
  function go(address, stay) {
    history.replaceState({ scroll: window.scrollY }, "");
    scrollTo = stay ? window.scrollY : 0;
    history.pushState({ scroll: scrollTo }, "", address);
    focusMain = !stay;
    draw();
  }

  /** Rewrite the query of the address without drawing anything: null takes a name out. */
  function refine(changes, push) {
    const url = new URL(location.href);
    for (const [name, value] of Object.entries(changes)) {
      if (value === null || value === undefined || value === "") url.searchParams.delete(name);
      else url.searchParams.set(name, value);
    }
    if (url.href === location.href) return;
    if (push) {
      history.replaceState({ scroll: window.scrollY }, "");
      history.pushState({ scroll: window.scrollY }, "", url);
    } else {
      history.replaceState(history.state, "", url);
    }
  }

  window.addEventListener("popstate", (event) => {
    scrollTo = (event.state && event.state.scroll) || 0;
    draw();
  });

  document.addEventListener("click", (event) => {
    if (event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    const link = event.target.closest("a[href]");
    if (!link || link.target || link.hasAttribute("download")) return;
    const url = new URL(link.href);
    if (url.origin !== location.origin || (url.hash && url.pathname === location.pathname)) return;
    event.preventDefault();
    const now = new URL(location.href).searchParams;
    for (const name of (link.dataset.carry || "").split(" ")) {
      if (name && now.has(name) && now.get(name) !== "band") url.searchParams.set(name, now.get(name));
    }
    go(url.href, link.hasAttribute("data-stay"));
  });

  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-copy], [data-copy-link]");
    if (!button) return;
    if (button.hasAttribute("data-copy-link")) copy(location.href, "Link");
    else copy(button.getAttribute("data-copy"), "Text");
  });

  Object.assign(window.scope, { go, refine });

  /* Charts come by way of Plotly, which Dash fetches with the first of them and gives up after 30 seconds. It is fetched
     once the first page stands and nothing else is to be done. */
  function preparePlotly() {
    const url = window._dashPlotlyJSURL;
    if (!url || window.Plotly || Array.from(document.scripts).some((script) => script.getAttribute("src") === url)) return;
    const script = document.createElement("script");
    script.src = url;
    script.async = true;
    document.body.append(script);
  }

  const clientside = (window.dash_clientside = window.dash_clientside || {});
  clientside.scope = Object.assign(clientside.scope || {}, {
    /** The first view, once the layout stands. */
    start: () => view(),

    /** After a view has been drawn: where to scroll, what the window is called. */
    drawn(children, about) {
      if (about && about.visit < visits) {
        // A later visit has overtaken this one. Where it has been answered before, its page has just been replaced.
        if (answered === visits) draw();
        return window.dash_clientside.no_update;
      }
      answered = visits;
      if (visits === 1) (window.requestIdleCallback || setTimeout)(preparePlotly);
      document.body.classList.remove("navigating");
      document.title = (about && about.title) || "Scope";
      document.body.dataset.page = (about && about.page) || "";
      if (about && about.address) history.replaceState(history.state, "", about.address);
      for (const link of document.querySelectorAll(".rail a[data-page]")) {
        if (about && link.dataset.page === about.rail) link.setAttribute("aria-current", "page");
        else link.removeAttribute("aria-current");
        if (link.dataset.withIndex && about && about.index) {
          const url = new URL(link.href);
          url.searchParams.set("index", about.index);
          link.setAttribute("href", url.pathname + url.search);
        }
      }
      requestAnimationFrame(() => {
        window.scrollTo(0, scrollTo);
        if (focusMain) document.getElementById("page").focus({ preventScroll: true });
        focusMain = false;
        if (recallFocus) document.querySelector('[data-focus="/"]')?.focus();
        recallFocus = false;
      });
      return window.dash_clientside.no_update;
    },

    /** Something failed that has no place of its own on the page. */
    showTrouble(trouble) {
      if (trouble) window.scope.toast(trouble.text);
      return window.dash_clientside.no_update;
    },

    /** Two dictionaries to compare: the same page, about these. */
    compareSides(a, b) {
      const current = new URL(location.href);
      if (current.pathname !== "/compare") return window.dash_clientside.no_update;
      const asked = { a: a || null, b: b || null };
      if (["a", "b"].every((name) => current.searchParams.get(name) === asked[name])) return window.dash_clientside.no_update;
      if (a && b) {
        for (const [name, value] of Object.entries(asked)) current.searchParams.set(name, value);
        go(current.href);
      } else {
        refine(asked);
      }
      return window.dash_clientside.no_update;
    },

    /** Another index: the same page, about that one. */
    switchIndex(index) {
      const current = new URL(location.href);
      if (!index || current.searchParams.get("index") === index) return window.dash_clientside.no_update;
      const page = /^\/(prompt|lens|steer|model|embeddings|experts)/.test(current.pathname) ? current : new URL("/features", location.href);
      page.searchParams.set("index", index);
      for (const name of ["feature", "target", "pins", "push", "store", "expert", "do", "other", "window"]) page.searchParams.delete(name);
      go(page.href);
      return window.dash_clientside.no_update;
    },
  });

  let recallFocus = false;
  /** Go somewhere and put the cursor into its search box. */
  window.scope.goAndSearch = (address) => { recallFocus = true; go(address); };

  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !event.target.matches("[data-search]")) return;
    const text = event.target.value.trim();
    const index = event.target.getAttribute("data-index");
    if (!text || !index) return;
    const address = /^\d+$/.test(text) ? new URL("/feature/" + text, location.href) : new URL("/features", location.href);
    address.searchParams.set("index", index);
    if (!/^\d+$/.test(text)) address.searchParams.set("q", text);
    event.target.value = "";
    go(address.href);
  });
})();
