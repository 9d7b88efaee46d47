// The page: theme, trend charts, and the table of sites with its sorting, filters and details.

const byId = (id) => document.getElementById(id);
const severityNames = ["none", "info", "warning", "critical"];
/** Rows drawn at once. More come on request only: sections follow below, and thousands of rows take long to lay out. */
const CHUNK = 50;
/** Series beside the total that one chart can tell apart. */
const MAX_PINNED = 5;

/* ---- Theme ---- */

const themeButton = byId("theme");
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme || (prefersDark.matches ? "dark" : "light")) === "dark";
function themeChanged() {
  themeButton.textContent = isDark() ? "Light" : "Dark";
  themeButton.setAttribute("aria-label", `Switch to the ${isDark() ? "light" : "dark"} theme`);
  drawTrend();
  open.forEach((detail) => detail.draw());
}
themeButton.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  themeChanged();
});
prefersDark.addEventListener("change", themeChanged);

/* ---- Trend charts ---- */

/** What the charts show: -1 is the total, others are sites; with a colour each. */
const pinned = new Map();
let showTotal = true;
let trendCharts = [];

function firstPins() {
  for (const [index, site] of data.sites.entries()) {
    if (site.severity < 2 || pinned.size >= 4) break;
    pinned.set(index, pinned.size + 1);
  }
}

/** Puts a site into the charts or takes it out; true when it is in afterwards. */
function togglePin(index) {
  if (pinned.delete(index)) {
    drawTrend();
    return false;
  }
  // The first one in makes room.
  if (pinned.size >= MAX_PINNED) {
    const [oldest] = pinned.keys();
    pinned.delete(oldest);
    open.get(oldest)?.showPin(false);
  }
  const used = new Set(pinned.values());
  pinned.set(index, [1, 2, 3, 4, 5].find((colour) => !used.has(colour)));
  drawTrend();
  return true;
}

function trendLines(column) {
  const shown = [...pinned].map(([index, colour]) => [index, colour, headingOf(data.sites[index]).name]);
  if (showTotal) shown.unshift([-1, 0, "Total"]);
  return shown.map(([index, colour, label]) => ({ time: seriesOf(index).time, values: seriesOf(index)[column], colour, label, fill: index < 0 }));
}

/** The period to shade: of the only site shown, else of the total. */
function trendMark() {
  const single = !showTotal && pinned.size === 1 ? data.sites[pinned.keys().next().value].growing_since : null;
  const since = showTotal ? data.growing_since_s : single;
  return since == null ? null : { since: data.zero_wall_s + since, until: data.zero_wall_s + data.now_s };
}

function drawTrend() {
  trendCharts.forEach((chart) => chart && chart.destroy());
  const options = { mark: trendMark(), sync: "trend" };
  trendCharts = [
    makeChart(byId("plot-bytes"), trendLines("bytes"), { ...options, bytes: true, onCursor: showValues }),
    makeChart(byId("plot-count"), trendLines("count"), { ...options, bytes: false }),
  ];
  drawChips();
}

function drawChips() {
  const chip = (index, colour, label, pressed, action) => {
    const button = el("button", { type: "button", className: `chip c${colour}` },
      el("span", { className: "swatch" }), el("bdi", { className: "label" }, label), el("span", { className: "now" }));
    button.dataset.series = index;
    button.setAttribute("aria-pressed", pressed);
    button.title = index < 0 ? "Show or hide the total" : `Take ${label} out of the charts`;
    button.addEventListener("click", action);
    return button;
  };
  byId("chips").replaceChildren(
    chip(-1, 0, "Total", showTotal, () => { showTotal = !showTotal; drawTrend(); }),
    ...[...pinned].map(([index, colour]) => chip(index, colour, headingOf(data.sites[index]).name, true, () => {
      togglePin(index);
      open.get(index)?.showPin(false);
    })),
  );
  showValues(null);
}

/** Writes the values at the cursor, or the newest ones, beside the names. */
function showValues(wall) {
  byId("cursor-time").textContent = wall == null ? "" : `${formatTime(wall, 1)} UTC`;
  for (const button of byId("chips").children) {
    const series = seriesOf(Number(button.dataset.series));
    const end = series.time[series.time.length - 1];
    const bytes = valueAt(series, series.bytes, wall ?? end), count = valueAt(series, series.count, wall ?? end);
    button.querySelector(".now").textContent = bytes == null ? none : `${formatBytes(bytes)}, ${formatCount(count)}`;
  }
}

