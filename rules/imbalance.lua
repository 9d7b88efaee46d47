-- Finds a site that allocates far more than it frees, over a longer time, however unevenly.
--
-- Less strict than "growth" about the shape (bursts and pauses are fine) and stricter about the time: only a surplus
-- that goes on to the end of the window counts, which a cache or warm-up does not have once it is full.
--
-- Arguments
--   min_time        shortest time of imbalance
--   min_snapshots   fewest snapshots of it
--   share           how much of the time watched the imbalance must cover ...
--   max_time        ... though never more than this
--   min_allocations fewest blocks allocated in that time
--   max_freed       largest share of them (by number, and by bytes) that may have been freed
--   min_bytes       least surplus
--   max_level_off   how much slower the growth may have become: 0 not at all, 1 stopped
--
-- Sample finding
--   warning 0.78: freed 12 of 4,410 blocks (0.3 %) in 1m 30s: a surplus of 1.1 MiB, 12.2 KiB/s, 43.1 MiB an hour

local grow = require("lib.grow")

local function evaluate(site, p)
  local series = site.series
  local span = grow.span(series, p)
  local window = series:window(span, p.min_snapshots)
  local allocated_bytes, allocated = window:allocated()
  local freed_bytes, freed = window:freed()
  if allocated < p.min_allocations or freed > allocated * p.max_freed or freed_bytes > allocated_bytes * p.max_freed then
    return nil
  end
  local surplus = allocated_bytes - freed_bytes
  if surplus < p.min_bytes or not grow.is_certain(site, surplus) or window:largest_drop() > surplus / 3 then
    return nil
  end
  local level_off = math.max(window:level_off(), series:window(3 * span, 3 * p.min_snapshots):level_off())
  if level_off > p.max_level_off or not grow.new_height(window, series:before(span, p.min_snapshots)) then
    return nil
  end

  local severity, doubt = "warning", ""
  if grow.replaces_old(site, window) then
    severity = "info"
    doubt = "; the process frees as many blocks from before the attach, so these may only take their place"
  end
  local lasted = window:duration()
  return {
    severity = severity,
    confidence = (1 - freed / allocated) * (1 - level_off / 2) * math.min(1, 0.7 + 0.1 * lasted / p.min_time),
    reason = string.format(
      "freed %s of %s blocks (%s) in %s: a surplus of %s, %s%s",
      units.count(freed), units.count(allocated), units.percent(freed / allocated), units.duration(lasted),
      units.bytes(surplus), grow.speed(surplus / lasted), doubt
    ),
  }
end

return {
  name = "imbalance",
  description = "far more is allocated than freed, over a longer time",
  params = {
    min_time = "90s",
    min_snapshots = 30,
    share = 0.2,
    max_time = "10min",
    min_allocations = 500,
    max_freed = 0.5,
    min_bytes = "512KiB",
    max_level_off = 0.5,
  },
  -- The kernel's own caches fill for as long as there is memory: its sites are for `kernel_growth`. Through windows frees
  -- are not seen, so what looks outstanding may be gone: that is for `suspected`.
  needs = {
    kernel = false, windows = false, outstanding = "min_bytes", rise = "min_bytes", time = "min_time",
    snapshots = "min_snapshots",
  },
  evaluate = evaluate,
  examples = {
    { name = "a leak in bursts", shape = "bursts", rate = "15KiB/s", size = "512B", period = 7, snapshots = 120,
      expect = "warning" },
    { name = "a queue", shape = "queue", period = 3, expect = "quiet" },
    { name = "a cache that has filled", shape = "bounded_cache", rate = "200kB/s", period = 15, expect = "quiet" },
  },
}
