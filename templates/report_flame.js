// The flame graph: call stacks of the sites in the table, merged from the outside in, as wide as what they hold. Drawn
// from the page's data in place of a picture, so that it costs no bytes, follows the theme, and can be zoomed.

/** Sites that are merged: the ones with the largest values. */
const FLAME_SITES = 1000;
/** Frames narrower than this part of the whole are left out; it bounds what is drawn. */
const FLAME_LEAST = 0.001;
/** Frames below each other that are drawn at once; zooming in shows deeper ones. */
const FLAME_DEPTH = 60;

const flame = { mode: "outstanding", root: null, zoom: null, focus: null };

/** What a site counts in a mode: bytes held, or by how much they have changed since the first snapshot that is kept. */
function flameValue(index, mode) {
  if (mode === "outstanding") return data.sites[index].bytes;
  const { bytes } = seriesOf(index);
  return bytes.length ? bytes[bytes.length - 1] - bytes[0] : 0;
}

/** Merges the stacks; `size` is the width of a node (always positive), `net` what its sites hold or have grown by. */
function flameTree(mode) {
  const make = (name, place, parent) => ({ name, place, parent, size: 0, net: 0, children: new Map() });
  const root = make("all processes", "", null);
  root.left = 0;
  const values = data.sites.map((_, index) => [index, flameValue(index, mode)]).filter(([, value]) => value !== 0);
  values.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]) || a[0] - b[0]);
  root.hidden = Math.max(0, values.length - FLAME_SITES);
  for (const [index, value] of values.slice(0, FLAME_SITES)) {
    const site = data.sites[index];
    const path = [{ name: processOf(site), place: "" }, ...site.stack.map(frameOf).reverse()];
    let node = root;
    for (const step of [null, ...path]) {
      if (step) {
        // Frames of one function are one, whatever lines its calls are on: a flame graph is about functions.
        const key = `${step.name}\n${step.module || ""}`;
        if (!node.children.has(key)) node.children.set(key, make(step.name, step.place, node));
        node = node.children.get(key);
        if (node.place !== step.place) node.place = step.module ? fileName(step.module) : "";
      }
      node.size += Math.abs(value);
      node.net += value;
    }
  }
  return root;
}

/** Children from wide to narrow, with their left edges as parts of the whole tree's width. */
function flameChildren(node, whole) {
  const list = [...node.children.values()].sort((a, b) => b.size - a.size || (a.name < b.name ? -1 : 1));
  let left = node.left;
  for (const child of list) {
    child.left = left;
    left += child.size / whole;
  }
  return list;
}

/** Shade of a frame: growth by its share of all change, red or blue; outstanding by the name, so that it stays the same. */
function flameClass(node) {
  if (flame.mode === "growth") {
    const part = Math.abs(node.net) / (flame.root.size || 1);
    const step = part > 0.3 ? 3 : part > 0.05 ? 2 : part > 0.005 ? 1 : 0;
    return step === 0 ? "level" : `${node.net > 0 ? "grew" : "shrank"}-${step}`;
  }
  let hash = 0;
  for (let i = 0; i < node.name.length; i++) hash = (hash * 31 + node.name.charCodeAt(i)) | 0;
  return `held-${1 + Math.abs(hash) % 3}`;
}

function flameFigures(node) {
  const part = formatPercent(node.size / (flame.root.size || 1));
  if (flame.mode === "outstanding") return `${formatBytes(node.net)}, ${part} of all`;
  const sign = node.net > 0 ? "+" : "";
  return `${sign}${formatBytes(node.net)} since the first snapshot, ${part} of all change`;
}

function showFlame(node) {
  byId("flame-detail").replaceChildren(...(node
    ? [el("bdi", { className: "fn" }, node.name), node.place ? el("bdi", { className: "muted" }, node.place) : "", el("span", {}, flameFigures(node))].filter(Boolean)
    : [el("span", { className: "muted" }, "Point at a frame, or walk with the arrow keys; click or Enter zooms.")]));
}

