// Owns what is kept in this browser: chats, and what a tab remembers. A store that is full or forbidden
// costs what would be kept, never the page. What is read may be anybody's: it is checked.

const CHAT = "tiny_llm.chat.";
const MOST_CHATS = 200;
const MOST_CHARACTERS = 2_000_000; // of all chats together; browsers give a site some five million
const TITLE_LENGTH = 80;

/** A store of the browser's by its name. Where it is forbidden, even looking at it throws. */
const storeOf = (name) => ({
  get: (key) => attempt(() => window[name].getItem(key)) ?? null,
  set: (key, value) => attempt(() => (window[name].setItem(key, value), true)) ?? false,
  remove: (key) => attempt(() => window[name].removeItem(key)),
  keys: () => attempt(() => Object.keys(window[name])) ?? [],

  /** What was set as JSON, by name; nothing where there is none. */
  fields: (key) => Object(attempt(() => JSON.parse(window[name].getItem(key)))),
});

function attempt(act) {
  try {
    return act();
  } catch {
    return undefined;
  }
}

/** What this tab remembers over a reload. */
export const tab = storeOf("sessionStorage");
const browser = storeOf("localStorage");

/** A chat that nothing was said in yet. */
export function newChat() {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, title: "", at: Date.now(), messages: [] };
}

/** What a chat is called: as the reader named it, or how it began. */
export function titleOf(chat) {
  const first = chat.title || chat.messages[0]?.content || "New chat";
  const line = first.replace(/\s+/g, " ").trim();
  return line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH)} …` : line;
}

export const chats = {
  /** All that are kept, the newest first. */
  all() {
    const all = browser.keys().filter((key) => key.startsWith(CHAT));
    return all.map(read).filter(Boolean).sort((a, b) => b.at - a.at);
  },

  get: (id) => read(CHAT + id),

  /** Keep a chat as it is now; the oldest others make room. False: it cannot be kept. */
  save(chat) {
    const text = JSON.stringify(chat);
    if (text.length > MOST_CHARACTERS) return false;
    const others = this.all().filter((one) => one.id !== chat.id);
    let total = text.length;
    const stay = others.filter((one, i) => i < MOST_CHATS - 1 && (total += JSON.stringify(one).length) <= MOST_CHARACTERS);
    for (const one of others) if (!stay.includes(one)) this.remove(one.id);
    while (!browser.set(CHAT + chat.id, text)) {
      if (!stay.length) return false;
      this.remove(stay.pop().id);
    }
    return true;
  },

  remove: (id) => browser.remove(CHAT + id),

  /** Call `act(id)` when another tab changes or removes a chat; null: all of them. */
  onChange(act) {
    addEventListener("storage", ({ key, storageArea }) => {
      if (storageArea !== attempt(() => localStorage)) return;
      if (key === null || key.startsWith(CHAT)) act(key && key.slice(CHAT.length));
    });
  },
};

/** The chat under a key, as we write it; null for anything else. */
function read(key) {
  const chat = browser.fields(key);
  const isText = (value) => typeof value === "string";
  const isMessage = (one) => (one?.role === "user" || one?.role === "assistant") && isText(one.content);
  const isOurs = CHAT + chat.id === key && isText(chat.title) && Number.isFinite(chat.at);
  if (!isOurs || !Array.isArray(chat.messages) || !chat.messages.every(isMessage)) return null;
  const messages = chat.messages.map(({ role, content, thought, note }) => ({
    role, content, thought: isText(thought) ? thought : "", note: isText(note) ? note : "",
  }));
  return { id: chat.id, title: chat.title, at: chat.at, messages };
}
