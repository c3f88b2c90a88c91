const node = id => document.getElementById(id);
const random = () => [...crypto.getRandomValues(new Uint8Array(12))].map(byte => byte.toString(16).padStart(2, "0")).join("");
const voter = (() => {
  try { return localStorage.tunesmithVoter ??= random(); } catch { return random(); }
})();
let models = [], history = [], conversation = random(), turn = null, aborting = null, revealed = false, waitingCalls = [], results = [];

// What is served

function headers() {
  const key = node("key").value;
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
}

async function failure(response) {
  try { return (await response.json()).error.message; } catch { return `the server answered with status ${response.status}`; }
}

async function loadModels() {
  const status = node("status");
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    node("key-field").hidden = response.status !== 401 && !node("key").value;
    if (!response.ok) { status.textContent = await failure(response); return; }
    models = (await response.json()).data;
  } catch { status.textContent = "The server cannot be reached."; return; }
  const chosen = node("model").value;
  node("model").replaceChildren(...models.map(model => new Option(model.id + (model.ab ? " (A/B test)" : ""), model.id)));
  node("model").value = models.some(model => model.id === chosen) ? chosen : (models.find(model => model.ab) ?? models[0])?.id ?? "";
  const tests = models.filter(model => model.ab).length, own = new Set(models.filter(model => !model.ab).map(model => model.root ?? model.id)).size;
  status.textContent = `${own} ${own === 1 ? "model" : "models"}` + (tests ? `, ${tests} A/B ${tests === 1 ? "test" : "tests"}` : "");
  offerRivals();
}

const isTest = () => Boolean(models.find(model => model.id === node("model").value)?.ab);

function offerRivals() {
  const own = node("model").value, before = node("rival").selectedOptions[0]?.value;
  const options = isTest() ? [new Option("both models of the test, blind", "blind"), new Option("nobody", "")]
    : [new Option("nobody", ""), ...models.filter(model => !model.ab && model.id !== own).map(model => new Option(model.id, model.id))];
  node("rival").replaceChildren(...options);
  if (options.some(option => option.value === before)) node("rival").value = before;
  showRequest();
}

const asked = () => {
  const own = node("model").value, rival = node("rival").value;
  return rival === "blind" ? [`${own}/1`, `${own}/2`] : rival ? [own, rival] : [own];
};
const isBlind = () => node("rival").value === "blind" && !revealed;
const nameOf = (place, count) => count > 1 ? `${"AB"[place]}${isBlind() ? "" : ` · ${asked()[place]}`}` : asked()[place];

// The request

function tools() {
  const text = node("tools").value.trim(), problem = node("tools-problem");
  problem.hidden = true;
  if (!text) return [];
  try {
    const value = JSON.parse(text), list = Array.isArray(value) ? value : [value];
    return list.map(tool => tool.type === "function" ? tool : { type: "function", function: tool });
  } catch (error) {
    problem.textContent = `These are not tools: ${error.message}`;
    problem.hidden = false;
    node("settings").open = true;
    return null;
  }
}

function body(model, messages) {
  const system = node("system").value, declared = tools() ?? [];
  return {
    model, messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    temperature: Number(node("temperature").value) || 0, max_tokens: Number(node("max-tokens").value) || 512,
    ...(declared.length && { tools: declared }), user: conversation,
  };
}

function python(value, indent = "") {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const inner = indent + "    ", isList = Array.isArray(value);
  const parts = isList ? value.map(item => python(item, inner)) : Object.entries(value).map(([key, item]) => `${JSON.stringify(key)}: ${python(item, inner)}`);
  return parts.length ? `${isList ? "[" : "{"}\n${parts.map(part => inner + part + ",\n").join("")}${indent}${isList ? "]" : "}"}` : isList ? "[]" : "{}";
}

