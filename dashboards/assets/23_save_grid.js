/* A grid as a file: what the table shows, drawn once, as SVG or as pixels. The colours are those of the page. */
(function () {
  "use strict";

  const SIZE = { cell: 24, line: 24, head: 22, names: 240, font: 12 };
  const pixel = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  pixel.canvas.width = pixel.canvas.height = 1;

  /** A colour as the page computed it, in the form that every program reads. */
  function plain(colour) {
    pixel.clearRect(0, 0, 1, 1);
    pixel.fillStyle = colour;
    pixel.fillRect(0, 0, 1, 1);
    const [red, green, blue, alpha] = pixel.getImageData(0, 0, 1, 1).data;
    if (!alpha) return null;
    return "#" + [red, green, blue].map((one) => one.toString(16).padStart(2, "0")).join("");
  }

  function cut(context, text, width) {
    if (context.measureText(text).width <= width) return text;
    let kept = text;
    while (kept && context.measureText(kept + "…").width > width) kept = kept.slice(0, -1);
    return kept + "…";
  }

  /** Rectangles {x, y, w, h, fill} and texts {x, y, text, fill, turned}. */
  function drawing(box) {
    const table = box.querySelector("table");
    const words = box.classList.contains("with-text");
    const style = getComputedStyle(document.body);
    const ink = plain(style.color);
    const page = plain(style.backgroundColor) || "#ffffff";
    const font = SIZE.font + "px " + style.fontFamily;
    const context = document.createElement("canvas").getContext("2d");
    context.font = font;
    const names = words ? 96 : SIZE.names;
    const wide = words ? 92 : SIZE.cell;
    const heads = Array.from(table.tHead.rows[0].cells).slice(1).map((cell) => cell.textContent);
    const head = words ? SIZE.head : 16 + Math.max(...heads.map((text) => Math.min(110, context.measureText(text).width)));
    const shapes = [];
    heads.forEach((text, place) => {
      const x = names + place * wide;
      if (words) shapes.push({ x: x + 6, y: head - 7, text: cut(context, text, wide - 10), fill: ink });
      else shapes.push({ x: x + wide / 2 + 4, y: head - 6, text: cut(context, text, 110), fill: ink, turned: true });
    });
    Array.from(table.tBodies[0].rows).forEach((row, line) => {
      const y = head + line * SIZE.line;
      const name = Array.from(row.cells[0].querySelectorAll("a, .row-name, .row-mark"), (part) => part.textContent).join("  ");
      shapes.push({ x: 4, y: y + 16, text: cut(context, name, names - 10), fill: ink });
      Array.from(row.cells).slice(1).forEach((cell, place) => {
        const x = names + place * wide;
        const fill = plain(getComputedStyle(cell).backgroundColor) || page;
        shapes.push({ x: x + 0.5, y: y + 0.5, w: wide - 1, h: SIZE.line - 1, fill });
        const text = cell.querySelector(".cell-text");
        if (text) shapes.push({ x: x + 6, y: y + 16, text: cut(context, text.textContent, wide - 10), fill: ink });
      });
    });
    return {
      shapes, page, font, family: style.fontFamily,
      width: names + heads.length * wide + 8,
      height: head + table.tBodies[0].rows.length * SIZE.line + 8,
    };
  }

  function svg({ shapes, page, family, width, height }) {
    const space = "http://www.w3.org/2000/svg";
    const root = document.createElementNS(space, "svg");
    const add = (tag, attributes, text) => {
      const element = document.createElementNS(space, tag);
      for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
      if (text !== undefined) element.textContent = text;
      root.append(element);
    };
    root.setAttribute("viewBox", "0 0 " + width + " " + height);
    root.setAttribute("width", width);
    root.setAttribute("height", height);
    root.setAttribute("font-family", family);
    root.setAttribute("font-size", SIZE.font);
    add("rect", { width, height, fill: page });
    for (const { x, y, w, h, fill, text, turned } of shapes) {
      if (text === undefined) add("rect", { x, y, width: w, height: h, fill });
      else add("text", Object.assign({ x, y, fill, "xml:space": "preserve" }, turned ? { transform: "rotate(-90 " + x + " " + y + ")" } : {}), text);
    }
    return new Blob([new XMLSerializer().serializeToString(root)], { type: "image/svg+xml" });
  }

  function png({ shapes, page, font, width, height }) {
    const scale = Math.min(2, 16000 / Math.max(width, height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.ceil(width * scale);
    canvas.height = Math.ceil(height * scale);
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    context.fillStyle = page;
    context.fillRect(0, 0, width, height);
    context.font = font;
    for (const { x, y, w, h, fill, text, turned } of shapes) {
      context.fillStyle = fill;
      if (text === undefined) { context.fillRect(x, y, w, h); continue; }
      context.save();
      context.translate(x, y);
      if (turned) context.rotate(-Math.PI / 2);
      context.fillText(text, 0, 0);
      context.restore();
    }
    return new Promise((done) => canvas.toBlob(done, "image/png"));
  }

  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-save-grid]");
    if (!button) return;
    const grid = button.closest(".panel").querySelector(".token-grid");
    const kind = button.dataset.saveGrid;
    const drawn = drawing(grid);
    const blob = kind === "svg" ? svg(drawn) : await png(drawn);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = grid.id + "." + kind;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
})();
