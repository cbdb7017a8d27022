// The page: what is chosen, what is asked of the models, and how it is drawn.

import {World, nameOf, shuffled} from "./world.js";

const $ = id => document.getElementById(id);
const make = (tag, props = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
};
const MOST_THINGS = 40, MOST_WORDS = 60, LONG_ANSWER = 70;

let world, worker;
const cards = new Map();                               // method -> its card's parts
const state = {
  scene: null, number: -1, edited: false, chosen: -1,  // chosen: the thing that is edited
  key: 0,                                              // counts pictures: what a result belongs to
  orders: null, fresh: false,                          // rankings, and whether they are this key's
  question: "", ids: null, truth: null, cover: null,
  episodes: new Map(),                                 // `${method} ${fallen}` -> {picks, logits}
  answers: new Map(),                                  // `${key} ${question} ${keep}` -> text
  asking: new Map(),                                   // method -> the name of what it is asked
  k: 16, mean: 16, step: Infinity, playing: 0,
};
const base = make("canvas"), pictures = new Map();     // base: the picture at its own size

// ------------------------------------------------------------------------------------ the worker

const pending = new Map();
let lastId = 0;

function askWorker(what, job = {}) {
  const id = ++lastId;
  worker.postMessage({id, do: what, key: state.key, ...job});
  return new Promise((done, fail) => pending.set(id, {done, fail}));
}

function hear({data}) {
  if (data.broken) return broken(`The models cannot be loaded: ${data.broken}.`);
  const {done, fail} = pending.get(data.id);
  pending.delete(data.id);
  if (data.error) fail(new Error(data.error));
  else done(data.late ? null : data);
}

// ------------------------------------------------------------------------------------ the scene

async function pixelsOf(name) {
  if (!pictures.has(name)) {
    const image = new Image();
    image.src = `scenes/${name}.png`;
    await image.decode();
    const side = world.side, canvas = make("canvas", {width: side, height: side});
    const context = canvas.getContext("2d", {willReadFrequently: true});
    context.drawImage(image, 0, 0);
    pictures.set(name, context.getImageData(0, 0, side, side).data);
  }
  return pictures.get(name);
}

function showPixels(pixels) {
  state.pixels = pixels;
  state.drawn = (state.drawn ?? 0) + 1;
  const image = new ImageData(new Uint8ClampedArray(pixels), world.side);
  base.getContext("2d").putImageData(image, 0, 0);
}

async function chooseScene(number) {
  stopPlaying();
  const given = world.scenes[state.wanted = number];
  const pixels = await pixelsOf(given.name);
  if (number !== state.wanted) return;                 // another was chosen meanwhile
  Object.assign(state, {number, edited: false, chosen: -1, orders: null, fresh: false,
                        scene: {things: structuredClone(given.things)}});
  showPixels(pixels);
  [...$("scenes").children].forEach((each, i) => each.setAttribute("aria-pressed", i === number));
  $("scene-number").textContent = `${number + 1} of ${world.scenes.length}`;
  showTools();
  suggest();
  see();
  const {questions} = given, family = state.truth?.family ?? "text";
  setQuestion((questions.find(each => each.family === family) ?? questions[0]).question);
}

const suggestions = () => state.edited ? world.ask(state.scene)
  : world.scenes[state.number].questions.map(each => each.question);

// After a change of its things: drawn anew, then seen, asked and answered anew.
async function edited() {
  stopPlaying();
  const number = state.number;
  Object.assign(state, {edited: true, fresh: false});
  redraw();
  const empty = await pixelsOf(`${world.scenes[number].name}_empty`);
  if (number !== state.number || !state.edited) return;
  showPixels(world.render(state.scene, empty));
  $("scene-number").textContent = `${number + 1}, changed`;
  suggest();
  showTools();
  setTruth();
  redraw();
  see();
}

