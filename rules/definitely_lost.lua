-- Finds a site whose blocks the process itself can no longer reach: nothing in its memory refers to them.
--
-- The evidence comes from scans of the process's memory ([reachability] in the settings), not from growth: a slow leak
-- is found as soon as enough blocks are lost. A block counts as lost when several scans in a row found no reference.
-- Programs that hide their pointers free blocks that were called lost; that is counted, and such sites are left alone.
--
-- Arguments
--   min_bytes  least lost bytes
--   max_age    older verdicts say nothing any more
--
-- Sample finding
--   critical 0.95: 40 of 41 judged blocks (1.2 MiB) are lost: nothing in the process's memory refers to them (98 %, at
--   least 87 %; 3 scans)

local function evaluate(site, p)
  local reach = site.reachability
  if reach.verdict ~= "definite" or reach.lost_bytes < p.min_bytes or reach.age_s > p.max_age then
    return nil
  end
  local doubt = ""
  if reach.refuted > 0 then
    doubt = string.format("; %d of %d called lost were freed later", reach.refuted, reach.called_lost)
  end
  return {
    severity = "critical",
    confidence = reach.lost_low,
    reason = string.format(
      "%s of %s judged blocks (%s) are lost: nothing in the process's memory refers to them (%s, at least %s; %d scans%s)",
      units.count(reach.lost_count), units.count(reach.lost_count + reach.reachable_count),
      units.bytes(reach.lost_bytes), units.percent(reach.lost_fraction), units.percent(reach.lost_low), reach.scans,
      doubt
    ),
  }
end

return {
  name = "definitely_lost",
  description = "the process can no longer reach the site's blocks",
  params = {
    min_bytes = "1B",
    max_age = "1h",
  },
  needs = { scan = true },
  evaluate = evaluate,
  examples = {
    { name = "blocks that nothing refers to", shape = "thread_pool", reachability = "definite", expect = "critical" },
    { name = "growth that is still referenced", shape = "leak", reachability = "reachable", expect = "quiet" },
    { name = "a program that hides its pointers", shape = "leak", reachability = "unknown", expect = "quiet" },
  },
}
