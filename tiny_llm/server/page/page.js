// Owns the conversation, the settings and the dialogs. The conversation lives in this page alone.

import { ask, events, key, Refusal } from "./asking.js";
import { Live } from "./live.js";
import { show } from "./markdown.js";

const SETTINGS = "tiny_llm.settings";
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const RETRY_MS = 1000;
const LOAD = 16;

const $ = (id) => document.getElementById(id);
const messages = []; // as the API has them
let answering = null; // AbortController of the answer that is being made
let loading = null; // and of the 16 prompts
let asksForKey = false;

function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

// ---- the server

const live = new Live((refusal) => {
  $("live-state").hidden = !refusal;
  if (!refusal) return setState("ready");
  $("live-state").textContent = refusal.message;
  if (refusal.status === 401) askForKey("");
  else setState("away");
});

function setState(state, name = null) {
  $("state").dataset.state = state;
  if (name) $("model").textContent = name;
}

/** Find out which model this is; then watch it. Waits while it is being loaded. */
async function connect() {
  for (;;) {
    try {
      const { data } = await (await ask("/v1/models")).json();
      setState("ready", data[0].id);
      document.title = `${data[0].id} · tiny_llm`;
      $("max_tokens").max = data[0].max_model_len;
      $("forget-key").hidden = !key.get();
      return void live.start();
    } catch (error) {
      if (error.status === 401) return askForKey("");
      setState(error.code === "loading" ? "loading" : "away", error.code === "loading" ? "loading …" : "not connected");
      $("live-state").hidden = false;
      $("live-state").textContent = error.message;
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }
}

function askForKey(problem) {
  if (asksForKey) return;
  asksForKey = true;
  live.stop();
  setState("away", "needs a key");
  problem ||= key.get() ? "The server did not take this key." : "";
  $("key-problem").hidden = !problem;
  $("key-problem").textContent = problem;
  $("key").value = "";
  $("key-dialog").showModal();
}

$("key-dialog").addEventListener("close", () => {
  asksForKey = false;
  const given = $("key").value.trim();
  $("key").value = "";
  if (!given) {
    $("live-state").hidden = false;
    $("live-state").textContent = "Without a key there is nothing to see. Send a message to be asked again.";
    return;
  }
  key.set(given);
  connect();
  $("ask").focus();
});

$("forget-key").addEventListener("click", () => {
  key.forget();
  $("settings").close();
  location.reload();
});

// ---- the conversation

/** The answer's place on the page, and what it shows as the answer comes. */
class Answer {
  constructor() {
    this.text = this.thought = "";
    this.tokens = 0;
    this.began = performance.now();
    this.item = element("li", "message assistant busy");
    this.folded = element("details", "thought");
    this.thinking = element("div", "text");
    this.folded.append(element("summary", "", "What it thought"), this.thinking);
    this.folded.hidden = true;
    this.body = element("div", "text");
    this.note = element("p", "note");
    this.item.append(element("span", "unseen", "Answer: "), this.folded, this.body, this.note);
    $("messages").append(this.item);
  }

  take({ choices, usage }) {
    if (usage) this.usage = usage;
    const [choice] = choices;
    if (!choice) return;
    this.reason = choice.finish_reason ?? this.reason;
    const { content, reasoning_content: thought } = choice.delta;
    if (!content && !thought) return;
    this.first ??= performance.now();
    this.tokens += 1;
    this.text += content ?? "";
    this.thought += thought ?? "";
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.frame = null;
    keepInSight(() => {
      this.folded.hidden = !this.thought;
      show(this.thinking, this.thought);
      show(this.body, this.text);
    });
  }

  /** The end: by itself, by the reader (`stopped`), or by an error, which can be tried again. */
  end(stopped, error) {
    cancelAnimationFrame(this.frame);
    this.draw();
    this.item.classList.remove("busy");
    keepInSight(() => {
      this.note.textContent = this.figures(stopped, error);
      if (error) this.item.append(problemOf(error, this));
    });
    if (!error) $("said").textContent = stopped ? "Stopped." : `Answer: ${this.body.textContent}`;
  }

  figures(stopped, error) {
    if (!this.first) return stopped ? "stopped" : "";
    const made = this.usage?.completion_tokens ?? this.tokens;
    const seconds = (performance.now() - this.first) / 1000;
    const parts = [`${made} ${made === 1 ? "token" : "tokens"}`, `first after ${((this.first - this.began) / 1000).toFixed(2)} s`];
    if (made > 1 && seconds > 0) parts.push(`${Math.round((made - 1) / seconds)} per second`);
    const cached = this.usage?.prompt_tokens_details?.cached_tokens;
    if (cached) parts.push(`${cached} of ${this.usage.prompt_tokens} of the prompt cached`);
    if (stopped) parts.push("stopped");
    else if (!error && this.reason === "length") parts.push("cut: no more tokens allowed");
    return parts.join(" · ");
  }
}

function problemOf(error, answer) {
  const box = element("div", "problem");
  box.setAttribute("role", "alert");
  const again = element("button", "quiet", "Try again");
  again.type = "button";
  again.addEventListener("click", () => {
    if (answering) return;
    if (messages.at(-1)?.role === "assistant") messages.pop();
    answer.item.remove();
    $("ask").focus();
    answerIt();
  });
  box.append(element("p", "", error.message), again);
  return box;
}

/** Change the page, and stay at the conversation's end if that is what was in sight. */
function keepInSight(change) {
  const box = $("scroll");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  change();
  if (atEnd) box.scrollTop = box.scrollHeight;
}

function send(text) {
  if (answering || !text.trim()) return;
  messages.push({ role: "user", content: text });
  const item = element("li", "message user");
  item.append(element("span", "unseen", "You: "), element("p", "", text));
  $("welcome").hidden = true;
  $("messages").append(item);
  $("ask").value = "";
  grow();
  answerIt();
}

/** Have the conversation's next message made, as it stands. */
async function answerIt() {
  const own = (answering = new AbortController());
  const answer = new Answer();
  setBusy(true);
  $("scroll").scrollTop = $("scroll").scrollHeight;
  $("said").textContent = "Answering.";
  let problem = null;
  try {
    const system = $("system").value.trim();
    const all = system ? [{ role: "system", content: system }, ...messages] : messages;
    const body = { messages: all, stream: true, stream_options: { include_usage: true }, ...chosen() };
    for await (const told of events("/v1/chat/completions", { body, signal: own.signal })) answer.take(told);
  } catch (error) {
    if (!own.signal.aborted) problem = error instanceof Refusal ? error : new Refusal(0, String(error));
  }
  if (answering !== own) return; // a new chat has begun
  answering = null;
  setBusy(false);
  if (answer.text) messages.push({ role: "assistant", content: answer.text });
  answer.end(own.signal.aborted, problem);
  if (problem?.status === 401) askForKey("");
}

function setBusy(busy) {
  $("messages").setAttribute("aria-busy", busy);
  const hadFocus = document.activeElement === (busy ? $("send") : $("stop"));
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  if (hadFocus) $(busy ? "stop" : "ask").focus();
}

const stop = () => answering?.abort();

function newChat() {
  const old = answering;
  answering = null;
  old?.abort();
  setBusy(false);
  messages.length = 0;
  $("messages").replaceChildren();
  $("welcome").hidden = false;
  $("said").textContent = "New chat.";
  $("ask").focus();
}

/** The text field is as high as its text, up to a point. */
function grow() {
  $("ask").style.height = "auto";
  $("ask").style.height = `${$("ask").scrollHeight}px`;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send($("ask").value);
});
$("ask").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send($("ask").value);
});
$("ask").addEventListener("input", grow);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop();
});
$("stop").addEventListener("click", stop);
$("new-chat").addEventListener("click", newChat);
$("ideas").addEventListener("click", (event) => {
  if (event.target.tagName === "BUTTON") send(event.target.textContent);
});