const see = lazily(async () => {
  state.key++;
  state.fresh = false;
  state.episodes.clear();
  redraw();
  const out = await askWorker("see", {pixels: state.pixels.slice()});
  if (!out) return;
  const n = world.grid ** 2, given = world.scenes[state.number];
  state.orders = out.orders;
  for (const {name, kind} of world.methods) {
    if (kind === "all") state.orders[name] = Array.from({length: n}, (_, i) => i);
    if (kind === "draw") state.orders[name] = state.edited ? shuffled(n, 1) : given.drawn[name];
  }
  state.fresh = true;
  redraw();
  answerNow();                                        // of all tokens, before more models load
  rank();
  point();
}, 60);

// The rankings that read the picture alone.
async function rank() {
  const orders = state.orders;
  for (const {name, kind, reads_question} of world.methods) {
    if (kind !== "scores" || reads_question) continue;
    const out = await attempt(askWorker("point", {method: name, lane: name, ids: []}));
    if (!out || orders !== state.orders) return;
    orders[name] = out.order;
    redraw();
    answer();
  }
}

// ------------------------------------------------------------------------------------ the question

function wordsOf(text) {
  return text.toLowerCase().match(/[\p{L}\p{N}\p{M}_]+|[^\p{L}\p{N}\p{M}_\s]+/gu) ?? [];
}

function setQuestion(text) {
  stopPlaying();
  text = text.trim().replace(/\s+/g, " ");
  if (text && !/[?.]$/.test(text)) text += " ?";
  $("question").value = text;
  const words = wordsOf(text), foreign = [...new Set(words.filter(w => !(w in world.vocabulary)))];
  let says = "";
  if (!words.length) {
    says = "Ask something: choose a question below, or type one.";
  } else if (words.length > MOST_WORDS) {
    says = `A question of ${words.length} words: at most ${MOST_WORDS}, please.`;
  } else if (foreign.length) {
    says = `The model cannot read ${foreign.map(word => `“${word}”`).join(", ")}: `
      + `it knows ${Object.keys(world.vocabulary).length} words, listed below.`;
  }
  state.question = says ? "" : words.join(" ");
  state.ids = says ? null : words.map(word => world.vocabulary[word]);
  state.wrong = says;
  state.episodes.clear();
  for (const each of $("suggestions").children) {
    each.setAttribute("aria-pressed", each.textContent === text);
  }
  setTruth();
  redraw();
  point();
  answer();
}

function setTruth() {
  const truth = state.ids && world.truth(state.scene, state.question);
  state.truth = truth?.answer ? truth : null;
  state.cover = state.truth && world.coverage(state.scene, truth.evidence);
  let says = state.wrong;
  if (state.ids) {
    says = truth?.answer ? `Truth: ${truth.answer}`
      : truth ? `No truth to compare with: ${truth.why}.`
        : "No truth to compare with: the world does not ask this.";
  }
  $("question-says").textContent = says;
  $("question-says").classList.toggle("wrong", Boolean(state.wrong));
}

function suggest() {
  $("suggestions").replaceChildren(...suggestions().map(text => make("button", {
    type: "button", textContent: text, title: text, onclick: () => setQuestion(text)})));
  for (const each of $("suggestions").children) {
    each.setAttribute("aria-pressed", each.textContent === state.question);
  }
}

// ------------------------------------------------------------------------------------ what is kept

const stepsOf = () => world.methods.find(each => each.kind === "steps");
const steering = method => method.steps.steering[state.mean];
const episodeOf = method => state.episodes.get(`${method.name} ${steering(method).fallen}`);

// How many patches an episode picks before stop wins; stop is shut at the first step.
function countOf(method, episode) {
  const {stop_bias} = steering(method), stop = world.grid ** 2;
  for (let t = 1; t < episode.picks.length; t++) {
    if (episode.logits[t][episode.picks[t]] < episode.logits[t][stop] + stop_bias) return t;
  }
  return episode.picks.length;
}

// pi_t of Eq. (6), the stop bias added.
function policy(method, episode, t) {
  const {stop_bias} = steering(method), row = Float64Array.from(episode.logits[t]);
  const stop = row.length - 1;
  row[stop] = t ? row[stop] + stop_bias : -Infinity;
  const most = Math.max(...row), parts = row.map(x => Math.exp((x - most) / method.steps.tau));
  const sum = parts.reduce((a, b) => a + b);
  return parts.map(x => x / sum);
}

