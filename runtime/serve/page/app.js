// The page. Each file is sent once. Job events are read with fetch instead of EventSource, because fetch can send the
// API key. Nothing is loaded from other hosts, and there is no build step.

const $ = id => document.getElementById(id);
const FIELDS = ["input_reference", "video_reference", "mask_reference", "video_mask_reference"];
const COLOURS = ["blue", "red", "green", "magenta", "cyan", "yellow"];
const chosen = {};          // field → File
const entries = new Map();  // video id → {video, element, stop}
let shown = null, lastId = null, masks = null;

// ---- the service

let key = sessionStorage.getItem("key") || "";

async function call(path, options = {}) {
  const headers = new Headers(options.headers || {});
  if (key) headers.set("Authorization", `Bearer ${key}`);
  const answer = await fetch(path, {...options, headers});
  if (answer.ok) return answer;
  let said = `The service answered with status ${answer.status}. Try again.`;
  try { said = (await answer.json()).error.message; } catch { /* no JSON */ }
  if (answer.status === 401) askForKey();
  throw new Error(said);
}

const ask = async (path, options) => (await call(path, options)).json();
const post = (path, body, more = {}) => ask(path, {
  method: "POST", headers: {"Content-Type": "application/json", ...more}, body: JSON.stringify(body)});

function askForKey() {
  $("key-form").hidden = false;
  $("state").textContent = "This service requires an API key. Enter one.";
}

$("key-form").addEventListener("submit", event => {
  event.preventDefault();
  key = $("key").value.trim();
  sessionStorage.setItem("key", key);
  $("key-form").hidden = true;
  start();
});

const kept = new WeakMap();  // File → promise of its id at the service

function keep(file) {
  if (!kept.has(file)) {
    const sent = send(file);
    sent.catch(() => kept.delete(file));
    kept.set(file, sent);
  }
  return kept.get(file);
}

function send(file) {  // only XMLHttpRequest reports upload progress
  return new Promise((done, failed) => {
    const request = new XMLHttpRequest(), form = new FormData();
    form.append("purpose", "user_data");
    form.append("file", file, file.name);
    request.open("POST", "/v1/files");
    if (key) request.setRequestHeader("Authorization", `Bearer ${key}`);
    request.upload.onprogress = event => { $("sending").value = event.loaded / event.total; };
    request.onload = () => {
      let answer = {};
      try { answer = JSON.parse(request.responseText); } catch { /* below */ }
      request.status === 200 ? done(answer.id) : failed(new Error(answer.error?.message || `The upload failed (${request.status}). Try again.`));
    };
    request.onerror = () => failed(new Error("The service cannot be reached. Check that it runs."));
    request.send(form);
  });
}

async function* events(id, signal, kind = "videos") {
  const answer = await call(`/v1/${kind}/${id}/events`, {signal});
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  while (true) {
    const {value, done} = await reader.read();
    if (done) return;
    text += value;
    const messages = text.split("\n\n");
    text = messages.pop();
    for (const message of messages) {
      const lines = message.split("\n"), of = name => lines.find(l => l.startsWith(name))?.slice(name.length);
      if (of("event: ")) yield [of("event: "), JSON.parse(of("data: "))];
    }
  }
}

const objectUrl = async path => URL.createObjectURL(await (await call(path)).blob());

// ---- inputs

function choose(field, file) {
  if (!file) return;
  chosen[field] = file;
  if (field === "input_reference") show($("photo"), file);
  if (field === "video_reference") show($("clip"), file);
  if (field === "input_reference" || field === "video_reference") forgetMasks();
}

function put(element, url) {  // an object URL keeps its content in memory until it is revoked
  if (element.src) URL.revokeObjectURL(element.src);
  element.src = url;
}

function show(element, file) {
  put(element, URL.createObjectURL(file));
  element.hidden = false;
}

for (const area of document.querySelectorAll(".drop")) {
  const field = area.dataset.field, input = $(field);
  input.addEventListener("change", () => choose(field, input.files[0]));
  area.addEventListener("dragover", event => { event.preventDefault(); area.classList.add("over"); });
  area.addEventListener("dragleave", () => area.classList.remove("over"));
  area.addEventListener("drop", event => {
    event.preventDefault();
    area.classList.remove("over");
    if (event.dataTransfer.files.length) {
      input.files = event.dataTransfer.files;
      choose(field, event.dataTransfer.files[0]);
    }
  });
}

$("size").addEventListener("change", () => { $("own-size-label").hidden = $("size").value !== "own"; });

// ---- a new video

function asked() {
  const body = {prompt: $("prompt").value, preset: $("preset").value, mode: $("mode").value, seed: Number($("seed").value)};
  const size = $("size").value === "own" ? $("own-size").value.replace("×", "x") : $("size").value;
  if (size) body.size = size;
  for (const name of ["steps", "frames"]) if ($(name).value) body[name] = Number($(name).value);
  return body;
}

