// The page: what is asked of the server, and what is shown of its answers. The algorithm is the server's.
import { DragCanvas } from "./canvas.js";
import { difference, drawCurve, drawLive, make, slider } from "./views.js";

const $ = (id) => document.getElementById(id);
const canvas = new DragCanvas($("canvas"));
const runs = new Map(); // by id, in the order they came
let start, picture = null, current = null, wanted = null, values = {};
const changed = {}; // settings that differ from those of model and preset

// ------------------------------------------------------------------------------ the server

async function ask(path, body, raw = false) {
  const form = body instanceof FormData;
  const options = body === undefined ? {} : { method: "POST", body: form ? body : JSON.stringify(body) };
  if (body !== undefined && !form) options.headers = { "Content-Type": "application/json" };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("the server does not answer");
  }
  if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).error ?? `the server answers ${answer.status}`);
  return raw ? answer : answer.json();
}

/** Do it; what goes wrong is said on the page. */
async function attempt(work) {
  $("error").hidden = true;
  try {
    return await work();
  } catch (error) {
    $("error").textContent = error.message;
    $("error").hidden = false;
  }
}

const on = (id, event, work) => $(id).addEventListener(event, (e) => attempt(() => work(e)));

// ------------------------------------------------------------------------------ the canvas

async function show(opened, { points = opened.points ?? [] } = {}) {
  picture = opened.picture;
  await canvas.load(`/api/pictures/${picture.id}`, { points, mask: opened.mask ? await (await fetchData(opened.mask)) : null });
  $("prompt").value = opened.prompt ?? "";
  $("prompt").disabled = picture.generated;
  $("size").value = canvas.brushSize = Math.max(2, Math.round(Math.max(picture.width, picture.height) / 12));
  select("edit");
}

async function fetchData(url) { // a data URL as a Blob; fetch() of one is not within the page's policy
  const bytes = Uint8Array.from(atob(url.split(",")[1]), (c) => c.charCodeAt(0));
  return new Blob([bytes], { type: "image/png" });
}

async function upload(files) {
  if (!files.length) return;
  const most = start.limits.megabytes;
  if ([...files].reduce((sum, f) => sum + f.size, 0) > most * 2 ** 20) throw new Error(`the upload is larger than ${most} MB`);
  const form = new FormData();
  [...files].forEach((file, i) => form.append(`file${i}`, file));
  await show(await ask("/api/open", form));
}

async function request() {
  if (!picture) throw new Error("open a picture first");
  const mask = await canvas.mask();
  return { ...settings(), picture: picture.id, prompt: $("prompt").value, points: canvas.points, mask: mask && (await dataUrl(mask)) };
}

const dataUrl = (blob) => new Promise((resolve) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.readAsDataURL(blob);
});

function refresh() {
  $("undo").disabled = !canvas.canUndo;
  $("redo").disabled = !canvas.canRedo;
  const { points, pending } = canvas;
  $("drag").disabled = !points.length;
  $("hint").textContent = pending ? "Now click where it should go."
    : points.length ? "Press Drag, or add more pairs. With the brush, paint what may change."
    : "Click the part to move, then where it should go.";
  if ($("pairs").contains(document.activeElement)) return; // typing
  $("pairs").replaceChildren(...points.map((pair, i) => {
    const field = (end, axis) => make("input", {
      type: "number", min: 0, step: "any", value: +pair[end][axis].toFixed(1), ariaLabel: `pair ${i + 1}, ${["handle", "target"][end]}, ${"xy"[axis]}`,
      onchange: (e) => {
        const moved = structuredClone(canvas.points[i]);
        moved[end][axis] = Math.min(Math.max(0, +e.target.value), (axis ? canvas.height : canvas.width) - 1);
        canvas.setPair(i, moved);
      },
    });
    const remove = make("button", { textContent: "Delete", ariaLabel: `Delete pair ${i + 1}`, onclick: () => { canvas.deletePair(i); } });
    return make("li", {}, field(0, 0), " ", field(0, 1), " → ", field(1, 0), " ", field(1, 1), " ", remove);
  }));
}

// ------------------------------------------------------------------------------ settings

const settings = () => ({ model: $("model").value, preset: $("preset").value, settings: { ...changed } });