function showRequest() {
  const text = node("say").value.trim(), messages = [...history, ...(text || !history.length ? [{ role: "user", content: text || "Hello" }] : [])];
  const sent = body(asked()[0], messages), form = find("[data-form][aria-pressed=true]").dataset.form, key = node("key").value;
  if (form === "curl") {
    const json = JSON.stringify(sent, null, 2).replaceAll("'", "'\\''");
    node("code").textContent = `curl ${location.origin}/v1/chat/completions \\\n  -H 'Content-Type: application/json' \\\n${key ? "  -H \"Authorization: Bearer $TUNESMITH_KEY\" \\\n" : ""}  -d '${json}'`;
  } else {
    const lines = Object.entries(sent).map(([name, value]) => `    ${name}=${python(value, "    ")},`);
    node("code").textContent = `from openai import OpenAI\n\nclient = OpenAI(base_url="${location.origin}/v1", api_key=${key ? 'os.environ["TUNESMITH_KEY"]' : '"none"'})\nanswer = client.chat.completions.create(\n${lines.join("\n")}\n)\nprint(answer.choices[0].message.content)`;
    if (key) node("code").textContent = "import os\n\n" + node("code").textContent;
  }
}

// One answer

class Answer {
  constructor(place, count) {
    this.place = place; this.text = ""; this.calls = []; this.id = null; this.failed = false;
    this.card = make("article", "", "card answer busy");
    this.label = make("h3", nameOf(place, count));
    this.reasoning = make("div", "", "reasoning"); this.words = make("div", "", "words");
    this.callBox = make("pre"); this.callBox.hidden = true; this.reasoning.hidden = true;
    this.measured = make("p", "", "measured");
    this.card.append(this.label, this.reasoning, this.words, this.callBox, this.measured);
    this.card.setAttribute("aria-busy", "true");
  }

  async ask(model, messages, signal) {
    this.begun = performance.now();
    try {
      const response = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), signal, body: JSON.stringify({ ...body(model, messages), stream: true, stream_options: { include_usage: true } }) });
      if (!response.ok) throw new Error(await failure(response));
      await this.read(response.body.getReader());
    } catch (error) {
      if (error.name !== "AbortError") { this.failed = true; this.card.append(make("p", error.message, "error")); }
      else this.ended = "stopped";
    }
    this.card.classList.remove("busy");
    this.card.removeAttribute("aria-busy");
    this.measure();
  }

  async read(reader) {
    const decoder = new TextDecoder();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      rest += decoder.decode(value, { stream: !done });
      const events = rest.split(/\r?\n\r?\n/);
      rest = events.pop();
      for (const event of events) {
        const text = event.split(/\r?\n/).filter(line => line.startsWith("data:")).map(line => line.slice(5).trim()).join("\n");
        if (text && text !== "[DONE]") this.take(JSON.parse(text));
      }
      if (done) return;
    }
  }

  take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    const root = document.documentElement, following = root.scrollHeight - scrollY - innerHeight < 160;
    this.id ??= chunk.id;
    if (chunk.usage) this.usage = chunk.usage;
    const [choice] = chunk.choices ?? [];
    if (!choice) return;
    const { content, reasoning_content: reasoning, tool_calls: calls } = choice.delta ?? {};
    if (content || reasoning || calls) {
      this.last = performance.now();
      this.first ??= this.last;
    }
    if (reasoning) { this.reasoning.hidden = false; this.reasoning.textContent += reasoning; }
    if (content) { this.text += content; this.words.textContent = this.text; }
    for (const call of calls ?? []) {
      const whole = this.calls[call.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } };
      whole.id ||= call.id ?? "";
      whole.function.name ||= call.function?.name ?? "";
      whole.function.arguments += call.function?.arguments ?? "";
    }
    if (calls) { this.callBox.hidden = false; this.callBox.textContent = this.calls.map(call => `${call.function.name}(${call.function.arguments})`).join("\n"); }
    if (choice.finish_reason) this.ended = choice.finish_reason;
    this.measure();
    if (following) scrollTo({ top: root.scrollHeight, behavior: "instant" });
  }

  measure() {
    const parts = [], seconds = (this.last - this.first) / 1000, tokens = this.usage?.completion_tokens;
    if (this.first) parts.push(`first token ${((this.first - this.begun) / 1000).toFixed(2)} s`);
    // An answer that a guardrail held back comes at once: its speed is that of the whole request.
    if (tokens > 1 && seconds > 0.001) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
    else if (tokens && this.first) parts.push(`${(1000 * tokens / (this.last - this.begun)).toFixed(1)} tokens/s, prompt included`);
    if (tokens !== undefined) parts.push(`${tokens} tokens`);
    if (this.usage?.prompt_tokens_details?.cached_tokens) parts.push(`${this.usage.prompt_tokens_details.cached_tokens} of ${this.usage.prompt_tokens} prompt tokens cached`);
    if (this.ended && !["stop", "tool_calls"].includes(this.ended)) parts.push({ length: "cut at the most tokens", content_filter: "ended by a guardrail" }[this.ended] ?? this.ended);
    this.measured.textContent = parts.join(" · ");
  }

  get message() {
    return { role: "assistant", content: this.text, ...(this.calls.length && { tool_calls: this.calls }) };
  }
}

