// The page: what is asked of the server, and what is shown of its answers. The algorithm is the server's.
import { DragCanvas } from "./canvas.js";
import { curve, difference, drawCurve, drawLive, make, slider } from "./views.js";

const $ = (id) => document.getElementById(id);
const canvas = new DragCanvas($("canvas"));
const runs = new Map(); // by id, in the order they came
let start, picture = null, current = null, wanted = null, loaded = "";
let method, fields = [], values = {}, offered = {}; // the chosen method, and the form that is shown
const changed = {}; // settings that the person has made; each method takes those that it reads

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

async function upload(files, sample) {
  const most = start.limits.megabytes;
  if (files.reduce((sum, f) => sum + f.size, 0) > most * 2 ** 20) throw new Error(`the upload is larger than ${most} MB`);
  const form = new FormData();
  files.forEach((file, i) => form.append(`file${i}`, file));
  if (sample !== undefined) form.append("sample", sample);
  const opened = await ask("/api/open", form);
  if (opened.samples) offer(opened.samples, (name) => upload(files, name));
  else await show(opened);
}

/** Open files, or the sample among those of a folder; of several the person chooses. */
async function open(files) {
  $("choice").hidden = true;
  const folders = new Map();
  for (const file of files) {
    const path = (file.path ?? file.webkitRelativePath ?? "").split("/").slice(0, -1).join("/");
    folders.set(path, [...(folders.get(path) ?? []), file]);
  }
  const samples = [...folders].filter(([, inside]) => inside.some(({ name }) => /\.(json|pkl)$/.test(name)));
  if (samples.length > 1) offer(samples.map(([path]) => path).sort(), (path) => upload(folders.get(path), path.split("/").at(-1)));
  else if (samples.length) await upload(samples[0][1], samples[0][0].split("/").at(-1) || undefined);
  else if (folders.has("")) await upload(files);
  else throw new Error("there is no sample in this folder: it needs edit.json or meta_data.pkl");
}

/** Let the person choose one of several samples; and then another. */
function offer(names, work) {
  choices("choose", names, [make("option", { value: "", textContent: `one of ${names.length}…` })]);
  $("choose").onchange = (e) => e.target.value && attempt(() => work(e.target.value));
  $("choice").hidden = false;
  $("choose").focus();
}

/** The files that are dropped; those in a folder know their path in it. */
async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()); // at once: the list is empty later
  if (!entries.some((entry) => entry?.isDirectory)) return [...transfer.files];
  const files = [];
  const walk = async (entry) => {
    if (entry.isFile) {
      const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
      files.push(Object.assign(file, { path: entry.fullPath.slice(1) }));
      return;
    }
    const reader = entry.createReader();
    for (let some; (some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject))).length;)
      for (const one of some) await walk(one);
  };
  for (const entry of entries) if (entry) await walk(entry);
  return files;
}

async function request() {
  if (!picture) throw new Error("open a picture first");
  const mask = await canvas.mask();
  return { ...settings(), against: $("against").value, picture: picture.id, prompt: $("prompt").value, points: canvas.points, mask: mask && (await dataUrl(mask)) };
}

const dataUrl = (blob) => new Promise((resolve) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.readAsDataURL(blob);
});

function refresh() {
  if (!picture) return;
  $("undo").disabled = !canvas.canUndo;
  $("redo").disabled = !canvas.canRedo;
  const { points, pending } = canvas;
  $("drag").disabled = !points.length && chosen().some(({ needs }) => needs.includes("points"));
  $("hint").textContent = pending ? "Now click where it should go."
    : points.length ? `Press Drag, or add more pairs.${uses("mask") ? " With the brush, paint what may change." : ""}`
    : "Click the part to move, then where it should go.";
  if ($("pairs").contains(document.activeElement)) return; // typing
  $("pairs").replaceChildren(...points.map((pair, i) => {
    const field = (end, axis) => make("input", {
      type: "number", min: 0, step: "any", value: +pair[end][axis].toFixed(1), ariaLabel: `pair ${i + 1}, ${["handle", "target"][end]}, ${"xy"[axis]}`,
      onchange: (e) => {
        if (e.target.value === "") return (e.target.value = +pair[end][axis].toFixed(1));
        const moved = canvas.points[i]; // a copy
        moved[end][axis] = Math.min(Math.max(0, +e.target.value), (axis ? canvas.height : canvas.width) - 1);
        canvas.setPair(i, moved);
      },
    });
    const remove = make("button", { textContent: "Delete", ariaLabel: `Delete pair ${i + 1}`, onclick: () => { canvas.deletePair(i); } });
    return make("li", {}, field(0, 0), " ", field(0, 1), " → ", field(1, 0), " ", field(1, 1), " ", remove);
  }));
}

