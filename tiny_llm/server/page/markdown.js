// Owns the step from a model's text to nodes. The text is untrusted: every piece of it becomes a text
// node or an attribute that cannot run; no string is ever read as HTML. Links are http(s) only, images
// are not loaded.

import { copyButton, element } from "./dom.js";
import { pieces } from "./highlight.js";

const DEEPEST = 8; // quotes and lists in each other
const FENCE = /^( {0,3})(```+|~~~+)\s*([\w+#.-]*)[^\n`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const QUOTE = /^ {0,3}>/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)(.*)$/;
const TASK = /^\[([ xX])\]\s+/;
const INLINE = new RegExp(
  [
    "\\\\(?<escaped>[*_`~#|<>+.!-])",
    "(?<ticks>`+)(?<code>[^`]|[^`][\\s\\S]*?[^`])\\k<ticks>(?!`)",
    "!?\\[(?<label>[^\\[\\]\\n]{1,500})\\]\\((?<href>[^\\s()<>]{1,2000}(?:\\([^\\s()<>]{0,200}\\)[^\\s()<>]{0,200})?)(?:\\s+\"[^\"\\n]*\")?\\)",
    "\\*\\*(?<bold>(?=\\S)[^\\n]{1,2000}?\\S?)\\*\\*",
    "(?<![\\w_])__(?<strong>(?=[^\\s_])[^\\n]{1,2000}?)__(?!\\.?\\w)",
    "~~(?<gone>(?=\\S)[^\\n]{1,2000}?)~~",
    "(?<![\\w*])\\*(?<italic>(?=[^\\s*])[^\\n*]{1,2000}?)\\*(?![\\w*])",
    "(?<![\\w_])_(?<slanted>(?=[^\\s_])[^\\n_]{1,2000}?)_(?![\\w_])",
    "<(?<line>br) ?/?>",
    "\\bhttps?:\\/\\/(?<bare>[^\\s<>\"'`]{1,2000}[^\\s<>\"'`.,;:!?)\\]])",
  ].join("|"),
  "g",
);

/** Show `text` in `box`. Of what it shows already, the blocks that are the same stay as they are. */
export function show(box, text, depth = 0) {
  const sources = blocksOf(text.replace(/\r\n?/g, "\n").split("\n"), depth).map((lines) => lines.join("\n"));
  const before = box.sources ?? [];
  let same = 0;
  while (same < sources.length && sources[same] === before[same]) same++;
  while (box.childNodes.length > same) box.lastChild.remove();
  for (const source of sources.slice(same)) box.append(block(source.split("\n"), depth));
  box.sources = sources;
}

/** The lines of a text by blocks: a fence, a heading, a rule, a quote, a list, a table or a paragraph. */
function blocksOf(lines, depth) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    const end = lines[at].trim() ? blockAt(lines, at, depth).end : at + 1;
    if (lines[at].trim()) blocks.push(lines.slice(at, end));
    at = end;
  }
  return blocks;
}

const block = (lines, depth) => blockAt(lines, 0, depth).make(lines);

/** The block that begins with line `at`: the line after it, and what makes a node of its lines. */
function blockAt(lines, at, depth) {
  const line = lines[at], isNesting = depth < DEEPEST;
  const fence = FENCE.exec(line), heading = HEADING.exec(line);
  if (fence) return { end: endOfFence(lines, at), make: (own) => code(own, fence) };
  if (heading) {
    const words = heading[2].trim().replace(/(?:^|\s)#+$/, "");
    return { end: at + 1, make: () => element(`h${Math.min(6, heading[1].length + 2)}`, {}, ...inline(words)) };
  }
  if (RULE.test(line)) return { end: at + 1, make: () => element("hr") };
  if (isNesting && QUOTE.test(line)) {
    const make = (own) => element("blockquote", {}, ...nodesOf(own.map((one) => one.replace(/^ {0,3}> ?/, "")), depth + 1));
    return { end: endWhere(lines, at, (one) => !QUOTE.test(one)), make };
  }
  if (isNesting && ITEM.test(line)) return { end: endOfList(lines, at), make: (own) => list(own, depth) };
  const isOver = (one) => !one.trim() || interrupts(one, depth);
  if (beginsTable(lines, at)) return { end: endWhere(lines, at + 1, isOver), make: table };
  const make = (own) => element("p", {}, ...inline(own.map((one) => one.trim()).join("\n")));
  return { end: endWhere(lines, at, (one, i) => isOver(one) || beginsTable(lines, i)), make };
}

const nodesOf = (lines, depth) => blocksOf(lines, depth).map((own) => block(own, depth));

function endWhere(lines, at, ends) {
  for (let i = at + 1; i < lines.length; i++) if (ends(lines[i], i)) return i;
  return lines.length;
}

/** Whether a paragraph ends before this line though it is not empty. */
function interrupts(line, depth) {
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line)) return true;
  if (depth >= DEEPEST) return false;
  const item = ITEM.exec(line);
  return QUOTE.test(line) || (item !== null && item[4] !== "" && !/^(?!1[.)])\d/.test(item[2]));
}

function endOfFence(lines, at) {
  const mark = FENCE.exec(lines[at])[2];
  const end = lines.findIndex((line, i) => i > at && closes(line, mark));
  return end < 0 ? lines.length : end + 1;
}

/** Whether this line ends code that began with `mark`. */
function closes(line, mark) {
  const text = line.trim();
  return text.startsWith(mark) && !text.slice(mark.length).replaceAll(mark[0], "");
}

