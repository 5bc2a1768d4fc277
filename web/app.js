/**
 * The page itself: choose a model, wait for it, talk to it. All work is done by realm.js; this file moves what it
 * says to the screen. Model output reaches the document as text nodes only (markdown.js).
 */

import { render } from "./markdown.js";
import { Realm } from "./realm.js";

const $ = (id) => document.getElementById(id);
const VIEWS = ["start", "loading", "chat"];
const DEFAULTS = {
  system: "",
  temperature: 0.7,
  top_k: 0,
  top_p: 0.95,
  min_p: 0,
  repetition_penalty: 1,
  max_tokens: null,
  seed: null,
};
const STAGES = {
  download: "Downloading",
  store: "Copying into this browser",
  boot: "Starting Python",
  load: "Loading onto the GPU",
  compile: "Compiling kernels",
};

let realm = null; // the loaded model
let history = []; // [{role, content}] of this conversation, without the system prompt
let writing = false;
let loading = null; // AbortController of the load under way
let usable = true; // there is a GPU
let settings = { ...DEFAULTS, ...readSettings() };

// ---------------------------------------------------------------- small things

function show(view) {
  for (const name of VIEWS) $(name).hidden = name !== view;
  document.body.dataset.view = view;
  $("new-chat").hidden = view !== "chat";
  $("model-button").hidden = view !== "chat";
  $("back").hidden = !realm;
}

/** @param {"error" | "warn"} kind */
function notify(message, kind = "error", { sticky = false } = {}) {
  const box = make("div", { className: `notice ${kind}` }, make("span", {}, message));
  if (!sticky) {
    const close = make("button", { type: "button", className: "button", ariaLabel: "Dismiss" }, "✕");
    close.onclick = () => box.remove();
    box.append(close);
  }
  $("notices").append(box);
}

const clearNotices = () => document.querySelectorAll(".notice:has(button)").forEach((box) => box.remove());

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function bytes(n) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let power = 0;
  for (; n >= 1000 && power < units.length - 1; power += 1) n /= 1000;
  return `${n < 10 && power ? n.toFixed(1) : Math.round(n)} ${units[power]}`;
}

function readSettings() {
  try {
    return JSON.parse(localStorage.getItem("realm-settings") ?? "{}");
  } catch {
    return {};
  }
}

// ---------------------------------------------------------------- the GPU

async function lookForGpu() {
  const adapter = await Realm.adapter();
  $("adapter-name").textContent = adapter.name ?? "no WebGPU";
  $("adapter-dot").className = `dot ${adapter.available ? (adapter.fallback ? "warn" : "good") : "bad"}`;
  usable = adapter.available;
  for (const control of document.querySelectorAll("#own input, #own button")) control.disabled = !usable;
  if (!adapter.available) {
    notify(
      !isSecureContext
        ? "WebGPU works on https:// and http://localhost only; open this page by one of these."
        : adapter.api
          ? "The browser knows WebGPU but offers no GPU. Turn on hardware acceleration and update the graphics driver; in " +
            "Chrome on Linux also try chrome://flags/#enable-unsafe-webgpu. Models cannot run here until then."
          : "This browser has no WebGPU. Use a current Chrome or Edge, Firefox 141 or later, or Safari 26 or later.",
      "error",
      { sticky: true },
    );
  } else if (adapter.fallback) {
    notify(`WebGPU runs on the processor here (${adapter.name}), not on a GPU: answers will be very slow.`, "warn");
  }
}

// ---------------------------------------------------------------- choosing

async function offered() {
  try {
    const response = await fetch("models.json");
    return response.ok ? await response.json() : [];
  } catch {
    return [];
  }
}

async function listModels() {
  const [server, kept] = await Promise.all([
    offered(),
    Realm.models().catch((error) => (notify(error.message, "warn"), [])),
  ]);
  const urlOf = (model) => new URL(`models/${encodeURIComponent(model.file)}`, location.href).href;
  const byUrl = new Map(kept.map((model) => [model.url, model]));

  $("offered").hidden = server.length === 0;
  $("offered-list").replaceChildren(
    ...server.map((model, i) => {
      const have = byUrl.get(urlOf(model));
      const fact = have?.complete && have.bytes === model.size ? "already in this browser" : "downloaded once, then kept";
      const start = make("button", { type: "button", className: `button ${i ? "" : "primary"}`, disabled: !usable }, "Start chatting");
      start.onclick = () => load(urlOf(model), model.name, { size: model.size });
      return row(model.name, `${bytes(model.size)} · ${fact}`, start);
    }),
  );

  $("kept").hidden = kept.length === 0;
  $("kept-total").hidden = kept.length < 2;
  $("kept-total").textContent = `${bytes(kept.reduce((sum, model) => sum + model.bytes, 0))} in all`;
  $("kept-list").replaceChildren(
    ...kept.map((model) => {
      const of = model.size === null ? "" : ` of ${bytes(model.size)}`;
      const go = make("button", { type: "button", className: "button" }, model.complete ? "Load" : "Resume");
      go.disabled = !usable || !(model.complete || model.url);
      go.onclick = () => load(model.complete ? model.name : model.url, model.name);
      const drop = make("button", { type: "button", className: "button", ariaLabel: `Delete ${model.name}` }, "Delete");
      drop.onclick = async () => {
        if (!confirm(`Delete ${model.name} (${bytes(model.bytes)}) from this browser?`)) return;
        await Realm.remove(model.name).catch((error) => notify(error.message));
        await listModels();
      };
      return row(model.name, model.complete ? bytes(model.bytes) : `${bytes(model.bytes)}${of}, incomplete`, go, drop);
    }),
  );
}

