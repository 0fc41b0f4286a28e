// Owns the view of the engine: figures, block map, batch, drawn from the server's pictures (GET /live).
// What a picture holds is said in tiny_llm/server/picture.py.

import { events, Refusal } from "./asking.js";
import { $, element } from "./dom.js";

const [FREE, CACHED, SHARED, OWNED] = [0, 1, 2, 3];
const HISTORY = 96;             // pictures that the curves go back
const RATE_S = 1;               // over which speeds are taken
const LINGER_MS = 900;          // how long a request that has ended is still seen
const MAP_HEIGHT = 210;
const PROMPT_SHARE = 34;        // per cent of a bar
const RETRY_MS = [500, 1000, 2000, 4000];

const count = (number) => Math.round(number).toLocaleString("en");
const percent = (share) => `${Math.round(100 * share)} %`;
const sum = (counts) => Object.values(counts).reduce((all, one) => all + one, 0);
const dark = matchMedia("(prefers-color-scheme: dark)");

/** The colour of a byte of the block map that stands for one request. */
function colour(owner) {
  const hue = (owner * 137.508 + 40) % 360;
  return dark.matches ? `oklch(0.74 0.105 ${hue})` : `oklch(0.64 0.115 ${hue})`;
}

function svg(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** A number with its name and its curve. */
class Figure {
  constructor(name, format) {
    this.format = format;
    this.values = [];
    this.value = element("dd");
    this.note = element("dd", "note");
    [this.area, this.line] = [svg("path", { class: "area" }), svg("path", {})];
    const frame = { viewBox: "0 0 100 28", preserveAspectRatio: "none", "aria-hidden": "true" };
    const curve = svg("svg", frame, this.area, this.line);
    $("figures").append(element("div", {}, element("dt", {}, name), this.value, this.note, curve));
    this.show(null, "");
  }

  /** Show a value (null: there is none yet), and move the curve on. */
  show(value, note) {
    this.values.push(value ?? 0);
    this.values = this.values.slice(-HISTORY);
    this.value.textContent = value === null ? "–" : this.format(value);
    this.note.textContent = note;
    const top = Math.max(...this.values) || 1;
    const step = 100 / (HISTORY - 1), first = HISTORY - this.values.length;
    const points = this.values.map((v, i) => `${((first + i) * step).toFixed(2)} ${(26.5 - (24 * v) / top).toFixed(2)}`);
    this.line.setAttribute("d", `M${points.join("L")}`);
    this.area.setAttribute("d", `M${(first * step).toFixed(2)} 28L${points.join("L")}L100 28Z`);
  }
}

/** The pool, a square a cell. */
class BlockMap {
  constructor() {
    this.canvas = $("map");
    this.cells = new Uint8Array();
    this.marked = null;
    new ResizeObserver(() => this.draw()).observe(this.canvas.parentElement);
    dark.addEventListener("change", () => this.draw());
  }

  show(picture) {
    const { capacity, limit, used, cached, free } = picture.blocks;
    this.cells = Uint8Array.from(atob(picture.cells), (byte) => byte.charCodeAt(0));
    this.draw();
    const each = Math.ceil(capacity / Math.max(1, this.cells.length));
    const grow = limit > capacity ? ` It may grow to ${count(limit)}.` : "";
    $("map-words").textContent = capacity
      ? `${count(capacity)} blocks of ${picture.block_size} tokens: ${count(used)} in use, ${count(cached)} cached, ` +
        `${count(free)} free.${grow}${each > 1 ? ` A square is ${each} blocks.` : ""}`
      : `No block yet: the pool grows with the first request, up to ${count(limit)} blocks of ${picture.block_size} tokens.`;
  }

  /** Let one request's blocks stand out; null: none. */
  mark(owner) {
    this.marked = owner;
    this.draw();
  }

  draw() {
    const width = this.canvas.clientWidth, number = this.cells.length;
    if (!width) return;
    const { side, gap, columns } = fit(width, number);
    const height = Math.max(24, Math.ceil(number / columns) * (side + gap) - gap);
    const ratio = devicePixelRatio || 1;
    this.canvas.style.height = `${height}px`;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    const style = getComputedStyle(this.canvas);
    const fills = new Map([FREE, CACHED, SHARED].map((kind, i) => [
      kind, style.getPropertyValue(["--free", "--cached", "--shared"][i]),
    ]));
    this.cells.forEach((cell, index) => {
      if (!fills.has(cell)) fills.set(cell, colour(cell));
      context.fillStyle = fills.get(cell);
      context.globalAlpha = this.marked !== null && cell >= OWNED && cell !== this.marked ? 0.25 : 1;
      const x = (index % columns) * (side + gap), y = Math.floor(index / columns) * (side + gap);
      context.beginPath();
      context.roundRect(x, y, side, side, side > 6 ? 2 : side > 4 ? 1 : 0);
      context.fill();
    });
  }
}

/** The largest squares with which `number` of them fit into the map. */
function fit(width, number) {
  for (let side = 12; side > 2; side--) {
    const gap = side > 5 ? 2 : 1;
    const columns = Math.max(1, Math.floor((width + gap) / (side + gap)));
    if (Math.ceil(number / columns) * (side + gap) <= MAP_HEIGHT) return { side, gap, columns };
  }
  return { side: 2, gap: 1, columns: Math.max(1, Math.floor((width + 1) / 3)) };
}

/** One request of the batch, as a bar. */
class Bar {
  constructor(id, onMark) {
    this.owner = OWNED + (id % (256 - OWNED));
    this.pieces = ["part-cached", "part-read", "part-gap", "part-made"].map((kind) => element("i", kind));
    const bar = element("span", { className: "bar", ariaHidden: "true" }, ...this.pieces);
    this.what = element("span", "what");
    this.row = element("li", {}, element("span", "name", `#${id}`), bar, this.what);
    this.row.addEventListener("pointerenter", () => onMark(this.owner));
    this.row.addEventListener("pointerleave", () => onMark(null));
  }

  show([, running, prompt, computed, known, most, cached, blocks]) {
    const made = Math.max(0, known - prompt), read = Math.min(computed, prompt);
    const state = running ? (known - computed > 1 ? "prefill" : "decode") : made ? "paused" : "waiting";
    const hit = Math.min(cached, read);
    const shares = [hit, read - hit, prompt - read].map((part) => (PROMPT_SHARE * part) / prompt);
    shares.push(((100 - PROMPT_SHARE) * made) / Math.max(1, most - prompt));
    this.pieces.forEach((piece, i) => (piece.style.width = `${shares[i].toFixed(2)}%`));
    this.row.dataset.state = state;
    this.row.style.setProperty("--own", colour(this.owner));
    const where = state === "prefill" ? `${count(read)} of ${count(prompt)}` : state === "decode" ? count(made) : "";
    this.what.textContent = `${state} ${where}`.trim();
    const tail = `${count(blocks)} ${blocks === 1 ? "block" : "blocks"}`;
    this.row.title = `prompt ${count(prompt)}, of it cached ${count(cached)}; answer ${count(made)} of at most ${count(most - prompt)}; ${tail}`;
  }
}

/** Everything together, and its way to the server. */
export class Live {
  /** `onState(refusal)`: it cannot be had, and why; null: it is there. */
  constructor(onState) {
    this.onState = onState;
    this.map = new BlockMap();
    this.bars = new Map();
    this.samples = [];
    const ms = (s) => (s < 1 ? `${(1000 * s).toFixed(s < 0.1 ? 1 : 0)} ms` : `${s.toFixed(2)} s`);
    this.speed = new Figure("Tokens per second", count);
    this.first = new Figure("First token after", ms);
    this.hits = new Figure("Found in cache", percent);
    this.used = new Figure("Blocks in use", count);
    this.gain = new Figure("Tokens a step", (tokens) => tokens.toFixed(2));
    this.right = new Figure("Guesses right", percent);
    this.ttft = this.gained = this.share = null;
    document.addEventListener("visibilitychange", () => (document.hidden ? this.stop() : this.start()));
  }

  /** Watch until stopped; who cannot be reached is asked again. */
  async start() {
    if (this.watching || document.hidden) return;
    const watching = (this.watching = new AbortController());
    for (let fails = 0; !watching.signal.aborted; fails++) {
      try {
        for await (const picture of events("/live", { signal: watching.signal })) {
          fails = -1;
          this.onState(null);
          this.show(picture);
        }
      } catch (error) {
        if (watching.signal.aborted) return;
        this.onState(error instanceof Refusal ? error : new Refusal(0, String(error)));
        if (error.status === 401) return this.stop();
      }
      const pause = RETRY_MS[Math.min(Math.max(0, fails), RETRY_MS.length - 1)];
      await new Promise((resolve) => setTimeout(resolve, pause));
    }
  }

  stop() {
    this.watching?.abort();
    this.watching = null;
  }

  show(picture) {
    const last = this.samples.at(-1);
    if (last && (picture.steps < last.steps || picture.now < last.now)) this.samples = []; // it began anew
    [picture.drafted, picture.accepted] = [sum(picture.drafted_tokens), sum(picture.accepted_tokens)];
    this.samples = [...this.samples, picture].slice(-HISTORY);
    this.showFigures(picture);
    this.map.show(picture);
    this.showBatch(picture);
  }

  showFigures(picture) {
    const before = this.samples.findLast((one) => picture.now - one.now >= RATE_S) ?? this.samples[0];
    const since = (name) => picture[name] - before[name];
    const seconds = since("now");
    const speed = seconds > 0 ? since("generation_tokens") / seconds : 0;
    const reads = seconds > 0 ? since("prompt_tokens") / seconds : 0;
    this.speed.show(speed, `and ${count(reads)} read`);
    if (since("first_tokens")) this.ttft = since("ttft_s") / since("first_tokens");
    else if (this.ttft === null && picture.first_tokens) this.ttft = picture.ttft_s / picture.first_tokens;
    this.first.show(this.ttft, this.ttft === null ? "" : "mean of the latest");
    const asked = picture.hit_tokens + picture.miss_tokens;
    this.hits.show(asked ? picture.hit_tokens / asked : null, `${count(picture.hit_tokens)} tokens`);
    const { used, limit } = picture.blocks;
    this.used.show(used, `of at most ${count(limit)}`);
    this.showGuesses(picture, since);
  }

  /** A step brings a request one token, and those guesses that were right. */
  showGuesses(picture, since) {
    if (since("decodes")) this.gained = 1 + since("accepted") / since("decodes");
    if (since("drafted")) this.share = since("accepted") / since("drafted");
    this.gain.show(this.gained, this.gained ? "for each request" : "");
    const sources = Object.entries(picture.drafted_tokens).filter(([, drafted]) => drafted);
    const shares = sources.map(([name, drafted]) => `${name} ${percent(picture.accepted_tokens[name] / drafted)}`);
    this.right.show(this.share, shares.join(", "));
  }

  showBatch(picture) {
    const seen = new Set(picture.rows.map(([id]) => id));
    for (const row of picture.rows) {
      let bar = this.bars.get(row[0]);
      if (!bar) {
        bar = new Bar(row[0], (owner) => this.map.mark(owner));
        this.bars.set(row[0], bar);
        const next = [...this.bars.keys()].filter((id) => id > row[0] && this.bars.get(id).row.isConnected);
        $("batch").insertBefore(bar.row, next.length ? this.bars.get(Math.min(...next)).row : null);
      }
      bar.show(row);
    }
    for (const [id, bar] of this.bars) {
      if (seen.has(id)) continue;
      this.bars.delete(id);
      bar.row.dataset.state = "ended";
      bar.what.textContent = "ended";
      if (this.map.marked === bar.owner) this.map.mark(null);
      setTimeout(() => bar.row.remove(), LINGER_MS);
    }
    const hidden = picture.running + picture.waiting - picture.rows.length;
    const gave = picture.preempted ? ` ${count(picture.preempted)} gave way so far.` : "";
    $("batch-words").textContent = picture.running + picture.waiting
      ? `${count(picture.running)} running, ${count(picture.waiting)} waiting${hidden ? `, ${count(hidden)} of them not shown` : ""}. Step ${count(picture.steps)}.${gave}`
      : `Nothing runs. ${count(picture.steps)} steps so far.${gave}`;
  }
}
