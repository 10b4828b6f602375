"use strict";
// The page of `dllm-hf serve`: sends a request, shows its drafts as they come, and replays them.

const $ = (id) => document.getElementById(id);
const PATHS = { complete: "/v1/completions", infill: "/v1/infill", chat: "/v1/chat/completions" };
const LABELS = {
  complete: "Text to continue",
  infill: "Text with blanks: a _ for each token to fill",
  chat: "Your message",
};
const EXAMPLES = { complete: "ROMEO:", infill: "O Romeo, Romeo! wherefore ___ ____ Romeo?", chat: "" };
const FRAME_MS = 60;

let turns = []; // of the conversation
let frames = []; // of the last generation: each a list of texts, null where a position is open
let given = ""; // what stands before the canvas
let spans = []; // one for each position
let logprobs = []; // of tokens that are final, by position
let running = null; // an AbortController
let playing = null; // a timer

// --- the canvas

function settledAt(frame, index) {
  // The step at which a position settled, as far as the frames up to this one tell.
  for (let step = frame; step > 0; step--) if (frames[step - 1][index] == null) return step;
  return 0;
}

function probability(index) {
  return logprobs[index] === undefined ? "" : `, probability ${Math.exp(logprobs[index]).toFixed(3)}`;
}

function note(choice, length) {
  // Log-probabilities of an event, in the form of its endpoint. `length`: of the canvas.
  const of = (found) => found.content?.map((each) => each.logprob) ?? found.token_logprobs;
  const added = choice.logprobs ? of(choice.logprobs) : [];
  if (!choice.fills) return logprobs.push(...added);
  for (const fill of choice.fills) of(fill.logprobs).forEach((value, index) => { logprobs[fill.start + index] = value; });
  added.forEach((value, index) => { logprobs[length - added.length + index] = value; });
}

function show(frame) {
  const tokens = frames[frame], before = frames[Math.max(frame - 1, 0)], first = tokens.indexOf(null);
  while (spans.length > tokens.length) spans.pop().remove();
  while (spans.length < tokens.length) spans.push($("canvas").appendChild(document.createElement("span")));
  tokens.forEach((token, index) => {
    const isOpen = token === null, wasOpen = frames[0][index] === null || frames[0][index] === undefined;
    let name = "final";
    if (isOpen) name = "mask";
    else if (!wasOpen) name = "given";
    else if (before[index] === null && frame) name = first >= 0 && index > first ? "island new" : "new";
    else if (first >= 0 && index > first) name = "island";
    const text = isOpen ? "▒" : token;
    if (spans[index].textContent !== text) spans[index].textContent = text;
    if (spans[index].className !== name) spans[index].className = name;
    spans[index].title = isOpen || !wasOpen ? "" : `settled in step ${settledAt(frame, index)}${probability(index)}`;
  });
  $("frame").value = frame;
  $("where").value = `step ${frame} of ${frames.length - 1}`;
}

function begin(text) {
  frames = []; spans = []; logprobs = []; given = text;
  $("result").hidden = false;
  $("canvas").replaceChildren();
  $("numbers").replaceChildren();
  $("where").value = "";
  if (given) {
    const span = $("canvas").appendChild(document.createElement("span"));
    span.className = "given";
    span.textContent = given;
  }
  $("frame").disabled = $("play").disabled = true;
}

function add(tokens) {
  // A step may transfer nothing.
  if (frames.length && JSON.stringify(frames[frames.length - 1]) === JSON.stringify(tokens)) return;
  frames.push(tokens);
  $("frame").max = frames.length - 1;
  show(frames.length - 1);
}

function stopPlaying() {
  clearInterval(playing);
  playing = null;
  $("play").textContent = "▶";
}

function play() {
  if (playing !== null) return stopPlaying();
  let frame = Number($("frame").value) === frames.length - 1 ? 0 : Number($("frame").value);
  $("play").textContent = "❚❚";
  show(frame);
  playing = setInterval(() => {
    if (frame === frames.length - 1) return stopPlaying();
    show(++frame);
  }, FRAME_MS);
}

function tell(numbers) {
  $("numbers").replaceChildren(...Object.entries(numbers).map(([name, value]) => {
    const pair = document.createElement("div");
    const term = pair.appendChild(document.createElement("dt"));
    const data = pair.appendChild(document.createElement("dd"));
    term.textContent = name;
    data.textContent = value;
    return pair;
  }));
}

