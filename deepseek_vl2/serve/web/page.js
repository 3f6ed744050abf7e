// What Gradio's components leave out for those who read the page by ear or by keyboard; run again whenever it changes.
(() => {
  const name = (selector, text) => {
    for (const element of document.querySelectorAll(selector)) {
      if (!element.getAttribute("aria-label")) element.setAttribute("aria-label", text(element));
    }
  };

  const copyText = async (text) => {
    if (navigator.clipboard) return navigator.clipboard.writeText(text);
    const field = document.createElement("textarea"); // a page without TLS has no clipboard of its own
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  };

  // An answer with a drawing can be downloaded, and Gradio then offers no copy of its text.
  const addCopy = (link) => {
    const row = link.parentElement;
    if (row.querySelector('[aria-label^="Copy"]')) return;
    let above = link.closest(".message-buttons")?.previousElementSibling;
    while (above && !above.matches(".message-row")) above = above.previousElementSibling;
    const message = above?.querySelector(".message");
    if (!message) return;
    const button = document.createElement("button");
    button.className = "copy-answer";
    button.type = "button";
    button.setAttribute("aria-label", "Copy text");
    button.title = "Copy text";
    button.innerHTML =
      '<svg viewBox="0 0 24 24" width="16" height="16" fill="none" stroke="currentColor" stroke-width="2" ' +
      'aria-hidden="true"><rect x="9" y="9" width="11" height="11" rx="2"/><path d="M5 15V5a1 1 0 0 1 1-1h9"/></svg>';
    button.addEventListener("click", async () => {
      const parts = [...message.querySelectorAll(".prose")].filter((part) => !part.querySelector(".boxes, .note"));
      await copyText(parts.map((part) => part.innerText.trim()).join("\n"));
      button.setAttribute("aria-label", "Copied");
      button.classList.add("done");
      setTimeout(() => {
        button.setAttribute("aria-label", "Copy text");
        button.classList.remove("done");
      }, 1500);
    });
    link.before(button);
  };

  const mend = () => {
    name("#box textarea", () => "Message");
    name("#chat .message button:has(> .image-frame)", (button) => {
      return `Enlarge: ${button.querySelector("img")?.alt || "picture"}`;
    });
    for (const list of document.querySelectorAll('#chat .examples[role="list"]')) {
      list.setAttribute("role", "group"); // its children are buttons, no list items
      list.setAttribute("aria-label", "Examples");
    }
    for (const link of document.querySelectorAll("#chat a.download-link")) {
      if (!link.hasAttribute("aria-label")) link.setAttribute("aria-label", "Download picture");
      // one stop for the keyboard, not two: the link does it
      link.querySelector("button")?.setAttribute("tabindex", "-1");
      addCopy(link);
    }
    const toggle = document.querySelector(".sidebar .toggle-button");
    if (toggle) {
      const open = String(!!toggle.closest(".sidebar.open"));
      if (toggle.getAttribute("aria-expanded") !== open) toggle.setAttribute("aria-expanded", open);
      if (toggle.getAttribute("aria-label") !== "Settings") toggle.setAttribute("aria-label", "Settings");
    }
  };

  let waiting = false;
  const soon = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      mend();
    });
  };
  new MutationObserver(soon).observe(document.documentElement, {
    subtree: true,
    childList: true,
    attributes: true,
    attributeFilter: ["class", "role"],
  });
  soon();
})();