$("job").addEventListener("submit", async event => {
  event.preventDefault();
  $("said").textContent = "";
  if (!chosen.input_reference || !chosen.video_reference) {
    $("said").textContent = "Choose a reference image and a driving clip first.";
    return;
  }
  $("go").disabled = true;
  $("sending").hidden = false;
  try {
    const body = asked();
    for (const field of FIELDS) if (chosen[field]) body[field] = {file_id: await keep(chosen[field])};
    if (masks && !chosen.mask_reference && !chosen.video_mask_reference) body.masks_id = masks.id;
    const video = await post("/v1/videos", body, {"Idempotency-Key": crypto.randomUUID?.() ?? String(Math.random())});
    add(video, true);
    display(video.id);
  } catch (error) {
    $("said").textContent = error.message;
  } finally {
    $("go").disabled = false;
    $("sending").hidden = true;
  }
});

// ---- the list

function add(video, first) {
  if (entries.has(video.id)) return;
  const element = $("entry").content.firstElementChild.cloneNode(true);
  const entry = {video, element, stop: new AbortController(), preview: null};
  entries.set(video.id, entry);
  element.dataset.id = video.id;
  element.querySelector(".show").addEventListener("click", () => display(video.id));
  element.querySelector(".delete").addEventListener("click", () => remove(video.id));
  first ? $("videos").prepend(element) : $("videos").append(element);
  update(entry, video);
  if (video.status === "queued" || video.status === "in_progress") follow(entry);
}

function update(entry, video) {
  entry.video = video;
  const in_ = name => entry.element.querySelector(name);
  in_(".prompt").textContent = video.prompt || "(no prompt)";
  in_(".what").textContent = `${video.size}, ${video.frames} frames, ${new Date(video.created_at * 1000).toLocaleString()}`;
  const bar = in_("progress");
  bar.hidden = !(video.status === "queued" || video.status === "in_progress");
  bar.value = video.progress;
  in_(".status").textContent = sentence(video);
  in_(".status").classList.toggle("bad", video.status === "failed");
  in_(".delete").textContent = bar.hidden ? "Delete" : "Cancel";
  if (video.status === "completed" && !in_(".thumb").src) {
    objectUrl(`/v1/videos/${video.id}/content?variant=thumbnail`).then(url => { in_(".thumb").src = url; }, () => {});
  }
  $("none").hidden = entries.size > 0;
  if (shown === video.id) caption(entry);
}

function sentence(video) {
  if (video.status === "queued" && video.phase) return `preparing: ${video.phase}`;
  if (video.status === "queued") return `queued, position ${video.queue_position + 1}`;
  if (video.status === "failed") return video.error.message;
  if (video.status === "completed") return `done in ${video.inference_time_s.toFixed(1)} s`;
  const left = video.seconds_left == null ? "" : `, about ${Math.round(video.seconds_left)} s left`;
  return `segment ${video.segment}/${video.segments}, step ${video.step}/${video.steps}, ${video.phase}${left}`;
}

async function follow(entry) {
  for (let pause = 500; !entry.stop.signal.aborted; pause = Math.min(pause * 2, 10000)) {
    try {
      for await (const [kind, document_] of events(entry.video.id, entry.stop.signal)) {
        pause = 500;
        if (kind === "preview") {
          entry.preview = `data:image/jpeg;base64,${document_.jpeg}`;
          entry.element.querySelector(".thumb").src = entry.preview;
          if (shown === entry.video.id) caption(entry);
        } else if (kind === "deleted") return drop(entry.video.id);
        else if (kind !== "closing") update(entry, document_);
        if (kind === "completed" || kind === "failed") {
          if (kind === "completed") entry.element.querySelector(".thumb").removeAttribute("src");
          update(entry, document_);
          if (shown === entry.video.id) display(entry.video.id);
          return;
        }
      }
    } catch (error) {
      if (entry.stop.signal.aborted) return;
    }
    await new Promise(done => setTimeout(done, pause));
  }
}

async function remove(id) {
  try {
    await call(`/v1/videos/${id}`, {method: "DELETE"});
  } catch (error) {
    $("said").textContent = error.message;
  }
  drop(id);
}

function drop(id) {
  const entry = entries.get(id);
  if (!entry) return;
  entry.stop.abort();
  entry.element.remove();
  entries.delete(id);
  $("none").hidden = entries.size > 0;
  if (shown === id) { $("result").hidden = true; shown = null; }
}

// ---- one video

function caption(entry) {
  const running = entry.video.status === "queued" || entry.video.status === "in_progress";
  $("result-caption").textContent = sentence(entry.video);
  $("preview").hidden = !(running && entry.preview);
  if (running && entry.preview) $("preview").src = entry.preview;
}

async function display(id) {
  const entry = entries.get(id), video = entry.video, done = video.status === "completed";
  const path = `/v1/videos/${id}/content?variant=`;
  shown = id;
  $("result").hidden = false;
  $("result-title").textContent = video.prompt || "Video";
  $("result-video").hidden = !done;
  for (const name of ["play", "download", "report"]) $(name).hidden = !done;
  caption(entry);
  try {
    const clip = await objectUrl(`${path}video_reference`);
    if (shown === id) put($("result-clip"), clip);
    if (done) {
      const [made, report] = await Promise.all([objectUrl(`${path}video`), objectUrl(`${path}report`)]);
      if (shown !== id) return;
      put($("result-video"), made);
      Object.assign($("download"), {href: made, download: `${id}.mp4`});
      Object.assign($("report"), {href: report, download: `${id}.json`});
      $("result").focus({preventScroll: true});
    }
  } catch (error) {
    $("result-caption").textContent = error.message;
  }
}

