// Owns the conversation that is shown: its messages, the answer that is being made, and what can be done
// with each: copied, edited, answered again.

import { events, Refusal } from "./asking.js";
import { $, button, copyButton, element } from "./dom.js";
import { show } from "./markdown.js";
import { newChat } from "./store.js";

const NEAR_END = 60; // pixels: the end is in sight

const count = (number) => number.toLocaleString("en");

/** Change the page, and stay at the conversation's end if that is what was in sight. */
function keepInSight(change) {
  const box = $("scroll");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_END;
  change();
  if (atEnd) box.scrollTop = box.scrollHeight;
}

/** An answer's place on the page, and what it shows as the answer comes. */
class Answer {
  constructor(onAgain) {
    this.text = this.thought = "";
    this.tokens = 0;
    this.began = performance.now();
    this.thinking = element("div", "text");
    this.folded = element("details", "thought", element("summary", {}, "What it thought"), this.thinking);
    this.body = element("div", "text");
    this.note = element("p", "note");
    this.tools = element("div", "tools", copyButton(() => this.text), button("Answer again", "again", onAgain));
    const who = element("span", "unseen", "Answer: ");
    this.item = element("li", "message assistant", who, this.folded, this.body, this.note, this.tools);
    $("messages").append(this.item);
    this.draw();
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
      this.tools.hidden = !this.text;
      show(this.thinking, this.thought);
      show(this.body, this.text);
    });
  }

  /** An answer that was made earlier. */
  remember({ content, thought, note }) {
    [this.text, this.thought] = [content, thought];
    this.draw();
    this.note.textContent = note;
  }

  /** The end: by itself, by the reader (`stopped`), or by an error, which is shown as `problem`. */
  end(stopped, problem) {
    cancelAnimationFrame(this.frame);
    this.draw();
    this.item.classList.remove("busy");
    keepInSight(() => {
      this.note.textContent = this.figures(stopped, problem);
      if (problem) this.item.append(problem);
    });
    if (!problem) $("said").textContent = stopped ? "Stopped." : `Answer: ${this.body.textContent}`;
  }

  figures(stopped, problem) {
    if (!this.first) return stopped ? "stopped" : "";
    const made = this.usage?.completion_tokens ?? this.tokens;
    const seconds = (performance.now() - this.first) / 1000;
    const wait = ((this.first - this.began) / 1000).toFixed(2);
    const parts = [`${count(made)} ${made === 1 ? "token" : "tokens"}`, `first after ${wait} s`];
    if (made > 1 && seconds > 0) parts.push(`${count(Math.round((made - 1) / seconds))} per second`);
    const cached = this.usage?.prompt_tokens_details?.cached_tokens;
    if (cached) parts.push(`${count(cached)} of ${count(this.usage.prompt_tokens)} of the prompt cached`);
    if (stopped) parts.push("stopped");
    else if (!problem && this.reason === "length") parts.push("cut: no more tokens allowed");
    return parts.join(" · ");
  }
}

export class Conversation {
  /**
   * `settings()`: the system prompt, and the request's fields; `onChange(chat)`: there is more to keep;
   * `onKey()`: the server asks for a key.
   */
  constructor({ settings, onChange, onKey }) {
    Object.assign(this, { settings, onChange, onKey });
    this.chat = newChat();
    this.answering = null; // { stop: AbortController, answer: Answer }
  }

  get messages() {
    return this.chat.messages;
  }

  /** Show a chat: one that was kept, or a new one. An answer under way is stopped and kept. */
  open(chat = newChat()) {
    this.leave();
    this.chat = chat;
    $("messages").replaceChildren();
    $("welcome").hidden = this.messages.length > 0;
    for (const message of this.messages) {
      if (message.role === "user") this.showQuestion(message);
      else this.newAnswer().remember(message);
    }
    if (this.messages.at(-1)?.role === "user") {
      const answer = this.newAnswer();
      answer.item.append(this.problem("This was not answered.", answer));
    }
    $("scroll").scrollTop = $("scroll").scrollHeight;
  }

