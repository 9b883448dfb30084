"use strict";
// The page requests each map once and colours it itself; the server draws saved images. Nothing is stored.

const DISPLAYED = 1400; // pixels of the longer side that a canvas has
const AT_ONCE = 4; // requests
const PINK = [255, 32, 140];

const element = (id) => document.getElementById(id);
const made = (template) => element(template).content.firstElementChild.cloneNode(true);
const cards = new Set();
let chosen = null; // the slider's threshold; null: each head's own

// ---- requests: a few at a time, repeated after a while if the server has too many ----

const waiting = [];
let running = 0;

function ask(file, query, signal) {
  return new Promise((resolve, reject) => { waiting.push({ file, query, signal, resolve, reject }); pump(); });
}

function pump() {
  while (running < AT_ONCE && waiting.length) {
    const job = waiting.shift();
    running += 1;
    send(job).then(job.resolve, job.reject).finally(() => { running -= 1; pump(); });
  }
}

async function send({ file, query, signal }) {
  if (file.size > served.max_megabytes * 1e6) throw new Error(`The image is larger than ${served.max_megabytes} MB: send a smaller one.`);
  const form = new FormData();
  form.append("image", file, file.name || "pasted.png");
  for (;;) {
    signal.throwIfAborted();
    const answer = await fetch("predict?" + new URLSearchParams(query), { method: "POST", body: form, signal })
      .catch((error) => { throw error.name === "AbortError" ? error : new Error("The server can’t be reached: check whether it is still running."); });
    if (answer.ok) return answer;
    if (answer.status !== 503) throw new Error((await answer.json().catch(() => ({}))).error ?? `The server responded with status ${answer.status}.`);
    await new Promise((resolve) => setTimeout(resolve, 1000 * (answer.headers.get("Retry-After") ?? 2)));
  }
}

// ---- images ----

function add(files) {
  const first = element("images").firstChild; // new images are inserted before it, in their own order
  for (const file of files) {
    const card = { file, name: file.name || "pasted.png", node: made("card"), stop: new AbortController() };
    card.node.querySelector("h2").textContent = card.name;
    const remove = card.node.querySelector(".remove");
    remove.ariaLabel = `Remove ${card.name}`;
    remove.onclick = () => {
      const beside = card.node.nextElementSibling ?? card.node.previousElementSibling;
      drop(card);
      (beside?.querySelector(".remove") ?? element("files")).focus();
    };
    card.panels = served.heads.map((head) => panel(card, head));
    card.node.querySelector(".panels").append(...card.panels.map((one) => one.node));
    cards.add(card);
    element("images").insertBefore(card.node, first);
    start(card);
  }
  element("files").value = "";
  refresh();
}

function drop(card) {
  card.stop.abort();
  card.panels.forEach((one) => seen.unobserve(one.node));
  card.node.remove();
  cards.delete(card);
  refresh();
}

function panel(card, head) {
  const one = { card, head, node: made("panel") };
  one.node.querySelector(".head").textContent = head.name;
  for (const kind of ["mask", "overlay", "cutout"]) {
    const button = document.createElement("button");
    button.textContent = kind;
    button.ariaLabel = `Save the ${kind} of ${card.name} by ${head.name}`;
    button.disabled = true;
    button.onclick = () => save(one, kind, button);
    one.node.querySelector(".saves").append(button);
  }
  one.node.panel = one;
  seen.observe(one.node);
  return one;
}

async function start(card) {
  // The server may be able to read formats that the browser can't show, such as TIFF.
  const photo = createImageBitmap(card.file).catch(() => null);
  photo.then((bitmap) => bitmap && card.panels.forEach((one) => shape(one, bitmap.width, bitmap.height, bitmap)));
  await Promise.all(card.panels.map(async (one) => {
    try {
      const answer = await ask(card.file, { kind: "map", head: one.head.name }, card.stop.signal);
      const map = await createImageBitmap(await answer.blob(), { colorSpaceConversion: "none" });
      shape(one, map.width, map.height, await photo);
      read(one, map);
      one.node.querySelectorAll("button").forEach((button) => { button.disabled = false; });
      one.node.querySelector(".waiting").hidden = true;
    } catch (error) {
      if (card.stop.signal.aborted) return;
      one.failed = error.message;
      one.node.classList.add("failed");
      one.node.querySelector(".waiting").textContent = error.message;
      one.node.querySelector(".saves").hidden = true;
    }
    refresh();
  }));
  (await photo)?.close();
}