// ------------------------------------------------------------------------------ settings

const settings = () => ({ model: $("model").value, preset: $("preset").value, method: method.name, settings: { ...changed } });

/** The methods that the next drag is done by: one, or two to be compared. */
const chosen = () => [method, ...start.methods.filter(({ name }) => name === $("against").value)];
const uses = (what) => chosen().some((one) => one.needs.includes(what) || one.uses.includes(what));

/** Take another method, with its form. */
async function choose(name) {
  method = start.methods.find((one) => one.name === name) ?? method;
  for (const radio of document.querySelectorAll("[name=method]")) radio.checked = radio.value === method.name;
  const others = start.methods.filter((one) => one !== method).map((one) => one.name), { value } = $("against");
  choices("against", others, [make("option", { value: "", textContent: "none" })]);
  $("against").value = others.includes(value) ? value : "";
  $("beside").hidden = !others.length || start.limits.together < 2;
  adapt();
  await baseValues();
}

/** Show what the chosen methods say of themselves, and only those controls that they use. */
function adapt() {
  $("chosen").textContent = called(method);
  $("about").replaceChildren(...chosen().map((one) => make("p", { textContent: one === method ? sentence(one) : `${one.name}: ${one.summary}` })));
  for (const control of document.querySelectorAll("[data-uses]")) control.hidden = !uses(control.dataset.uses);
  if (!uses("mask") && ["brush", "eraser"].includes(canvas.tool)) document.querySelector("[name=tool][value=points]").click();
  shade();
  refresh();
}

const shade = () => (canvas.maskOpacity = uses("mask") ? $("opacity").value / 100 : 0);

const called = ({ name, year }) => (year ? `${name} (${year})` : name);
const sentence = (one) => [one.summary, one.uses.includes("mask") ? "" : "It uses no mask.", one.note && `Note: ${one.note}`].filter(Boolean).join(" ");

function methodChoice(one) {
  const paper = one.paper && make("a", { href: `https://arxiv.org/abs/${one.paper}`, target: "_blank", rel: "noreferrer", textContent: `arXiv:${one.paper}` });
  return make("label", {},
    make("input", { type: "radio", name: "method", value: one.name, onchange: () => attempt(async () => { await choose(one.name); await command(); }) }),
    make("span", {}, make("strong", { textContent: called(one) }), ` ${one.title} `, paper),
    make("small", { textContent: sentence(one) }));
}

let asked = 0;

async function baseValues() {
  const turn = ++asked, { fields: mine, name } = method;
  const of = new URLSearchParams({ model: $("model").value, preset: $("preset").value, method: name });
  const answer = await ask(`/api/values?${of}`);
  if (turn !== asked) return; // meanwhile something else was chosen
  ({ values, choices: offered } = answer);
  fields = mine;
  fillFields();
}

function fillFields() {
  const focused = document.activeElement?.id;
  const groups = { fields: [], "generate-fields": [] };
  for (const f of fields) {
    if (!f.key.startsWith("generate.")) groups.fields.push(field(f));
    if (f.key.startsWith("generate.") || f.key === "seed") groups["generate-fields"].push(field(f, "wish"));
  }
  for (const [id, rows] of Object.entries(groups)) $(id).replaceChildren(...rows);
  if (focused) $(focused)?.focus();
}

