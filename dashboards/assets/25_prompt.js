/* The forms of the prompt page and the logit lens: a text or the turns of a chat, one prompt or two beside each other.

   `.prompt-form` holds one `.prompt-editor` per prompt (data-suffix "" or "2"): a text area, and `.turns` (data-turns
   JSON [[role, content], …]), which is filled here. What stands in the fields counts when Run is pressed: Dash may not
   have heard of the last keystrokes yet. */
(function () {
  "use strict";
  const { el, setProps } = window.scope;
  const ROLES = ["user", "assistant", "system"];

  function turn(role, content) {
    const line = el("div", "turn-line");
    const select = el("select", "turn-role");
    select.setAttribute("aria-label", "Role");
    for (const one of ROLES.includes(role) ? ROLES : ROLES.concat(role)) {
      const option = el("option", "", one);
      option.selected = one === role;
      select.append(option);
    }
    const text = el("textarea", "turn-text");
    text.setAttribute("aria-label", "What is said");
    text.rows = 1;
    text.dir = "auto";
    text.spellcheck = false;
    text.value = content;
    const grow = () => { text.style.height = "auto"; text.style.height = Math.min(240, text.scrollHeight + 2) + "px"; };
    text.addEventListener("input", grow);
    requestAnimationFrame(grow);
    const remove = el("button", "button icon-only tiny", "×");
    remove.type = "button";
    remove.setAttribute("aria-label", "Remove this turn");
    remove.addEventListener("click", () => line.remove());
    line.append(select, text, remove);
    return line;
  }

  function fill(box) {
    if (box.dataset.filled === box.dataset.turns) return;
    box.dataset.filled = box.dataset.turns;
    box.replaceChildren(...JSON.parse(box.dataset.turns).map(([role, content]) => turn(role, content)));
  }

  function scan(root) {
    if (root.nodeType !== 1) return;
    if (root.matches("[data-turns]")) fill(root);
    root.querySelectorAll("[data-turns]").forEach(fill);
  }
  new MutationObserver((records) => records.forEach((record) => record.addedNodes.forEach(scan))).observe(
    document.documentElement, { subtree: true, childList: true });

  function said(editor) {
    return Array.from(editor.querySelectorAll(".turn-line"), (line) => [
      line.querySelector("select").value, line.querySelector("textarea").value]);
  }

  function lastRole(box) {
    const roles = box.querySelectorAll("select");
    return roles.length ? roles[roles.length - 1].value : "assistant";
  }

  function setMode(form, chat) {
    form.classList.toggle("as-chat", chat);
    for (const button of form.querySelectorAll("[data-mode]")) {
      button.setAttribute("aria-pressed", String((button.dataset.mode === "chat") === chat));
    }
    if (!chat) return;
    for (const editor of form.querySelectorAll(".prompt-editor")) {
      const turns = editor.querySelector(".turns");
      if (!turns.children.length) turns.append(turn("user", editor.querySelector(".prompt-text textarea").value));
    }
  }

  function setCompared(form, on) {
    form.classList.toggle("compared", on);
    form.querySelector("[data-compare]")?.setAttribute("aria-pressed", String(on));
    const [first, second] = form.querySelectorAll(".prompt-editor");
    const text = second && second.querySelector(".prompt-text textarea");
    if (on && text && !text.value) {
      setProps(text.id, { value: first.querySelector(".prompt-text textarea").value });
      text.focus();
    }
    if (on && form.classList.contains("as-chat") && second && !second.querySelector(".turn-line")) {
      second.querySelector(".turns").append(...said(first).map(([role, content]) => turn(role, content)));
    }
  }

  /** The prompts as they stand in the form, as names of the address. */
  function prompts(form) {
    const chat = form.classList.contains("as-chat");
    const compared = form.classList.contains("compared");
    const names = {};
    for (const editor of form.querySelectorAll(".prompt-editor")) {
      const suffix = editor.dataset.suffix;
      const used = !suffix || compared;
      const turns = said(editor).filter(([, content]) => content);
      names["chat" + suffix] = used && chat && turns.length ? JSON.stringify(turns) : null;
      names["text" + suffix] = used && !chat ? editor.querySelector(".prompt-text textarea").value || null : null;
    }
    return names;
  }

  let sample = null;
  document.addEventListener("click", (event) => {
    const form = event.target.closest(".prompt-form");
    const mode = event.target.closest("[data-mode]");
    if (form && mode) setMode(form, mode.dataset.mode === "chat");
    const compare = event.target.closest("[data-compare]");
    if (form && compare) {
      setCompared(form, !form.classList.contains("compared"));
      if (!form.classList.contains("compared")) document.querySelector("[data-run]")?.click();
    }
    const add = event.target.closest("[data-add-turn]");
    if (add) {
      const turns = add.closest(".prompt-editor").querySelector(".turns");
      turns.append(turn(lastRole(turns) === "user" ? "assistant" : "user", ""));
      turns.lastChild.querySelector("textarea").focus();
    }
    const chosen = event.target.closest("[data-sample]");
    if (chosen) {
      const page = document.querySelector(".prompt-form");
      sample = { text: chosen.dataset.sample, text2: chosen.dataset.sample2 || null };
      setMode(page, false);
      setProps(page.querySelector(".prompt-text textarea").id, { value: sample.text });
      if (sample.text2) {
        page.classList.add("compared");
        setProps(page.querySelectorAll(".prompt-text textarea")[1].id, { value: sample.text2 });
      }
      document.querySelector("[data-run]")?.click();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.matches("textarea")) {
      event.preventDefault();
      document.querySelector("[data-run]")?.click();
    }
  });

  const clientside = (window.dash_clientside = window.dash_clientside || {});
  clientside.scope = Object.assign(clientside.scope || {}, {
    /** Run: the prompts go into the address; tokens that were selected in the old ones are let go. */
    runPrompt(clicks, request) {
      const nothing = window.dash_clientside.no_update;
      if (!clicks || !request) return [nothing, nothing];
      const form = document.querySelector(".prompt-form");
      const names = Object.assign(prompts(form), sample);
      sample = null;
      const changed = Object.entries(names).some(([name, value]) => (request[name] || null) !== (value || null));
      const gone = changed ? { token: null, token2: null, at: null, from: null, columns: null } : {};
      window.scope.refine(Object.assign({}, names, gone), true);
      const query = Object.fromEntries(new URL(location.href).searchParams);
      const asked = Object.fromEntries(Object.entries(names).filter(([, value]) => value));
      return [Object.assign({ index: request.index, run: (request.run || 0) + 1 }, asked), query];
    },

    /** A typed token has been found. */
    chooseTyped(found) {
      if (found) window.scope.select(found);
      return window.dash_clientside.no_update;
    },
  });
})();
