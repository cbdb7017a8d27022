// The tiny world in the browser: what is true of a scene, and its pixels after a change.
// A port of tiny/scenes.py, as far as it is needed; world.json brings the names and letters.
//
//   scene      {things}; a thing is {kind, colour, box: [left, top, right, bottom], text, fill}
//   truth      {family, answer, evidence: indices of things}, or {why} where the world does not ask

export class World {
  constructor(json) {
    Object.assign(this, json);
    this.colourNames = Object.keys(this.colours);
  }

  // ------------------------------------------------------------------------------- questions

  // The truth of a question; null for one that the world never asks.
  truth(scene, question) {
    const text = question.trim().replace(/\s+/g, " ").toLowerCase();
    const colour = `(${this.colourNames.join("|")})`, kind = `(${this.shapes.join("|")})`;
    const name = `${colour} ${kind}`;
    const where = test => scene.things.flatMap((t, i) => !t.text && test(t) ? [i] : []);
    const called = (c, k) => where(t => t.colour === c && t.kind === k);
    const match = pattern => text.match(new RegExp(`^${pattern}$`));
    const one = (family, found, say, what) => found.length === 1
      ? {family, answer: say(scene.things[found[0]]), evidence: found}
      : {why: `there ${found.length ? `are ${found.length}` : "is no"} ${what}`
              + (found.length ? ", the world asks about one" : " here")};
    let m;
    if (text === this.caption) {
      return {family: "caption", answer: this.captionOf(scene),
              evidence: scene.things.map((_, i) => i)};
    }
    if ((m = match(`is there a ${name} \\?`))) {
      const found = called(m[1], m[2]);
      const near = where(t => t.colour === m[1] || t.kind === m[2]);
      return {family: "exist", answer: found.length ? "yes" : "no",
              evidence: found.length ? found : near};
    }
    if ((m = match(`what colour is the ${kind} \\?`))) {
      return one("colour", where(t => t.kind === m[1]), t => t.colour, `${m[1]}`);
    }
    if ((m = match(`what shape is the ${colour} thing \\?`))) {
      return one("shape", where(t => t.colour === m[1]), t => t.kind, `${m[1]} shape`);
    }
    if ((m = match(`how many (?:(\\w+) )?shapes are there \\?`))) {
      if (m[1] && ![...this.colourNames, ...this.shapes].includes(m[1])) return null;
      const found = where(t => !m[1] || t.kind === m[1] || t.colour === m[1]);
      return found.length ? {family: "count", answer: String(found.length), evidence: found}
        : {why: "there is none, and the world never asks for a count of zero"};
    }
    if ((m = match(`where is the ${name} \\?`))) {
      return one("where", called(m[1], m[2]), t => this.cellOf(t), `${m[1]} ${m[2]}`);
    }
    if ((m = match(`is the ${name} (left of|above) the ${name} \\?`))) {
      const pair = [called(m[1], m[2]), called(m[4], m[5])];
      if (pair.some(found => found.length !== 1)) return {why: "one of the two is not there once"};
      const axis = m[3] === "above" ? 1 : 0;
      const [a, b] = pair.map(([i]) => centre(scene.things[i])[axis]);
      return {family: "relation", answer: a < b ? "yes" : "no",
              evidence: pair.flat().sort((i, j) => i - j)};
    }
    if ((m = match(`what does the ${colour} sign say \\?`))) {
      const found = scene.things.flatMap((t, i) => t.text && t.colour === m[1] ? [i] : []);
      return one("text", found, t => [...t.text.toLowerCase()].join(" "), `${m[1]} sign`);
    }
    return null;
  }

  // A question of each family that an edited scene can answer.
  ask(scene) {
    const shapes = scene.things.filter(thing => !thing.text);
    const once = (key, value) => shapes.filter(t => t[key] === value).length === 1;
    const named = shapes.filter(t => shapes.filter(u => nameOf(u) === nameOf(t)).length === 1);
    const [first] = shapes, sign = scene.things.find(t => t.text);
    const byKind = shapes.find(t => once("kind", t.kind));
    const byColour = shapes.find(t => once("colour", t.colour));
    const absent = shapes.flatMap(t => shapes.map(u => `${t.colour} ${u.kind}`))
      .find(name => !shapes.some(t => nameOf(t) === name));
    const pair = named.flatMap(a => named.map(b => [a, b])).find(
      ([a, b]) => a !== b && Math.abs(centre(a)[0] - centre(b)[0]) >= 18);
    return [
      sign && `what does the ${sign.colour} sign say ?`,
      byKind && `what colour is the ${byKind.kind} ?`,
      byColour && `what shape is the ${byColour.colour} thing ?`,
      first && "how many shapes are there ?",
      named.length && `where is the ${nameOf(named.at(-1))} ?`,
      first && `is there a ${absent ?? nameOf(first)} ?`,
      pair && `is the ${nameOf(pair[0])} left of the ${nameOf(pair[1])} ?`,
    ].filter(Boolean);
  }

