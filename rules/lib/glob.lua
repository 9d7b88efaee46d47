-- Globs over names: `*` is any text (also none), `?` is one character, everything else is itself. Pure functions.
--
-- Names come from the watched process, so the time must not explode for any of them: a glob is matched piece by piece,
-- each at the first place where it fits, and never gone back on.

local M = {}

-- A piece without `*` as a Lua pattern.
local function pattern(piece)
  return (piece:gsub("[%^%$%(%)%%%.%[%]%+%-]", "%%%0"):gsub("%?", "."))
end

-- Whether the glob matches all of `name`.
function M.matches(glob, name)
  local head, rest = glob:match("^([^*]*)%*(.*)$")
  if not head then
    return #glob == #name and name:find("^" .. pattern(glob) .. "$") ~= nil
  end
  local tail = rest:match("[^*]*$")
  if #name < #head + #tail or not name:find("^" .. pattern(head)) or not name:find(pattern(tail) .. "$", #name - #tail + 1) then
    return false
  end
  -- What lies between head and tail has to hold the pieces in the middle, in order.
  local from, to = #head + 1, #name - #tail
  for piece in rest:sub(1, #rest - #tail):gmatch("[^*]+") do
    local _, last = name:find(pattern(piece), from)
    if not last or last > to then
      return false
    end
    from = last + 1
  end
  return true
end

-- The first of `globs` that matches `name`; nil when none does or there is no name.
function M.first_match(globs, name)
  if not name then
    return nil
  end
  for _, glob in ipairs(globs) do
    if M.matches(glob, name) then
      return glob
    end
  end
end

return M
