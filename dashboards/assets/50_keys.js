/* Keys: whatever carries data-key is clicked by that key; "/" searches, "?" shows all keys, "c" copies the link. */
(function () {
  "use strict";

  function typing(target) {
    return target instanceof HTMLElement && (target.isContentEditable || target.matches("input, textarea, select, [role=combobox]"));
  }

  function help() {
    const dialog = document.getElementById("keys");
    if (!dialog) return;
    if (dialog.open) dialog.close();
    else dialog.showModal();
  }

  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
    if (typing(event.target)) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.target instanceof HTMLElement && event.target.closest("dialog, .ag-root, [role=radiogroup], [role=listbox]")) {
      if (event.key !== "?" && event.key !== "/") return;
    }
    if (event.key === "?") { event.preventDefault(); help(); return; }
    if (document.getElementById("keys")?.open) return;
    if (event.key === "c") { window.scope.copy(location.href, "Link"); return; }
    if (event.key === "/") {
      event.preventDefault();
      const boxes = Array.from(document.querySelectorAll('[data-focus="/"]')).filter((box) => box.checkVisibility({ visibilityProperty: true }));
      if (boxes.length) { boxes[0].focus(); boxes[0].select?.(); }
      else {
        const index = document.querySelector("[data-search]")?.getAttribute("data-index");
        if (index) window.scope.goAndSearch("/features?index=" + encodeURIComponent(index));
      }
      return;
    }
    const target = document.querySelector('[data-key="' + CSS.escape(event.key) + '"]');
    if (target) { event.preventDefault(); target.click(); }
  });

  document.addEventListener("click", (event) => {
    if (event.target.closest("[data-keys]")) help();
    if (event.target.matches("dialog.keys") || event.target.closest("[data-close]")) event.target.closest("dialog")?.close();
    if (event.target.closest(".theme-toggle")) {
      const next = window.scopeTheme.current() === "dark" ? "light" : "dark";
      window.scopeTheme.set(next);
      window.scope.setProps("theme", { forceColorScheme: next });
      window.scope.setProps("theme-now", { data: next });
    }
  });
})();