// The patches of a method in the order in which they were kept; null while nothing is known.
function keptBy(method) {
  if (method.kind === "all") return state.orders?.[method.name] ?? null;
  if (method.kind === "steps") {
    const episode = state.ids && episodeOf(method);
    return episode ? episode.picks.slice(0, countOf(method, episode)) : null;
  }
  const order = state.orders?.[method.name] ?? state.episodes.get(method.name)?.order;
  return order ? order.slice(0, state.k) : null;
}

async function point() {
  if (!state.ids || !state.fresh) return;
  for (const method of world.methods.filter(each => each.reads_question)) {
    const fallen = method.steps ? steering(method).fallen : 0;
    const name = method.steps ? `${method.name} ${fallen}` : method.name;
    if (state.episodes.has(name)) continue;
    const asked = state.question, key = state.key;
    const job = {method: method.name, lane: method.name, ids: state.ids, fallen};
    const out = await attempt(askWorker("point", job));
    if (!out || asked !== state.question || key !== state.key) continue;
    state.episodes.set(name, out);
    redraw();
    answer();
  }
}

const at = keep => `${state.key} ${state.question} ${keep}`;

// The answers that the cards lack, all tokens' first. What is kept enters in the picture's order.
function answerNow() {
  if (!state.ids || !state.fresh) return;
  const isLong = state.truth?.family === "caption" || !state.truth;
  const limit = isLong ? LONG_ANSWER : world.limit;
  for (const method of shownMethods()) {
    const kept = keptBy(method);
    if (!kept) continue;
    const keep = kept.toSorted((a, b) => a - b), name = at(keep);
    if (state.answers.has(name) || state.asking.get(method) === name) continue;
    state.asking.set(method, name);
    const job = {ids: state.ids, keep, limit, lane: method.name};
    attempt(askWorker("answer", job)).then(out => {
      if (state.asking.get(method) === name) state.asking.delete(method);
      if (!out) return;
      if (state.answers.size > 2000) state.answers.clear();
      state.answers.set(name, out.said.map(id => world.known[id]).join(" "));
      redraw();
    });
  }
}
const answer = lazily(answerNow, 40);

async function attempt(job) {
  try {
    return await job;
  } catch (error) {
    $("question-says").textContent = `The model stopped: ${error.message}.`;
    return null;
  }
}

// Calls the last of several wishes, after a pause of so many ms.
function lazily(act, ms) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(act, ms);
  };
}

// ------------------------------------------------------------------------------------ drawing

let veil, ink;
function readTheme() {
  const style = getComputedStyle(document.documentElement);
  veil = style.getPropertyValue("--veil");
  ink = style.getPropertyValue("--evidence");
}