  captionOf(scene) {
    const h = this.side;
    const order = [...scene.things].sort((a, b) => Math.floor(centre(a)[1] / (h / 3))
      - Math.floor(centre(b)[1] / (h / 3)) || centre(a)[0] - centre(b)[0]);
    const parts = order.map(t => `a ${nameOf(t)} ${this.cellOf(t)}`
      + (t.text ? ` ${[...t.text.toLowerCase()].join(" ")}` : ""));
    return `${parts.join(" , ")} .`;
  }

  cellOf(thing) {
    const [x, y] = centre(thing).map(c => Math.min(Math.floor(3 * c / this.side), 2));
    return `${this.rows[y]} ${this.columns[x]}`;
  }

  // ------------------------------------------------------------------------------- evidence

  // Boxes of what a thing shows: of a sign its letters, for its rim says nothing that is asked.
  boxesOf(thing) {
    return thing.text ? [0, 1, 2].map(i => this.letterBox(thing, i)) : [thing.box];
  }

  letterBox(sign, i) {
    const left = sign.box[0] + this.cell / 2 + this.cell * i, top = sign.box[1] + 3;
    return [left, top, left + this.cell, top + this.cell];
  }

  // Share of each patch that the evidence covers, 0..1, the largest over its things.
  coverage(scene, evidence) {
    const n = this.grid, size = this.side / n, most = new Float32Array(n * n);
    for (const i of evidence) {
      const own = new Float32Array(n * n);
      for (const [x0, y0, x1, y1] of this.boxesOf(scene.things[i])) {
        for (let y = 0; y < n; y++) {
          const dy = Math.max(Math.min((y + 1) * size, y1) - Math.max(y * size, y0), 0) / size;
          for (let x = 0; dy && x < n; x++) {
            const dx = Math.max(Math.min((x + 1) * size, x1) - Math.max(x * size, x0), 0) / size;
            own[y * n + x] += dy * dx;
          }
        }
      }
      own.forEach((share, p) => { most[p] = Math.max(most[p], share); });
    }
    return most;
  }

  // ------------------------------------------------------------------------------- pixels

  // The scene's pixels, RGBA: its things upon the empty scene's. As in Python the shapes are drawn
  // at twice the size and scaled down, and all that is drawn gets noise of 4.
  render(scene, empty) {
    const w = this.side, pixels = new Uint8ClampedArray(empty);
    const random = generator(7);
    const field = Float32Array.from({length: w * w * 3}, () => 4 * normal(random));
    const put = (x, y, colour, share) => {
      if (x < 0 || y < 0 || x >= w || y >= w || !share) return;
      for (let c = 0; c < 3; c++) {
        const at = 4 * (y * w + x) + c;
        const drawn = colour[c] + field[3 * (y * w + x) + c];
        pixels[at] = pixels[at] * (1 - share) + drawn * share;
      }
    };
    for (const thing of scene.things.filter(t => !t.text)) {
      const [x0, y0, x1, y1] = thing.box, isInside = inside(thing);
      // a polygon's last row and column lie just outside of its box
      for (let y = y0; y <= y1; y++) {
        for (let x = x0; x <= x1; x++) {
          let hits = 0;
          for (const [dx, dy] of [[0, 0], [1, 0], [0, 1], [1, 1]]) {
            hits += isInside(2 * x + dx, 2 * y + dy);
          }
          put(x, y, thing.fill, hits / 4);
        }
      }
    }
    for (const sign of scene.things.filter(t => t.text)) {
      const ink = sign.fill[0] + sign.fill[1] + sign.fill[2] > 330 ? [0, 0, 0] : [255, 255, 255];
      const [x0, y0, x1, y1] = sign.box;
      for (let y = y0; y < y1; y++) {
        for (let x = x0; x < x1; x++) {
          const isRim = x === x0 || y === y0 || x === x1 - 1 || y === y1 - 1;
          put(x, y, isRim ? ink : sign.fill, 1);
        }
      }
      [...sign.text].forEach((letter, i) => {
        const [left, top] = this.letterBox(sign, i), half = (this.glyph - this.cell) / 2;
        this.glyphs[letter].forEach((share, p) => put(
          left - half + p % this.glyph, top - half + Math.floor(p / this.glyph), ink, share / 255));
      });
    }
    return pixels;
  }
}

