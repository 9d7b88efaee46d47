-- What rules see of Lua's base library. Runs once per state, before any rule, with everything still in reach.
-- `host` holds the functions made in Rust; the result is the table of global names for rules.
local host = ...

-- A rule must not be able to catch a limit and go on: `check_limit` raises it again.
local raw_pcall, check_limit = pcall, host.check_limit
local function finish(ok, ...)
  if not ok then
    check_limit((...))
  end
  return ok, ...
end

-- Metatables are copied with these fields only and cannot be read back. `__gc` and `__close` would run where the
-- instruction hook does not, and `__mode` lets a rule see (and slow down) the garbage collector.
local allowed = {}
for name in ("index newindex call tostring len eq lt le concat unm add sub mul div mod pow idiv band bor bxor shl shr bnot pairs"):gmatch("%a+") do
  allowed["__" .. name] = true
end
local raw_setmetatable, raw_type, raw_next, raw_error, raw_tostring = setmetatable, type, next, error, tostring
local function safe_setmetatable(object, meta)
  if raw_type(meta) ~= "table" then
    raw_error("bad argument #2 to 'setmetatable' (table expected)", 2)
  end
  local copy = { __metatable = false }
  for key, value in raw_next, meta do
    if allowed[key] then
      copy[key] = value
    elseif raw_type(key) == "string" and key:sub(1, 2) == "__" and key ~= "__name" then
      raw_error("metatable field '" .. key .. "' is not available to rules", 2)
    end
  end
  return raw_setmetatable(object, copy)
end

-- Strings find their methods in the bounded library, and nobody can change that.
local string_meta = getmetatable("")
string_meta.__index = host.string
string_meta.__metatable = false

local scan = host.scan
host.string.gmatch = function(s, pattern)
  local pos, first = 1, true
  local function step(next_pos, ...)
    pos, first = next_pos, false
    return ...
  end
  return function()
    if pos then
      return step(scan(s, pattern, pos, first))
    end
  end
end

math.random, math.randomseed = nil, nil

-- A table that can be read through but neither changed nor listed.
local function read_only(name, content)
  return raw_setmetatable({}, {
    __index = content,
    __newindex = function()
      raw_error("'" .. name .. "' cannot be changed", 2)
    end,
    __metatable = false,
  })
end

local globals = {
  assert = assert,
  error = error,
  getmetatable = getmetatable,
  ipairs = ipairs,
  next = next,
  pairs = pairs,
  pcall = function(f, ...)
    return finish(raw_pcall(f, ...))
  end,
  print = host.print,
  rawequal = rawequal,
  rawget = rawget,
  rawlen = rawlen,
  require = host.require,
  select = select,
  setmetatable = safe_setmetatable,
  tonumber = tonumber,
  tostring = tostring,
  type = type,
  _VERSION = _VERSION,
  math = read_only("math", math),
  string = read_only("string", host.string),
  table = read_only("table", host.table),
  utf8 = read_only("utf8", utf8),
  units = read_only("units", host.units),
}

-- Reading a name that does not exist is a typing error far more often than a test for nil.
raw_setmetatable(globals, {
  __index = function(_, name)
    raw_error("no global '" .. raw_tostring(name) .. "' is available to rules", 2)
  end,
})

local env = raw_setmetatable({}, {
  __index = globals,
  __newindex = function(_, name)
    raw_error("rules cannot set globals: write 'local " .. raw_tostring(name) .. "'", 2)
  end,
  __metatable = false,
})

-- Nothing in the state leads to the original globals; should a way be found, there is nothing to find.
local original = _G
for name in raw_next, original do
  original[name] = nil
end
return env
