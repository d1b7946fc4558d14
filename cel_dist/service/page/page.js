"use strict";

const element = (id) => document.getElementById(id);
const seconds = (number) => `${number.toFixed(1)} s`;
let limits = { max_seconds: 60, max_bytes: Infinity };
let audio = null;
let recorder = null;
let busy = 0;

// --- The service ---

async function call(method, path, query = {}, body = undefined) {
  const headers = {};
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body) headers["Content-Type"] = body.type || "application/octet-stream";
  let response;
  try {
    response = await fetch(`v1/${path}?${new URLSearchParams(query)}`, { method, headers, body });
  } catch {
    throw new Error("The service does not answer.");
  }
  const answer = await response.json().catch(() => ({ detail: response.statusText }));
  // Other refusals tell nothing of the token.
  if (response.ok || response.status === 401) element("access").hidden = response.ok;
  if (!response.ok) throw new Error(answer.detail);
  return answer;
}

function show(text, kind = "") {
  element("result").textContent = text;
  element("result").className = kind;
}

async function during(work) {
  document.body.setAttribute("aria-busy", "true");
  busy += 1;
  enable();
  try {
    await work();
  } catch (error) {
    show(error.message, "bad");
  } finally {
    busy -= 1;
    if (!busy) document.body.removeAttribute("aria-busy");
    enable();
  }
}

function enable() {
  const idle = !busy;
  const named = element("name").value.trim() !== "";
  element("enrol").disabled = element("verify").disabled = !(idle && audio && named);
  element("identify").disabled = !(idle && audio);
  // A second click while the browser asks for the microphone would open it twice, and close it once.
  element("record").disabled = !idle;
}

// --- A recording ---

function keep(blob) {
  if (blob.size > limits.max_bytes) {
    audio = null;
    show(`The file is larger than ${limits.max_bytes} bytes.`, "bad");
  } else {
    audio = blob;
    const playback = element("playback");
    if (playback.src) URL.revokeObjectURL(playback.src);
    playback.src = URL.createObjectURL(blob);
    playback.hidden = false;
    show("");
  }
  enable();
}

