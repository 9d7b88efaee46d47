-- Finds a site whose outstanding bytes keep rising, straight on and to new heights.
--
-- Stays quiet on what fills and levels off (caches, warm-up, load ramps), grows in steps (thread pools) or drops
-- again (buffers). What it cannot tell yet it says: a fast rise right after the first allocation looks the same
-- whether a cache fills or memory leaks, so until `settle` has passed that is "info".
--
-- Arguments
--   min_snapshots  fewest snapshots of growth
--   min_time       shortest growth
--   share          how much of the time watched the growth must cover ...
--   max_time       ... though never more than this
--   min_bytes      least growth, and least outstanding bytes
--   min_rising     least share of the snapshots in which the bytes rise
--   max_level_off  how much slower the growth may have become: 0 not at all, 1 stopped
--   fast, settle   a rise faster than `fast` is no more than "info" for the first `settle` of a site
--   critical_time  growth that lasts this long and ...
--   critical_rate  ... is at least this fast is "critical"
--
-- Where the process's memory has been scanned, growth of lost blocks is "critical" at once, and growth of blocks that
-- are still referenced no more than "warning": see `definitely_lost` and `reachable_growth`.
--
-- Sample finding
--   warning 0.87: rose in 20 of 20 steps over 20s to 512.0 KiB: 25.6 KiB/s, 90.0 MiB an hour; a cache that is still
--   filling looks the same, a leak does not stop

local grow = require("lib.grow")

local function evaluate(site, p)
  local series = site.series
  local seen = series:duration()
  local span = grow.span(series, p)
  local window = series:window(span, p.min_snapshots)
  local growth = window:growth()
  if growth < p.min_bytes or not grow.is_certain(site, growth) or window:rising_fraction() < p.min_rising or window:largest_drop() > growth / 10 then
    return nil
  end
  -- The second look is three times as long: a curve that flattens slowly is straight when seen from close by.
  local level_off = math.max(window:level_off(), series:window(3 * span, 3 * p.min_snapshots):level_off())
  if level_off > p.max_level_off or not grow.goes_on(window) then
    return nil
  end
  if not grow.new_height(window, series:before(span, p.min_snapshots)) then
    return nil
  end

  local slope, lasted = window:slope(), window:duration()
  local severity, doubt = "warning", ""
  if grow.replaces_old(site, window) then
    severity = "info"
    doubt = "; the process frees as many blocks from before the attach, so these may only take their place"
  elseif slope > p.fast and seen < p.settle then
    severity = "info"
    doubt = "; may be a cache or a data set that is being loaded: too early to tell"
  elseif lasted >= p.critical_time and slope >= p.critical_rate then
    severity = "critical"
  elseif seen < p.critical_time then
    doubt = "; a cache that is still filling looks the same, a leak does not stop"
  end

  severity, doubt = grow.after_scan(site, severity, doubt)

  local patience = math.min(1, 0.6 + 0.4 * lasted / p.settle)
  local confidence = window:trend_confidence() * (1 - level_off / 2) * patience
    * (1 - site.outstanding_bytes_stderr / growth)
  if severity == "info" then
    confidence = confidence / 2
  end
  local steps = #window - 1
  return {
    severity = severity,
    confidence = confidence,
    reason = string.format(
      "rose in %d of %d steps over %s to %s: %s%s",
      window:rises(), steps, units.duration(lasted), units.bytes(site.outstanding_bytes), grow.speed(slope), doubt
    ),
  }
end

return {
  name = "growth",
  description = "outstanding bytes keep rising and do not level off",
  params = {
    min_snapshots = 21,
    min_time = "20s",
    share = 0.2,
    max_time = "10min",
    min_bytes = "128KiB",
    min_rising = 0.9,
    max_level_off = 0.45,
    fast = "512KiB/s",
    settle = "1min",
    critical_time = "5min",
    critical_rate = "64KiB/min",
  },
  -- The kernel's own caches fill for as long as there is memory: its sites are for `kernel_growth`. Through windows frees
  -- are not seen, so what looks outstanding may be gone: that is for `suspected`.
  needs = {
    kernel = false, windows = false, outstanding = "min_bytes", rise = "min_bytes", time = "min_time",
    snapshots = "min_snapshots",
  },
  evaluate = evaluate,
  examples = {
    { name = "a steady leak", shape = "leak", rate = "30KiB/s", size = "4KiB", snapshots = 25, expect = "warning" },
    { name = "a fast cache that is still filling", shape = "bounded_cache", rate = "1MB/s", period = 50, snapshots = 55,
      expect = "info" },
    { name = "a cache that has filled", shape = "keyed_cache", expect = "quiet" },
    { name = "start-up work that stays", shape = "warm_up", expect = "quiet" },
    { name = "a buffer that is flushed", shape = "sawtooth", period = 15, expect = "quiet" },
    { name = "connections until the load is reached", shape = "load_ramp", expect = "quiet" },
  },
}