function field(f, prefix = "field") {
  const value = changed[f.key] ?? values[f.key];
  const known = f.choices.length ? f.choices : offered[f.key] ?? [];
  let input;
  if (known.length && f.kind === "list") {
    input = make("fieldset", {}, make("legend", { textContent: f.key }), ...known.map((c) => make("label", {},
      make("input", { type: "checkbox", value: c, checked: value.includes(c), id: `${prefix}-${f.key}-${c}` }), ` ${c}`)));
  } else if (known.length) {
    const all = known.includes(value) ? known : [...known, value]; // a layer may also be named by its number
    input = make("select", {}, ...all.map((c) => make("option", { value: c, textContent: c || "(the model's own)" })));
    input.value = value;
  } else if (f.kind === "bool") input = make("input", { type: "checkbox", checked: value });
  else if (f.kind === "int" || f.kind === "float") input = make("input", { type: "number", step: f.kind === "int" ? 1 : "any", value });
  else input = make("input", { type: "text", value: f.kind === "list" ? value.join(", ") : value });
  input.id = `${prefix}-${f.key}`;
  const label = input.tagName === "FIELDSET" ? [] : [make("label", { htmlFor: input.id, textContent: f.key })];
  const row = make("div", { className: f.key in changed ? "field changed" : "field" }, ...label, input,
    make("small", { textContent: f.explanation + (f.allowed ? ` [${f.allowed}]` : "") }));
  input.addEventListener("change", () => {
    const given = f.kind === "bool" ? input.checked
      : input.tagName === "FIELDSET" ? known.filter((c) => input.querySelector(`[value="${c}"]`).checked)
      : f.kind === "list" ? input.value.split(",").map((s) => s.trim()).filter(Boolean)
      : f.kind === "int" || f.kind === "float" ? (input.value === "" ? values[f.key] : +input.value) : input.value;
    if (JSON.stringify(given) === JSON.stringify(values[f.key])) delete changed[f.key];
    else changed[f.key] = given;
    for (const twin of document.querySelectorAll(`[id$="-${f.key}"]`)) { // the seed is shown twice
      twin.value = input.value;
      twin.parentElement.classList.toggle("changed", f.key in changed);
    }
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

const active = (run) => run.status === "queued" || run.status === "running";
const together = (run) => (run?.together ?? []).map((id) => runs.get(id)).filter(Boolean); // of one press of Drag, by several methods
const px = ({ distance_before_px: before, distance_after_px: after }) => `${before.toFixed(1)} → ${after.toFixed(1)} px`;

/** What has become of the handles; a method without optimisation tracks none. */
function distances({ points }) {
  const tracked = points.filter((p) => "distance_after_px" in p);
  if (!tracked.length) return "No handle was tracked.";
  return `${points.map((p, i) => `Pair ${i + 1}: ${px(p)}`).join("; ")} (as tracked)`;
}

const took = ({ seconds }) => `${Object.values(seconds).reduce((sum, s) => sum + s, 0).toFixed(1)} s`;

function words(run) {
  const { facts } = run;
  if (run.status === "queued") return run.ahead ? `Waiting: ${run.ahead} run${run.ahead > 1 ? "s" : ""} before this one.` : "Begins…";
  if (run.status === "failed") return run.message;
  if (run.status === "cancelled") return "Cancelled. What was trained and inverted is kept for the next drag of this picture.";
  if (run.status === "done" && run.kind === "generate") return "Done.";
  if (run.status === "done") {
    const ended = facts.stop_reason ? `${facts.steps} steps, ${REASONS[facts.stop_reason] ?? facts.stop_reason}, ` : "";
    return `Done: ${ended}${took(facts)}. ${distances(facts)} ${run.request.doubts}`.trimEnd();
  }
  if (!run.stage || run.stage === "model") return "Loading the model…";
  const left = run.secondsLeft === null ? "" : `, at most about ${run.secondsLeft < 90 ? `${Math.ceil(run.secondsLeft)} s` : `${Math.ceil(run.secondsLeft / 60)} min`} left`;
  return `${run.stage}: step ${run.done} of ${run.total}${run.note ? `, ${run.note}` : ""}${left}${run.request.doubts && `. ${run.request.doubts}`}`;
}

const shown = new Map(); // preview pictures by address

/** Show how far the runs of the last press of Drag are: the one at work, and results as they come. */
async function showRuns() {
  const all = together(runs.get(current)), run = all.find(active) ?? all.at(-1);
  if (!run) return; // not told of yet
  const live = active(run);
  const who = all.length > 1 ? `${run.request.method}, ` : "";
  const text = live ? who + words(run) : all.length > 1 ? "Both have ended." : words(run);
  $("state").textContent = text;
  const said = run.status === "running" ? who + run.stage : text; // each step read aloud would be too much
  if ($("said").textContent !== said) $("said").textContent = said;
  $("state").className = run.status === "failed" && all.length === 1 ? "bad" : "";
  $("progress").hidden = !live;
  $("progress").value = run.total ? run.done / run.total : 0;
  $("stages").hidden = run.status !== "running" || !run.stages.includes(run.stage);
  $("stages").replaceChildren(...run.stages.map((name) => make("li", { textContent: name, ariaCurrent: name === run.stage ? "step" : null })));
  $("cancel").hidden = !live;
  $("finish").hidden = !(run.status === "running" && run.stage === "drag" && run.way.length);
  const { points } = run.request;
  $("curve-box").hidden = !run.way.length || (!live && all.length > 1); // then each has its own
  if (run.way.length) drawCurve($("curve"), run.way, points);
  showResults(all);
  const last = run.previews.at(-1);
  $("live").hidden = last === undefined || run.status === "done";
  if (last !== undefined && run.status !== "done") {
    const src = file(run, `preview-${String(last).padStart(4, "0")}.png`);
    const image = shown.get(src) ?? new Image();
    if (!image.src) { shown.clear(); shown.set(src, image); image.src = src; }
    await image.decode().catch(() => {});
    if (!run.together.includes(current) || run !== runs.get(run.id)) return; // meanwhile there is newer
    if (image.naturalWidth) drawLive($("live"), image, run.size, run.way, points);
  }
}

/** One result under a slider over its source; of several methods side by side. */
function showResults(all) {
  const state = all.map(({ id, status }) => `${id} ${active({ status }) ? "" : status}`).join();
  if ($("result").dataset.shown === state) return;
  $("result").dataset.shown = state;
  const [run] = all;
  if (all.length > 1 && !all.every(active)) $("result").replaceChildren(make("div", { className: "two" }, ...all.map(result)));
  else if (run.status === "done") $("result").replaceChildren(slider(file(run, "source.png"), file(run, "edited.png")), actions(run, false));
  else $("result").replaceChildren();
}

/** A method's result beside another's. */
function result(run) {
  const name = run.request.method, parts = [];
  if (run.status === "done") parts.push(make("img", { src: file(run, "edited.png"), alt: `edited by ${name}` }));
  parts.push(make("figcaption", {}, make("strong", { textContent: name }),
    make("p", { textContent: active(run) ? "to come" : words(run), className: run.status === "failed" ? "bad" : "" })));
  // what the first has trained and inverted, the second may have from the cache
  if (run.status === "done") parts.push(make("small", { textContent: Object.entries(run.facts.seconds).map(([stage, s]) => `${stage} ${s.toFixed(1)} s`).join(", ") }));
  if (run.status === "done" && run.way.length) parts.push(curve(run.way, run.request.points));
  return make("figure", {}, ...parts, ...(active(run) ? [] : [actions(run, false)]));
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
      await choose(run.request.method);
      await show(await ask(file(run, "use"), { what: "source" }));
    }));
    if (run.status === "done") list.push(
      button("Drag on from here", async () => { await show(await ask(file(run, "use"), { what: "result" })); $("canvas").focus(); }),
      button("Compare", () => { compare(run, together(run).find((other) => other !== run && other.status === "done")); select("compare"); }),
      make("a", { href: file(run, "result.zip"), textContent: "Download", download: "" }));
  } else if (run.status === "done") list.push(button("Drag it", async () => show(await ask(file(run, "use"), { what: "result" }))));
  if (inHistory) list.push(active(run) ? button("Cancel", () => ask(file(run, "cancel"), {}))
    : button("Delete", () => ask(file(run, "remove"), {})));
  return make("p", { className: "bar" }, ...list);
}

