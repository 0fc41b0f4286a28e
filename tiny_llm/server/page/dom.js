// Owns how elements of the page are found and made, and the button that copies. No string is ever read as HTML.

const SHOWN_MS = 1500; // that it was copied

export const $ = (id) => document.getElementById(id);

/** An element with `children`, texts among them; `properties` by their names in a script, or its class. */
export function element(name, properties = {}, ...children) {
  const given = typeof properties === "string" ? { className: properties } : properties;
  const made = Object.assign(document.createElement(name), given);
  made.append(...children);
  return made;
}

export const button = (text, className, onclick) => element("button", { type: "button", className, onclick }, text);

/** Where a page may not reach the clipboard (plain http, not on this machine) a selection does it. */
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