async function baseValues() {
  values = await ask(`/api/values?model=${encodeURIComponent($("model").value)}&preset=${encodeURIComponent($("preset").value)}`);
  fillFields();
}

function fillFields() {
  const groups = { fields: [], "generate-fields": [] };
  for (const f of start.fields) groups[f.key.startsWith("generate.") ? "generate-fields" : "fields"].push(field(f));
  for (const [id, rows] of Object.entries(groups)) $(id).replaceChildren(...rows);
}

function field(f) {
  const value = changed[f.key] ?? values[f.key];
  let input;
  if (f.choices.length) {
    input = make("select", {}, ...f.choices.map((c) => make("option", { value: c, textContent: c || "(the model's own)" })));
    input.value = value;
  } else if (f.kind === "bool") input = make("input", { type: "checkbox", checked: value });
  else if (f.kind === "int" || f.kind === "float") input = make("input", { type: "number", step: f.kind === "int" ? 1 : "any", value });
  else input = make("input", { type: "text", value: f.kind === "list" ? value.join(", ") : value });
  input.id = `field-${f.key}`;
  const row = make("div", { className: f.key in changed ? "field changed" : "field" },
    make("label", { htmlFor: input.id, textContent: f.key }), input,
    make("small", { textContent: f.explanation + (f.allowed ? ` [${f.allowed}]` : "") }));
  input.addEventListener("change", () => {
    const given = f.kind === "bool" ? input.checked : f.kind === "list" ? input.value.split(",").map((s) => s.trim()).filter(Boolean)
      : f.kind === "int" || f.kind === "float" ? (input.value === "" ? values[f.key] : +input.value) : input.value;
    if (JSON.stringify(given) === JSON.stringify(values[f.key])) delete changed[f.key];
    else changed[f.key] = given;
    row.classList.toggle("changed", f.key in changed);
    attempt(command);
  });
  return row;
}

async function command() {
  if (!$("command").open) return;
  const { line, yaml } = await ask("/api/command", { ...settings(), picture: picture?.id });
  $("line").textContent = line;
  $("yaml").textContent = yaml || "(as they are)";
}

// ------------------------------------------------------------------------------ runs

const REASONS = { reached: "all handles arrived", steps: "all steps done", stopped: "ended on request" };
const file = (run, name) => `/api/runs/${run.id}/${name}`;

function words(run) {
  if (run.status === "queued") return run.ahead ? `Waiting: ${run.ahead} run${run.ahead > 1 ? "s" : ""} before this one.` : "Begins…";
  if (run.status === "failed") return run.message;
  if (run.status === "cancelled") return "Cancelled. What was trained and inverted is kept for the next drag of this picture.";
  if (run.status === "done") return run.kind === "generate" ? "Done." : `Done: ${run.facts.steps} steps, ${REASONS[run.facts.stop_reason] ?? run.facts.stop_reason}. `
    + run.facts.points.map((p, i) => `Pair ${i + 1}: ${p.distance_before_px.toFixed(1)} → ${p.distance_after_px.toFixed(1)} px`).join("; ") + " (as tracked)";
  if (!run.stage || run.stage === "model") return "Loading the model…";
  const left = run.secondsLeft === null ? "" : `, at most about ${run.secondsLeft < 90 ? `${Math.ceil(run.secondsLeft)} s` : `${Math.ceil(run.secondsLeft / 60)} min`} left`;
  return `${run.stage}: step ${run.done} of ${run.total}${run.note ? `, ${run.note}` : ""}${left}`;
}

const shown = new Map(); // preview pictures by address

async function showRun(run) {
  const live = run.status === "running" || run.status === "queued";
  $("state").textContent = words(run);
  $("state").className = run.status === "failed" ? "bad" : "";
  $("progress").hidden = !live;
  $("progress").value = run.total ? run.done / run.total : 0;
  $("cancel").hidden = !live;
  $("finish").hidden = !(run.status === "running" && run.stage === "drag");
  const { points } = run.request;
  $("curve-box").hidden = !run.way.length;
  if (run.way.length) drawCurve($("curve"), run.waySteps, run.way, points, run.waySteps.at(-1));
  const last = run.previews.at(-1);
  $("live").hidden = last === undefined || run.status === "done";
  if (last !== undefined && run.status !== "done") {
    const src = file(run, `preview-${String(last).padStart(4, "0")}.png`);
    const image = shown.get(src) ?? new Image();
    if (!image.src) { shown.clear(); shown.set(src, image); image.src = src; }
    await image.decode().catch(() => {});
    if (run.id === current && image.naturalWidth) drawLive($("live"), image, run.size, run.way, points);
  }
  if (run.status === "done" && $("result").dataset.run !== run.id) {
    $("result").dataset.run = run.id;
    $("result").replaceChildren(slider(file(run, "source.png"), file(run, "edited.png")), actions(run, false));
  } else if (run.status !== "done") {
    delete $("result").dataset.run;
    $("result").replaceChildren();
  }
}

