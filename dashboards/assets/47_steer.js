/* Interventions: the sliders of the steering page, whose places go into the address; a feature that is ablated. */
(function () {
  "use strict";
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