function row(name, fact, ...buttons) {
  const about = make("div", { className: "about" }, make("span", {}, name), make("span", { className: "quiet" }, fact));
  return make("li", {}, about, make("div", { className: "actions" }, ...buttons));
}

// ---------------------------------------------------------------- loading

async function load(source, title, options = {}) {
  if (loading || writing || !usable) return;
  clearNotices();
  loading = new AbortController();
  $("loading-title").textContent = title;
  onProgress({ stage: "boot", done: 0, total: 0 });
  show("loading");
  try {
    if (realm) await realm.close(); // two models at once may not fit
    realm = null;
    realm = await Realm.load(source, { ...options, onProgress, signal: loading.signal });
    navigator.storage?.persist?.().catch(() => {}); // ask not to be evicted; a refusal changes nothing
    $("model-name").textContent = realm.info.file.replace(/\.gguf$/i, "");
    $("model-size").textContent = `${bytes(realm.info.size)} · ${realm.info.context} tokens of context`;
    $("adapter-name").textContent = realm.info.adapter;
    newChat();
    show("chat");
    $("prompt").focus();
  } catch (error) {
    show("start");
    if (error.name !== "AbortError") notify(error.message.includes(title) ? error.message : `${title}: ${error.message}`);
    await listModels();
  } finally {
    loading = null;
  }
}

function onProgress({ stage, done, total, rate, label }) {
  if (stage === "room") return; // how many tokens the cache holds: nothing to wait for
  $("stage").textContent = STAGES[stage] ?? label ?? stage;
  const counted = stage === "compile" ? (n) => String(n) : bytes;
  if (total) {
    $("progress").max = total;
    $("progress").value = done;
  } else {
    $("progress").removeAttribute("value");
  }
  $("amount").textContent = total ? `${counted(done)} of ${counted(total)}` : done ? counted(done) : "";
  $("rate").textContent = rate ? `${bytes(rate)}/s` : "";
}

function loadFile(file) {
  load(file, file.name, { keep: $("keep").checked });
}

// ---------------------------------------------------------------- talking

function newChat() {
  realm?.stop();
  history = [];
  $("log").replaceChildren();
  $("empty").hidden = false;
}

function addMessage(role) {
  const body = make("div", { className: "body" });
  const item = make("li", { className: `message ${role}` }, make("span", { className: "hidden" }, role === "user" ? "You:" : "Model:"), body);
  $("log").append(item);
  $("empty").hidden = true;
  return { item, body };
}

function ask(text) {
  history.push({ role: "user", content: text });
  addMessage("user").body.textContent = text;
  return answer();
}

async function answer() {
  const conversation = history;
  const { item, body } = addMessage("assistant");
  item.ariaBusy = "true";
  setWriting(true);
  scrollDown(true);

  const { system, ...sampling } = settings;
  const options = Object.fromEntries(Object.entries(sampling).filter(([, value]) => value !== null));
  const messages = [...(system.trim() ? [{ role: "system", content: system.trim() }] : []), ...conversation];
  let text = "";
  let painted = 0;
  const caret = make("span", { className: "caret" });
  const paint = () => {
    painted = 0;
    body.replaceChildren(render(text));
    let end = body; // the caret goes where the next letter will
    while (end.lastElementChild?.matches("p, ul, ol, li, pre, pre code, blockquote, h3, h4, h5, h6")) end = end.lastElementChild;
    end.append(caret);
    scrollDown();
  };
  paint();
  let failure = null;
  try {
    for await (const piece of realm.chat(messages, options)) {
      text += piece;
      painted ||= requestAnimationFrame(paint);
    }
  } catch (error) {
    failure = error;
  }
  cancelAnimationFrame(painted);
  body.replaceChildren(render(text));
  item.ariaBusy = "false";
  setWriting(false);
  if (history !== conversation) return; // a new chat began meanwhile
  if (!text && !failure) body.append(make("p", { className: "quiet" }, "(no text)"));
  if (failure) item.append(make("p", { className: "error", role: "alert" }, failure.message));
  body.hidden = !text && Boolean(failure);
  if (text) history.push({ role: "assistant", content: text });
  item.append(facts(item, text, failure ? null : realm.stats));
  scrollDown();
}

