-- Says what holds on to a site that grows although the process can still reach its blocks: a container that nobody
-- empties, or a cache without a bound. The finding names the way to the blocks, from a variable or a stack inwards.
--
-- Arguments
--   min_time, min_snapshots  shortest growth
--   min_bytes                least growth, and least outstanding bytes
--   min_rising               least share of the snapshots in which the bytes rise
--   max_level_off            how much slower the growth may have become: 0 not at all, 1 stopped
--   max_age                  older verdicts say nothing any more
--
-- Sample finding
--   warning 0.80: grows by 25.6 KiB/s and is still referenced: global sessions (server) > insert x3; a container that is
--   never emptied looks like this, and so does a cache that is still filling

local grow = require("lib.grow")

local function evaluate(site, p)
  local reach = site.reachability
  if reach.verdict ~= "reachable" or reach.age_s > p.max_age or not reach.way then
    return nil
  end
  if site.mode ~= "exact" then
    return nil
  end
  local series = site.series
  local window = series:window(p.min_time, p.min_snapshots)
  if window:growth() < p.min_bytes or window:rising_fraction() < p.min_rising then
    return nil
  end
  if window:level_off() > p.max_level_off or not grow.goes_on(window) then
    return nil
  end
  if not grow.new_height(window, series:before(p.min_time, p.min_snapshots)) then
    return nil
  end
  return {
    severity = "warning",
    confidence = 0.8 * window:trend_confidence(),
    reason = string.format(
      "grows by %s and is still referenced: %s; a container that is never emptied looks like this, and so does a cache "
        .. "that is still filling",
      grow.speed(window:slope()), reach.way
    ),
  }
end

return {
  name = "reachable_growth",
  description = "the site grows, and the process can still reach its blocks: says from where",
  params = {
    min_snapshots = 21,
    min_time = "1min",
    min_bytes = "128KiB",
    min_rising = 0.9,
    max_level_off = 0.45,
    max_age = "10min",
  },
  needs = {
    scan = true, outstanding = "min_bytes", rise = "min_bytes", time = "min_time", snapshots = "min_snapshots",
  },
  evaluate = evaluate,
  examples = {
    { name = "a container that is never emptied", shape = "leak", reachability = "reachable", expect = "warning" },
    { name = "a cache that has reached its bound", shape = "bounded_cache", reachability = "reachable", expect = "quiet" },
    { name = "growth of lost blocks", shape = "leak", reachability = "definite", expect = "quiet" },
  },
}
