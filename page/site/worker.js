// The models, away from the page's own thread. Messages in: {id, do, ...}; out: {id, ...} or
// {id, error}. What is asked last counts: a job that is overtaken ends with {id, late: true}.
//
//   see     {key, pixels: RGBA}         -> {orders: {method: ranking}} of what the encoder says
//                                          itself; what the picture gave is kept
//   point   {key, method, ids, fallen}  -> {order} of a method that ranks; of one that picks
//                                          {picks, logits: N + 1 of each step}, it does not stop
//   answer  {key, ids, keep, limit}     -> {said: word ids}, keep: ascending patches

import * as ort from "./runtime/ort.wasm.min.mjs";

let world, words, seen = {};
const sessions = {}, waiting = {}, newest = {};

const fetched = async (path, read) => {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path}: ${answer.status} ${answer.statusText}`);
  return answer[read]();
};

// A model, loaded when it is first wanted.
async function model(name) {
  waiting[name] ??= fetched(`models/${name}.onnx`, "arrayBuffer").then(bytes =>
    ort.InferenceSession.create(bytes, {executionProviders: ["wasm"]}));
  return sessions[name] ??= await waiting[name];
}

const float = (data, dims) => new ort.Tensor("float32", data, dims);

async function load() {
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = new URL("runtime/", self.location.href).href;
  const vision = model("see"), language = model("speak");
  const [bytes, json] = await Promise.all([fetched("models/words.bin", "arrayBuffer"),
                                           fetched("world.json", "json")]);
  [world, words] = [json, new Float32Array(bytes)];
  await Promise.all([vision, language]);
}

function embedded(ids) {
  const d = world.width, out = new Float32Array(ids.length * d);
  ids.forEach((id, i) => out.set(words.subarray(id * d, (id + 1) * d), i * d));
  return out;
}

// The best first, of equals the one that stands first.
function ranking(scores) {
  return Array.from(scores.keys()).sort((a, b) => scores[b] - scores[a] || a - b);
}

async function see({key, pixels}) {
  const area = world.side ** 2, planes = new Float32Array(3 * area);
  for (let p = 0; p < area; p++) {
    for (let c = 0; c < 3; c++) planes[c * area + p] = pixels[4 * p + c];
  }
  const session = await model("see");
  const out = await session.run({pixels: float(planes, [1, 3, world.side, world.side])});
  const orders = {};
  for (const method of world.methods) {
    if (method.kind === "reading") orders[method.name] = ranking(out[method.name].data);
  }
  seen = {key, feats: out.feats, tokens: out.tokens.data};
  return {orders};
}

async function point({method, ids, fallen}, isLate) {
  const {kind, steps} = world.methods.find(each => each.name === method);
  const asked = float(embedded(ids), [1, ids.length, world.width]);
  if (kind === "scores") {
    const given = ids.length ? {feats: seen.feats, words: asked} : {feats: seen.feats};
    return {order: ranking((await (await model(method)).run(given)).scores.data)};
  }
  const begin = await model(`${method}_begin`), pick = await model(`${method}_pick`);
  const given = {feats: seen.feats, words: asked,
                 fallen: float(Float32Array.of(fallen), [1, 1])};
  for (const name in given) if (!begin.inputNames.includes(name)) delete given[name];
  const {memory, ...keys} = await begin.run(given);
  const [, slots, width] = memory.dims, stop = slots - 1, closed = new Uint8Array(slots);
  let caches = Array.from({length: steps.caches}, () => float(new Float32Array(0), steps.empty));
  let x = Float32Array.from(steps.start);
  const picks = [], logits = [];
  while (picks.length < steps.most && !isLate()) {
    const feeds = {...keys, x: float(x, [1, 1, width])};
    caches.forEach((cache, i) => { feeds[`cache_${i}`] = cache; });
    const out = await pick.run(feeds);
    caches = caches.map((_, i) => out[`grown_${i}`]);
    const row = out.logits.data.slice();
    let best = -1;
    for (let i = 0; i < stop; i++) {
      if (closed[i]) row[i] = -Infinity;
      else if (best < 0 || row[i] > row[best]) best = i;
    }
    logits.push(row);
    picks.push(best);
    closed[best] = 1;
    x = memory.data.slice(best * width, (best + 1) * width);
  }
  return {picks, logits};
}

async function answer({ids, keep, limit}, isLate) {
  const d = world.width, n = world.grid ** 2, {before, between, after} = world.prompt;
  const text = [...between, ...ids, ...after], first = before.length + n;
  const rows = [embedded(before), ...keep.map(i => seen.tokens.subarray(i * d, (i + 1) * d)),
                embedded(text)];
  const places = [...before.keys(), ...keep.map(i => before.length + i),
                  ...text.map((_, i) => first + i)];
  const said = [], session = await model("speak");
  for (let step = 0; step < limit && !isLate(); step++) {
    const embeds = new Float32Array(places.length * d);
    let at = 0;
    for (const row of rows) { embeds.set(row, at); at += row.length; }
    const {logits} = await session.run({
      embeds: float(embeds, [1, places.length, d]),
      pos: new ort.Tensor("int64", BigInt64Array.from(places, BigInt), [1, places.length])});
    const best = ranking(logits.data)[0];
    if (world.ends.includes(best)) break;
    said.push(best);
    rows.push(embedded([best]));
    places.push(first + text.length + step);
  }
  return {said};
}

const doing = {see, point, answer};
let queue = load();
queue.catch(error => self.postMessage({broken: String(error.message ?? error)}));

self.onmessage = ({data}) => {
  const lane = `${data.do} ${data.lane ?? ""}`;
  newest[lane] = data.id;
  newest.scene = data.do === "see" ? data.key : newest.scene;
  const isLate = () => newest[lane] !== data.id || data.key !== newest.scene;
  queue = queue.then(async () => {
    if (isLate()) return self.postMessage({id: data.id, late: true});
    try {
      const out = await doing[data.do](data, isLate);
      self.postMessage(isLate() ? {id: data.id, late: true} : {id: data.id, ...out});
    } catch (error) {
      self.postMessage({id: data.id, error: String(error.message ?? error)});
    }
  });
};
