/* The forms of the prompt page and the logit lens: a text or a chat with its tools, one prompt or two beside each other.

   `.prompt-form` holds one `.prompt-editor` per prompt (data-suffix "" or "2"): a text area, `.turns` (data-turns JSON
   [[role, content, calls, further fields], …], the last two JSON or ""), `.chat-tools` (data-tools JSON) and
   `.chat-paste`, which are filled here. What stands in the fields counts when Run is pressed: Dash may not have heard of
   the last keystrokes yet. */
(function () {
  "use strict";
  const { el, setProps } = window.scope;
  const ROLES = ["user", "assistant", "system", "tool"];
  const SPEAKERS = { human: "user", gpt: "assistant", observation: "tool" };
  const CALL = '[{"name": "…", "arguments": {}}]';

  function area(name, label, value, rows) {
    const text = el("textarea", name);
    text.setAttribute("aria-label", label);
    text.rows = rows;
    text.spellcheck = false;
    text.value = value;
    const grow = () => { text.style.height = "auto"; text.style.height = Math.min(240, text.scrollHeight + 2) + "px"; };
    text.addEventListener("input", grow);
    requestAnimationFrame(grow);
    return text;
  }

  function turn(role, content, calls, more) {
    const line = el("div", "turn-line");
    const select = el("select", "turn-role");
    select.setAttribute("aria-label", "Role");
    for (const one of ROLES.includes(role) ? ROLES : ROLES.concat(role)) {
      const option = el("option", "", one);
      option.selected = one === role;
      select.append(option);
    }
    const text = area("turn-text", "What is said", content, 1);
    text.dir = "auto";
    const called = area("turn-calls", "Calls, as JSON", calls || "", 2);
    called.placeholder = CALL;
    const add = el("button", "button tiny turn-add-call", "Add a call");
    add.type = "button";
    add.addEventListener("click", () => { line.classList.add("calls"); called.focus(); });
    const remove = el("button", "button icon-only tiny", "×");
    remove.type = "button";
    remove.setAttribute("aria-label", "Remove this turn");
    remove.addEventListener("click", () => line.remove());
    select.addEventListener("change", () => { line.dataset.role = select.value; });
    line.dataset.role = role;
    line.dataset.more = more || "";
    line.classList.toggle("calls", Boolean(calls));
    line.append(select, text, remove, called, add);
    return line;
  }

  function fill(box) {
    if (box.dataset.filled === box.dataset.turns) return;
    box.dataset.filled = box.dataset.turns;
    box.replaceChildren(...JSON.parse(box.dataset.turns).map((one) => turn(...one)));
  }

  /** The field for the tools, open where there are any, and the one for a conversation that is pasted. */
  function fillJson(box) {
    if (box.dataset.filled === (box.dataset.tools || "-")) return;
    box.dataset.filled = box.dataset.tools || "-";
    const pasted = "paste" in box.dataset;
    const text = area("chat-json", pasted ? "A conversation, as JSON" : "Tools, as JSON", pasted ? "" : box.dataset.tools, 4);
    text.placeholder = pasted
      ? '{"messages": [{"role": "user", "content": "…"}], "tools": []}'
      : '[{"type": "function", "function": {"name": "…", "parameters": {}}}]';
    box.replaceChildren(text);
    if (pasted) {
      const use = el("button", "button tiny", "Use it");
      use.type = "button";
      use.dataset.usePasted = "true";
      box.append(use);
    } else if (box.dataset.tools) open(box, true);
  }

  function open(box, on) {
    box.classList.toggle("open", on);
    const kind = "paste" in box.dataset ? "paste" : "tools";
    box.closest(".chat-editor")?.querySelector(`[data-chat-open=${kind}]`)?.setAttribute("aria-expanded", String(on));
  }

  function say(editor, words, field) {
    editor.querySelectorAll("[aria-invalid]").forEach((one) => one.removeAttribute("aria-invalid"));
    editor.querySelector(".chat-problem").textContent = words;
    if (field) {
      field.setAttribute("aria-invalid", "true");
      field.focus();
    }
  }

  /** What stands in a field as JSON, a list; throws what is to be said about it. */
  function listIn(field, what) {
    const text = field.value.trim();
    if (!text) return [];
    let value;
    try { value = JSON.parse(text); } catch (problem) { throw { field, words: what + " cannot be read as JSON: " + problem.message }; }
    if (value === null || typeof value !== "object") throw { field, words: what + " should be a list of objects." };
    return Array.isArray(value) ? value : [value];
  }

  /** A pasted conversation: a list of messages, or an object with messages and tools. */
  function paste(editor) {
    const field = editor.querySelector(".chat-paste textarea");
    try {
      const value = JSON.parse(field.value);
      const messages = Array.isArray(value) ? value : value && value.messages;
      if (!Array.isArray(messages) || !messages.length) throw new Error("expected a list of messages, or an object with messages");
      const lines = messages.map((one) => {
        const pair = Array.isArray(one) ? { role: one[0], content: one[1] } : one;
        if (!pair || typeof pair !== "object" || !(pair.role || pair.from)) throw new Error("expected messages with role and content");
        const role = pair.role || SPEAKERS[pair.from] || pair.from;
        const said = "content" in pair ? pair.content : pair.value;
        const parts = Array.isArray(said) && said.every((part) => part && typeof part.text === "string");
        const content = said == null ? "" : parts ? said.map((part) => part.text).join("") : typeof said === "string" ? said : JSON.stringify(said);
        const calls = pair.tool_calls || (pair.function_call ? [pair.function_call] : null);
        const known = ["role", "content", "from", "value", "tool_calls", "function_call"];
        const more = Object.fromEntries(Object.entries(pair).filter(([name, own]) => !known.includes(name) && typeof own === "string"));
        return turn(String(role), content, calls ? JSON.stringify(calls) : "", Object.keys(more).length ? JSON.stringify(more) : "");
      });
      editor.querySelector(".turns").replaceChildren(...lines);
      const tools = editor.querySelector(".chat-tools");
      const given = !Array.isArray(value) && value.tools;
      tools.querySelector("textarea").value = given ? (typeof given === "string" ? given : JSON.stringify(given, null, 1)) : "";
      open(tools, Boolean(given && given.length));
      say(editor, "");
      field.value = "";
      open(editor.querySelector(".chat-paste"), false);
    } catch (problem) {
      say(editor, "This is no conversation: " + problem.message + ".", field);
    }
  }

  function scan(root) {
    if (root.nodeType !== 1) return;
    for (const [name, put] of [["[data-turns]", fill], ["[data-tools], [data-paste]", fillJson]]) {
      if (root.matches(name)) put(root);
      root.querySelectorAll(name).forEach(put);
    }
    root.querySelectorAll(".prompt-files input[type=file]").forEach((input) => input.setAttribute("aria-label", "An image or a sound"));
  }
  new MutationObserver((records) => records.forEach((record) => record.addedNodes.forEach(scan))).observe(
    document.documentElement, { subtree: true, childList: true });

  /** The turns of a form, as they go into an address: pairs where there is nothing else to say. Throws as `listIn`. */
  function said(editor) {
    const turns = [];
    let plain = true;
    editor.querySelectorAll(".turn-line").forEach((line, n) => {
      const [role, content] = [line.querySelector("select").value, line.querySelector(".turn-text").value];
      const calls = role === "assistant" ? listIn(line.querySelector(".turn-calls"), "The calls of turn " + (n + 1)) : [];
      if (!content && !calls.length) return;
      plain = plain && !calls.length && !line.dataset.more;
      turns.push(Object.assign({ role, content }, calls.length ? { tool_calls: calls } : {}, JSON.parse(line.dataset.more || "{}")));
    });
    const tools = listIn(editor.querySelector(".chat-tools textarea"), "The tools");
    if (!turns.length) return "";
    return JSON.stringify(plain && !tools.length ? turns.map((one) => [one.role, one.content]) : Object.assign({ messages: turns }, tools.length ? { tools } : {}));
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
      const lines = first.querySelectorAll(".turn-line");
      second.querySelector(".turns").append(...Array.from(lines, (line) => turn(
        line.querySelector("select").value, line.querySelector(".turn-text").value, line.querySelector(".turn-calls").value, line.dataset.more)));
      const tools = first.querySelector(".chat-tools textarea").value;
      second.querySelector(".chat-tools textarea").value = tools;
      open(second.querySelector(".chat-tools"), Boolean(tools));
    }
  }

  /** The prompts as they stand in the form, as names of the address; null where one can't be read, which is said. */
  function prompts(form) {
    const chat = form.classList.contains("as-chat");
    const compared = form.classList.contains("compared");
    const names = {};
    for (const editor of form.querySelectorAll(".prompt-editor")) {
      const suffix = editor.dataset.suffix;
      const used = !suffix || compared;
      try {
        names["chat" + suffix] = (used && chat && said(editor)) || null;
        say(editor, "");
      } catch (problem) {
        if (!problem.words) throw problem;
        say(editor, problem.words, problem.field);
        return null;
      }
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
    const opener = event.target.closest("[data-chat-open]");
    if (opener) {
      const box = opener.closest(".chat-editor").querySelector(opener.dataset.chatOpen === "paste" ? ".chat-paste" : ".chat-tools");
      open(box, !box.classList.contains("open"));
      if (box.classList.contains("open")) box.querySelector("textarea").focus();
    }
    const removed = event.target.closest("[data-remove-file]");
    if (removed) {
      const left = Array.from(document.querySelectorAll("[data-remove-file]")).filter((one) => one !== removed);
      setProps("prompt-files", { data: left.map((one) => [one.dataset.removeFile, one.querySelector("bdi").textContent]) });
    }
    if (event.target.closest("[data-use-pasted]")) paste(event.target.closest(".chat-editor"));
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
    runPrompt(clicks, request, files) {
      const nothing = window.dash_clientside.no_update;
      if (!clicks || !request) return [nothing, nothing];
      const form = document.querySelector(".prompt-form");
      const asked = prompts(form);
      if (!asked) return [nothing, nothing];
      const media = (files || []).map(([digest]) => digest).join(",") || null;
      const names = Object.assign({ window: null, media }, asked, sample);
      sample = null;
      const changed = Object.entries(names).some(([name, value]) => (request[name] || null) !== (value || null));
      const gone = changed ? { token: null, token2: null, at: null, from: null, columns: null } : {};
      window.scope.refine(Object.assign({}, names, gone), true);
      const query = Object.fromEntries(new URL(location.href).searchParams);
      const given = Object.fromEntries(Object.entries(names).filter(([, value]) => value));
      return [Object.assign({ index: request.index, run: (request.run || 0) + 1 }, given), query];
    },

    /** A typed token has been found. */
    chooseTyped(found) {
      if (found) window.scope.select(found);
      return window.dash_clientside.no_update;
    },
  });
})();
