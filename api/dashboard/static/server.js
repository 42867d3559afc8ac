// What the page asks of the server: its routes, with errors as one line of text. Must not know the page.

const RETRY_MS = 2000;

// The JSON of a route. Throws an Error with the server's own message.
export async function call(method, path, body) {
  const options = { method, headers: body === undefined ? {} : { "Content-Type": "application/json" } };
  if (body !== undefined) options.body = JSON.stringify(body);
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("the server does not answer");
  }
  return answer(response);
}

async function answer(response) {
  const value = await response.json().catch(() => ({}));
  if (response.ok) return value;
  if (response.status === 401) location.assign("/login");
  throw new Error(value.error?.message ?? `${response.status} ${response.statusText}`);
}

// Follows /events: `onRecords(records)`, `onNow(state)`, and `onState(text)` with "" while all is well. When the stream breaks,
// `onBreak()` is called and has to begin anew.
export function follow(after, { onRecords, onNow, onState, onBreak }) {
  const source = new EventSource(`/events?after=${after}`);
  source.onopen = () => onState("");
  source.onmessage = (event) => onRecords(JSON.parse(event.data));
  source.addEventListener("now", (event) => onNow(JSON.parse(event.data)));
  source.onerror = async () => {
    source.close();
    onState(await why());
    setTimeout(onBreak, RETRY_MS);
  };
  return () => {
    source.onerror = null;
    source.close();
  };
}

// EventSource does not tell why it was refused; a plain call does.
async function why() {
  const stop = new AbortController();
  try {
    const response = await fetch("/events", { signal: stop.signal });
    if (response.ok) return "the stream broke off; trying again";
    const value = await response.json();
    return value.error.message;
  } catch {
    return "the server does not answer; trying again";
  } finally {
    stop.abort();
  }
}

// The pieces of a completion as they come. Throws an Error with the server's own message.
export async function* complete(prompt, maxTokens, signal) {
  const models = await call("GET", "/v1/models");
  const response = await fetch("/v1/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      model: models.data[0].id, prompt, max_tokens: maxTokens, temperature: 0.6, top_k: 40, ignore_eos: true, stream: true,
    }),
    signal,
  });
  if (!response.ok) await answer(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (held + value).split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      for (const choice of chunk.choices) yield choice.text;
    }
  }
}
