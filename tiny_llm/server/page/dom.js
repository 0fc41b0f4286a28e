// Owns how elements of the page are found and made. No string is ever read as HTML.

export const $ = (id) => document.getElementById(id);

/** An element with `children`, texts among them; `properties` by their names in a script, or its class. */
export function element(name, properties = {}, ...children) {
  const given = typeof properties === "string" ? { className: properties } : properties;
  const made = Object.assign(document.createElement(name), given);
  made.append(...children);
  return made;
}

export const button = (text, className, onclick) => element("button", { type: "button", className, onclick }, text);
