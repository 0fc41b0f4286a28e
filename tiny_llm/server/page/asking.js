// Owns the way to the server: the API key, its errors, its event streams. Knows no element of the page.

import { tab } from "./store.js";

const KEY = "tiny_llm.key";

/** What the server refused, in its own words. `status` is 0 where there was no answer at all. */
export class Refusal extends Error {
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

let held = ""; // where the tab may remember nothing

export const key = {
  get: () => tab.get(KEY) ?? held,
  set(value) {
    held = value;
    tab.set(KEY, value);
  },
  forget() {
    held = "";
    tab.remove(KEY);
  },
};

/** A response that is good; throws Refusal, and AbortError if `signal` ends it. */
export async function ask(path, { body, signal } = {}) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, {
      method: body ? "POST" : "GET", headers, signal, cache: "no-store",
      body: body && JSON.stringify(body),
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Refusal(0, "The server cannot be reached. Is it still running?");
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  throw refusalOf(told, answer.status) ?? new Refusal(answer.status, `The server said ${answer.status}.`);
}

function refusalOf(told, status) {
  const error = told?.error;
  return error ? new Refusal(status, String(error.message), error.code) : null;
}

/** The events of a stream as values, until its end. Throws as `ask` does, and for an error event. */
export async function* events(path, options) {
  const answer = await ask(path, options);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        if (options?.signal?.aborted) throw error;
        throw new Refusal(0, "The connection broke off.");
      });
      if (done) return;
      const pieces = (left + value).split("\n\n");
      left = pieces.pop();
      for (const piece of pieces) {
        if (!piece.startsWith("data: ") || piece === "data: [DONE]") continue;
        const told = JSON.parse(piece.slice(6));
        const refusal = refusalOf(told, 500);
        if (refusal) throw refusal;
        yield told;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
