// Owns what the page's parts share: the server's state, the settings, the dialogs, what is typed.

import { ask, events, key } from "./asking.js";
import { ChatList } from "./chats.js";
import { Conversation } from "./conversation.js";
import { $ } from "./dom.js";
import { Live } from "./live.js";
import { chats, newChat, tab } from "./store.js";

const SETTINGS = "tiny_llm.settings";
const SHOWN = "tiny_llm.shown";
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const RETRY_MS = 1000;
const LOAD = 16;

let loading = null; // AbortController of the 16 prompts
let asksForKey = false;

// ---- the server

const live = new Live((refusal) => {
  tell(refusal?.message ?? "");
  if (!refusal) return setState("ready");
  if (refusal.status === 401) askForKey();
  else setState("away");
});

/** Why there is nothing to watch; "": there is. */
function tell(problem) {
  $("live-state").hidden = !problem;
  $("live-state").textContent = problem;
}

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
      if (error.status === 401) return askForKey();
      setState(error.code === "loading" ? "loading" : "away", error.code === "loading" ? "loading …" : "not connected");
      tell(error.message);
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }
}

function askForKey() {
  if (asksForKey) return;
  asksForKey = true;
  live.stop();
  setState("away", "needs a key");
  $("key-problem").hidden = !key.get(); // else it was not taken
  $("key").value = "";
  $("key-dialog").showModal();
}

$("key-dialog").addEventListener("close", () => {
  asksForKey = false;
  const given = $("key").value.trim();
  $("key").value = "";
  if (!given) return tell("Without a key there is nothing to see. Send a message to be asked again.");
  key.set(given);
  connect();
  $("ask").focus();
});

$("forget-key").addEventListener("click", () => {
  key.forget();
  $("settings").close();
  location.reload();
});

// ---- the conversation, and those that are kept

const conversation = new Conversation({ settings: chosen, onChange: keep, onKey: askForKey });
const list = new ChatList({
  current: () => conversation.chat,
  onOpen: open,
  onGone(id) {
    if (id !== conversation.chat.id) return;
    conversation.leave(false);
    open(newChat(), "Deleted.");
  },
  onRename(chat) {
    if (chat.id === conversation.chat.id) conversation.chat.title = chat.title;
  },
});

/** Keep a chat, and have this tab show it again after a reload; say so if it cannot be. */
function keep(chat) {
  const isKept = chats.save(chat);
  $("not-kept").hidden = isKept;
  tab.set(SHOWN, chat.id);
}

function open(chat, said = "Chat opened.") {
  conversation.open(chat);
  tab.set(SHOWN, chat.id);
  $("not-kept").hidden = true;
  $("said").textContent = said;
  $("ask").focus();
}

chats.onChange((id) => {
  if ($("chats").open) list.show();
  const kept = chats.get(conversation.chat.id);
  if (kept && id === kept.id && !conversation.answering) conversation.open(kept); // another tab went on with it
});
addEventListener("pagehide", () => conversation.leave());

function send(text) {
  if (conversation.answering || !text.trim()) return;
  $("ask").value = "";
  grow();
  conversation.send(text);
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
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) conversation.stop();
});
$("stop").addEventListener("click", () => conversation.stop());
$("new-chat").addEventListener("click", () => open(newChat(), "New chat."));
$("ideas").addEventListener("click", (event) => {
  if (event.target.tagName === "BUTTON") send(event.target.textContent);
});

// ---- settings

/** The settings that are filled in, by the API's names, and the system prompt. */
function chosen() {
  const filled = NUMBERS.filter((name) => $(name).value !== "");
  const numbers = Object.fromEntries(filled.map((name) => [name, Number($(name).value)]));
  return { system: $("system").value.trim(), ...numbers };
}

/** What this tab remembers: the settings, and the chat that it showed. */
function restore() {
  const kept = tab.fields(SETTINGS);
  for (const name of ["system", ...NUMBERS]) if (name in kept) $(name).value = kept[name];
  const chat = chats.get(tab.get(SHOWN));
  if (chat) conversation.open(chat);
}

$("open-settings").addEventListener("click", () => $("settings").showModal());
$("settings").addEventListener("close", () => {
  const kept = Object.fromEntries(["system", ...NUMBERS].map((name) => [name, $(name).value]));
  tab.set(SETTINGS, JSON.stringify(kept));
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
      if (error.status === 401) askForKey();
    }
  }
  loading = null;
  $("load").textContent = `Send ${LOAD} prompts`;
}

$("load").addEventListener("click", load);

restore();
connect();
$("ask").focus();