function shape(one, width, height, photo) {
  const scale = Math.min(1, DISPLAYED / Math.max(width, height));
  const size = [width, height].map((side) => Math.max(1, Math.round(scale * side)));
  one.node.style.setProperty("--ratio", width / height);
  for (const canvas of one.node.querySelectorAll("canvas")) [canvas.width, canvas.height] = size;
  if (photo) one.node.querySelector(".photo").getContext("2d").drawImage(photo, 0, 0, ...size);
  one.photo = Boolean(photo);
}

// Grey levels at the size of the canvas, and their histogram over all pixels.
function read(one, map) {
  const { width, height } = one.node.querySelector(".layer");
  one.levels = greys(map, 0, map.height, width, height);
  one.counts = new Float64Array(256);
  const rows = Math.max(1, Math.floor(4e6 / map.width));
  for (let top = 0; top < map.height; top += rows) {
    const some = Math.min(rows, map.height - top);
    for (const level of greys(map, top, some, map.width, some)) one.counts[level] += 1;
  }
  map.close();
  one.stale = true;
}

function greys(map, top, rows, width, height) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(map, 0, top, map.width, rows, 0, 0, width, height);
  const { data } = context.getImageData(0, 0, width, height), levels = new Uint8Array(width * height);
  for (let index = 0; index < levels.length; index++) levels[index] = data[4 * index];
  return levels;
}

// ---- drawing ----

const levelOf = (threshold) => Math.ceil(255 * threshold - 1e-9);
const thresholdOf = (head) => chosen ?? head.threshold;
const isCut = (head) => chosen !== null || head.cuts;
const view = () => document.querySelector("input[name=view]:checked").value;

function draw(one) {
  if (!one.levels) return;
  one.stale = false;
  const layer = one.node.querySelector(".layer"), context = layer.getContext("2d");
  const shown = view() === "overlay" && !one.photo ? "mask" : view();
  const least = levelOf(thresholdOf(one.head)), cut = isCut(one.head);
  const pixels = context.createImageData(layer.width, layer.height), packed = new Uint32Array(pixels.data.buffer);
  if (shown !== "image") {
    const colours = new Uint32Array(new Uint8ClampedArray(Array.from({ length: 256 }, (_, level) => {
      const inside = level >= least;
      if (shown === "overlay") return [...PINK, inside ? 0.45 * (cut ? 255 : level) : 0];
      const grey = cut ? (inside ? 255 : 0) : level;
      return [grey, grey, grey, 255];
    }).flat()).buffer);
    one.levels.forEach((level, index) => { packed[index] = colours[level]; });
    if (shown === "overlay") outline(one.levels, packed, layer.width, layer.height, least);
  }
  context.putImageData(pixels, 0, 0);
}

function outline(levels, packed, width, height, least) {
  const line = Math.max(1, Math.round(Math.min(width, height) / 400));
  const [pink] = new Uint32Array(new Uint8ClampedArray([...PINK, 255]).buffer);
  for (let y = 0, index = 0; y < height; y++) {
    for (let x = 0; x < width; x++, index++) {
      const inside = levels[index] >= least;
      if (x + 1 < width && inside !== levels[index + 1] >= least)
        for (let to = Math.max(0, x - line + 1); to <= Math.min(width - 1, x + line); to++) packed[index - x + to] = pink;
      if (y + 1 < height && inside !== levels[index + width] >= least)
        for (let to = Math.max(0, y - line + 1); to <= Math.min(height - 1, y + line); to++) packed[to * width + x] = pink;
    }
  }
}

