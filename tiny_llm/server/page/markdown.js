// Owns the step from a model's text to nodes. The text is untrusted: every piece of it becomes a text
// node or an attribute that cannot run; no string is ever read as HTML. Links are http(s) only, images
// are not loaded.

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)[^\n`]*$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const DEEPEST_QUOTE = 8;
const INLINE = new RegExp(
  [
    "(?<ticks>`+)(?<code>[^`]|[^`][\\s\\S]*?[^`])\\k<ticks>(?!`)",
    "!?\\[(?<label>[^\\[\\]\\n]{1,500})\\]\\((?<href>[^\\s()<>]{1,2000})(?:\\s+\"[^\"\\n]*\")?\\)",
    "\\*\\*(?<bold>(?=\\S)[^\\n]{1,2000}?\\S?)\\*\\*",
    "~~(?<gone>(?=\\S)[^\\n]{1,2000}?)~~",
    "(?<![\\w*])\\*(?<italic>(?=[^\\s*])[^\\n*]{1,2000}?)\\*(?![\\w*])",
    "(?<![\\w_])_(?<slanted>(?=[^\\s_])[^\\n_]{1,2000}?)_(?![\\w_])",
    "\\bhttps?:\\/\\/(?<bare>[^\\s<>\"'`]{1,2000}[^\\s<>\"'`.,;:!?)\\]])",
  ].join("|"),
  "g",
);

/** Show `text` in `box`. Of what it shows already, the blocks that are the same stay as they are. */
export function show(box, text, depth = 0) {
  const sources = blocksOf(text);
  const before = box.sources ?? [];
  let same = 0;
  while (same < sources.length && sources[same] === before[same]) same++;
  while (box.childNodes.length > same) box.lastChild.remove();
  for (const source of sources.slice(same)) box.append(block(source, depth));
  box.sources = sources;
}

function node(name, children = [], attributes = {}) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** The text cut into blocks, each with all its lines: at blank lines, and around fences. */
function blocksOf(text) {
  const blocks = [];
  let lines = [], fence = null;
  const end = () => {
    if (lines.length) blocks.push(lines.join("\n"));
    lines = [];
  };
  for (const line of text.replace(/\r\n?/g, "\n").split("\n")) {
    const mark = FENCE.exec(line);
    if (fence) {
      lines.push(line);
      if (line.trim().startsWith(fence) && !line.trim().slice(fence.length).trim()) (fence = null), end();
    } else if (mark) {
      end();
      fence = mark[1];
      lines.push(line);
    } else if (!line.trim()) {
      end();
    } else if (/^#{1,6}\s/.test(line) || /^ {0,3}([-*_])( *\1){2,} *$/.test(line)) {
      end();
      lines.push(line);
      end();
    } else {
      const begins = ITEM.test(line) && lines.length && !ITEM.test(lines[0]) && !lines[0].startsWith(">");
      if (begins) end();
      lines.push(line);
    }
  }
  end();
  return blocks;
}

function block(source, depth) {
  const lines = source.split("\n");
  const fence = FENCE.exec(lines[0]);
  if (fence) return code(lines, fence);
  const heading = /^(#{1,6})\s+(.*)$/.exec(source);
  if (heading) return node(`h${Math.min(6, heading[1].length + 2)}`, inline(heading[2]));
  if (/^ {0,3}([-*_])( *\1){2,} *$/.test(source)) return node("hr");
  if (depth < DEEPEST_QUOTE && lines.every((line) => /^ {0,3}>/.test(line))) {
    const inner = node("blockquote");
    show(inner, lines.map((line) => line.replace(/^ {0,3}> ?/, "")).join("\n"), depth + 1);
    return inner;
  }
  if (ITEM.test(lines[0])) return list(lines);
  if (lines.length > 1 && lines[0].includes("|") && /^[\s|:-]*-[\s|:-]*$/.test(lines[1])) return table(lines);
  return node("p", inline(source));
}

function code(lines, fence) {
  const closed = lines.length > 1 && lines.at(-1).trim().startsWith(fence[1]);
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  const shown = node("pre", [node("code", [text])], { tabindex: "0" });
  const copy = node("button", ["Copy"], { type: "button", class: "copy" });
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  });
  const head = node("figcaption", [node("span", [fence[2]]), ...(navigator.clipboard ? [copy] : [])]);
  return node("figure", [head, shown], { class: "code" });
}

/** A list, and the lists in it, by how far they are indented. */
function list(lines) {
  const top = { indent: ITEM.exec(lines[0])[1].length, items: [] };
  const number = /^\s*(\d+)/.exec(lines[0]);
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= top.indent + 1) top.items.push({ text: item[3], under: [] });
    else if (item || top.items.at(-1).under.length) top.items.at(-1).under.push(line.slice(top.indent));
    else top.items.at(-1).text += `\n${line.trim()}`;
  }
  const children = top.items.map(({ text, under }) => {
    const nested = under.length && ITEM.test(under[0]) ? [list(under)] : [];
    return node("li", [...inline(text), ...nested]);
  });
  return number ? node("ol", children, { start: number[1] }) : node("ul", children);
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => inline(cell.trim()));
  const row = (line, name) => node("tr", cells(line).map((cell) => node(name, cell)));
  const body = node("tbody", lines.slice(2).map((line) => row(line, "td")));
  const whole = node("table", [node("thead", [row(lines[0], "th")]), body]);
  return node("div", [whole], { class: "wide", tabindex: "0" });
}

/** A line's text as nodes. */
function inline(text) {
  const found = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    found.push(text.slice(at, match.index), span(match[0], match.groups));
    at = match.index + match[0].length;
  }
  found.push(text.slice(at));
  return found.filter((piece) => piece !== "");
}

function span(whole, { code, label, href, bold, gone, italic, slanted, bare }) {
  if (code !== undefined) return node("code", [code]);
  if (bold !== undefined) return node("strong", inline(bold));
  if (gone !== undefined) return node("s", inline(gone));
  if (italic !== undefined || slanted !== undefined) return node("em", inline(italic ?? slanted));
  if (bare !== undefined) return link(whole, [whole]) ?? whole;
  if (whole.startsWith("!")) return whole;
  return link(href, [label]) ?? whole;
}

/** A link to another site, which learns nothing of us; null for what is no address of the web. */
function link(href, children) {
  let url;
  try {
    url = new URL(href);
  } catch {
    return null;
  }
  if (url.protocol !== "http:" && url.protocol !== "https:") return null;
  return node("a", children, { href: url.href, rel: "noopener noreferrer nofollow", target: "_blank" });
}
