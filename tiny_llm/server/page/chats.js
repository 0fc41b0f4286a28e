// Owns the list of the chats that are kept: opening, naming, deleting them.

import { $, button, element } from "./dom.js";
import { chats, titleOf } from "./store.js";

const when = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

/** A button that asks once more before it acts. */
function carefulButton(text, question, act) {
  const made = button(text, "quiet", () => {
    if (made.textContent === question) return act();
    made.textContent = question;
  });
  made.addEventListener("blur", () => (made.textContent = text));
  return made;
}

export class ChatList {
  /** `current()`: the chat that is shown; `onOpen(chat)`: show this one; `onGone(id)`: it is deleted. */
  constructor({ current, onOpen, onGone, onRename }) {
    Object.assign(this, { current, onOpen, onGone, onRename });
    $("open-chats").addEventListener("click", () => {
      this.show();
      $("chats").showModal();
    });
    $("chats").addEventListener("click", ({ target }) => {
      if (target === $("chats")) $("chats").close(); // beside it
    });
    $("chats-actions").prepend(carefulButton("Delete all", "Delete all chats?", () => this.deleteAll()));
  }

  show() {
    const all = chats.all();
    $("chat-list").replaceChildren(...all.map((chat) => this.entry(chat)));
    $("chats-words").textContent = all.length
      ? "They are kept in this browser alone."
      : "No chat is kept yet; they are kept in this browser alone.";
    $("chats-actions").hidden = !all.length;
  }

  entry(chat) {
    const open = button("", "open", () => {
      $("chats").close();
      this.onOpen(chats.get(chat.id) ?? chat);
    });
    open.append(element("span", {}, titleOf(chat)), element("small", {}, when.format(chat.at)));
    if (chat.id === this.current().id) open.ariaCurrent = "true";
    const remove = carefulButton("Delete", "Delete it?", () => {
      chats.remove(chat.id);
      this.onGone(chat.id);
      const next = item.nextSibling ?? item.previousSibling;
      this.show();
      if (next) $("chat-list").querySelector(".open")?.focus();
    });
    const rename = button("Rename", "quiet", () => this.rename(item, open, chat));
    const item = element("li", {}, open, rename, remove);
    return item;
  }

  rename(item, open, chat) {
    const field = element("input", { value: titleOf(chat), ariaLabel: "Name of the chat" });
    let isOver = false;
    const end = (isTaken) => {
      if (isOver) return;
      isOver = true;
      const kept = chats.get(chat.id) ?? chat;
      if (isTaken && field.value.trim()) {
        kept.title = field.value.trim();
        chats.save(kept);
        this.onRename(kept);
      }
      item.replaceWith(this.entry(kept));
    };
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.preventDefault(); // the dialog stays open
      end(event.key === "Enter");
    });
    field.addEventListener("blur", () => end(true));
    open.replaceWith(field);
    field.select();
    field.focus();
  }

  deleteAll() {
    for (const { id } of chats.all()) {
      chats.remove(id);
      this.onGone(id);
    }
    this.show();
  }
}
