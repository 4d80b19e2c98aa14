// Where a head looks: a map of cells, lines from token to token, and every head at a glance.
// Tokens are set as text, never as HTML. Exact weights are read out on hovering and by arrow keys.

const SVG = "http://www.w3.org/2000/svg";
const ROW = 18; // pixels of a token in the view of lines
const NAME = 150; // pixels of a token's name
const GAP = 130; // pixels between the two columns
const LONGEST_NAME = 18; // characters
const SMALLEST_NAME = 11; // pixels of a cell: below that the map has no names, hovering tells them
const MOST_FAINT_LINES = 40; // tokens: with more, only the chosen token's lines are drawn

const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

function element(tag, properties) {
  return Object.assign(document.createElement(tag), properties);
}

function drawing(tag, attributes, text = "") {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

function short(token) {
  const line = token.replace(/[\n\t]/g, "");
  const characters = [...line];
  return characters.length > LONGEST_NAME ? characters.slice(0, LONGEST_NAME - 1).join("") + "…" : line;
}

// Paint weights, 0 to 1, as shares of one colour over the theme's background.
function paint(canvas, size, weightOf) {
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  const image = context.createImageData(size, size);
  for (let cell = 0; cell < size * size; cell++) {
    image.data.set([0, 114, 178, Math.round(255 * weightOf(cell))], 4 * cell);
  }
  context.putImageData(image, 0, 0);
}

function render({ model, el }) {
  el.classList.add("lm-attention");
  el.dataset.lmSuppressShortcuts = "true"; // otherwise JupyterLab handles the arrow keys
  el.innerHTML = `
    <div class="lm-says" role="status"></div>
    <div class="lm-panes">
      <div><h4>heat map (row: token that looks; column: token looked at)</h4><div class="lm-map">
        <div class="lm-columns"></div><div class="lm-rows"></div>
        <canvas class="lm-canvas" tabindex="0" role="img"
          aria-label="heat map: arrow keys move from cell to cell"></canvas></div></div>
      <div><h4>from token to token</h4><div class="lm-links" tabindex="0" role="group"
        aria-label="from token to token: arrow keys choose the token that looks"></div></div>
      <div><h4>all heads (layer.head: entropy in bits)</h4><div class="lm-heads" role="group"
        aria-label="all heads: choose one; arrow keys move between them"></div></div>
    </div>`;
  const [says, columnNames, rowNames, canvas, links, heads] =
    ["says", "columns", "rows", "canvas", "links", "heads"].map((name) => el.querySelector(`.lm-${name}`));

  let weights = new Float32Array(0); // of the chosen head, T x T
  let [row, column] = [0, 0];
  const tokens = () => model.get("tokens");
  const weight = (query, key) => weights[query * tokens().length + key];

  function say(query, key) {
    [row, column] = [query, key];
    says.textContent =
      `“${short(tokens()[query])}” (${query + 1}) looks at “${short(tokens()[key])}” (${key + 1}): ` +
      `${weight(query, key).toPrecision(6)}`;
  }

  function drawHead() {
    const data = model.get("weights");
    weights = new Float32Array(data.buffer.slice(data.byteOffset, data.byteOffset + data.byteLength));
    const size = tokens().length;
    if (!size || weights.length !== size * size) return; // the rest of a change is on its way
    paint(canvas, size, (cell) => weights[cell]);
    const pixels = clamp(22 * size, 260, 520);
    canvas.style.width = canvas.style.height = `${pixels}px`;
    for (const names of [columnNames, rowNames]) {
      const fits = pixels / size >= SMALLEST_NAME;
      const texts = fits ? tokens() : [];
      names.replaceChildren(...texts.map((one) => element("bdi", { textContent: short(one) })));
    }
    [row, column] = [Math.min(row, size - 1), Math.min(column, size - 1)];
    drawLinks();
    drawHeads();
    say(row, Math.min(column, row));
  }

  function drawLinks() {
    const size = tokens().length;
    const svg = drawing("svg", { width: 2 * NAME + GAP + 80, height: ROW * size + 4 });
    const line = (query, key, share) =>
      svg.append(drawing("line", {
        x1: NAME, y1: ROW * (query + 0.5), x2: NAME + GAP, y2: ROW * (key + 0.5),
        "stroke-width": 2, "stroke-opacity": share,
      }));
    if (size <= MOST_FAINT_LINES) {
      for (let query = 0; query < size; query++)
        for (let key = 0; key <= query; key++) {
          const share = weight(query, key) * 0.25;
          if (query !== row && share > 0.005) line(query, key, share);
        }
    }
    for (let key = 0; key <= row; key++) line(row, key, weight(row, key));
    tokens().forEach((token, place) => {
      const y = ROW * (place + 0.72);
      const query = drawing("text", { x: NAME - 6, y, "text-anchor": "end" }, short(token));
      query.classList.add("lm-query");
      query.classList.toggle("lm-chosen", place === row);
      query.dataset.place = place;
      const key = drawing("text", { x: NAME + GAP + 6, y }, short(token));
      svg.append(query, key);
      if (place <= row) {
        const value = weight(row, place);
        key.append(drawing("title", {}, value.toPrecision(6)));
        key.style.fillOpacity = 0.6 + 0.4 * value;
        svg.append(drawing("text", { x: 2 * NAME + GAP + 6, y }, value.toFixed(4)));
      } else {
        key.style.fillOpacity = 0.3; // the future, where nobody looks
      }
    });
    links.replaceChildren(svg);
  }

  function drawHeads() {
    const [layers, perLayer, size] = model.get("grid");
    const data = model.get("thumbnails");
    const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    if (bytes.length !== layers * perLayer * size * size) return;
    const chosen = model.get("layer") * perLayer + model.get("head");
    heads.style.gridTemplateColumns = `repeat(${perLayer}, max-content)`;
    if (heads.bytes !== data) {
      heads.bytes = data;
      heads.replaceChildren();
      for (let number = 0; number < layers * perLayer; number++) {
        const [layer, head] = [Math.floor(number / perLayer), number % perLayer];
        const entropy = model.get("entropy_bits")[layer][head].toFixed(2);
        const ariaLabel = `layer ${layer + 1}, head ${head + 1}: ${entropy} bits`;
        const button = element("button", { className: "lm-head", ariaLabel });
        const small = document.createElement("canvas");
        paint(small, size, (cell) => bytes[number * size * size + cell] / 255);
        button.append(small, `${layer + 1}.${head + 1}: ${entropy}`);
        button.addEventListener("click", () => model.send([layer, head]));
        heads.append(button);
      }
    }
    [...heads.children].forEach((button, number) => {
      button.ariaPressed = String(number === chosen);
      button.tabIndex = number === chosen ? 0 : -1;
    });
  }

  function cellAt(event) {
    const box = canvas.getBoundingClientRect();
    const size = tokens().length;
    const place = (at, start, length) =>
      clamp(Math.floor(((at - start) / length) * size), 0, size - 1);
    return [place(event.clientY, box.top, box.height), place(event.clientX, box.left, box.width)];
  }

  function chooseRow(place) {
    const size = tokens().length;
    row = clamp(place, 0, size - 1);
    drawLinks();
    const values = [...weights.slice(row * size, row * size + row + 1)];
    say(row, values.indexOf(Math.max(...values)));
    const top = ROW * row; // scroll this box alone: the page stays where it is
    links.scrollTop = Math.max(top + 2 * ROW - links.clientHeight, Math.min(links.scrollTop, top - ROW));
  }

  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const onKey = (part, act) =>
    part.addEventListener("keydown", (event) => {
      const step = steps[event.key];
      if (!step || event.ctrlKey || event.altKey || event.metaKey || !weights.length) return;
      event.preventDefault();
      act(step);
    });
  onKey(canvas, ([down, right]) => {
    const last = tokens().length - 1;
    say(clamp(row + down, 0, last), clamp(column + right, 0, last));
    drawLinks();
  });
  onKey(links, ([down, right]) => chooseRow(row + down + right));
  onKey(heads, ([down, right]) => {
    const places = [...heads.children];
    const now = places.indexOf(document.activeElement);
    places[now + down * model.get("grid")[1] + right]?.focus();
  });
  canvas.addEventListener("mousemove", (event) => say(...cellAt(event)));
  canvas.addEventListener("click", (event) => chooseRow(cellAt(event)[0]));
  links.addEventListener("click", (event) => {
    if (event.target.dataset.place !== undefined) chooseRow(Number(event.target.dataset.place));
  });

  const changes = ["tokens", "weights", "thumbnails", "layer", "head"].map((name) => `change:${name}`);
  changes.forEach((change) => model.on(change, drawHead));
  drawHead();
  return () => changes.forEach((change) => model.off(change, drawHead));
}

export default { render };