function actions(run, inHistory) {
  const button = (textContent, work) => make("button", { textContent, onclick: () => attempt(work) });
  const list = [];
  if (run.kind === "edit") {
    list.push(button("Use its settings", async () => {
      for (const key of Object.keys(changed)) delete changed[key];
      Object.assign(changed, run.request.settings ?? {});
      $("model").value = run.request.model;
      $("preset").value = run.request.preset ?? "";
      await baseValues();
      await show(await ask(file(run, "use"), { what: "source" }));
    }));
    if (run.status === "done") list.push(
      button("Go on from the result", async () => show(await ask(file(run, "use"), { what: "result" }))),
      button("Compare", () => { compare(run); select("compare"); }),
      make("a", { href: file(run, "result.zip"), textContent: "Download", download: "" }));
  } else if (run.status === "done") list.push(button("Drag it", async () => show(await ask(file(run, "use"), { what: "result" }))));
  if (inHistory) list.push(["queued", "running"].includes(run.status) ? button("Cancel", () => ask(file(run, "cancel"), {}))
    : button("Delete", () => ask(file(run, "remove"), {})));
  return make("p", { className: "bar" }, ...list);
}

function compare(run) {
  const left = file(run, "source.png"), right = file(run, "edited.png");
  const stage = make("div");
  const modes = {
    Slider: () => slider(left, right),
    "Side by side": () => make("div", { className: "two" }, make("img", { src: left, alt: "source" }), make("img", { src: right, alt: "edited" })),
    Difference: () => difference(left, right),
  };
  const choose = make("select", { ariaLabel: "View" }, ...Object.keys(modes).map((m) => make("option", { textContent: m })));
  const others = [...runs.values()].filter((other) => other.status === "done" && other.kind === "edit" && other.id !== run.id);
  const against = make("select", { ariaLabel: "Compare with" }, make("option", { value: "", textContent: "its source" }),
    ...others.map((other) => make("option", { value: other.id, textContent: title(other) })));
  const draw = async () => {
    const [a, b] = [against.value ? file(runs.get(against.value), "edited.png") : left, right];
    const view = choose.value === "Slider" ? slider(a, b) : choose.value === "Difference" ? await difference(a, b)
      : make("div", { className: "two" }, make("img", { src: a, alt: "left" }), make("img", { src: b, alt: "edited" }));
    stage.replaceChildren(view);
  };
  choose.onchange = against.onchange = () => attempt(draw);
  $("view").replaceChildren(make("p", { className: "bar" }, title(run), " against ", against, choose), stage);
  attempt(draw);
}

const title = (run) => {
  const number = [...runs.keys()].indexOf(run.id) + 1;
  const what = Object.entries(run.request.settings ?? {}).map(([k, v]) => `${k}=${v}`).join(" ");
  return `${number}. ${run.request.name ?? "generated"}, ${run.request.model} ${run.request.preset ?? ""} ${what}`.trim();
};

function showHistory() {
  $("history").replaceChildren(...[...runs.values()].reverse().map((run) => {
    const thumb = run.status === "done" ? make("img", { src: file(run, run.kind === "edit" ? "edited.png" : "generated.png"), alt: "" }) : make("span");
    return make("li", {}, thumb, make("div", {}, make("div", { textContent: title(run) }), make("div", { className: "soft", textContent: words(run) }), actions(run, true)));
  }));
  if (!runs.size) $("history").replaceChildren(make("li", { textContent: "None yet." }));
}

