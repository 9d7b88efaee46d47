-- Questions about growth that several rules ask. Pure functions: no state, no globals.

local M = {}

-- The stretch of a series that has to grow: the last `min_time` seconds and `min_snapshots` snapshots, and more the
-- longer the site has been watched (`share` of that time, up to `max_time`). Whoever has been quiet for an hour has to
-- grow for longer than a minute before that means anything.
function M.span(series, p)
  return math.max(p.min_time, math.min(series:duration() * p.share, p.max_time))
end

-- Whether the growth in `window` takes the site to a new height, rather than back to one it had before: what fills
-- and empties again is a buffer. `before` is the part of the series that precedes the window.
function M.new_height(window, before)
  if #before == 0 then
    return true
  end
  return window:last() >= before:max() + window:growth() / 2
end

-- Whether the growth has gone on to the very end of `window`: its last sixth, at least four steps, rises at no less than
-- a share of the speed of all of it. The thirds that `level_off` compares notice a sudden stop late.
function M.goes_on(window)
  local last = window:window(window:duration() / 6, 5)
  return last:rate() >= 0.4 * window:slope()
end

-- Whether an amount is more than the noise of a sample: three standard errors of what is outstanding. The error of a
-- growth is never larger than that of the whole, which contains it. Always true where everything is recorded.
function M.is_certain(site, bytes)
  return bytes >= 3 * site.outstanding_bytes_stderr
end

-- Growth of a process over the last `seconds`, bytes per second, and what it is the growth of: anonymous memory, or all
-- resident memory, files included, where the kernel does not tell them apart. Nil when nothing is known.
function M.of_process(process, seconds)
  local slope = process:rss_anon_slope(seconds)
  if slope then
    return slope, "anonymous memory"
  end
  return process:rss_slope(seconds), "resident memory, files included,"
end

-- Whether the growth may be old blocks being replaced: blocks from before the attach are unknown, so when a full cache
-- swaps them for new ones, only the new ones are counted. The sign is that the process frees at least as many
-- unknown blocks as the site gains, while its memory does not grow with the site.
function M.replaces_old(site, window)
  local seconds = window:duration()
  local freed = site.process:unmatched_rate(seconds)
  if not freed or freed <= 0 or freed < window:count_slope() then
    return false
  end
  local growth = M.of_process(site.process, seconds)
  return not growth or growth < window:slope() / 2
end

-- Severity and doubt of a finding about growth after a look at whether the process can still reach the blocks: what is
-- lost is no longer in doubt, what is reachable may be a container that is never emptied and is no more than "warning".
function M.after_scan(site, severity, doubt)
  local reach = site.reachability
  if not reach then
    return severity, doubt
  elseif reach.verdict == "definite" then
    return "critical", string.format("; the process can no longer reach %s of its blocks", units.count(reach.lost_count))
  elseif reach.verdict == "reachable" then
    local most = severity == "critical" and "warning" or severity
    return most, "; the process still refers to its blocks" .. (reach.way and ": " .. reach.way or "")
  end
  return severity, doubt
end

-- "2.1 MiB/s, 7.4 GiB an hour"; per hour is what people plan with.
function M.speed(slope)
  return string.format("%s, %s an hour", units.rate(slope), units.bytes(slope * 3600))
end

return M