// The picture with what is dropped veiled, the evidence outlined. numbers: of the patches in kept.
// frame: the box of a thing that is chosen.
function draw(canvas, kept, {numbers = false, heat = null, frame = null} = {}) {
  const shown = [state.drawn, kept, state.truth?.evidence, heat, frame, veil].join(" | ");
  if (canvas.shown === shown) return;                  // nothing has changed
  canvas.shown = shown;
  const context = canvas.getContext("2d"), side = canvas.width, n = world.grid, cell = side / n;
  context.imageSmoothingEnabled = false;
  context.drawImage(base, 0, 0, side, side);
  if (kept) {
    const stays = new Set(kept), area = p => [p % n * cell, Math.floor(p / n) * cell, cell, cell];
    context.beginPath();
    for (let p = 0; p < n * n; p++) if (!stays.has(p)) context.rect(...area(p));
    context.fillStyle = veil;
    context.fill();
    for (let p = 0; heat && p < n * n; p++) {
      if (stays.has(p) || heat[p] < .004) continue;
      context.fillStyle = `rgba(91, 108, 255, ${Math.min(.15 + heat[p], .9)})`;
      context.fillRect(...area(p));
    }
  }
  if (state.truth) {
    const scale = side / world.side;
    const boxes = state.truth.evidence.flatMap(i => {
      const thing = state.scene.things[i], parts = thing ? world.boxesOf(thing) : [];
      return thing?.text ? [[...parts[0].slice(0, 2), ...parts[2].slice(2)]] : parts;
    });
    for (const [width, colour] of [[7, "rgba(0, 0, 0, .55)"], [4, ink]]) {
      Object.assign(context, {lineWidth: width, strokeStyle: colour});
      for (const [x0, y0, x1, y1] of boxes) {
        context.strokeRect(x0 * scale, y0 * scale, (x1 - x0) * scale, (y1 - y0) * scale);
      }
    }
  }
  if (kept && numbers) {
    Object.assign(context, {font: `700 ${Math.round(cell * .5)}px system-ui, sans-serif`,
                            textAlign: "center", textBaseline: "middle", lineJoin: "round",
                            lineWidth: cell * .14, strokeStyle: "rgba(0, 0, 0, .8)"});
    kept.forEach((p, i) => {
      const x = (p % n + .5) * cell, y = (Math.floor(p / n) + .54) * cell;
      context.strokeText(i + 1, x, y);
      context.fillStyle = "#fff";
      context.fillText(i + 1, x, y);
    });
  }
  for (const [width, colour] of frame ? [[8, "#000a"], [4, "#fff"]] : []) {
    const [x0, y0, x1, y1] = frame.map(c => c * side / world.side);
    Object.assign(context, {lineWidth: width, strokeStyle: colour});
    context.setLineDash([16, 10]);
    context.strokeRect(x0 - 6, y0 - 6, x1 - x0 + 12, y1 - y0 + 12);
    context.setLineDash([]);
  }
}

const drawScene = () => draw($("scene"), null, {frame: state.scene.things[state.chosen]?.box});


const shownMethods = () => world.methods.filter(({name}) => !cards.get(name).card.hidden);

function redraw() {
  drawScene();
  for (const method of shownMethods()) drawCard(method);
  drawPlayer();
}

function drawCard(method) {
  const {card, canvas, answer, verdict, count, share, bar} = cards.get(method.name);
  const kept = keptBy(method), n = world.grid ** 2;
  draw(canvas, method.kind === "all" ? null : kept, {numbers: method.kind === "steps"});
  const keep = kept?.toSorted((a, b) => a - b), text = keep && state.answers.get(at(keep));
  const whole = state.answers.get(at([...Array(n).keys()]));
  const isReady = text !== undefined && state.fresh;
  card.setAttribute("aria-busy", Boolean(state.ids) && !isReady);
  card.dataset.kept = keep?.join(" ") ?? "";
  card.dataset.answer = isReady ? text : "";
  if (isReady || !state.ids) {
    answer.textContent = isReady ? text || "(nothing)" : "–";
    answer.title = answer.textContent;
    answer.classList.toggle("long", answer.textContent.length > 24);
  }
  const isRight = isReady && state.truth ? text === state.truth.answer : null;
  card.dataset.verdict = isRight === null ? "" : isRight ? "right" : "wrong";
  verdict.textContent = !isReady ? "" : method.kind === "all" ? "unpruned"
    : whole === undefined ? "" : text === whole ? "as unpruned" : `unpruned: ${whole}`;
  count.textContent = kept ? `${kept.length} of ${n}` : `– of ${n}`;
  let shown = "–";
  if (kept && state.cover) {
    const total = state.cover.reduce((a, b) => a + b, 0);
    const held = kept.reduce((sum, p) => sum + state.cover[p], 0);
    if (total) shown = `${Math.round(100 * held / total)} %`;
    bar.style.width = total ? `${100 * held / total}%` : "0";
  } else {
    bar.style.width = "0";
  }
  share.textContent = shown;
}

// ------------------------------------------------------------------------------------ the player

