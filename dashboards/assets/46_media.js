/* Images and sounds with a feature's strength over them. One arrives as `<div data-medium="JSON">` and is filled here.

   JSON: kind "image" | "audio", src, m end of the scale, places [x0, y0, x1, y1] in fractions of the image or
   [start, end] in seconds, v strengths, n numbers of the soft tokens, c those that are outlined, words for a screen
   reader; of an image w and h in pixels and side, its longest on the page; of a sound s, its seconds. */
(function () {
  "use strict";
  const { el } = window.scope;
  const sources = new WeakMap();
  const percent = (share) => (100 * share).toFixed(3) + "%";
  const short = (value) => Number(value.toPrecision(3)).toLocaleString("en-US", { maximumSignificantDigits: 3 });

  function mark(spec, place, kind) {
    const value = spec.v[place];
    const span = el("span", kind);
    span.style.setProperty("--v", Math.min(1, Math.abs(value) / (spec.m > 0 ? spec.m : 1)).toFixed(3));
    if (spec.k === "effect") span.dataset.on = value > 0 ? "pos" : "neg";
    span.classList.toggle("centre", spec.c.includes(spec.n[place]));
    return [span, value];
  }

  function drawImage(box, spec) {
    const frame = el("div", "medium-frame");
    const image = el("img");
    image.alt = spec.words;
    image.src = spec.src;
    image.loading = "lazy";
    // What is small is shown larger, with its pixels as they are.
    const factor = spec.side / Math.max(spec.w, spec.h);
    frame.style.setProperty("--width", Math.round(spec.w * factor) + "px");
    frame.style.setProperty("--ratio", spec.w + " / " + spec.h);
    if (factor >= 2) image.classList.add("enlarged");
    frame.append(image);
    spec.places.forEach(([x0, y0, x1, y1], place) => {
      const [patch, value] = mark(spec, place, "patch");
      Object.assign(patch.style, { left: percent(x0), top: percent(y0), width: percent(x1 - x0), height: percent(y1 - y0) });
      patch.title = "strength " + short(value) + " · patch " + (spec.n[place] + 1);
      frame.append(patch);
    });
    const toggle = el("button", "button tiny", "Image alone");
    toggle.type = "button";
    toggle.setAttribute("aria-pressed", "false");
    toggle.addEventListener("click", () => toggle.setAttribute("aria-pressed", String(frame.classList.toggle("bare"))));
    image.addEventListener("error", () => frame.replaceWith(el("p", "small muted", "The image could not be shown.")));
    box.append(frame, toggle);
  }

  function drawSound(box, spec) {
    const frame = el("div", "medium-frame");
    frame.setAttribute("role", "img");
    frame.setAttribute("aria-label", spec.words);
    spec.places.forEach(([start, end], place) => {
      const [bar, value] = mark(spec, place, "span-bar");
      Object.assign(bar.style, { left: percent(start / spec.s), width: percent((end - start) / spec.s) });
      bar.title = "strength " + short(value) + " · " + short(start) + " to " + short(end) + " s";
      frame.append(bar);
    });
    const axis = el("div", "medium-axis number");
    for (const share of [0, 0.5, 1]) axis.append(el("span", "", short(spec.s * share) + (share === 1 ? " s" : "")));
    const player = el("audio");
    player.controls = true;
    player.preload = "none";
    player.src = spec.src;
    player.setAttribute("aria-label", "Play the sound");
    const now = el("span", "medium-now");
    now.hidden = true;
    frame.append(now);
    player.addEventListener("timeupdate", () => {
      now.hidden = false;
      now.style.left = percent(Math.min(1, player.currentTime / spec.s));
    });
    box.append(frame, axis, player);
  }

  function build(box) {
    const source = box.getAttribute("data-medium");
    if (sources.get(box) === source) return;
    sources.set(box, source);
    box.textContent = "";
    const spec = JSON.parse(source);
    (spec.kind === "image" ? drawImage : drawSound)(box, spec);
  }

  function scan(root) {
    if (root.nodeType !== 1) return;
    if (root.matches("[data-medium]")) build(root);
    root.querySelectorAll("[data-medium]").forEach(build);
  }

  new MutationObserver((records) => {
    for (const record of records) {
      if (record.type === "attributes") build(record.target);
      else record.addedNodes.forEach(scan);
    }
  }).observe(document.documentElement, { subtree: true, childList: true, attributes: true, attributeFilter: ["data-medium"] });
})();
