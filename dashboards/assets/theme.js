/* Runs in the head, before anything is drawn: the theme of last time, or the system's. The server is told through a
   cookie, so that figures come in the right colours. */
(function () {
  "use strict";
  const KEY = "mantine-color-scheme-value";
  const root = document.documentElement;

  function apply(scheme) {
    root.setAttribute("data-mantine-color-scheme", scheme);
    document.cookie = "scope_theme=" + scheme + "; path=/; max-age=31536000; samesite=strict";
  }

  let saved = null;
  try { saved = localStorage.getItem(KEY); } catch (error) { /* storage may be off */ }
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  apply(saved === "dark" || saved === "light" ? saved : system);

  window.scopeTheme = {
    current: () => root.getAttribute("data-mantine-color-scheme"),
    set(scheme) {
      try { localStorage.setItem(KEY, scheme); } catch (error) { /* storage may be off */ }
      apply(scheme);
    },
  };
})();