function drawPlayer() {
  const method = stepsOf();
  if (!method) return;
  const episode = state.ids && episodeOf(method);
  const count = episode ? countOf(method, episode) : 0, ends = episode?.picks.length > count;
  const most = count + (ends ? 1 : 0), step = Math.min(state.step, most);
  $("step").max = most;
  $("step").value = step;
  for (const id of ["back", "next", "play", "step"]) $(id).disabled = !episode;
  $("play").textContent = state.playing ? "Pause" : "Play";
  const now = episode && step > 0 ? policy(method, episode, step - 1) : null;
  const before = episode ? episode.picks.slice(0, Math.min(step, count)) : null;
  draw($("player-picture"), before, {numbers: true, heat: now && step <= count ? now : null});
  const stop = now ? now.at(-1) : 0;
  $("stop-bar").style.width = `${100 * stop}%`;
  $("stop-value").textContent = now ? `${(100 * stop).toFixed(stop < .1 ? 1 : 0)} %` : "–";
  $("player").dataset.step = step;
  let says = "Ask a question to see it pick.";
  if (episode) {
    const pick = episode.picks[step - 1], n = world.grid;
    says = !step ? `It will keep ${count} patches.`
      : step > count ? `Step ${step}: it points at stop. ${count} patches are kept.`
        : `Step ${step}: it points at patch ${pick}, row ${Math.floor(pick / n) + 1}, `
          + `column ${pick % n + 1}, with ${Math.round(100 * now[pick])} %.`;
  }
  $("step-says").textContent = says;
  drawChart(method, episode, most, step);
}

function drawChart(method, episode, most, step) {
  const chart = $("chart");
  $("last-step").textContent = most ? `step ${most}` : "";
  if (!episode) {
    chart.episode = null;
    return chart.replaceChildren();
  }
  const wide = 480 / most, {stop_bias} = steering(method);
  if (chart.episode !== episode || chart.bias !== stop_bias) {
    Object.assign(chart, {episode, bias: stop_bias});
    chart.innerHTML = Array.from({length: most}, (_, t) => {
      const height = Math.max(118 * policy(method, episode, t).at(-1), 1.5);
      return `<rect x="${(t + .1) * wide}" y="${120 - height}" width="${wide * .8}"
        height="${height}"/>`;
    }).join("");
    chart.setAttribute("aria-label", `Probability of stop at each of ${most} steps`);
  }
  [...chart.children].forEach((bar, t) => bar.setAttribute(
    "class", t + 1 === step ? "now" : t < step ? "past" : ""));
}

function stopPlaying() {
  clearInterval(state.playing);
  state.playing = 0;
  state.step = Infinity;
}

function play() {
  if (state.playing) {
    clearInterval(state.playing);
    state.playing = 0;
    return drawPlayer();
  }
  const most = Number($("step").max);
  if (Math.min(state.step, most) === most) state.step = 0;
  state.playing = setInterval(() => goTo(state.step + 1, true), 450);
  drawPlayer();
}

function goTo(step, isPlaying = false) {
  const most = Number($("step").max);
  state.step = Math.max(0, Math.min(step, most));
  if (!isPlaying || state.step === most) {
    clearInterval(state.playing);
    state.playing = 0;
  }
  drawPlayer();
}

// ------------------------------------------------------------------------------------ the editor

function scenePoint(event) {
  const {left, top, width} = $("scene").getBoundingClientRect(), scale = world.side / width;
  return [(event.clientX - left) * scale, (event.clientY - top) * scale];
}

function showTools() {
  const thing = state.scene.things[state.chosen];
  $("remove").disabled = !thing;
  $("letters").disabled = !thing?.text;
  $("letters").value = thing?.text ?? "";
  $("reset").disabled = !state.edited;
  for (const each of [...$("colours").children, ...$("kinds").children]) {
    each.setAttribute("aria-pressed", Boolean(thing)
      && [thing.colour, thing.kind].includes(each.dataset.name));
  }
  const n = state.scene.things.length, most = world.most + 2;
  let says = thing ? `Chosen: ${nameOf(thing)}, ${world.cellOf(thing)}.`
    : "Click a thing to change it, drag it to move it.";
  if (!n) {
    says = "This scene is empty, there is nothing to see: add a thing, or reset.";
  } else if (n >= MOST_THINGS) {
    says = `${n} things, and no more fit. The models have never seen more than ${most}.`;
  } else if (n > most) {
    says = `${n} things: the models have never seen more than ${most}, do not trust them.`;
  } else if (overlap()) {
    says = "Two things overlap, which the models have never seen.";
  }
  $("scene-says").textContent = says;
}

