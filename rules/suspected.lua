-- Finds, in a process that is watched through windows, the sites whose blocks survive window after window while the
-- process's memory grows.
--
-- Between windows frees are not seen, so nothing is proven: a cache that fills looks the same. The rate is an estimate:
-- the growth of the process's anonymous memory, divided among the sites by the bytes of their survivors. Windows that are
-- shorter than usual, because the target is sensitive to latency, tell survivors from short-lived blocks less well: that
-- halves the confidence, and the finding says so.
--
-- Arguments
--   min_time     shortest growth of the process
--   min_rate     least growth of the process's anonymous memory
--   min_cohorts  least number of birth periods with blocks that were seen ...
--   min_lasting  ... and least share of them that has survivors
--   min_blocks   least survivors
--   min_share    least share of the process's surviving bytes
--   full_window  windows shorter than this are weaker evidence
--   settle       growth that is shorter is no more than "info": data may still be loaded
--
-- Sample finding
--   warning 0.42: suspected, not proven: 212 of 212 sampled blocks (100 % +- 1 %) from 14 periods were not seen to be
--   freed, while the process's anonymous memory grows by 1.2 MiB/s; about 1.1 MiB/s of it may be this site's (estimate)

local grow = require("lib.grow")

-- Sums of surviving bytes by process id, over the sites of processes that are watched through windows.
local function surviving_bytes(sites)
  local sums = {}
  for _, site in ipairs(sites) do
    if site.mode == "estimated" then
      local pid = site.process.pid
      sums[pid] = (sums[pid] or 0) + site.outstanding_bytes
    end
  end
  return sums
end

local function evaluate_site(site, p, total)
  local survivors, sampled = site.outstanding_count, site.allocated_count
  local share = site.outstanding_bytes / total
  if survivors < p.min_blocks or share < p.min_share then
    return nil
  end
  local growth, of_what = grow.of_process(site.process, p.min_time)
  if not growth or growth < p.min_rate or site.age_s < p.min_time then
    return nil
  end
  local _, _, _, _, cohorts, lasting = site:survival(0)
  if cohorts < p.min_cohorts or lasting < p.min_lasting * cohorts then
    return nil
  end

  local fraction = survivors / sampled
  local error = 1.96 * math.sqrt(math.max(fraction * (1 - fraction), 1 / sampled) / sampled)
  local short = (site.process.window_s or p.full_window) < p.full_window
  local severity = site.age_s < p.settle and "info" or "warning"
  local doubt
  severity, doubt = grow.after_scan(site, severity, "")
  if site.reachability and site.reachability.verdict == "reachable" then
    -- Nothing but survival speaks for a leak here, and what is referenced survives.
    severity = "info"
  end
  return {
    site = site,
    severity = severity,
    confidence = 0.5 * math.min(1, cohorts / (2 * p.min_cohorts)) * (severity == "info" and 0.5 or 1)
      * (short and 0.5 or 1),
    reason = string.format(
      "suspected, not proven: %s of %s sampled blocks (%s +- %s) from %d periods were not seen to be freed, while the "
        .. "process's %s grows by %s; about %s of it may be this site's (estimate)%s%s",
      units.count(survivors), units.count(sampled), units.percent(fraction), units.percent(error), cohorts,
      of_what, units.rate(growth), units.rate(growth * share),
      short and "; seen through short windows, which is weaker evidence" or "", doubt
    ),
  }
end

local function is_windowed(processes)
  for _, process in ipairs(processes) do
    if process.mode == "estimated" then
      return true
    end
  end
  return false
end

local function evaluate_snapshot(snapshot, p)
  if not is_windowed(snapshot.processes) then
    return nil
  end
  local totals = surviving_bytes(snapshot.sites)
  local findings = {}
  for _, site in ipairs(snapshot.sites) do
    if site.mode == "estimated" then
      local total = totals[site.process.pid]
      findings[#findings + 1] = total > 0 and evaluate_site(site, p, total) or nil
    end
  end
  return findings
end

return {
  name = "suspected",
  description = "in a process watched through windows, blocks survive window after window while the process grows: suspected, not proven",
  params = {
    min_time = "30s",
    min_rate = "64KiB/min",
    min_cohorts = 5,
    min_lasting = 0.8,
    min_blocks = 10,
    min_share = 0.1,
    full_window = "100ms",
    settle = "2min",
  },
  evaluate_snapshot = evaluate_snapshot,
  examples = {
    { name = "survivors in a process that grows", shape = "leak", rate = "20kB/s", size = "500B", mode = "estimated",
      rss_rate = "20kB/s", snapshots = 200, expect = "warning" },
    { name = "survivors in a process that does not", shape = "leak", rate = "20kB/s", size = "500B", mode = "estimated",
      snapshots = 200, expect = "quiet" },
    { name = "a process that is traced exactly", shape = "leak", rss_rate = "20kB/s", snapshots = 200, expect = "quiet" },
  },
}