// ---- settings

/** The settings that are filled in, by the API's names. */
function chosen() {
  const filled = NUMBERS.filter((name) => $(name).value !== "");
  return Object.fromEntries(filled.map((name) => [name, Number($(name).value)]));
}

function restore() {
  const kept = JSON.parse(sessionStorage.getItem(SETTINGS) ?? "{}");
  for (const [name, value] of Object.entries(kept)) if ($(name)) $(name).value = value;
}

$("open-settings").addEventListener("click", () => $("settings").showModal());
$("settings").addEventListener("close", () => {
  const kept = Object.fromEntries(["system", ...NUMBERS].map((name) => [name, $(name).value]));
  sessionStorage.setItem(SETTINGS, JSON.stringify(kept));
});

// ---- narrow screens show one half at a time

for (const [button, view] of [["show-chat", "chat"], ["show-live", "live"]]) {
  $(button).addEventListener("click", () => {
    document.body.dataset.view = view;
    for (const other of ["show-chat", "show-live"]) $(other).setAttribute("aria-pressed", other === button);
  });
}

// ---- something to watch

/** Sixteen prompts in one request, which begin alike; their answers are not read. */
async function load() {
  if (loading) return loading.abort();
  const own = (loading = new AbortController());
  $("load").textContent = "Stop them";
  const opening = "A traveller asks the keeper of a small library, who has read every book and forgets nothing: ";
  const about = "paging memory caches tokens queues batches kernels threads ".repeat(LOAD);
  const prompt = Array.from({ length: LOAD }, (_, i) => `${opening}question ${i + 1}, on ${about.slice(0, 12 + 30 * (i % 8))}`);
  const body = { prompt, max_tokens: 240, ignore_eos: true, temperature: 1, stream: true };
  try {
    for await (const _ of events("/v1/completions", { body, signal: own.signal }));
  } catch (error) {
    if (!own.signal.aborted) {
      $("batch-words").textContent = error.message;
      if (error.status === 401) askForKey("");
    }
  }
  loading = null;
  $("load").textContent = `Send ${LOAD} prompts`;
}

$("load").addEventListener("click", load);

restore();
connect();
$("ask").focus();
