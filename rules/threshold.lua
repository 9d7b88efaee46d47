-- Finds a site that holds more than a fixed size or number of blocks. Off until a threshold is set: what is too much
-- depends on the program.
--
--   [rules.threshold]
--   max_bytes = "2GiB"
--
-- Arguments
--   max_bytes  outstanding bytes of one site; 0 checks nothing
--   max_count  outstanding blocks of one site; 0 checks nothing
--   critical   times the threshold from which the finding is "critical"
--
-- Sample finding
--   warning 1.00: holds 2.3 GiB in 1,204 blocks, more than 2.0 GiB

local function evaluate_site(site, p)
  -- Through windows only a part of the blocks is seen.
  if site.mode == "estimated" then
    return nil
  end
  -- Of an estimate what is there almost surely: two standard errors less.
  local bytes = site.outstanding_bytes - 2 * site.outstanding_bytes_stderr
  local count = site.outstanding_count - 2 * site.outstanding_count_stderr
  local over, limit
  if p.max_bytes > 0 and bytes > p.max_bytes then
    over, limit = bytes / p.max_bytes, units.bytes(p.max_bytes)
  elseif p.max_count > 0 and count > p.max_count then
    over, limit = count / p.max_count, units.count(p.max_count) .. " blocks"
  else
    return nil
  end
  return {
    site = site,
    severity = over >= p.critical and "critical" or "warning",
    confidence = site.mode == "exact" and 1 or 0.95,
    reason = string.format(
      "holds %s in %s blocks, more than %s", units.bytes(site.outstanding_bytes), units.count(site.outstanding_count),
      limit
    ),
  }
end

-- For all sites at once: without a threshold, as it comes, there is nothing to look at.
local function evaluate_snapshot(snapshot, p)
  if p.max_bytes == 0 and p.max_count == 0 then
    return nil
  end
  local findings = {}
  for _, site in ipairs(snapshot.sites) do
    findings[#findings + 1] = evaluate_site(site, p)
  end
  return findings
end

return {
  name = "threshold",
  description = "one site holds more than a fixed size or number of blocks",
  params = {
    max_bytes = "0B",
    max_count = 0,
    critical = 4,
  },
  evaluate_snapshot = evaluate_snapshot,
  examples = {
    { name = "off until it is set", shape = "warm_up", snapshots = 20, expect = "quiet" },
    { name = "more than it may hold", shape = "warm_up", snapshots = 20, params = { max_bytes = "1MiB" }, expect = "warning" },
    { name = "far more blocks than it may hold", shape = "warm_up", snapshots = 20, params = { max_count = 100 },
      expect = "critical" },
  },
}