function tell(one) {
  if (!one.counts) return;
  const least = levelOf(thresholdOf(one.head)), all = one.counts.reduce((a, b) => a + b);
  const above = one.counts.reduce((sum, count, level) => sum + (level >= least ? count : 0), 0);
  const verdict = one.node.querySelector(".verdict");
  verdict.textContent = above ? `alarm, ${(100 * above / all).toFixed(above / all < 0.1 ? 2 : 1)} %` : "clear";
  verdict.classList.toggle("alarm", above > 0);
  one.node.querySelector(".layer").ariaLabel =
    `${one.card.name} by ${one.head.name}, ${view()}: ${verdict.textContent} of the image at threshold ${thresholdOf(one.head)}`;
}

const seen = new IntersectionObserver((entries) => entries.forEach(({ target, isIntersecting }) => {
  target.panel.seen = isIntersecting;
  if (isIntersecting && target.panel.stale) draw(target.panel);
}), { rootMargin: "50%" });

const panels = () => [...cards].flatMap((card) => card.panels);
let asked = false;

function refresh() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    const all = panels(), done = all.filter((one) => one.levels || one.failed).length;
    document.body.classList.toggle("busy", cards.size > 0);
    element("controls").hidden = element("all").hidden = !cards.size;
    element("own").hidden = chosen === null;
    const own = new Set(served.heads.map((head) => head.threshold));
    if (chosen === null) element("threshold").value = served.heads[0].threshold;
    element("chosen").textContent = chosen === null && own.size > 1 ? "per head" : thresholdOf(served.heads[0]).toFixed(2);
    element("status").textContent = all.length && done < all.length ? `${done} of ${all.length} computed` : "";
    for (const one of all) {
      tell(one);
      one.stale = true;
      if (one.seen) draw(one);
    }
  });
}

// ---- saving ----

const wanted = (one, kind) => ({ kind, head: one.head.name, ...(chosen === null ? {} : { threshold: chosen }) });

function keep(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

async function save(one, kind, button) {
  const stem = one.card.name.replace(/\.[^.]*$/, ""), by = served.heads.length > 1 ? `-${one.head.name}` : "";
  button.disabled = true;
  element("status").textContent = `drawing the ${kind} of ${one.card.name}`;
  try {
    const answer = await ask(one.card.file, wanted(one, kind), one.card.stop.signal);
    keep(await answer.blob(), `${stem}${by}-${kind}.png`);
    element("status").textContent = `${stem}${by}-${kind}.png is saved`;
  } catch (error) {
    element("status").textContent = error.message;
  }
  button.disabled = false;
}

async function saveTable(button) {
  const all = panels().filter((one) => one.levels);
  button.disabled = true;
  try {
    let done = 0;
    const rows = await Promise.all(all.map(async (one) => {
      const [row] = await (await ask(one.card.file, wanted(one, "table"), one.card.stop.signal)).json();
      element("status").textContent = `${++done} of ${all.length} done`;
      return { head: one.head.name, ...row };
    }));
    keep(new Blob([JSON.stringify(rows, null, 1)], { type: "application/json" }), "table.json");
    element("status").textContent = "table.json is saved";
  } catch (error) {
    element("status").textContent = error.message;
  }
  button.disabled = false;
}

// ---- user input ----

element("files").onchange = (event) => add(event.target.files);
element("threshold").oninput = (event) => { chosen = event.target.valueAsNumber; refresh(); };
element("own").onclick = () => { chosen = null; refresh(); element("threshold").focus(); };
element("clear").onclick = () => { [...cards].forEach(drop); element("files").focus(); };
element("table").onclick = (event) => saveTable(event.target);
document.querySelectorAll("input[name=view]").forEach((radio) => { radio.onchange = refresh; });
document.addEventListener("paste", (event) => event.clipboardData.files.length && add(event.clipboardData.files));
document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("over"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("over"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  add(event.dataTransfer.files);
});