// The conversation

async function send(messages, shown) {
  if (tools() === null) return;
  settle();
  tell("");
  const models = asked(), box = make("div", "", "turn"), grid = make("div", "", "answers");
  const answers = models.map((_, place) => new Answer(place, models.length));
  box.append(make("p", shown, "said"), grid);
  grid.append(...answers.map(answer => answer.card));
  node("turns").append(box);
  history.push(...messages);
  const own = turn = { box, answers, preferred: null, added: messages.length };
  node("reveal").hidden = true;
  aborting = new AbortController();
  node("stop").hidden = false; node("send").disabled = true;
  box.scrollIntoView({ block: "nearest" });
  await Promise.all(answers.map((answer, place) => answer.ask(models[place], [...history], aborting.signal)));
  if (turn !== own) return; // a new conversation has begun meanwhile
  rest();
  offerVotes();
  awaitResults();
}

function rest() {
  aborting = null;
  node("stop").hidden = true; node("send").disabled = false;
}

// The answer with which the conversation goes on: the preferred one, else the first that did not fail.
const going = ({ answers, preferred }) =>
  answers[preferred] ?? answers.find(answer => !answer.failed && (answer.text || answer.calls.length));

function settle() {
  if (!turn) return;
  const next = going(turn);
  if (next) history.push(next.message); else history.length -= turn.added;
  turn.answers.forEach(answer => answer.card.classList.toggle("other", Boolean(next) && answer !== next));
  turn.box.querySelectorAll(".votes button").forEach(button => button.disabled = true);
  turn = null;
}

function awaitResults() {
  waitingCalls = going(turn)?.calls.slice() ?? []; results = [];
  showWaitingCall();
}

function showWaitingCall() {
  const [call] = waitingCalls;
  node("say-label").textContent = call ? `Result of ${call.function.name}` : "Your message";
  node("say").placeholder = call ? `Result of ${call.function.name}, or empty` : "Ask something";
}

function submit() {
  const text = node("say").value;
  if (aborting || (!text.trim() && !waitingCalls.length)) return;
  node("say").value = "";
  if (!waitingCalls.length) { send([{ role: "user", content: text }], text); return; }
  const call = waitingCalls.shift();
  results.push({ role: "tool", tool_call_id: call.id, name: call.function.name, content: text });
  showWaitingCall();
  if (!waitingCalls.length) send(results, results.map(result => `${result.name} → ${result.content}`).join("\n"));
}

function tell(text, place = "problem") {
  for (const each of ["problem", "hint"]) {
    node(each).textContent = each === place ? text : "";
    node(each).hidden = each !== place || !text;
  }
}

function begin() {
  aborting?.abort();
  rest();
  history = []; turn = null; conversation = random(); revealed = false; waitingCalls = []; results = [];
  node("turns").replaceChildren();
  node("reveal").hidden = true;
  tell(""); showWaitingCall(); showRequest();
}

// Votes

