// The page's data and how numbers are written. Runs first; everything is in one function scope with the files that
// follow. The data is made by core/src/output/report/page.rs.

const data = JSON.parse(document.getElementById("data").textContent);
const none = "–";

/** Text by number; "" for none. */
const text = (index) => (index < 0 ? "" : data.strings[index]);

/** Decodes rows of three numbers into three columns: base64 over zigzag LEB128 differences from row to row. */
function decode(encoded) {
  const raw = atob(encoded);
  const columns = [[], [], []], now = [0, 0, 0];
  let at = 0;
  while (at < raw.length) {
    for (let column = 0; column < 3; column++) {
      // Products instead of shifts: values go beyond 32 bits.
      let value = 0, scale = 1, byte;
      do {
        byte = raw.charCodeAt(at++);
        value += (byte & 0x7f) * scale;
        scale *= 128;
      } while (byte >= 0x80);
      now[column] += value % 2 ? -(value + 1) / 2 : value / 2;
      columns[column].push(now[column]);
    }
  }
  return columns;
}

/** The decoded series of a site (by index), or of everything (-1); decoded on first use. */
const decoded = new Map();
function seriesOf(index) {
  if (!decoded.has(index)) {
    const [ticks, bytes, count] = decode(index < 0 ? data.series : data.sites[index].series);
    decoded.set(index, { time: ticks.map((t) => data.zero_wall_s + t / 100), bytes, count });
  }
  return decoded.get(index);
}

/** The cohorts of a site, oldest first. */
function cohortsOf(site) {
  const [born, outstanding, bytes] = decode(site.cohorts);
  return data.periods[site.periods].map(([start, end], i) => ({ start, end, born: born[i], outstanding: outstanding[i], bytes: bytes[i] }));
}

/** The part of a path after the last slash. */
const fileName = (path) => path.slice(path.lastIndexOf("/") + 1);

/** A frame by number as an object; name and place as in the context of templates. */
function frameOf(number) {
  const [fn, moduleIndex, offsetIndex, fileIndex, line, inlined, reason, build] = data.frames[number];
  const named = fn >= 0, module = text(moduleIndex), offset = text(offsetIndex), file = text(fileIndex);
  return {
    named, module, offset, file, line, inlined: inlined === 1, reason: text(reason), build: text(build),
    name: named ? text(fn) : module ? `${fileName(module)}+${offset}` : offset,
    place: file ? (line > 0 ? `${file}:${line}` : file) : named ? fileName(module) : "",
  };
}

/** Name and place of a site's heading. */
function headingOf(site) {
  if (site.head < 0) return { name: text(site.name), place: "" };
  const { name, place } = frameOf(site.stack[site.head]);
  return { name, place };
}

function processOf(site) {
  const p = data.processes[site.process];
  return p ? `${text(p.comm)} (${p.pid})` : "unknown process";
}

/** Bytes for people, as `bytes` in templates. */
function formatBytes(value) {
  if (value == null || !isFinite(value)) return none;
  const sign = value < 0 ? "-" : "";
  let n = Math.abs(value);
  if (n < 1023.5) return `${sign}${Math.round(n)} B`;
  const units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
  let unit = -1;
  do { n /= 1024; unit++; } while (n >= 1023.95 && unit + 1 < units.length);
  return `${sign}${n.toFixed(1)} ${units[unit]}`;
}

const formatCount = (value) => (value == null ? none : Math.round(value).toLocaleString("en-US"));

/** Bytes per second as bytes per hour with a sign. */
function formatGrowth(perSecond) {
  const hourly = perSecond * 3600;
  if (Math.abs(hourly) < 0.5) return "0 B/h";
  return `${hourly > 0 ? "+" : ""}${formatBytes(hourly)}/h`;
}

/** Seconds for people, two units at most. */
function formatDuration(seconds) {
  if (seconds == null || !isFinite(seconds)) return none;
  const s = Math.max(0, seconds);
  if (s === 0) return "0s";
  if (s < 999.5e-6) return `${(s * 1e6).toFixed(0)}us`;
  if (s < 0.9995) return `${(s * 1e3).toFixed(0)}ms`;
  if (s < 59.95) return `${s.toFixed(1).replace(".0", "")}s`;
  const whole = Math.round(s);
  const [[a, b], [large, small]] =
    whole < 3600 ? [[Math.floor(whole / 60), whole % 60], ["m", "s"]]
    : whole < 86400 ? [[Math.floor(whole / 3600), Math.floor((whole % 3600) / 60)], ["h", "m"]]
    : [[Math.floor(whole / 86400), Math.floor((whole % 86400) / 3600)], ["d", "h"]];
  return b ? `${a}${large} ${b}${small}` : `${a}${large}`;
}

function formatPercent(fraction) {
  if (fraction == null || !isFinite(fraction)) return none;
  const p = fraction * 100;
  if (p === 0 || p === 100) return `${p} %`;
  if (p < 0.01) return "<0.01 %";
  if (p >= 99.95) return ">99.9 %";
  return `${p.toFixed(p < 1 ? 2 : p < 10 || p >= 99 ? 1 : 0)} %`;
}

/** A point in time (seconds since 1970) in UTC; `step` (seconds) decides how much of it is worth writing. */
function formatTime(wall, step) {
  const iso = new Date(wall * 1000).toISOString();
  if (step >= 86400) return iso.slice(5, 10);
  return step >= 60 ? iso.slice(11, 16) : iso.slice(11, 19);
}

/** An element with properties and children; strings become text nodes, so nothing in them is ever markup. */
function el(tag, props, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props || {})) {
    if (value == null || value === false) continue;
    if (key in node && key !== "list") node[key] = value; else node.setAttribute(key, value);
  }
  node.append(...children.filter((c) => c != null && c !== ""));
  return node;
}

/** The same for SVG, where everything is an attribute. */
function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/** What scans of the memory say of a site: words, and the colour of the label. */
const verdicts = {
  definite: { words: "definitely lost", colour: "critical" },
  possible: { words: "possibly lost", colour: "warning" },
  reachable: { words: "still reachable", colour: "info" },
  unknown: { words: "reachability unknown", colour: "" },
};

/** A severity or status as a label. */
const badge = (name) => el("span", { className: `badge ${name}` }, name[0].toUpperCase() + name.slice(1));
