// openai for node, as its documentation uses it: chat, streams, tools, zod, responses, an abort, errors.
// node --test test.mjs, with URL (of a server) and GUARDED (of one that wants a key).
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { zodResponseFormat, zodResponsesFunction, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: `${process.env.URL}/v1`, apiKey: "none", maxRetries: 0 });
const asked = { model: "demo", temperature: 0, max_tokens: 300 };
const ASK = [{ role: "user", content: "What is a KV cache?" }];
const digit = z.number().int().min(0).max(9);
const Point = z.object({ x: digit, y: digit });
const Shape = z.object({ name: z.string().max(9), corner: Point, others: z.array(Point).max(2) });

test("a stream joins to the whole and tells usage", async () => {
  const whole = await client.chat.completions.create({ messages: ASK, ...asked });
  const options = { stream: true, stream_options: { include_usage: true } };
  let [text, usage] = ["", null];
  for await (const chunk of await client.chat.completions.create({ messages: ASK, ...asked, ...options })) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.match(text, /cache/);
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
});

test("the tools runner feeds results back", async () => {
  for (const stream of [false, true]) {
    const given = [];
    const calculator = {
      name: "calculator",
      description: "Compute an arithmetic expression.",
      parameters: {
        type: "object",
        properties: { expression: { type: "string", description: "For example 12 * 7." } },
        required: ["expression"],
      },
      parse: JSON.parse,
      function: ({ expression }) => (given.push(expression), "579"),
    };
    const messages = [{ role: "user", content: "What is 123 + 456?" }];
    const tools = [{ type: "function", function: calculator }];
    const runner = client.chat.completions.runTools({ messages, tools, stream, ...asked });
    assert.match(await runner.finalContent(), /579/);
    assert.deepEqual(given, ["123 + 456"]);
  }
});

test("zod: a form of nested objects", async () => {
  const messages = [{ role: "user", content: "Draw." }];
  const response_format = zodResponseFormat(Shape, "shape");
  const told = await client.chat.completions.parse({ messages, response_format, ...asked });
  Shape.parse(told.choices[0].message.parsed);
  const streamed = await client.chat.completions.stream({ messages, response_format, ...asked }).finalChatCompletion();
  assert.deepEqual(streamed.choices[0].message.parsed, told.choices[0].message.parsed);
});

test("responses: text, stream, zod, a demanded call", async () => {
  const common = { model: "demo", temperature: 0, max_output_tokens: 300 };
  const whole = await client.responses.create({ input: "What is a KV cache?", ...common });
  const streamed = await client.responses.stream({ input: "What is a KV cache?", ...common }).finalResponse();
  assert.match(whole.output_text, /cache/);
  assert.equal(streamed.output_text, whole.output_text);
  const text = { format: zodTextFormat(Shape, "shape") };
  Shape.parse((await client.responses.parse({ input: "Draw.", text, ...common })).output_parsed);
  const tools = [zodResponsesFunction({ name: "draw", parameters: Shape })];
  const called = await client.responses.parse({ input: "Draw.", tools, tool_choice: "required", ...common });
  Shape.parse(called.output.find((item) => item.type === "function_call").parsed_arguments);
});

test("a stream that is aborted ends its request", async () => {
  const stream = await client.chat.completions.create({ messages: ASK, ...asked, stream: true });
  for await (const _ of stream) break;
  const other = client.chat.completions.stream({ messages: ASK, ...asked });
  other.on("chunk", () => other.abort());
  await assert.rejects(other.done(), OpenAI.APIUserAbortError);
  await client.chat.completions.create({ messages: ASK, ...asked });
});

test("errors are its own kinds", async () => {
  const guarded = new OpenAI({ baseURL: `${process.env.GUARDED}/v1`, apiKey: "wrong", maxRetries: 0 });
  await assert.rejects(guarded.chat.completions.create({ messages: ASK, ...asked }), OpenAI.AuthenticationError);
  const messages = [{ role: "user", content: "word ".repeat(3000) }];
  await assert.rejects(client.chat.completions.create({ messages, ...asked }), { code: "context_length_exceeded" });
});