function compare(run, beside) {
  const left = file(run, "source.png"), right = file(run, "edited.png");
  const stage = make("div");
  const views = {
    Slider: slider,
    "Side by side": (a, b) => make("div", { className: "two" }, make("img", { src: a, alt: "left" }), make("img", { src: b, alt: "edited" })),
    Difference: difference,
  };
  const choose = make("select", { ariaLabel: "View" }, ...Object.keys(views).map((name) => make("option", { textContent: name })));
  const others = [...runs.values()].filter((other) => other.status === "done" && other.kind === "edit" && other.id !== run.id);
  const against = make("select", { ariaLabel: "Compare with" }, make("option", { value: "", textContent: "its source" }),
    ...others.map((other) => make("option", { value: other.id, textContent: title(other) })));
  against.value = beside?.id ?? "";
  const draw = async () => {
    stage.replaceChildren(await views[choose.value](against.value ? `/api/runs/${against.value}/edited.png` : left, right));
  };
  choose.onchange = against.onchange = () => attempt(draw);
  $("view").replaceChildren(make("p", { className: "bar" }, title(run), " against ", against, choose), stage);
  attempt(draw);
}

const numbers = new Map(); // by id; they stay when a run is deleted

const title = (run) => {
  if (!numbers.has(run.id)) numbers.set(run.id, numbers.size + 1);
  const number = numbers.get(run.id);
  const what = Object.entries(run.request.settings ?? {}).map(([k, v]) => `${k}=${v}`).join(" ");
  return `${number}. ${run.request.name ?? "generated"}, ${run.kind === "edit" ? `${run.request.method}, ` : ""}${run.request.model} ${run.request.preset ?? ""} ${what}`.trim();
};

const rows = new Map(); // of the history, by run's id; each is made anew only when its run begins or ends