const isOrdered = (item) => /\d/.test(item[2]);
const indentOf = (line) => line.length - line.trimStart().length;

/** A list goes on over empty lines, as long as what follows is in an item or is one of its items. */
function endOfList(lines, at) {
  const first = ITEM.exec(lines[at]);
  const inner = first[1].length + 2;
  let end = at + 1, fence = null;
  for (let i = end; i < lines.length; i++) {
    const line = lines[i];
    const isEmpty = !line.trim(), isInside = indentOf(line) >= inner;
    if (fence) {
      if (!isEmpty && !isInside) return end; // code that nobody closed
      if (closes(line, fence)) fence = null;
    } else if (isEmpty) {
      continue;
    } else if (isInside) {
      fence = FENCE.exec(line.trimStart())?.[2] ?? null;
    } else {
      const item = ITEM.exec(line);
      const isNext = item && !RULE.test(line) && isOrdered(item) === isOrdered(first);
      if (!isNext && (end < i || interrupts(line, 0))) return end; // not a line that goes on with a paragraph
    }
    end = i + 1;
  }
  return end;
}

function beginsTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !lines[at + 1].includes("-")) return false;
  const marks = cellsOf(lines[at + 1]);
  return marks.every((mark) => /^:?-+:?$/.test(mark)) && marks.length === cellsOf(lines[at]).length;
}

function code(lines, [, indent, mark, language]) {
  const isClosed = lines.length > 1 && closes(lines.at(-1), mark);
  const inner = lines.slice(1, isClosed ? -1 : undefined).map((line) => dedented(line, indent.length));
  const text = inner.join("\n");
  const coloured = pieces(text, language).map(([kind, piece]) => (kind ? element("span", kind, piece) : piece));
  const head = element("figcaption", {}, element("span", {}, language), copyButton(() => text));
  return element("figure", "code", head, element("pre", { tabIndex: 0 }, element("code", {}, ...coloured)));
}

/** A line without its first `count` spaces, or those of them that it has. */
function dedented(line, count) {
  return line.slice(Math.min(count, indentOf(line)));
}

function list(lines, depth) {
  const first = ITEM.exec(lines[0]);
  const inner = first[1].length + 2;
  const items = [];
  let isLoose = false;
  for (const [i, line] of lines.entries()) {
    const item = indentOf(line) < inner && ITEM.exec(line);
    if (item) {
      isLoose ||= i > 0 && !lines[i - 1].trim();
      items.push({ width: line.length - item[4].length, lines: [item[4]] });
    } else {
      items.at(-1).lines.push(line);
    }
  }
  const children = items.map((item) => listItem(outdented(item), isLoose, depth + 1));
  return isOrdered(first) ? element("ol", { start: parseInt(first[2]) }, ...children) : element("ul", {}, ...children);
}

/** An item's lines without the indent that the first of them after its own has, or its own words have. */
function outdented({ width, lines: [first, ...rest] }) {
  const next = rest.find((line) => line.trim());
  const indent = next === undefined ? 0 : Math.min(width, indentOf(next));
  return [first, ...rest.map((line) => dedented(line, indent))];
}

function listItem(lines, isLoose, depth) {
  const task = TASK.exec(lines[0]);
  if (task) lines[0] = lines[0].slice(task[0].length);
  const blocks = nodesOf(lines, depth);
  const isTight = !isLoose && blocks.filter((one) => one.nodeName === "P").length <= 1;
  const shown = blocks.flatMap((one) => (isTight && one.nodeName === "P" ? [...one.childNodes] : [one]));
  if (!task) return element("li", {}, ...shown);
  const box = element("input", { type: "checkbox", disabled: true, defaultChecked: task[1] !== " " });
  return element("li", "task", box, ...shown);
}

/** The cells of a table's row: between bars that no backslash stands before. */
function cellsOf(line) {
  const row = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return row.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table(lines) {
  const sides = cellsOf(lines[1]).map((mark) => {
    if (mark.endsWith(":")) return mark.startsWith(":") ? "center" : "right";
    return {};
  });
  const row = (line, name) => {
    const cells = cellsOf(line);
    return element("tr", {}, ...sides.map((side, i) => element(name, side, ...inline(cells[i] ?? ""))));
  };
  const body = element("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")));
  const whole = element("table", {}, element("thead", {}, row(lines[0], "th")), body);
  return element("div", { className: "wide", tabIndex: 0 }, whole);
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

function span(whole, { escaped, code, label, href, bold, strong, gone, italic, slanted, line, bare }) {
  if (escaped !== undefined) return escaped;
  if (code !== undefined) return element("code", {}, code);
  if (bold !== undefined || strong !== undefined) return element("strong", {}, ...inline(bold ?? strong));
  if (gone !== undefined) return element("s", {}, ...inline(gone));
  if (italic !== undefined || slanted !== undefined) return element("em", {}, ...inline(italic ?? slanted));
  if (line !== undefined) return element("br");
  if (bare !== undefined) return link(whole, whole) ?? whole;
  if (whole.startsWith("!")) return whole;
  return link(href, label) ?? whole;
}

/** A link to another site, which learns nothing of us; null for what is no address of the web. */
function link(href, text) {
  let url;
  try {
    url = new URL(href);
  } catch {
    return null;
  }
  if (url.protocol !== "http:" && url.protocol !== "https:") return null;
  return element("a", { href: url.href, rel: "noopener noreferrer nofollow", target: "_blank" }, text);
}
