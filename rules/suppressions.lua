-- Suppresses findings about code that is known: by function, by module or by call stack. Empty by default.
--
--   [rules.suppressions]
--   functions = ["g_quark_*"]                # any frame's function
--   modules = ["*/libcrypto.so*"]            # any frame's file
--   stacks = ["main;*;load_config;*"]        # the whole stack, outermost first, joined by ";"
--
-- `*` is any text, `?` one character. Frames without a name count as "?" in `stacks`. A suppressed finding is still
-- listed as suppressed, with the pattern that did it.
--
-- Arguments
--   functions, modules, stacks  lists of patterns
--
-- Sample reason
--   function g_quark_from_string matches "g_quark_*"

local glob = require("lib.glob")

local function suppress(site, p)
  -- Asking for frames symbolizes the site: not without need.
  if #p.functions == 0 and #p.modules == 0 and #p.stacks == 0 then
    return nil
  end
  local frames = site.frames
  local names = {}
  for i, frame in ipairs(frames) do
    local hit = glob.first_match(p.functions, frame.func)
    if hit then
      return string.format("function %s matches %q", frame.func:sub(1, 200), hit)
    end
    hit = glob.first_match(p.modules, frame.module)
    if hit then
      return string.format("module %s matches %q", frame.module:sub(1, 200), hit)
    end
    names[#frames - i + 1] = frame.func or "?"
  end
  local hit = glob.first_match(p.stacks, table.concat(names, ";"))
  return hit and string.format("the call stack matches %q", hit)
end

return {
  name = "suppressions",
  description = "silences findings about known functions, modules or call stacks",
  params = {
    functions = {},
    modules = {},
    stacks = {},
  },
  suppress = suppress,
  examples = {
    { name = "a known function", shape = "leak", func = "g_quark_new", params = { functions = { "g_quark_*" } },
      snapshots = 30, expect = "suppressed" },
    { name = "another function", shape = "leak", params = { functions = { "g_quark_*" } }, snapshots = 30, expect = "quiet" },
  },
}