const meet = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
const overlap = () => state.scene.things.some(
  (a, i) => state.scene.things.some((b, j) => i < j && meet(a.box, b.box)));

function move(thing, x, y) {
  const [w, h] = [thing.box[2] - thing.box[0], thing.box[3] - thing.box[1]];
  let left = Math.round(Math.max(0, Math.min(x, world.side - w)));
  let top = Math.round(Math.max(0, Math.min(y, world.side - h)));
  if (thing.text) {                                    // its letters stand on the patches' lattice
    const {cell, grid} = world;
    const snap = (c, least, most) => Math.max(least, Math.min(Math.round(c / cell), most)) * cell;
    left = snap(left - 6, 0, grid - 5) + 6;
    top = snap(top + 3, 1, grid - 2) - 3;
  }
  thing.box = [left, top, left + w, top + h];
}

// A thing of this kind gets its size and, if it is a sign, letters.
function become(thing, kind) {
  const isSign = kind === "sign", [x, y] = thing.box, [w, h] = isSign ? [48, 18] : [26, 26];
  Object.assign(thing, {kind, text: isSign ? "KEY" : "", box: [x, y, x + w, y + h]});
  move(thing, x, y);
}

function addThing() {
  if (state.scene.things.length >= MOST_THINGS) return showTools();
  const colour = state.colour ?? world.colourNames[0];
  const thing = {colour, fill: world.colours[colour], box: [0, 0]};
  become(thing, state.kind ?? world.shapes[0]);
  const free = ([x, y]) => {
    move(thing, x, y);
    return !state.scene.things.some(each => meet(each.box, thing.box));
  };
  const places = shuffled(256, 3).map(p => [p % 16 * 8 + 4, Math.floor(p / 16) * 8 + 4]);
  places.find(free) ?? move(thing, ...places[state.scene.things.length]);
  state.scene.things.push(thing);
  state.chosen = state.scene.things.length - 1;
  edited();
}

function removeThing() {
  if (!state.scene.things[state.chosen]) return;
  state.scene.things.splice(state.chosen, 1);
  state.chosen = -1;
  edited();
}

function change(what, value) {
  state[what] = value;
  const thing = state.scene.things[state.chosen];
  if (!thing) return showTools();
  if (what === "colour") Object.assign(thing, {colour: value, fill: world.colours[value]});
  if (what === "kind" && (value === "sign") !== Boolean(thing.text)) become(thing, value);
  else if (what === "kind") thing.kind = value;
  edited();
}