/* ---- Sites ---- */

const rows = byId("table").tBodies[0];
const state = { key: "severity", descending: true, words: [], severities: new Set([0, 1, 2, 3]), shown: 0, list: [] };
/** Opened rows by site. */
const open = new Map();

const sortValues = {
  severity: (site) => site.severity, bytes: (site) => site.bytes, count: (site) => site.count,
  growth: (site) => site.growth, age: (site) => site.age,
};

/** Everything a filter looks at, in lower case; made on first use. */
const haystacks = new Map();
const frameHaystacks = [];
function haystackOf(index) {
  if (!haystacks.has(index)) {
    const site = data.sites[index];
    const frames = site.stack.map((n) => {
      if (frameHaystacks[n] === undefined) {
        const f = frameOf(n);
        frameHaystacks[n] = `${f.name} ${f.module} ${f.file}${f.line > 0 ? `:${f.line}` : ""}`.toLowerCase();
      }
      return frameHaystacks[n];
    });
    const rules = site.alerts.map((a) => text(data.alerts[a].rule));
    const own = [text(site.name), processOf(site), text(site.probe_set), text(site.function), site.id, ...rules];
    if (site.reach) own.push(verdicts[site.reach.verdict].words, text(site.reach.way));
    haystacks.set(index, `${own.join(" ").toLowerCase()} ${frames.join(" ")}`);
  }
  return haystacks.get(index);
}

function refresh() {
  const value = sortValues[state.key];
  const sign = state.descending ? -1 : 1;
  state.list = [];
  data.sites.forEach((site, index) => {
    if (!state.severities.has(site.severity)) return;
    if (state.words.length && !state.words.every((word) => haystackOf(index).includes(word))) return;
    state.list.push(index);
  });
  // Equal values keep the order of the ranking.
  state.list.sort((a, b) => sign * (value(data.sites[a]) - value(data.sites[b])) || a - b);
  open.forEach((detail) => detail.close());
  open.clear();
  rows.replaceChildren();
  state.shown = 0;
  showMore();
  for (const head of document.querySelectorAll("#table th[data-key]")) {
    if (head.dataset.key === state.key) head.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  }
  byId("sort").value = state.key;
  byId("shown").textContent = state.list.length === data.sites.length
    ? `${formatCount(data.sites.length)} sites`
    : `${formatCount(state.list.length)} of ${formatCount(data.sites.length)} sites`;
  byId("nothing").hidden = state.list.length > 0;
  byId("nothing").textContent = data.sites.length ? "No site matches the filter." : "No allocation has been seen.";
}

function showMore() {
  const next = state.list.slice(state.shown, state.shown + CHUNK);
  rows.append(...next.map(makeRow));
  state.shown += next.length;
  const left = state.list.length - state.shown;
  byId("more").hidden = left === 0;
  byId("more").textContent = `Show ${formatCount(Math.min(left, CHUNK))} more of ${formatCount(left)}`;
}

function makeRow(index) {
  const site = data.sites[index];
  const { name, place } = headingOf(site);
  const growing = site.growing_since != null;
  const resolved = !site.severity && site.alerts.length > 0;
  const button = el("button", { type: "button", className: "expand" },
    el("bdi", { className: "name", title: name }, name),
    site.reach && site.reach.verdict !== "unknown" ? el("span", { className: `verdict-tag ${verdicts[site.reach.verdict].colour}` }, verdicts[site.reach.verdict].words) : null,
    el("bdi", { className: "sub" }, [place, processOf(site), text(site.function), site.ended != null ? "ended" : ""].filter(Boolean).join(" · ")));
  button.setAttribute("aria-expanded", "false");
  const cell = (label, value, extra) => {
    const td = el("td", { className: `num ${extra || ""}` }, value);
    td.dataset.label = label;
    return td;
  };
  const row = el("tr", { className: "site", id: `site-${index}` },
    el("td", {}, site.severity ? badge(severityNames[site.severity]) : resolved ? badge("resolved") : ""),
    el("td", {}, button),
    el("td", { className: "trend" }, sparkline(index)),
    cell("Outstanding", formatBytes(site.bytes)),
    cell("Blocks", formatCount(site.count)),
    cell("Growth", formatGrowth(site.growth), growing ? "growing" : ""),
    cell("Oldest", site.count ? formatDuration(site.age) : none));
  if (growing) row.cells[5].title = `Growing without a break for ${formatDuration((site.ended ?? data.now_s) - site.growing_since)}`;
  row.addEventListener("click", () => {
    // Selecting text in a row is not a wish to open it.
    if (String(getSelection())) return;
    toggle(index, row);
  });
  return row;
}

