-- Finds what is still outstanding when a process has ended: for `memleak run`, which looks after all exit handlers and
-- destructors have run, so that what they free is not reported.
--
-- Outstanding at the end is not yet a leak: memory that a global still points to was available to the last moment. A
-- process that calls exit() is scanned then, before its exit handlers run (reachability.at_exit): what nothing pointed to
-- is lost, what something did point to is only remarked. Without a scan both look the same. A process that was killed or
-- that crashed had no chance to clean up, so what it held is only remarked.
--
-- Arguments
--   min_bytes  least bytes outstanding at the site
--   min_blocks fewest blocks outstanding at the site
--   once       functions of the C library that allocate a few blocks per process and never free them ...
--   max_once   ... and how many blocks that may be: more is a leak of files or threads
--
-- Sample finding
--   critical 0.90: 131 blocks (1.7 KiB) were outstanding when the process had ended, after its exit handlers; nothing in
--   its memory referred to 131 of them when it called exit()

local glob = require("lib.glob")

local function evaluate_exit(site, p)
  local bytes, count = site.outstanding_bytes, site.outstanding_count
  if bytes < p.min_bytes or count < p.min_blocks then
    return nil
  end
  local severity, remark = "warning", "whether anything still pointed to them was not checked"
  local how = site.process.ended
  local reach = site.reachability
  if site.mode == "estimated" then
    severity, remark = "info", "they were seen through windows: some may have been freed unseen"
  elseif how == "signal" then
    severity, remark = "info", "it was ended by a signal and had no chance to free them"
  elseif how == "running" then
    severity, remark = "info", "it still runs"
  elseif reach and reach.verdict == "definite" then
    severity = "critical"
    remark = string.format("nothing in its memory referred to %s of them when it called exit()",
      units.count(math.min(reach.lost_count, count)))
  elseif reach and reach.verdict == "reachable" and reach.lost_count == 0 then
    severity = "info"
    remark = "something still referred to them when it called exit()" .. (reach.way and ": " .. reach.way or "")
  elseif count <= p.max_once then
    -- Asking for frames symbolizes the site: only for what may be one of these.
    local top = site.frames[1]
    local name = top and glob.first_match(p.once, top.func)
    if name then
      severity, remark = "info", "the C library allocates them once and keeps them (" .. name .. ")"
    end
  end
  local text = {
    exit = "when the process had ended, after its exit handlers",
    signal = "when the process was killed",
    running = "when the run ended",
  }
  return {
    severity = severity,
    confidence = severity == "critical" and 0.9 or severity == "info" and 0.2 or 0.5,
    reason = string.format("%s %s (%s) %s outstanding %s; %s", units.count(count), count == 1 and "block" or "blocks",
      units.bytes(bytes), count == 1 and "was" or "were", text[how] or text.exit, remark),
  }
end

return {
  name = "at_exit",
  description = "blocks are still outstanding when a process has ended (memleak run)",
  params = {
    min_bytes = "1B",
    min_blocks = 1,
    once = {
      "_IO_file_doallocate", "_IO_wfile_doallocate", "_dl_*", "dl_*", "allocate_dtv*", "_nl_*", "__new_exitfn",
      "init_cacheinfo", "tzset_internal", "__tzfile_read",
    },
    max_once = 8,
  },
  evaluate_exit = evaluate_exit,
  examples = {
    { name = "blocks that nobody freed", shape = "leak", at_exit = "exit", snapshots = 5, expect = "warning" },
    { name = "blocks that nothing referred to", shape = "leak", at_exit = "exit", snapshots = 5,
      reachability = "definite", expect = "critical" },
    { name = "blocks that something still referred to", shape = "leak", at_exit = "exit", snapshots = 5,
      reachability = "reachable", expect = "info" },
    { name = "the same after a crash", shape = "leak", at_exit = "signal", snapshots = 5, expect = "info" },
    { name = "a buffer of the C library", shape = "thread_pool", func = "_IO_file_doallocate", at_exit = "exit",
      snapshots = 5, expect = "info" },
    { name = "blocks in a process that goes on", shape = "leak", snapshots = 5, expect = "quiet" },
  },
}