function drawFlame(keepFocus) {
  const box = byId("flame-graph");
  const { root } = flame, zoom = flame.zoom || root;
  byId("flame-empty").hidden = root.size > 0;
  byId("flame-reset").hidden = zoom === root;
  box.hidden = root.size === 0;
  box.replaceChildren();
  if (!root.size) return;
  const width = zoom.size / root.size;
  let depth = 0;
  const add = (node, level, left, part, ancestor) => {
    const button = el("button", { type: "button", className: `frame ${ancestor ? "outer" : flameClass(node)}`, tabIndex: -1 }, el("bdi", {}, node.name));
    button.setAttribute("aria-label", `${node.name}: ${flameFigures(node)}`);
    button.style.left = `${left * 100}%`;
    button.style.width = `${part * 100}%`;
    button.style.top = `${level * 21}px`;
    button.flameNode = node;
    node.button = button;
    depth = Math.max(depth, level);
    box.append(button);
  };
  // What encloses the zoomed frame takes the whole width.
  const above = [];
  for (let node = zoom.parent; node; node = node.parent) above.unshift(node);
  above.forEach((node, level) => add(node, level, 0, 1, true));
  const visit = (node, level) => {
    add(node, level, (node.left - zoom.left) / width, node.size / zoom.size, false);
    if (level - above.length >= FLAME_DEPTH) return;
    for (const child of flameChildren(node, root.size)) {
      if (child.size / zoom.size >= FLAME_LEAST) visit(child, level + 1);
    }
  };
  visit(zoom, above.length);
  box.style.height = `${(depth + 1) * 21}px`;
  zoom.button.tabIndex = 0;
  if (keepFocus) zoom.button.focus({ preventScroll: true });
}

function setFlame(mode) {
  flame.mode = mode;
  flame.root = flameTree(mode);
  flame.zoom = null;
  for (const button of byId("flame-modes").children) button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
  byId("flame-note").textContent = (mode === "growth"
    ? "Width is change since the first snapshot: red grew, blue shrank."
    : "Width is outstanding bytes; callers above, what they call below.")
    + (flame.root.hidden ? ` The ${formatCount(FLAME_SITES)} largest sites of ${formatCount(FLAME_SITES + flame.root.hidden)}.` : "");
  showFlame(null);
  drawFlame(false);
}

/** The frame that an arrow key leads to; only drawn ones count. */
function flameNeighbour(node, key) {
  const drawn = (n) => n && n.button && n.button.isConnected;
  const row = (n) => (n.parent ? flameChildren(n.parent, flame.root.size).filter(drawn) : [n]);
  const steps = {
    ArrowUp: () => node.parent,
    ArrowDown: () => flameChildren(node, flame.root.size).find(drawn),
    ArrowLeft: () => row(node)[row(node).indexOf(node) - 1],
    ArrowRight: () => row(node)[row(node).indexOf(node) + 1],
  };
  const found = steps[key] && steps[key]();
  return drawn(found) ? found : null;
}

function startFlame() {
  const box = byId("flame-graph");
  const nodeAt = (event) => event.target.closest(".frame")?.flameNode;
  box.addEventListener("click", (event) => {
    const node = nodeAt(event);
    if (!node) return;
    flame.zoom = node.parent ? node : null;
    drawFlame(true);
    showFlame(node);
  });
  box.addEventListener("pointerover", (event) => { const node = nodeAt(event); if (node) showFlame(node); });
  box.addEventListener("focusin", (event) => { const node = nodeAt(event); if (node) showFlame(node); });
  box.addEventListener("keydown", (event) => {
    const node = nodeAt(event);
    if (event.key === "Escape" && flame.zoom) {
      flame.zoom = null;
      drawFlame(true);
    }
    const next = node && flameNeighbour(node, event.key);
    if (!next) return;
    event.preventDefault();
    node.button.tabIndex = -1;
    next.button.tabIndex = 0;
    next.button.focus();
  });
  byId("flame-reset").addEventListener("click", () => { flame.zoom = null; drawFlame(true); });
  for (const button of byId("flame-modes").children) button.addEventListener("click", () => setFlame(button.dataset.mode));
  byId("flame").hidden = false;
  // Drawn when it comes near the screen or the paper: opening the page must not wait for what is below the table.
  const first = () => {
    watch.disconnect();
    if (!flame.root) setFlame("outstanding");
  };
  const watch = new IntersectionObserver((entries) => { if (entries.some((e) => e.isIntersecting)) first(); }, { rootMargin: "400px" });
  watch.observe(byId("flame"));
  addEventListener("beforeprint", first);
}
