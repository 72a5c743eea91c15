/* Fields whose text Enter sends, or the button that names the field ([data-sends]), to the store that the field names
   ([data-typing]): as {text, at}. What stands in the field counts: Dash may not have heard of the last keys yet.

   Such a field is drawn anew with its part of the page when an answer comes. What one is typing stays in it, and the
   focus too; what has been sent goes. */
(function () {
  "use strict";
  const { setProps } = window.scope;
  const kept = new Map(); // by id: the field, the text not sent yet, whether it has the focus
  const setValue = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value").set;

  function of(field) {
    if (!(field instanceof HTMLInputElement) || !field.matches("[data-typing]")) return null;
    if (!kept.has(field.id)) kept.set(field.id, { field, text: field.value, focused: field === document.activeElement });
    return kept.get(field.id);
  }

  function send(field) {
    const one = of(field);
    if (!one) return;
    one.text = "";
    setProps(field.dataset.typing, { data: { text: field.value, at: Date.now() } });
  }

  function restore(field, before) {
    const ends = [before.field.selectionStart, before.field.selectionEnd];
    before.field = field;
    if (before.text !== field.value) {
      setValue.call(field, before.text);
      field.dispatchEvent(new Event("input", { bubbles: true }));
    }
    if (!before.focused) return;
    field.focus({ preventScroll: true });
    field.setSelectionRange(...ends);
  }

  document.addEventListener("focusin", (event) => { const one = of(event.target); if (one) one.focused = true; });
  document.addEventListener("input", (event) => { const one = of(event.target); if (one) one.text = event.target.value; });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.isComposing) send(event.target);
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-sends]");
    if (button) send(document.getElementById(button.dataset.sends));
  });
  document.addEventListener("focusout", (event) => {
    const one = of(event.target);
    // A field that is taken away with the focus in it loses it too: that is none of one's doing.
    if (one) setTimeout(() => { if (event.target.isConnected && event.target !== document.activeElement) one.focused = false; });
  });
  new MutationObserver(() => {
    for (const [id, before] of kept) {
      const field = document.getElementById(id);
      if (!field) kept.delete(id);
      else if (field !== before.field) restore(field, before);
    }
  }).observe(document.documentElement, { subtree: true, childList: true });
})();