function wav(blocks, rate) {
  const samples = blocks.reduce((sum, block) => sum + block.length, 0);
  const view = new DataView(new ArrayBuffer(44 + 2 * samples));
  const text = (place, word) => [...word].forEach((letter, i) => view.setUint8(place + i, letter.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  text(36, "data");
  view.setUint32(40, 2 * samples, true);
  let place = 44;
  for (const block of blocks) {
    for (const value of block) {
      view.setInt16(place, Math.max(-1, Math.min(1, value)) * 32767, true);
      place += 2;
    }
  }
  return new Blob([view], { type: "audio/wav" });
}

async function startRecording() {
  if (!navigator.mediaDevices) {
    throw new Error("Browsers give the microphone to pages of https:// or of this machine only. Choose a file instead.");
  }
  // What improves speech for people on the phone changes the voice.
  const plain = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false };
  const stream = await navigator.mediaDevices.getUserMedia({ audio: plain }).catch((error) => {
    throw new Error(`The microphone cannot be used (${error.message}). Permit it, or choose a file instead.`);
  });
  const context = new AudioContext();
  try {
    await context.audioWorklet.addModule("recorder.js");
  } catch {
    await release(stream, context);
    throw new Error("The recorder cannot be loaded. Reload the page, or choose a file instead.");
  }
  const node = new AudioWorkletNode(context, "recorder");
  const blocks = [];
  const longest = Math.min(limits.max_seconds, (limits.max_bytes - 44) / 2 / context.sampleRate) * context.sampleRate;
  let samples = 0;
  const finished = new Promise((resolve) => {
    node.port.onmessage = ({ data }) => {
      if (data === null) return resolve();
      const block = data.subarray(0, Math.max(0, Math.floor(longest) - samples));
      blocks.push(block);
      samples += block.length;
      element("timer").textContent = seconds(samples / context.sampleRate);
      element("level").value = Math.max(0, ...block.map(Math.abs));
      if (samples >= Math.floor(longest)) stopRecording();
    };
  });
  // Some browsers run only what leads to the speakers; the recorder gives them silence.
  context.createMediaStreamSource(stream).connect(node).connect(context.destination);
  recorder = { stream, context, node, blocks, finished };
  element("timer").textContent = seconds(0);
  element("record").textContent = "Stop";
  element("record").classList.add("on");
}

function release(stream, context) {
  stream.getTracks().forEach((track) => track.stop());
  return context.close();
}

async function stopRecording() {
  if (!recorder) return;
  const { stream, context, node, blocks, finished } = recorder;
  recorder = null;
  node.port.postMessage("stop");
  await finished;
  const rate = context.sampleRate;
  await release(stream, context);
  element("record").textContent = "Record";
  element("record").classList.remove("on");
  element("level").value = 0;
  element("file").value = "";
  keep(wav(blocks, rate));
}

// --- Questions ---

const likely = (answer) =>
  `score ${answer.score.toFixed(3)}` +
  (answer.probability === null ? "" : `, probability ${(100 * answer.probability).toFixed(1)} %`);

async function enrol() {
  const person = await call("POST", "enrol", { name: element("name").value.trim() }, audio);
  const number = person.recordings === 1 ? "1 recording" : `${person.recordings} recordings`;
  show(`${person.name} is enrolled: ${number}, ${seconds(person.seconds)}.`, "good");
  await list();
}

async function verify() {
  const answer = await call("POST", "verify", { name: element("name").value.trim() }, audio);
  const verdict = { true: `This is ${answer.name}`, false: `This is not ${answer.name}` };
  show(
    `${verdict[answer.same] ?? `Compared with ${answer.name}`}: ${likely(answer)}.`,
    { true: "good", false: "bad" }[answer.same],
  );
}

async function identify() {
  const answer = await call("POST", "identify", {}, audio);
  const [first] = answer.candidates;
  if (!first) return show("Nobody is enrolled.");
  const lines = answer.candidates.map((candidate, i) => `${i + 1}. ${candidate.name}: ${likely(candidate)}`);
  if (first.same !== null) lines.unshift(answer.identified === null ? "Nobody of these:" : `${answer.identified}.`);
  return show(lines.join("\n"), { true: "good", false: "bad" }[first.same]);
}

async function list() {
  const { speakers } = await call("GET", "speakers");
  const rows = speakers.map((person) => {
    const row = document.createElement("tr");
    for (const text of [person.name, person.recordings, person.seconds.toFixed(1)]) {
      row.insertCell().textContent = text;
    }
    const remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = "Remove";
    remove.setAttribute("aria-label", `Remove ${person.name}`);
    remove.onclick = () =>
      confirm(`Remove ${person.name} and all embeddings of this person?`) &&
      during(async () => {
        await call("DELETE", "speakers", { name: person.name });
        show(`${person.name} is removed.`);
        await list();
      });
    row.insertCell().append(remove);
    return row;
  });
  document.querySelector("#people tbody").replaceChildren(...rows);
  element("names").replaceChildren(...speakers.map((person) => new Option(person.name, person.name)));
}

async function begin() {
  limits = await call("GET", "service");
  element("service").textContent =
    `Encoder ${limits.encoder}, model ${limits.fingerprint.slice(0, 12)}. Recordings of up to ` +
    `${limits.max_seconds} s; they are not kept.` +
    (limits.decides ? "" : " The model has no threshold: there are scores, and no decisions.");
  await list();
}

element("access").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", element("token").value);
  during(async () => {
    await begin();
    show("");
  });
};
element("record").onclick = () => during(recorder ? stopRecording : startRecording);
element("file").onchange = () => element("file").files.length && keep(element("file").files[0]);
element("name").oninput = enable;
element("enrol").onclick = () => during(enrol);
element("verify").onclick = () => during(verify);
element("identify").onclick = () => during(identify);
during(begin);
