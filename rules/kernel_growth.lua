-- Finds a site of the kernel whose outstanding bytes keep rising, and whose slab cache grows with it.
--
-- The kernel keeps caches of its own that fill for as long as there is memory, and gives them back when it is short:
-- they are left out. Sites are also left out where it cannot be known whether their blocks were freed (unverifiable), as
-- they are for all rules. The other rules about growth leave the kernel to this one.
--
-- Arguments
--   min_snapshots  fewest snapshots of growth
--   min_time       shortest growth
--   share          how much of the time watched the growth must cover ...
--   max_time       ... though never more than this
--   min_bytes      least growth, and least outstanding bytes
--   min_rising     least share of the snapshots in which the bytes rise
--   max_level_off  how much slower the growth may have become: 0 not at all, 1 stopped
--   min_confirmed  how much of the outstanding bytes must show in the growth of the slab cache (/proc/slabinfo)
--   critical_time  growth that lasts this long and ...
--   critical_rate  ... is at least this fast is "critical"
--
-- Sample finding
--   warning 0.81: rose in 30 of 30 steps over 30s to 1.2 MiB: 40.0 KiB/s, 140.6 MiB an hour; cache kmalloc-4k has grown by
--   1.3 MiB since the start

local grow = require("lib.grow")

local function evaluate(site, p)
  local kernel = site.kernel
  if kernel.unverifiable or kernel.reclaimable then
    return nil
  end
  local series = site.series
  local span = grow.span(series, p)
  local window = series:window(span, p.min_snapshots)
  local growth = window:growth()
  if growth < p.min_bytes or not grow.is_certain(site, growth) or window:rising_fraction() < p.min_rising
    or window:largest_drop() > growth / 10 then
    return nil
  end
  local level_off = math.max(window:level_off(), series:window(3 * span, 3 * p.min_snapshots):level_off())
  if level_off > p.max_level_off or not grow.goes_on(window) then
    return nil
  end
  if not grow.new_height(window, series:before(span, p.min_snapshots)) then
    return nil
  end
  local evidence = ""
  if kernel.cache_growth_bytes then
    if kernel.cache_growth_bytes < p.min_confirmed * site.outstanding_bytes then
      return nil
    end
    evidence = string.format("; cache %s has grown by %s since the start", kernel.cache,
      units.bytes(kernel.cache_growth_bytes))
  end

  local slope, lasted = window:slope(), window:duration()
  local severity = "warning"
  if lasted >= p.critical_time and slope >= p.critical_rate then
    severity = "critical"
  end
  return {
    severity = severity,
    confidence = window:trend_confidence() * (1 - level_off / 2) * math.min(1, 0.6 + 0.4 * lasted / p.critical_time)
      * (1 - site.outstanding_bytes_stderr / growth),
    reason = string.format("rose in %d of %d steps over %s to %s: %s%s", window:rises(), #window - 1,
      units.duration(lasted), units.bytes(site.outstanding_bytes), grow.speed(slope), evidence),
  }
end

return {
  name = "kernel_growth",
  description = "outstanding bytes of the kernel keep rising, and their slab cache with them",
  params = {
    min_snapshots = 21,
    min_time = "30s",
    share = 0.3,
    max_time = "10min",
    min_bytes = "256KiB",
    min_rising = 0.85,
    max_level_off = 0.4,
    min_confirmed = 0.5,
    critical_time = "5min",
    critical_rate = "64KiB/min",
  },
  needs = {
    kernel = true, windows = false, outstanding = "min_bytes", rise = "min_bytes", time = "min_time",
    snapshots = "min_snapshots",
  },
  evaluate = evaluate,
  examples = {
    { name = "a steady leak", shape = "leak", kernel = "verifiable", rate = "40KiB/s", size = "4KiB", snapshots = 40,
      expect = "warning" },
    { name = "blocks that are freed unseen", shape = "leak", kernel = "unverifiable", rate = "40KiB/s", size = "4KiB",
      snapshots = 40, expect = "quiet" },
    { name = "a cache that the kernel gives back", shape = "leak", kernel = "reclaimable", rate = "40KiB/s", size = "4KiB",
      snapshots = 40, expect = "quiet" },
    { name = "start-up work that stays", shape = "warm_up", kernel = "verifiable", expect = "quiet" },
    { name = "a leak of a process", shape = "leak", rate = "40KiB/s", snapshots = 40, expect = "quiet" },
  },
}
