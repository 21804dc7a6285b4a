/** The page: prompts, settings, results and history. The engine generates; viewer.js shows one image large. */

import * as engine from "./engine.js";
import * as history from "./history.js";
import { fileName, openViewer } from "./viewer.js";
import { zip } from "./zip.js";

const SAMPLING = ["temperature", "top_k", "top_p", "cond_scale"];
const HAS_MOUSE = !matchMedia("(pointer: coarse)").matches; // or at least no touch screen
const settings = {}; // exact values, which the sliders show; null: as the model recommends
const described = new Map(); // prompt → {tokens, unknown_words}
const empty = document.getElementById("empty"); // what the grid shows before the first images
let model = null; // what engine.model() returned
let start = null; // image to continue: a Blob, or null
let running = null; // AbortController of the generation in progress
let shown = []; // finished images of the grid
let saved = []; // images of the history, the newest first
let dragged = null; // image of this page that is being dragged: a Blob, or null
let typing = 0; // timer that counts tokens when the typing pauses

const $ = (id) => document.getElementById(id);
const element = (tag, properties) => Object.assign(document.createElement(tag), properties);
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

/** Show a sentence in the status line; wrong: as an error; retry: what the button "Try again" calls. */
function say(sentence, wrong = false, retry = null) {
  $("status").textContent = sentence;
  $("status").classList.toggle("wrong", wrong);
  $("left").textContent = "";
  $("retry").hidden = !retry;
  $("retry").onclick = retry;
}

/** Say what went wrong, and offer to try again if that can help. Ask for a token if the server wants one. */
function fail({ message, status }, retry) {
  say(message, true, [400, 413, 422].includes(status) ? null : retry);
  if (status !== 401) return;
  $("login_note").textContent = message;
  $("sign_in").onsubmit = () => {
    engine.signIn($("token").value.trim());
    $("token").value = "";
    retry();
  };
  $("login").showModal();
}

async function open() {
  try {
    model = await engine.model();
  } catch (error) {
    return fail(error, open);
  }
  say("");
  $("about").textContent = model.name;
  $("num_images").max = model.max_images;
  $("keep_rows").max = model.rows - 1;
  $("cond_scale").disabled = !model.guidable;
  if (model.recommended.top_k > 1) Object.assign($("top_k"), { min: 2, max: 1024, step: 1 }); // a number, not a share
  recommend();
  const example = (prompt) => element("button", { textContent: prompt, onclick: () => fillIn({ prompt }, true) });
  $("examples").replaceChildren(...model.examples.map(example));
  const link = Object.fromEntries(new URLSearchParams(location.search));
  if (!link.prompt) return count();
  window.history.replaceState(null, "", location.pathname); // so that a reload does not generate again
  return fillIn({ num_images: 1, ...link }, true);
}

/** Fill in the form with the values of an example, an image or a link; submit: and generate. */
function fillIn(values, submit) {
  $("prompt").value = values.prompt;
  if ("seed" in values) $("seed").value = values.seed;
  for (const key of ["num_images", ...SAMPLING]) {
    const value = values[key] === null ? null : Number(values[key]); // a link may carry anything
    if (value === null || Number.isFinite(value)) set(key, value);
  }
  if (HAS_MOUSE) $("prompt").focus();
  return submit ? $("ask").requestSubmit() : count();
}

function set(key, value) {
  if (key === "num_images") value = Object.assign($(key), { value }).valueAsNumber; // within the server's limit
  settings[key] = value;
  $(key).value = document.querySelector(`output[for=${key}]`).value = value ?? 1;
  if (key === "keep_rows") $("choose").style.setProperty("--share", value / model.rows);
}

function recommend() {
  for (const key of SAMPLING) set(key, model.recommended[key]);
  set("num_images", Math.min(4, model.max_images));
  set("keep_rows", Math.ceil(model.rows / 2));
  $("seed").value = "";
}

const prompts = () => $("prompt").value.split("\n").map((line) => line.trim()).filter(Boolean);