$("play").addEventListener("click", () => {
  for (const name of ["result-clip", "result-video"]) { $(name).currentTime = 0; $(name).play(); }
});

// ---- masks made by the service

for (const colour of COLOURS) $("colour").add(new Option(colour));

function forgetMasks() {
  masks = null;
  $("points").value = "";
  $("mask-state").textContent = "";
  for (const name of ["photo-mask", "clip-mask"]) $(name).hidden = true;
}

// The position of a click in pixels of the image, which is scaled to fit its element; null if outside the image.
function pixel(event, width, height) {
  const box = event.currentTarget.getBoundingClientRect();
  const scale = Math.min(box.width / width, box.height / height);
  const x = (event.clientX - box.left - (box.width - width * scale) / 2) / scale;
  const y = (event.clientY - box.top - (box.height - height * scale) / 2) / scale;
  return x >= 0 && y >= 0 && x <= width && y <= height ? `${x.toFixed(1)},${y.toFixed(1)}` : null;
}

function point(place) {
  if (!place || !$("masks").open) return false;
  $("points").value += ($("points").value.trim() ? "; " : "") + `${place}:${$("colour").value}`;
  $("mask-state").textContent = "Make the masks again to apply the clicks.";
  return true;
}

$("photo").addEventListener("click", event => {
  const at = pixel(event, $("photo").naturalWidth, $("photo").naturalHeight);
  point(at && `image:${at}`);
});

$("clip").addEventListener("click", event => {
  const at = pixel(event, $("clip").videoWidth, $("clip").videoHeight);
  const frame = masks ? Math.round($("clip").currentTime * rate(masks.frame_rate)) : 0;
  if (at && point(`${Math.min(frame, (masks?.frames ?? 1) - 1)}:${at}`)) event.preventDefault();
});

const rate = text => { const [over, under] = text.split("/"); return Number(over) / Number(under ?? 1); };

for (const event of ["play", "pause", "seeked", "timeupdate"]) {
  $("clip").addEventListener(event, () => {
    const mask = $("clip-mask"), clip = $("clip");
    if (mask.hidden) return;
    if (Math.abs(mask.currentTime - clip.currentTime) > 0.08) mask.currentTime = clip.currentTime;
    clip.paused ? mask.pause() : mask.play().catch(() => {});
  });
}

async function makeMasks() {
  const fields = ["input_reference", "video_reference"];
  if (fields.some(field => !chosen[field])) throw new Error("Choose a reference image and a driving clip first.");
  $("mask-state").textContent = "sending …";
  const body = {mode: $("mode").value, max_characters: Number($("max_characters").value) || 2};
  for (const field of fields) body[field] = {file_id: await keep(chosen[field])};
  const points = $("points").value.split(";").map(text => text.trim()).filter(Boolean);
  if (points.length) body.points = points;
  const made = await post("/v1/masks", body);
  for await (const [kind, document_] of events(made.id, undefined, "masks")) {
    if (kind === "failed") throw new Error(document_.error.message);
    if (kind === "completed") return document_;
    if (kind === "progress") $("mask-state").textContent = `making masks: ${document_.status === "queued" && !document_.phase ? "queued" : `${document_.progress} %`}`;
  }
  throw new Error("The connection to the service was lost. Make the masks again.");
}

$("make-masks").addEventListener("click", async () => {
  $("make-masks").disabled = true;
  try {
    masks = await makeMasks();
    const content = variant => objectUrl(`/v1/masks/${masks.id}/content?variant=${variant}`);
    put($("photo-mask"), await content("mask_reference"));
    put($("clip-mask"), await content("video_mask_reference"));
    for (const name of ["photo-mask", "clip-mask"]) $(name).hidden = false;
    $("mask-state").textContent = [`Masks for ${masks.characters.join(", ")}.`, ...masks.notes].join(" ");
  } catch (error) {
    $("mask-state").textContent = error.message;
  } finally {
    $("make-masks").disabled = false;
  }
});

// ---- the start

async function older() {
  const page = await ask(`/v1/videos?limit=20${lastId ? `&after=${lastId}` : ""}`);
  for (const video of page.data) add(video, false);
  lastId = page.last_id ?? lastId;
  $("more").hidden = !page.has_more;
}

$("more").addEventListener("click", () => older().catch(error => { $("said").textContent = error.message; }));

async function start() {
  try {
    const models = await ask("/v1/models");
    $("state").textContent = `ready: ${models.data[0].id}`;
    await older();
    document.body.dataset.ready = "yes";
  } catch (error) {
    if ($("key-form").hidden) $("state").textContent = error.message;
  }
}

start();