/** The line below an answer: numbers, copy, and another try at the last one. */
function facts(item, text, stats) {
  document.querySelectorAll(".again").forEach((button) => button.remove());
  const copy = make("button", { type: "button", className: "button text" }, "Copy");
  copy.onclick = async () => {
    await navigator.clipboard.writeText(text);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  };
  const again = make("button", { type: "button", className: "button text again" }, "Try again");
  again.onclick = () => {
    if (writing) return;
    if (history.at(-1)?.role === "assistant") history.pop();
    item.remove();
    answer();
  };
  const numbers = make("span", { className: "numbers" }, stats ? describe(stats) : "");
  return make("div", { className: "facts" }, numbers, ...(text ? [copy] : []), again);
}

function describe({ predicted_per_second: rate, time_to_first_token_ms: first, completion_tokens: n, finish_reason: why }) {
  const digits = (x) => (x < 10 ? x.toFixed(1) : Math.round(x));
  return [
    rate ? `${digits(rate)} tok/s` : null,
    first ? `first token after ${first < 1000 ? `${Math.round(first)} ms` : `${digits(first / 1000)} s`}` : null,
    `${n} ${n === 1 ? "token" : "tokens"}`,
    { abort: "stopped", length: "cut at the longest length" }[why],
  ]
    .filter(Boolean)
    .join(" · ");
}

function setWriting(now) {
  writing = now;
  $("send").hidden = now;
  $("stop").hidden = !now;
  $("model-button").disabled = now;
}

let following = true;
function scrollDown(force = false) {
  const box = $("scroller");
  if (force) following = true;
  if (following) box.scrollTop = box.scrollHeight;
}

function send() {
  const text = $("prompt").value.trim();
  if (!text || writing || !realm) return;
  $("prompt").value = "";
  ask(text);
}

// ---------------------------------------------------------------- settings

function fillSettings() {
  for (const [name, value] of Object.entries(settings)) $("settings-form").elements[name].value = value ?? "";
}

function takeSettings() {
  for (const name of Object.keys(DEFAULTS)) {
    const field = $("settings-form").elements[name];
    if (!field.checkValidity()) continue;
    settings[name] = name === "system" ? field.value : field.value === "" ? null : Number(field.value);
  }
  try {
    localStorage.setItem("realm-settings", JSON.stringify(settings));
  } catch {
    // storage is off: they last as long as the page
  }
}

// ---------------------------------------------------------------- wiring

function wire() {
  $("file").onchange = ({ target }) => {
    const [file] = target.files;
    target.value = ""; // the same file may be chosen again
    if (file) loadFile(file);
  };
  $("url-form").onsubmit = (event) => {
    event.preventDefault();
    load($("url").value, $("url").value.split("/").pop() || "model");
  };
  $("cancel").onclick = () => loading?.abort();
  $("back").onclick = () => show("chat");
  $("model-button").onclick = async () => {
    await listModels();
    show("start");
  };
  $("new-chat").onclick = () => {
    newChat();
    $("prompt").focus();
  };

  $("composer").onsubmit = (event) => {
    event.preventDefault();
    send();
  };
  $("prompt").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  };
  $("stop").onclick = () => realm?.stop();
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && writing && !$("settings").open) realm?.stop();
  });
  $("ideas").onclick = ({ target }) => {
    if (target.matches(".idea") && !writing) ask(target.textContent);
  };
  $("scroller").onscroll = ({ target }) => {
    following = target.scrollHeight - target.scrollTop - target.clientHeight < 60;
  };

  $("settings-button").onclick = () => {
    fillSettings();
    $("settings").showModal();
  };
  $("settings").onclose = takeSettings;
  $("settings").onclick = ({ target }) => {
    if (target === $("settings")) $("settings").close(); // a click on the backdrop
  };
  $("defaults").onclick = () => {
    settings = { ...DEFAULTS };
    fillSettings();
  };

  let inside = 0; // dragenter and dragleave come for every element crossed
  const drag = (event, step) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    inside = Math.max(0, inside + step);
    $("dropping").hidden = inside === 0;
  };
  document.addEventListener("dragenter", (event) => drag(event, 1));
  document.addEventListener("dragover", (event) => drag(event, 0));
  document.addEventListener("dragleave", (event) => drag(event, -1));
  document.addEventListener("drop", (event) => {
    drag(event, -inside);
    const [file] = event.dataTransfer?.files ?? [];
    if (file) loadFile(file);
  });
}

wire();
show("start");
await lookForGpu().catch((error) => notify(error.message, "error", { sticky: true }));
await listModels();
if (usable) Realm.boot().catch((error) => notify(error.message, "error", { sticky: true })); // ready when needed
