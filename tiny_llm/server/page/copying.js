// Owns copying, and its button. Where a page may not reach the clipboard (plain http, not on this machine)
// a selection does it.

import { button, element } from "./dom.js";

const SHOWN_MS = 1500;

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copySelected(text);
  }
}

function copySelected(text) {
  const before = document.activeElement;
  const area = element("textarea", { className: "unseen", value: text });
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  before?.focus({ preventScroll: true });
  return done;
}

/** A button that copies what `text()` is when it is pressed. */
export function copyButton(text) {
  const made = button("Copy", "copy", async () => {
    made.textContent = (await copy(text())) ? "Copied" : "Not copied";
    setTimeout(() => (made.textContent = "Copy"), SHOWN_MS);
  });
  return made;
}
