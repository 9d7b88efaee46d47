-- Finds a leak buried in churn: most blocks of the site die young, but of every generation a constant share lives on.
--
-- A cache or a queue looks different. In a queue all old blocks are gone; in a bounded cache the older a generation is,
-- the less is left of it; what warm-up leaves behind belongs to the first generation only. And the site must still
-- be growing: where the bytes have levelled off, something frees as much as survives.
--
-- Arguments
--   min_age        blocks younger than this are nobody's business yet
--   min_time       shortest time that the site has been watched
--   min_snapshots  fewest snapshots of it
--   min_bytes      least bytes outstanding in old generations
--   min_blocks     fewest blocks outstanding in old generations
--   max_share      above this share there is no churn to hide in, and rule "growth" sees it
--   max_decay      how much smaller the share may be in the older half of the generations (0.3: 30 % smaller), and
--                  how much larger
--   max_level_off  how much slower the growth may have become: 0 not at all, 1 stopped
--
-- Sample finding
--   warning 0.82: 1.9 % of the blocks outlive 15s in each of 9 generations, while half of the freed ones live less than
--   1.02ms; 412 survivors hold 103.0 KiB

local grow = require("lib.grow")

local function evaluate(site, p)
  local series = site.series
  local seen = series:duration()
  local share, blocks, _, bytes, generations = site:survival(p.min_age)
  if blocks < p.min_blocks or bytes < p.min_bytes or not grow.is_certain(site, bytes) or share > p.max_share then
    return nil
  end

  local middle = (p.min_age + math.min(site.age_s, seen)) / 2
  local older, older_blocks = site:survival(middle)
  local younger, younger_blocks = site:survival(p.min_age, middle)
  if older_blocks < p.min_blocks / 4 or younger_blocks < p.min_blocks / 4 then
    return nil
  end
  local ratio = older / younger
  if ratio < 1 - p.max_decay or ratio > 1 / (1 - p.max_decay) then
    return nil
  end
  -- Where survivors pile up, so do the bytes: in a bounded cache young blocks survive too, but old ones go for them.
  local half = seen / 2
  local _, _, _, kept = site:survival(0, half)
  if series:window(half):growth() < kept / 2 then
    return nil
  end
  local level_off = series:level_off()
  if level_off > p.max_level_off or series:trend_confidence() < 0.9 or not grow.goes_on(series) then
    return nil
  end

  local severity, doubt = "warning", ""
  if grow.replaces_old(site, series) then
    severity = "info"
    doubt = "; the process frees as many blocks from before the attach, so these may only take their place"
  end
  local evenness = math.min(ratio, 1 / ratio)
  local amount = math.min(1, 0.6 + 0.4 * blocks / (10 * p.min_blocks))
  local median = site:lifetime_s(0.5)
  local young = median and string.format(", while half of the freed ones live less than %s", units.duration(median)) or ""
  return {
    severity = severity,
    confidence = evenness * amount * (1 - level_off / 2),
    reason = string.format(
      "%s of the blocks outlive %s in each of %d generations%s; %s survivors hold %s%s",
      units.percent(share), units.duration(p.min_age), generations, young, units.count(blocks), units.bytes(bytes),
      doubt
    ),
  }
end

return {
  name = "survival",
  description = "a constant share of every generation of blocks survives although most die young",
  params = {
    min_age = "15s",
    min_time = "1min",
    min_snapshots = 30,
    min_bytes = "16KiB",
    min_blocks = 20,
    max_share = 0.9,
    max_decay = 0.3,
    max_level_off = 0.4,
  },
  -- The kernel's own caches fill for as long as there is memory: its sites are for `kernel_growth`. Through windows frees
  -- are not seen, so what looks outstanding may be gone: that is for `suspected`.
  needs = {
    kernel = false, windows = false, outstanding = "min_bytes", rise = 1, time = "min_time", snapshots = "min_snapshots",
    age = "min_age", generations = 3,
  },
  evaluate = evaluate,
  examples = {
    { name = "a leak buried in churn", shape = "churn", rate = "100KiB/s", size = "256B", lifetime = "10ms", leaked = 0.02,
      expect = "warning" },
    { name = "churn alone", shape = "churn", rate = "60kB/s", size = "300B", lifetime = "100ms", expect = "quiet" },
    { name = "a queue", shape = "queue", period = 12, expect = "quiet" },
    { name = "a cache at its bound", shape = "wandering_cache", expect = "quiet" },
  },
}
