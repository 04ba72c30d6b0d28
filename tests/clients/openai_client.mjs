// The official Node client against a gateway: base URL, key and model come as arguments; prints facts as JSON.
import OpenAI from "openai";

const [baseURL, apiKey, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "Hi" }];

const whole = await client.chat.completions.create({ model, messages, max_tokens: 50 });
const stream = await client.chat.completions.create({
  model, messages, max_tokens: 50, stream: true, stream_options: { include_usage: true },
});
let streamed = "";
let usage = null;
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
const text = await client.completions.create({ model, prompt: "Once", max_tokens: 50 });
const models = [];
for await (const one of client.models.list()) models.push(one.id);
const one = await client.models.retrieve(model);
let refused = null;
try {
  await client.chat.completions.create({ model: "none", messages });
} catch (error) {
  refused = [error.constructor.name, error.status, error.code];
}
console.log(JSON.stringify({
  whole: whole.choices[0].message.content, streamed, text: text.choices[0].text, models, one: one.id,
  cost: whole.usage.cost, streamed_cost: usage.cost, refused,
}));
