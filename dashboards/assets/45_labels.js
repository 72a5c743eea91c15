/* A label that was saved shows wherever the page names the feature. */
(function () {
  "use strict";

  const clientside = (window.dash_clientside = window.dash_clientside || {});
  clientside.scope = Object.assign(clientside.scope || {}, {
    labelSaid(said) {
      if (!said) return clientside.no_update;
      for (const shown of document.querySelectorAll('[data-label-of="' + CSS.escape(said.of) + '"]')) {
        shown.textContent = said.label || shown.dataset.labelElse || "";
      }
      const id = { of: said.of, part: "label-text" };
      const box = document.getElementById(JSON.stringify(id));
      if (box && said.label !== said.typed && box.value === said.typed) window.scope.setProps(id, { value: said.label });
      document.dispatchEvent(new CustomEvent("scope:label", { detail: said }));
      return clientside.no_update;
    },
  });

  /* Enter saves a label; a line break has no place in it. */
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.isComposing || !(event.target instanceof HTMLTextAreaElement)) return;
    if (event.target.closest(".label-panel") && event.target.id.includes("label-text")) event.preventDefault();
  });
})();