  /** Stop the answer under way, and keep what there is of it, unless the chat is to go. */
  leave(isKept = true) {
    const left = this.answering;
    if (!left) return;
    this.answering = null;
    left.stop.abort();
    this.setBusy(false);
    left.answer.end(true);
    if (isKept) this.addAnswer(left.answer);
  }

  stop() {
    this.answering?.stop.abort();
  }

  send(text) {
    if (this.answering || !text.trim()) return;
    const message = { role: "user", content: text, thought: "", note: "" };
    this.messages.push(message);
    $("welcome").hidden = true;
    this.showQuestion(message);
    this.answer();
  }

  showQuestion(message) {
    const edit = button("Edit", "edit", () => this.edit(item, message));
    const tools = element("div", "tools", copyButton(() => message.content), edit);
    const text = element("p", {}, message.content);
    const item = element("li", "message user", element("span", "unseen", "You: "), text, tools);
    $("messages").append(item);
  }

  /** Let a question be written anew; what was said after it goes when it is sent. */
  edit(item, message) {
    if (this.answering) return;
    const field = element("textarea", { rows: 1, value: message.content, ariaLabel: "Edit your message" });
    const close = () => {
      form.remove();
      item.classList.remove("edited");
      item.querySelector(".edit").focus();
    };
    const send = (event) => {
      event.preventDefault();
      if (this.answering || !field.value.trim()) return;
      const { messages } = this;
      messages.length = messages.indexOf(message);
      while (item.nextSibling) item.nextSibling.remove();
      item.remove();
      this.send(field.value);
      $("ask").focus();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
      if (event.key !== "Escape") return;
      event.stopPropagation();
      close();
    });
    const row = element("div", "row", button("Cancel", "quiet", close), element("button", {}, "Send again"));
    const form = element("form", { className: "editing", onsubmit: send }, field, row);
    item.classList.add("edited");
    item.append(form);
    field.focus();
    field.style.height = `${field.scrollHeight + 2}px`;
  }

  newAnswer() {
    const answer = new Answer(() => this.again(answer));
    return answer;
  }

  /** Have the last question answered again, in this answer's place. */
  again(answer) {
    if (this.answering) return;
    if (this.messages.at(-1)?.role === "assistant") this.messages.pop();
    answer.item.remove();
    $("ask").focus();
    this.answer();
  }

  /** Have the conversation's next message made, as it stands. */
  async answer() {
    const answer = this.newAnswer();
    const own = (this.answering = { stop: new AbortController(), answer });
    const { signal } = own.stop;
    answer.item.classList.add("busy");
    this.setBusy(true);
    this.changed();
    $("scroll").scrollTop = $("scroll").scrollHeight;
    $("said").textContent = "Answering.";
    let refusal = null;
    try {
      const { system, ...fields } = this.settings();
      const said = this.messages.map(({ role, content }) => ({ role, content }));
      const messages = system ? [{ role: "system", content: system }, ...said] : said;
      const body = { messages, stream: true, stream_options: { include_usage: true }, ...fields };
      for await (const told of events("/v1/chat/completions", { body, signal })) answer.take(told);
    } catch (error) {
      if (!signal.aborted) refusal = error instanceof Refusal ? error : new Refusal(0, String(error));
    }
    if (this.answering !== own) return; // another chat is open
    this.answering = null;
    this.setBusy(false);
    answer.end(signal.aborted, refusal && this.problem(refusal.message, answer));
    this.addAnswer(answer);
    if (refusal?.status === 401) this.onKey();
  }

  addAnswer({ text, thought, note }) {
    if (text) this.messages.push({ role: "assistant", content: text, thought, note: note.textContent });
    this.changed();
  }

  changed() {
    this.chat.at = Date.now();
    this.onChange(this.chat);
  }

  /** What went wrong, in the answer's place, and a way to try again. */
  problem(what, answer) {
    const again = button("Try again", "quiet", () => this.again(answer));
    return element("div", { className: "problem", role: "alert" }, element("p", {}, what), again);
  }

  setBusy(busy) {
    $("messages").setAttribute("aria-busy", busy);
    const hadFocus = document.activeElement === (busy ? $("send") : $("stop"));
    $("send").hidden = busy;
    $("stop").hidden = !busy;
    if (hadFocus) $(busy ? "stop" : "ask").focus();
  }
}