/** Show how many tokens the prompts have and which words the model never saw; return the latter as a sentence. */
async function count() {
  const lines = prompts();
  try {
    for (const line of lines) if (!described.has(line)) described.set(line, await engine.describe(line));
  } catch {
    $("count").textContent = $("note").textContent = ""; // of an earlier prompt; generating says what is wrong
    return "";
  }
  if (lines.join("\n") !== prompts().join("\n")) return ""; // edited in the meantime
  const found = lines.map((line) => described.get(line));
  const tokens = Math.max(0, ...found.map((one) => one.tokens));
  const many = lines.length > 1 ? `${lines.length} prompts, the longest with ` : "";
  $("count").textContent = lines.length ? `${many}${tokens} of ${model.text_seq_len} tokens` : "";
  $("count").classList.toggle("wrong", tokens > model.text_seq_len);
  const words = [...new Set(found.flatMap((one) => one.unknown_words))].map((word) => `“${word}”`);
  return ($("note").textContent = words.length ? `The model never saw ${words.join(", ")}.` : "");
}

/** Keep the upper rows of this image in the next generations; null: of none. */
function startFrom(blob) {
  start = blob?.size <= model.max_upload_bytes ? blob : null;
  if (blob && !start) say(`The image is larger than ${Math.floor(model.max_upload_bytes / 2 ** 20)} MB.`, true);
  if (start) $("start").src = URL.createObjectURL(start);
  else $("start").removeAttribute("src");
  $("kept").hidden = !start;
  $("file").value = "";
}

const request = () => ({
  prompts: prompts(),
  num_images: settings.num_images,
  seed: $("seed").value ? Number($("seed").value) : null,
  ...Object.fromEntries(SAMPLING.map((key) => [key, settings[key]])),
  image: start,
  keep_rows: start && settings.keep_rows,
});

/** Show empty cells of the final size, a group for each prompt, and return them. */
function layOut({ prompts, num_images }) {
  $("grid").replaceChildren();
  for (const prompt of prompts) {
    $("grid").append(element("h2", { textContent: prompt }), element("div", { className: "cells" }));
    for (let i = 0; i < num_images; i++) $("grid").lastChild.append(element("div", { className: "cell" }));
  }
  return [...$("grid").querySelectorAll(".cell")];
}

async function generate(asked) {
  if (!model || running) return;
  running = new AbortController();
  shown = [];
  setBusy(true);
  const cells = layOut(asked);
  const shares = cells.map(() => 0); // of each image's rows that are generated
  const total = plural(cells.length, "image");
  const began = performance.now();
  const stored = [];
  say(`Generating ${total}. ${await count()}`);
  $("status").scrollIntoView({ block: "nearest" });
  const onProgress = (type, event) => {
    if (type === "queued") {
      $("left").textContent = event.ahead ? `${plural(event.ahead, "request")} ahead of yours` : "";
      return;
    }
    const cell = cells[event.index];
    shares[event.index] = type === "image" ? 1 : event.rows / event.of;
    $("progress").value = shares.reduce((sum, share) => sum + share) / shares.length;
    if (type === "image") {
      shown = [...shown, event].sort((one, other) => one.index - other.index);
      saved = [event, ...saved]; // a copy, since the large view keeps the list
      stored.push(history.add(event));
      cell.replaceWith(tile(event, () => shown));
      return;
    }
    cell.style.setProperty("--share", shares[event.index]);
    if (event.preview) (cell.firstChild ?? cell.appendChild(element("img", { alt: "" }))).src = event.preview;
    if (event.seconds_left != null) $("left").textContent = `About ${Math.ceil(event.seconds_left)} s left`;
  };
  try {
    await engine.generate(asked, onProgress, running.signal);
    await Promise.all(stored);
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    say(running.signal.aborted ? `Stopped; ${shown.length} of ${total} finished.` : `${total} in ${seconds} seconds.`);
  } catch (error) {
    fail(error, () => generate(asked));
    if (!shown.length) $("grid").replaceChildren(empty); // the examples, not cells that stay empty
  }
  running = null;
  setBusy(false);
  showHistory();
}

