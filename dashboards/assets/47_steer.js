/* Interventions: the sliders of the steering page, whose places go into the address; a feature that is ablated. */
(function () {
  "use strict";

  /* A feature more, or one less: the others stay where their sliders are by now. */
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-push], [data-unpush]");
    if (!button) return;
    const feature = button.dataset.push || button.dataset.unpush;
    const now = (new URL(location.href).searchParams.get("push") || "").split(",");
    const pushes = now.filter((one) => one && Number(one.split(":")[0]) !== Number(feature));
    if (button.dataset.push) pushes.push(feature + ":1");
    window.scope.select({ push: pushes.join(",") || null, named: null });
  });

  const clientside = (window.dash_clientside = window.dash_clientside || {});
  clientside.scope = Object.assign(clientside.scope || {}, {
    /** The effect of ablating a feature is asked for: that is part of the address. */
    askAblation(clicks) {
      if (!clicks) return window.dash_clientside.no_update;
      window.scope.refine({ ablate: "1" });
      return { ask: clicks + 1 };
    },

    /** How far each feature is pushed, in words; and into the address where that has changed. */
    pushed(times, ids) {
      const said = times.map((value) => (value > 0 ? "+" : "") + window.scope.number(value) + " ×");
      const text = ids.map((id, place) => id.feature + ":" + times[place]).join(",");
      const before = new URL(location.href).searchParams.get("push") || "";
      const numbers = (some) => some.split(",").map((part) => part.split(":").map(Number).join(":")).join(",");
      if (ids.length && before && numbers(before) !== numbers(text)) window.scope.select({ push: text });
      return said;
    },
  });
})();