function toggle(index, row) {
  const button = row.querySelector(".expand");
  const detail = open.get(index);
  if (detail) {
    detail.close();
    open.delete(index);
    row.nextElementSibling.remove();
  } else {
    const made = makeDetail(index, pinned.has(index), togglePin);
    const cell = el("td", {}, made.node);
    cell.colSpan = 7;
    row.after(el("tr", { className: "detail" }, cell));
    made.draw();
    open.set(index, made);
  }
  row.classList.toggle("open", !detail);
  button.setAttribute("aria-expanded", String(!detail));
}

/** Brings a site into view, opened, whatever is filtered. */
function reveal(index) {
  if (!state.list.includes(index)) {
    byId("filter").value = "";
    state.words = [];
    state.severities = new Set([0, 1, 2, 3]);
    drawSeverities();
    refresh();
  }
  while (!byId(`site-${index}`) && state.shown < state.list.length) showMore();
  const row = byId(`site-${index}`);
  if (!open.has(index)) toggle(index, row);
  row.scrollIntoView({ block: "start", behavior: "auto" });
  row.querySelector(".expand").focus({ preventScroll: true });
}

/* ---- Filters and sorting ---- */

function drawSeverities() {
  const counts = [0, 0, 0, 0];
  for (const site of data.sites) counts[site.severity]++;
  const all = state.severities.size === 4;
  const button = (label, count, pressed, choose) => {
    const node = el("button", { type: "button" }, `${label} `, el("i", {}, formatCount(count)));
    node.setAttribute("aria-pressed", String(pressed));
    node.addEventListener("click", () => { state.severities = new Set(choose); drawSeverities(); refresh(); });
    return node;
  };
  byId("severities").replaceChildren(
    button("All", data.sites.length, all, [0, 1, 2, 3]),
    ...[[3, "Critical"], [2, "Warning"], [1, "Info"], [0, "No finding"]]
      .filter(([level]) => counts[level] || level > 1)
      .map(([level, label]) => button(label, counts[level], !all && state.severities.has(level), [level])),
  );
}

function sortBy(key) {
  state.descending = key === state.key ? !state.descending : true;
  state.key = key;
  refresh();
}

function start() {
  for (const [key, label] of Object.entries({ severity: "by severity", bytes: "by outstanding", count: "by blocks", growth: "by growth", age: "by oldest" })) {
    byId("sort").append(el("option", { value: key }, label));
  }
  byId("sort").addEventListener("change", (event) => {
    state.key = event.target.value;
    state.descending = true;
    refresh();
  });
  for (const head of document.querySelectorAll("#table th[data-key]")) {
    head.querySelector("button").addEventListener("click", () => sortBy(head.dataset.key));
  }
  let pause;
  byId("filter").addEventListener("input", (event) => {
    clearTimeout(pause);
    pause = setTimeout(() => {
      state.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
      refresh();
    }, 80);
  });
  byId("more").addEventListener("click", showMore);
  for (const link of document.querySelectorAll("a[data-site]")) {
    // The data may have got names after the page was written, see `memleak symbolize`.
    const site = data.sites[Number(link.dataset.site)], name = link.querySelector("bdi");
    if (site && name) name.textContent = headingOf(site).name.slice(0, 160);
    link.addEventListener("click", (event) => {
      event.preventDefault();
      reveal(Number(link.dataset.site));
    });
  }
  // Paper cannot be unfolded, and charts drawn for a dark page would be pale on it.
  let theme;
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((node) => { node.open = true; });
    theme = document.documentElement.dataset.theme;
    document.documentElement.dataset.theme = "light";
    themeChanged();
  });
  addEventListener("afterprint", () => {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    themeChanged();
  });
  for (const id of ["theme", "tools", "table"]) byId(id).hidden = false;
  firstPins();
  drawSeverities();
  refresh();
  themeChanged();
  startFlame();
}

start();