export const centre = ({box}) => [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2];
export const nameOf = thing => `${thing.colour} ${thing.kind}`;

// Whether a pixel of the picture of twice the size belongs to a shape.
function inside({kind, box}) {
  const [x0, y0, x1, y1] = box.map(c => 2 * c), side = x1 - x0;
  const [cx, cy] = [(x0 + x1) / 2, (y0 + y1) / 2];
  const ellipse = (left, top, right, bottom) => (x, y) =>
    ((x + .5 - (left + right) / 2) / ((right - left) / 2)) ** 2
    + ((y + .5 - (top + bottom) / 2) / ((bottom - top) / 2)) ** 2 <= 1;
  const polygon = points => {
    const corners = points.map(([u, v]) => [x0 + side * u, y0 + side * v]);
    return (x, y) => covers(corners, x, y);
  };
  const whole = ellipse(x0, y0, x1, y1);
  switch (kind) {
    case "circle": return whole;
    case "square": return (x, y) => x >= x0 && x < x1 && y >= y0 && y < y1;
    case "ring": {
      const rim = Math.max(Math.floor(side * .22), 3);
      const hole = ellipse(x0 + rim, y0 + rim, x1 - rim, y1 - rim);
      return (x, y) => whole(x, y) && !hole(x, y);
    }
    case "triangle": return polygon([[.5, 0], [1, 1], [0, 1]]);
    case "diamond": return polygon([[.5, 0], [.95, .5], [.5, 1], [.05, .5]]);
    case "cross": return polygon([[.33, 0], [.67, 0], [.67, .33], [1, .33], [1, .67], [.67, .67],
      [.67, 1], [.33, 1], [.33, .67], [0, .67], [0, .33], [.33, .33]]);
    case "star": {
      const corners = Array.from({length: 10}, (_, i) => {
        const r = (i % 2 ? .42 : 1) * side / 2, t = Math.PI * (i / 5 - .5);
        return [cx + r * Math.cos(t), cy + r * Math.sin(t)];
      });
      return (x, y) => covers(corners, x, y);
    }
    case "heart": {
      const left = ellipse(x0, y0, cx + side * .04 + 1, y0 + side * .56 + 1);
      const right = ellipse(cx - side * .04, y0, x1 + 1, y0 + side * .56 + 1);
      const below = polygon([[.035, .4], [.965, .4], [.5, 1]]);
      return (x, y) => left(x, y) || right(x, y) || below(x, y);
    }
  }
}

// Pillow fills a polygon with its edges: half a pixel to every side counts.
function covers(corners, x, y) {
  let isIn = false;
  corners.forEach(([ax, ay], i) => {
    const [bx, by] = corners[(i + 1) % corners.length];
    if (ay > y !== by > y && x < (bx - ax) * (y - ay) / (by - ay) + ax) isIn = !isIn;
  });
  if (isIn) return true;
  return corners.some(([ax, ay], i) => {
    const [bx, by] = corners[(i + 1) % corners.length];
    const length = (bx - ax) ** 2 + (by - ay) ** 2;
    const t = Math.max(0, Math.min(1, ((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / length));
    return Math.hypot(x - ax - t * (bx - ax), y - ay - t * (by - ay)) <= .5;
  });
}

// Numbers in 0..1, the same for the same seed (mulberry32).
export function generator(seed) {
  return () => {
    seed = seed + 0x6D2B79F5 | 0;
    let t = Math.imul(seed ^ seed >>> 15, 1 | seed);
    t = t + Math.imul(t ^ t >>> 7, 61 | t) ^ t;
    return ((t ^ t >>> 14) >>> 0) / 4294967296;
  };
}

const normal = random =>
  Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());

// A permutation of 0 .. n - 1.
export function shuffled(n, seed) {
  const order = Array.from({length: n}, (_, i) => i), random = generator(seed);
  for (let i = n - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}
