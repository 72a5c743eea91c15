/* What the other scripts share: elements from text (never from markup), numbers, requests, Dash's properties. */
(function () {
  "use strict";

  /** An element with a class and text. Text is always text: nothing in this folder writes markup. */
  function el(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined && text !== null) element.textContent = text;
    return element;
  }

  /** Three significant digits, as scope.figures.text.short_number writes them. */
  function number(value) {
    if (value === null || value === undefined || !Number.isFinite(value)) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    let text;
    if (size < 1e-3 || size >= 1e7) {
      const [mantissa, exponent] = value.toExponential(2).split("e");
      text = mantissa + "e" + Number(exponent);
    } else if (size >= 999.5) {
      text = Math.round(value).toLocaleString("en-US");
    } else {
      text = value.toFixed(Math.max(0, 2 - Math.floor(Math.log10(size))));
    }
    return text.replace("-", "−");
  }

  function oneIn(share) {
    return share > 0 ? "1 in " + number(1 / share) : "never";
  }

  /* What stands for a character that shows nothing, in a token that has nothing else. */
  const INVISIBLE = {
    "\u00a0": "NBSP", "\u00ad": "SHY", "\u200b": "ZWSP", "\u200c": "ZWNJ", "\u200d": "ZWJ", "\u200e": "LRM", "\u200f": "RLM",
    "\u2028": "LS", "\u2060": "WJ", "\u3000": "␣", "\ufe0e": "VS15", "\ufe0f": "VS16", "\ufeff": "BOM",
  };
  /** The names of a token's characters where it shows nothing, such as the joiner inside an emoji; "" where it does. */
  function unseen(token) {
    const [, text, share] = token.match(/^([^]*?)( [⁰¹²³⁴⁵⁶⁷⁸⁹]+⁄[₀₁₂₃₄₅₆₇₈₉]+)?$/);
    const inner = Array.from(text.replace(/^ +| +$/g, ""));
    const hidden = inner.length && inner.every((one) => one in INVISIBLE);
    return hidden ? inner.map((one) => INVISIBLE[one]).join("") + (share || "") : "";
  }

  /** Text with a circle in front that bears a combining mark which has nothing else to stand on. */
  function borne(text, alone) {
    return alone.test(text) ? "◌" + text : text;
  }

  /** A token with its blanks and line breaks drawn, as nodes: for places where they would be lost. */
  function tokenText(token) {
    const box = el("span", "token-text");
    const names = unseen(token);
    if (names) {
      box.append(el("span", "blank", "␣".repeat(token.match(/^ */)[0].length) + names));
      return box;
    }
    for (const part of token.split(/(^ +| +$|[\n\t\r])/)) {
      if (!part) continue;
      const drawn = { "\n": "⏎", "\t": "⇥", "\r": "␍" }[part] || (/^ +$/.test(part) ? "␣".repeat(part.length) : null);
      box.append(drawn ? el("span", "blank", drawn) : document.createTextNode(borne(part, /^\p{M}/u)));
    }
    return box;
  }

  async function getJson(path, query) {
    const url = new URL(path, location.href);
    for (const [name, value] of Object.entries(query)) url.searchParams.set(name, value);
    const response = await fetch(url, { headers: { Accept: "application/json" } });
    const body = await response.json();
    if (!response.ok) throw new Error(body.error || response.statusText);
    return body;
  }

  function setProps(id, props) {
    window.dash_clientside.set_props(id, props);
  }

  let toastTimer;
  function toast(text) {
    let box = document.getElementById("toast");
    if (!box) {
      box = el("div", "toast");
      box.id = "toast";
      box.setAttribute("role", "status");
      document.body.append(box);
    }
    box.textContent = text;
    box.hidden = false;
    clearTimeout(toastTimer);
    toastTimer = setTimeout(() => { box.hidden = true; }, 2400);
  }

  async function copy(text, what) {
    try {
      await navigator.clipboard.writeText(text);
      toast(what + " copied");
    } catch (error) {
      toast("The browser does not allow copying here");
    }
  }

  /** A choice that outlives the visit. */
  function remember(name, value) {
    try { localStorage.setItem("scope-" + name, value); } catch (error) { /* storage may be off */ }
  }
  function recall(name) {
    try { return localStorage.getItem("scope-" + name); } catch (error) { return null; }
  }

  /* When the server is gone, whatever was asked of it says so. */
  const plainFetch = window.fetch.bind(window);
  window.fetch = async (...request) => {
    try {
      const answer = await plainFetch(...request);
      if (answer.status === 401) {
        document.body.classList.remove("navigating");
        toast("This dashboard does not know you any more. Open a link that scope serve has printed.");
      }
      return answer;
    } catch (error) {
      if (error instanceof TypeError) {
        document.body.classList.remove("navigating");
        toast("The dashboard does not answer. Is scope serve still running?");
      }
      throw error;
    }
  };

  window.scope = { el, number, oneIn, tokenText, borne, unseen, getJson, setProps, toast, copy, remember, recall };
})();