function offerVotes() {
  const { box, answers } = turn, done = answers.filter(answer => answer.id && !answer.failed && answer.ended !== "stopped");
  if (done.length !== answers.length) return;
  const bar = make("div", "", "votes");
  bar.setAttribute("role", "group");
  bar.setAttribute("aria-label", "Vote");
  const choices = answers.length > 1 ? [["A is better", "1", "first", 0], ["B is better", "2", "second", 1], ["No difference", "0", "tie", null]] : [["Good answer", "1", "up", 0], ["Bad answer", "2", "down", 0]];
  for (const [text, key, verdict, preferred] of choices) {
    const button = make("button", text, "choice");
    button.append(make("kbd", key));
    button.dataset.key = key;
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => vote(bar, button, verdict, preferred));
    bar.append(button);
  }
  bar.append(Object.assign(make("span", "", "soft"), { role: "status" }));
  box.append(bar);
  node("reveal").hidden = !isBlind();
  if (!node("say").value) { bar.tabIndex = -1; bar.focus({ preventScroll: true }); }
}

async function vote(bar, button, verdict, preferred) {
  const { answers } = turn, current = turn, status = bar.querySelector("[role=status]");
  const said = answers.length > 1 ? { first: answers[0].id, second: answers[1].id, preferred: verdict } : { id: answers[0].id, thumb: verdict };
  try {
    const response = await fetch("/v1/feedback", { method: "POST", headers: headers(), body: JSON.stringify({ ...said, user: voter, ...(revealed && { blind: false }) }) });
    if (!response.ok) throw new Error(await failure(response));
  } catch (error) { status.textContent = error.message; return; }
  bar.querySelectorAll("button").forEach(other => other.setAttribute("aria-pressed", String(other === button)));
  current.preferred = preferred;
  if (turn === current) awaitResults();
  const next = going(current);
  status.textContent = "Recorded, thank you." + (next && answers.length > 1 ? ` The conversation goes on with ${"AB"[next.place]}.` : "");
}

async function reveal() {
  const cards = turn?.answers ?? [];
  for (const answer of cards) {
    const response = await fetch(`/v1/feedback/${encodeURIComponent(answer.id)}`, { headers: headers() });
    if (!response.ok) { tell(await failure(response)); return; }
    answer.label.textContent = `${"AB"[answer.place]} · ${(await response.json()).model}`;
  }
  revealed = true;
  node("reveal").hidden = true;
  turn.box.querySelectorAll(".votes button").forEach(button => button.disabled = true);
  tell("To vote blind again, begin a new conversation.", "hint");
}

// Events

node("choices").addEventListener("submit", event => { event.preventDefault(); loadModels(); });
node("composer").addEventListener("submit", event => { event.preventDefault(); submit(); });
node("say").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); }
});
node("stop").addEventListener("click", () => aborting?.abort());
node("fresh").addEventListener("click", () => { begin(); node("say").focus(); });
node("reveal").addEventListener("click", reveal);
node("model").addEventListener("change", () => { node("rival").replaceChildren(); offerRivals(); begin(); });
node("rival").addEventListener("change", begin);
node("key").addEventListener("change", loadModels);
for (const input of all("textarea, .field input")) input.addEventListener("input", showRequest);
for (const button of all("[data-form]")) button.addEventListener("click", () => {
  all("[data-form]").forEach(other => other.setAttribute("aria-pressed", String(other === button)));
  showRequest();
});
node("request").addEventListener("toggle", showRequest);
node("copy").addEventListener("click", async () => {
  getSelection().selectAllChildren(node("code"));
  try { await navigator.clipboard.writeText(node("code").textContent); node("copied").textContent = "Copied."; } catch { node("copied").textContent = "Selected: copy it with the keyboard."; }
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape") aborting?.abort();
  if (event.target.closest("textarea, input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") { event.preventDefault(); node("say").focus(); }
  turn?.box.querySelector(`.votes button[data-key="${CSS.escape(event.key)}"]:enabled`)?.click();
});
loadModels();
node("say").focus();