function fail(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

// --- requests

function mode() {
  return document.querySelector("input[name=mode]:checked").value;
}

function options() {
  const chosen = {};
  for (const field of $("options").querySelectorAll("input, select")) {
    if (field.value === "") continue;
    if (!field.reportValidity()) throw new Error(`${field.labels[0].textContent.trim()}: ${field.validationMessage}`);
    chosen[field.name] = field.type === "number" ? Number(field.value) : field.value;
  }
  return chosen;
}

function bodyOf(prompt) {
  const body = { ...options(), stream: true, stream_drafts: true, stream_options: { include_usage: true } };
  if (mode() === "chat") return { ...body, logprobs: true, messages: [...turns, { role: "user", content: prompt }] };
  if (mode() === "infill") return { max_tokens: 0, ...body, logprobs: 0, prompt, blank: "_" };
  return { ...body, logprobs: 0, prompt };
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
    }
  }
}

async function messageOf(response) {
  try {
    const { error } = await response.json();
    return error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

async function generate(prompt) {
  const chosen = mode(), body = bodyOf(prompt), start = performance.now();
  let text = "", first = null, reason = null;
  begin(chosen === "complete" ? prompt : "");
  running = new AbortController();
  const response = await fetch(PATHS[chosen], {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal: running.signal,
  });
  if (!response.ok) throw new Error(await messageOf(response));
  for await (const event of eventsOf(response)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0];
    if (event.draft) add(event.draft.tokens);
    if (choice) {
      const added = choice.text ?? choice.delta.content ?? "";
      if (added && first === null) first = performance.now() - start;
      text += added;
      note(choice, event.draft?.tokens.length);
      reason = choice.finish_reason ?? reason;
    }
    if (event.usage) {
      const { diffusion, completion_tokens: tokens } = event.usage;
      tell({
        "forward passes (NFE)": diffusion.forward_passes,
        "denoising steps": diffusion.denoising_steps,
        "tokens per forward": diffusion.tokens_per_forward.toFixed(2),
        "new tokens": tokens,
        "first text": first === null ? "–" : `${(first / 1000).toFixed(2)} s`,
        "in all": `${((performance.now() - start) / 1000).toFixed(2)} s`,
        "ended by": reason,
      });
    }
  }
  if (frames.length) show(Number($("frame").value)); // with what is known now
  if (chosen === "chat") {
    turns.push({ role: "user", content: prompt }, { role: "assistant", content: text });
    showTurns();
    $("prompt").value = "";
  }
}

async function run() {
  if (running) return;
  stopPlaying();
  fail("");
  $("run").disabled = true;
  $("stop").disabled = false;
  try {
    await generate($("prompt").value);
  } catch (error) {
    if (error.name !== "AbortError") fail(error instanceof TypeError ? "The server cannot be reached." : error.message);
  } finally {
    running = null;
    $("run").disabled = false;
    $("stop").disabled = true;
    $("frame").disabled = $("play").disabled = frames.length < 2;
    if (!frames.length) $("result").hidden = true;
  }
}

// --- the form

function showTurns() {
  $("turns").replaceChildren(...turns.map(({ role, content }) => {
    const item = document.createElement("li");
    item.dataset.role = role;
    item.textContent = content;
    return item;
  }));
  $("forget").hidden = !turns.length || mode() !== "chat";
}

function changeMode() {
  const chosen = mode();
  $("prompt-label").textContent = LABELS[chosen];
  $("turns").hidden = chosen !== "chat";
  if (Object.values(EXAMPLES).includes($("prompt").value)) $("prompt").value = EXAMPLES[chosen];
  showTurns();
}

async function describe() {
  const response = await fetch("/v1/models");
  if (!response.ok) throw new Error(await messageOf(response));
  const [model] = (await response.json()).data;
  $("model").textContent = `${model.id} · ${model.diffusion.model_type} · ${model.max_model_len} positions`;
  const fields = $("options");
  for (const name of ["max_tokens", "temperature", "block_length"]) {
    fields.querySelector(`[name=${name}]`).placeholder = model.diffusion[name] ?? "";
  }
  const strategies = fields.querySelector("[name=remasking_strategy]");
  for (const name of model.diffusion.remasking_strategies) strategies.add(new Option(name));
  const chat = document.querySelector("input[value=chat]");
  chat.disabled = !model.diffusion.has_chat_template;
  if (chat.disabled) chat.parentElement.title = "The model has no chat template.";
  const fill = document.querySelector("input[value=infill]");
  fill.disabled = model.diffusion.mask === null;
  if (!chat.disabled) chat.checked = true;
  changeMode();
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); run(); });
$("stop").addEventListener("click", () => running?.abort());
$("forget").addEventListener("click", () => { turns = []; showTurns(); });
$("play").addEventListener("click", play);
$("frame").addEventListener("input", () => { stopPlaying(); show(Number($("frame").value)); });
$("modes").addEventListener("change", changeMode);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); run(); }
  if (event.key === "Escape") running?.abort();
});
$("prompt").value = EXAMPLES.complete;
describe().catch((error) => fail(error.message));