function setBusy(busy) {
  if (document.activeElement === $("stop")) $("prompt").focus();
  $("stop").hidden = $("progress").hidden = !busy;
  $("progress").removeAttribute("value");
  $("generate").ariaDisabled = busy;
  $("grid").classList.toggle("busy", busy);
  $("zip").hidden = busy || shown.length < 2;
}

/** Return a button that shows an image and opens it large, among the images that list() returns. */
function tile(image, list) {
  image.url ??= URL.createObjectURL(image.blob);
  const about = { className: "cell", title: image.prompt, ariaLabel: `${image.prompt}, seed ${image.seed}` };
  const onclick = () => openViewer(list(), list().indexOf(image), actions);
  const button = element("button", { ...about, onclick, draggable: true, ondragstart: () => (dragged = image.blob) });
  button.append(element("img", { src: image.url, alt: "", draggable: false }));
  return button;
}

function showHistory() {
  saved = saved.slice(0, history.LIMIT);
  $("strip").replaceChildren(...saved.map((image) => tile(image, () => saved)));
  $("history").hidden = !saved.length;
}

async function download(images) {
  const files = images.map((image, i) => ({ name: `${i + 1}-${fileName(image)}`, blob: image.blob }));
  element("a", { href: URL.createObjectURL(await zip(files)), download: "mini-dalle.zip" }).click();
}

const samplingOf = ({ metadata }) => Object.fromEntries(SAMPLING.map((key) => [key, metadata[key] ?? null]));

/** What the large view offers for its image. */
const actions = {
  vary(image) {
    const half = { image: image.blob, keep_rows: Math.ceil(model.rows / 2) };
    generate({ ...request(), ...samplingOf(image), ...half, prompts: [image.prompt], seed: null });
  },
  resume(image) {
    startFrom(image.blob);
    if (!prompts().length) fillIn({ prompt: image.prompt }, false);
    $("settings").open = true;
    $("keep_rows").focus();
  },
  reuse: (image) => fillIn({ prompt: image.prompt, seed: image.seed, ...samplingOf(image) }, false),
  link(image) {
    const known = Object.entries(samplingOf(image)).filter(([, value]) => value !== null);
    const query = new URLSearchParams([["prompt", image.prompt], ["seed", image.seed], ...known]);
    return `${location.origin}${location.pathname}?${query}`;
  },
};

$("ask").onsubmit = (event) => {
  event.preventDefault();
  generate(request());
};
$("prompt").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || !HAS_MOUSE) return;
  event.preventDefault();
  $("ask").requestSubmit();
};
$("prompt").oninput = () => {
  clearTimeout(typing);
  typing = setTimeout(count, 250);
};
for (const key of ["num_images", "keep_rows", ...SAMPLING]) $(key).oninput = () => set(key, $(key).valueAsNumber);
$("reset").onclick = recommend;
$("stop").onclick = window.onpagehide = () => running?.abort();
$("zip").onclick = () => download(shown);
$("zip_history").onclick = () => download(saved);
$("clear").onclick = () => {
  if (!confirm(`Delete the ${plural(saved.length, "image")} of the history from this browser?`)) return;
  history.clear();
  saved = [];
  showHistory();
};
$("file").onchange = () => startFrom($("file").files[0]);
$("remove").onclick = () => startFrom(null);
$("start").onerror = () => {
  say(`${start.name ?? "The file"} is not an image that this browser can read.`, true);
  startFrom(null);
};
window.onpaste = ({ clipboardData }) => clipboardData.files[0] && startFrom(clipboardData.files[0]);
window.ondragover = (event) => {
  if (!dragged && !event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  $("drop").showPopover();
};
window.ondragleave = ({ relatedTarget }) => relatedTarget || $("drop").hidePopover();
window.ondragend = () => (dragged = null);
window.ondrop = (event) => {
  const blob = dragged ?? event.dataTransfer.files[0];
  if (!blob) return;
  event.preventDefault();
  $("drop").hidePopover();
  $("viewer").close();
  startFrom(blob);
};

$("settings").open = innerWidth > 760;
open();
saved = await history.all();
showHistory();