function listen() {
  const stream = new EventSource("/api/events");
  stream.onmessage = ({ data }) => {
    const told = JSON.parse(data);
    for (const run of told.runs) {
      runs.set(run.id, run);
      const active = ["queued", "running"].includes(run.status);
      if (run.kind === "edit" && (run.id === wanted || (current === null && active))) { current = run.id; wanted = null; }
      if (run.id === current) showRun(run);
      if (run.kind === "generate") {
        $("make-state").textContent = words(run);
        if (run.status === "done") $("made").replaceChildren(make("img", { src: file(run, "generated.png"), alt: run.request.prompt, className: "difference" }), actions(run, false));
      }
    }
    for (const id of told.gone) runs.delete(id);
    showHistory();
  };
}

// ------------------------------------------------------------------------------ together

function select(name) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const mine = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", mine);
    tab.tabIndex = mine ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !mine;
  }
}

const choices = (id, names, first) => $(id).replaceChildren(...first, ...names.map((name) => make("option", { value: name, textContent: name })));

for (const tab of document.querySelectorAll("[role=tab]")) {
  tab.addEventListener("click", () => select(tab.getAttribute("aria-controls")));
  tab.addEventListener("keydown", (e) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
    if (!step) return;
    const tabs = [...document.querySelectorAll("[role=tab]")];
    const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
    select(next.getAttribute("aria-controls"));
    next.focus();
  });
}
canvas.addEventListener("change", refresh);
on("open", "click", () => $("file").click());
on("file", "change", async (e) => { await upload(e.target.files); e.target.value = ""; });
on("samples", "change", async (e) => { if (e.target.value) await show(await ask("/api/open", { sample: e.target.value })); e.target.value = ""; });
document.addEventListener("dragover", (e) => { e.preventDefault(); document.body.classList.add("drop"); });
document.addEventListener("dragleave", () => document.body.classList.remove("drop"));
document.addEventListener("drop", (e) => { e.preventDefault(); document.body.classList.remove("drop"); attempt(() => upload(e.dataTransfer.files)); });
document.addEventListener("paste", (e) => { if (e.clipboardData.files.length) attempt(() => upload(e.clipboardData.files)); });
for (const radio of document.querySelectorAll("[name=tool]")) radio.addEventListener("change", () => (canvas.tool = radio.value));
on("size", "input", (e) => (canvas.brushSize = +e.target.value));
on("opacity", "input", (e) => (canvas.maskOpacity = e.target.value / 100));
on("undo", "click", () => canvas.undo());
on("redo", "click", () => canvas.redo());
on("clear-points", "click", () => canvas.clearPoints());
on("clear-mask", "click", () => canvas.clearMask());
on("invert-mask", "click", () => canvas.invertMask());
on("zoom-in", "click", () => canvas.zoomBy(1.4));
on("zoom-out", "click", () => canvas.zoomBy(1 / 1.4));
on("fit", "click", () => canvas.fit());
on("drag", "click", async () => { wanted = current = (await ask("/api/runs", { kind: "edit", ...(await request()) })).id; if (runs.has(current)) showRun(runs.get(current)); });
on("cancel", "click", () => ask(`/api/runs/${current}/cancel`, {}));
on("finish", "click", () => ask(`/api/runs/${current}/finish`, {}));
on("export", "click", async () => {
  const answer = await ask("/api/export", { ...(await request()), format: $("format").value }, true);
  const link = make("a", { href: URL.createObjectURL(await answer.blob()), download: `${picture.name}.zip` });
  link.click();
  URL.revokeObjectURL(link.href);
});
on("make", "click", async () => { await ask("/api/runs", { kind: "generate", ...settings(), prompt: $("wish").value }); });
for (const id of ["model", "preset"]) on(id, "change", async () => { await baseValues(); await command(); });
on("reset", "click", async () => { for (const key of Object.keys(changed)) delete changed[key]; fillFields(); await command(); });
on("command", "toggle", command);

attempt(async () => {
  start = await ask("/api/start");
  choices("samples", start.samples, [make("option", { value: "", textContent: "choose…" })]);
  choices("model", start.models, []);
  choices("preset", start.presets, [make("option", { value: "", textContent: "none" })]);
  await baseValues();
  listen();
  showHistory();
  canvas.maskOpacity = $("opacity").value / 100;
  // its mask stays, its points don't: the first drag is the visitor's own
  await show(await ask("/api/open", { sample: start.samples.find((name) => name.startsWith("example:")) }), { points: [] });
  refresh();
});