function buildEditor() {
  const canvas = $("scene");
  let grip = null;
  const thingAt = ([x, y]) => state.scene.things.findLastIndex(
    ({box}) => x >= box[0] - 2 && x < box[2] + 2 && y >= box[1] - 2 && y < box[3] + 2);
  // a finger upon a thing drags it, beside of it scrolls the page
  canvas.addEventListener("touchstart", event => {
    if (thingAt(scenePoint(event.touches[0])) >= 0) event.preventDefault();
  }, {passive: false});
  canvas.onpointerdown = event => {
    const [x, y] = scenePoint(event);
    state.chosen = thingAt([x, y]);
    const thing = state.scene.things[state.chosen];
    if (thing) {
      grip = [x - thing.box[0], y - thing.box[1]];
      canvas.setPointerCapture(event.pointerId);
    }
    showTools();
    drawScene();
  };
  canvas.onpointermove = event => {
    const thing = state.scene.things[state.chosen];
    if (!grip || !thing) return;
    const [x, y] = scenePoint(event), was = thing.box.join();
    move(thing, x - grip[0], y - grip[1]);
    if (thing.box.join() !== was) edited();
  };
  canvas.onpointerup = canvas.onpointercancel = () => { grip = null; };
  canvas.onkeydown = event => {
    const thing = state.scene.things[state.chosen];
    const by = event.shiftKey || thing?.text ? world.cell : 3;
    const steps = {ArrowLeft: [-by, 0], ArrowRight: [by, 0], ArrowUp: [0, -by], ArrowDown: [0, by]};
    if (event.key.toLowerCase() === "n" && state.scene.things.length) {
      state.chosen = (state.chosen + 1) % state.scene.things.length;
      showTools();
      drawScene();
    } else if (["Delete", "Backspace"].includes(event.key)) {
      removeThing();
    } else if (thing && steps[event.key]) {
      const [dx, dy] = steps[event.key];
      move(thing, thing.box[0] + dx, thing.box[1] + dy);
      edited();
    } else {
      return;
    }
    event.preventDefault();
  };
  $("colours").append(...Object.entries(world.colours).map(([name, rgb]) => {
    const button = make("button", {type: "button", className: "swatch", title: name,
                                   ariaLabel: name, onclick: () => change("colour", name)});
    button.dataset.name = name;
    button.style.setProperty("--fill", `rgb(${rgb.join()})`);
    return button;
  }));
  $("kinds").append(...[...world.shapes, "sign"].map(name => {
    const button = make("button", {type: "button", className: "swatch", title: name,
                                   ariaLabel: name, onclick: () => change("kind", name)});
    button.dataset.name = name;
    button.append(icon(name));
    return button;
  }));
  $("add").onclick = addThing;
  $("remove").onclick = removeThing;
  $("reset").onclick = () => chooseScene(state.number);
  $("letters").oninput = () => {
    const thing = state.scene.things[state.chosen];
    const letters = [...$("letters").value.toUpperCase()];
    const text = letters.filter(letter => world.letters.includes(letter)).join("");
    if (text.length < 3 || !thing) {
      $("scene-says").textContent = `A sign has three letters of ${world.letters}.`;
      return;
    }
    thing.text = text;
    edited();
  };
}

// A shape's picture, drawn as the scenes' are.
function icon(kind) {
  const canvas = make("canvas", {width: 40, height: 40});
  const small = Object.assign(Object.create(world), {side: 40});
  if (kind === "sign") {
    const context = canvas.getContext("2d");
    Object.assign(context, {fillStyle: "#808aa5", font: "700 17px system-ui", textAlign: "center"});
    context.fillText("KEY", 20, 26);
    return canvas;
  }
  const thing = {kind, box: [5, 5, 35, 35], text: "", fill: [128, 138, 165]};
  const pixels = small.render({things: [thing]}, new Uint8ClampedArray(40 * 40 * 4));
  const mask = small.render({things: [{...thing, fill: [255, 255, 255]}]},
                            new Uint8ClampedArray(40 * 40 * 4));
  for (let p = 3; p < pixels.length; p += 4) pixels[p] = Math.min(255, mask[p - 1]);
  canvas.getContext("2d").putImageData(new ImageData(pixels, 40), 0, 0);
  return canvas;
}

// ------------------------------------------------------------------------------------ the start

function showNote(place, note) {
  const link = make("a", {href: note.href, target: "_blank", title: `${note.file}, ${note.name}`});
  link.innerHTML = note.equation;
  place.replaceChildren(make("span", {className: "equation"}, link), note.says);
}