function showInHistory(run) {
  let row = rows.get(run.id);
  if (row?.dataset.status !== run.status) {
    const thumb = run.status === "done" ? make("img", { src: file(run, run.kind === "edit" ? "edited.png" : "generated.png"), alt: "" }) : make("span");
    const parts = [thumb, make("div", {}, make("div", { textContent: title(run) }), make("div", { className: "soft" }), actions(run, true))];
    if (!row) $("history").prepend(row = make("li"));
    row.replaceChildren(...parts);
    row.dataset.status = run.status;
    rows.set(run.id, row);
  }
  row.querySelector(".soft").textContent = words(run);
}

function forget(id) {
  runs.delete(id);
  if (current === id) current = null;
  rows.get(id)?.remove();
  rows.delete(id);
}

function listen() {
  const stream = new EventSource("/api/events");
  let lost = false;
  stream.onerror = () => attempt(() => {
    lost = true;
    throw new Error(stream.readyState === EventSource.CLOSED ? "the server does not know this page any more: reload it" : "the server does not answer; trying again…");
  });
  stream.onopen = () => { if (lost) $("error").hidden = true; lost = false; };
  stream.onmessage = ({ data }) => {
    const told = JSON.parse(data);
    for (const run of told.runs) {
      const before = runs.get(run.id)?.status;
      runs.set(run.id, run);
      showInHistory(run);
      if (run.kind === "edit" && (run.id === wanted || (current === null && active(run)))) { current = run.id; wanted = null; }
      if (run === [...runs.values()].findLast(({ kind }) => kind === "generate")) {
        $("make-state").textContent = words(run);
        $("make-state").className = run.status === "failed" ? "bad" : "";
        if (run.status !== before) $("made").replaceChildren(
          ...(run.status === "done" ? [make("img", { src: file(run, "generated.png"), alt: run.request.prompt, className: "difference" })] : []),
          actions(run, run.status !== "done"));
      }
    }
    if (told.runs.some((run) => run.together.includes(current))) showRuns();
    told.gone.forEach(forget);
    $("none").hidden = runs.size > 0;
    if (loaded !== (loaded = told.loaded.join())) attempt(baseValues); // its settings' choices are known now
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
  const latest = [...runs.values()].filter((run) => run.status === "done" && run.kind === "edit").at(-1);
  if (name === "compare" && latest && !$("view").hasChildNodes()) compare(latest);
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
on("open-folder", "click", () => $("folder").click());
for (const id of ["file", "folder"]) on(id, "change", async (e) => { const files = [...e.target.files]; e.target.value = ""; if (files.length) await open(files); });
on("samples", "change", async (e) => { if (e.target.value) await show(await ask("/api/open", { sample: e.target.value })); e.target.value = ""; });
document.addEventListener("dragover", (e) => { e.preventDefault(); document.body.classList.add("drop"); });
document.addEventListener("dragleave", () => document.body.classList.remove("drop"));
document.addEventListener("drop", (e) => { e.preventDefault(); document.body.classList.remove("drop"); attempt(async () => { const files = await dropped(e.dataTransfer); if (files.length) await open(files); }); });
document.addEventListener("paste", (e) => { if (e.clipboardData.files.length) attempt(() => open([...e.clipboardData.files])); });
for (const radio of document.querySelectorAll("[name=tool]")) radio.addEventListener("change", () => (canvas.tool = radio.value));
on("size", "input", (e) => (canvas.brushSize = +e.target.value));
on("opacity", "input", shade);
on("against", "change", adapt);
on("undo", "click", () => canvas.undo());
on("redo", "click", () => canvas.redo());
on("clear-points", "click", () => canvas.clearPoints());
on("clear-mask", "click", () => canvas.clearMask());
on("invert-mask", "click", () => canvas.invertMask());
on("zoom-in", "click", () => canvas.zoomBy(1.4));
on("zoom-out", "click", () => canvas.zoomBy(1 / 1.4));
on("fit", "click", () => canvas.fit());
on("drag", "click", async () => { wanted = current = (await ask("/api/runs", { kind: "edit", ...(await request()) })).id; showRuns(); });
on("cancel", "click", () => Promise.all(together(runs.get(current)).filter(active).map((run) => ask(file(run, "cancel"), {}))));
on("finish", "click", () => ask(file(together(runs.get(current)).find(active), "finish"), {}));
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
  $("methods").append(...start.methods.map(methodChoice));
  await choose(start.methods[0].name);
  listen();
  // its mask stays, its points don't: the first drag is the visitor's own
  await show(await ask("/api/open", { sample: start.samples.find((name) => name.startsWith("example:")) }), { points: [] });
  refresh();
});
