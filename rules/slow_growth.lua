-- Finds a slow leak under noise: a trend over the whole run that is statistically beyond doubt, although single
-- snapshots go up and down.
--
-- The slope is Theil-Sen's (outliers do not move it), the certainty is Mann-Kendall's. Both can be fooled by a plateau,
-- by a few large steps and by a sawtooth, so growth must go on in the last third of the run, come in many steps, and
-- lift the lowest values too.
--
-- Arguments
--   min_time       shortest run
--   min_snapshots  fewest snapshots
--   min_confidence least Mann-Kendall confidence
--   min_slope      least slope
--   min_bytes      least growth over the run
--   min_share      least growth as a share of what is outstanding: a large cache that drifts is no leak
--   min_noise      least growth as a multiple of the noise around the trend
--   min_rises      fewest steps upwards: thread pools grow in a few
--   max_level_off  how much slower the growth may have become: 0 not at all, 1 stopped
--
-- Sample finding
--   warning 0.97: trend of 2.0 KiB/min, 120.0 KiB an hour over 42m (certainty 100 %), now 310.2 KiB

local grow = require("lib.grow")

local function evaluate(site, p)
  local series = site.series
  local seen = series:duration()
  -- The plain difference first: the slope costs more than all else here, and most sites are flat.
  if series:growth() < p.min_bytes / 2 then
    return nil
  end
  local growth = series:slope() * seen
  if growth < math.max(p.min_bytes, p.min_share * site.outstanding_bytes) or series:slope() < p.min_slope then
    return nil
  end
  local certainty = series:trend_confidence()
  local level_off = series:level_off()
  if certainty < p.min_confidence or level_off > p.max_level_off or series:rises() < p.min_rises then
    return nil
  end
  if growth < p.min_noise * series:noise() or not grow.is_certain(site, growth) then
    return nil
  end
  local first, last = series:before(seen * 2 / 3), series:window(seen / 3)
  if last:min() < first:min() + growth / 3 then
    return nil
  end

  local severity, doubt = "warning", ""
  if grow.replaces_old(site, series) then
    severity = "info"
    doubt = "; the process frees as many blocks from before the attach, so these may only take their place"
  end
  severity, doubt = grow.after_scan(site, severity, doubt)
  return {
    severity = severity,
    confidence = certainty * (1 - level_off / 2),
    reason = string.format(
      "trend of %s over %s (certainty %s), now %s%s",
      grow.speed(series:slope()), units.duration(seen), units.percent(certainty), units.bytes(site.outstanding_bytes),
      doubt
    ),
  }
end

return {
  name = "slow_growth",
  description = "a slow but significant rise over the whole run, under noise",
  params = {
    min_time = "5min",
    min_snapshots = 20,
    min_confidence = 0.99,
    min_slope = "512B/min",
    min_bytes = "64KiB",
    min_share = 0.05,
    min_noise = 4,
    min_rises = 10,
    max_level_off = 0.5,
  },
  -- The kernel's own caches fill for as long as there is memory: its sites are for `kernel_growth`. Through windows frees
  -- are not seen, so what looks outstanding may be gone: that is for `suspected`.
  needs = {
    kernel = false, windows = false, outstanding = "min_bytes", rise = 1, time = "min_time", snapshots = "min_snapshots",
  },
  evaluate = evaluate,
  examples = {
    { name = "a slow leak over hours", shape = "leak", rate = "4KiB/min", size = "256B", interval = "10s", snapshots = 360,
      seed = 5, expect = "warning" },
    { name = "a cache at its bound", shape = "wandering_cache", interval = "10s", snapshots = 360, expect = "quiet" },
    { name = "a pool that grows in steps", shape = "thread_pool", interval = "10s", snapshots = 360, expect = "quiet" },
  },
}