function buildCards() {
  for (const method of world.methods) {
    const note = world.notes[method.name], name = method.name;
    const parts = {
      canvas: make("canvas", {className: "picture", width: 576, height: 576}),
      answer: make("strong", {className: "answer", textContent: "–"}),
      verdict: make("span", {className: "soft verdict"}),
      count: make("span", {className: "count"}), share: make("span", {className: "count"}),
      bar: make("div"), note: make("p", {className: "note"}),
    };
    parts.canvas.setAttribute("role", "img");
    parts.canvas.setAttribute("aria-label", `The patches that ${note.label} keeps`);
    parts.card = make("article", {className: "card"},
      parts.canvas,
      make("header", {}, make("h3", {textContent: note.label}), parts.count),
      make("p", {className: "result"}, parts.answer, parts.verdict),
      make("p", {className: "line evidence"}, make("span", {textContent: "evidence kept"}),
           make("div", {className: "bar"}, parts.bar), parts.share),
      parts.note);
    parts.card.dataset.method = name;
    if (note.equation) showNote(parts.note, note);
    else parts.note.textContent = note.says;
    const toggle = make("input", {type: "checkbox", checked: true, onchange: () => {
      parts.card.hidden = !toggle.checked;
      redraw();
      answer();
    }});
    cards.set(name, parts);
    $("cards").append(parts.card);
    $("methods").append(make("label", {className: "chip"}, toggle, note.label));
  }
}

function buildSliders() {
  const n = world.grid ** 2, method = stepsOf();
  let frame = 0;
  const onSlide = (id, name, act) => {
    $(id).oninput = () => {
      state[name] = Number($(id).value);
      $(`${id}-value`).textContent = state[name];
      cancelAnimationFrame(frame);
      frame = requestAnimationFrame(() => { redraw(); act(); answer(); });
    };
    $(id).value = state[name];
    $(`${id}-value`).textContent = state[name];
  };
  $("k").max = n;
  onSlide("k", "k", () => {});
  if (!method) return;
  const label = world.notes[method.name].label;
  $("mean-control").hidden = $("player").hidden = false;
  $("mean-label").textContent = label;
  $("player-title").textContent = `${label}, pick by pick`;
  $("mean").max = Math.max(...Object.keys(method.steps.steering).map(Number));
  state.mean = Math.min(state.mean, Number($("mean").max));
  onSlide("mean", "mean", () => { stopPlaying(); point(); });
  $("play").onclick = play;
  $("back").onclick = () => goTo(Number($("step").value) - 1);
  $("next").onclick = () => goTo(Number($("step").value) + 1);
  $("step").oninput = () => goTo(Number($("step").value));
}

function build() {
  base.width = base.height = world.side;
  for (const place of document.querySelectorAll("[data-note]")) {
    const note = world.controls[place.dataset.note];
    if (note) showNote(place, note);
  }
  $("words").textContent = Object.keys(world.vocabulary).join(" ");
  $("scenes").append(...world.scenes.map(({name, things}, i) => {
    const picture = make("img", {src: `scenes/${name}.png`, loading: "lazy", width: 56, height: 56,
                                 alt: `Scene ${i + 1}: ${things.map(nameOf).join(", ")}`});
    return make("button", {type: "button", onclick: () => chooseScene(i)}, picture);
  }));
  $("ask").onsubmit = event => {
    event.preventDefault();
    setQuestion($("question").value);
  };
  $("question").onkeydown = event => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    setQuestion($("question").value);
  };
  buildCards();
  buildEditor();
  buildSliders();
  $("theme").onclick = () => {
    const root = document.documentElement;
    const isDark = getComputedStyle(root).getPropertyValue("--is-dark");
    root.dataset.theme = Number(isDark) ? "light" : "dark";
    readTheme();
    redraw();
  };
  matchMedia("(prefers-color-scheme: dark)").onchange = () => { readTheme(); redraw(); };
  readTheme();
}

async function start() {
  if (!$("broken").hidden) return;
  worker = new Worker("worker.js", {type: "module"});
  worker.onmessage = hear;
  worker.onerror = event => broken(`The models cannot start: ${event.message ?? "no worker"}.`);
  const answer = await fetch("world.json");
  if (!answer.ok) throw new Error(`world.json: ${answer.status} ${answer.statusText}`);
  world = new World(await answer.json());
  world.known = Object.fromEntries(
    Object.entries(world.vocabulary).map(([word, id]) => [id, word]));
  build();
  await chooseScene(0);
}

// such as a scene that a host does not send
addEventListener("unhandledrejection", event => {
  $("scene-says").textContent = `This did not work: ${event.reason?.message ?? event.reason}.`;
});
start().catch(error => broken(`The page cannot start: ${error.message}.`));
