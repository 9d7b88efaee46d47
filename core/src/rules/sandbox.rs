//! One Lua state per rule: what is in it and what bounds it.
//!
//! A state has Lua's base functions without those that reach code, files or the garbage collector, `math` without
//! randomness, `string`, `table` and `utf8`, and the shared modules under `lib/` through `require`. Three limits hold
//! in it (see [`Budget`]), and no function that is left can loop outside them: pattern matching and the table
//! functions are replaced (`strings.rs`), finalizers and weak tables are refused (`prelude.lua`).

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;

use mlua::chunk::ChunkMode;
use mlua::{Function, HookTriggers, Lua, LuaOptions, LuaString, StdLib, Table, Value, Variadic, VmState};

use super::budget::Budget;
use super::error::Stopped;
use super::strings;

/// Instructions between two looks at the budget.
const HOOK_EVERY: u64 = 1_000;
/// Stack levels that are searched for a place in a rule file.
const MAX_LEVELS: usize = 20;
/// Longest line that `print` passes on to the log, in bytes.
const MAX_PRINT: usize = 1_000;
/// Bytes that a state may have piled up in an evaluation before it is tidied.
const MAX_UNTIDY: usize = 128 << 10;
/// Shared Lua modules: name as in `require`, text.
pub(super) type Libraries = Rc<BTreeMap<String, String>>;

/// Limits of one state.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Instructions of one call.
    pub(super) instructions: u64,
    /// Bytes of the state.
    pub(super) memory: u64,
}

/// A sandboxed Lua state.
pub(super) struct Sandbox {
    pub(super) lua: Lua,
    pub(super) budget: Rc<Budget>,
    env: Table,
    /// Bytes that were in use when nothing was left to tidy.
    tidy: Cell<usize>,
}

impl Sandbox {
    /// A fresh state. `rule` names it in the log, `units` is the table of formatters.
    pub(super) fn new(
        rule: &str,
        limits: Limits,
        libraries: &Libraries,
        units: impl FnOnce(&Lua) -> mlua::Result<Table>,
    ) -> mlua::Result<Sandbox> {
        let lua = Lua::new_with(StdLib::MATH | StdLib::STRING | StdLib::TABLE | StdLib::UTF8, LuaOptions::default())?;
        let budget = Rc::new(Budget::new(limits.instructions, limits.memory));
        let host = lua.create_table()?;
        host.raw_set("string", strings::string_library(&lua, &lua.globals().raw_get("string")?, &budget)?)?;
        host.raw_set("table", strings::table_library(&lua, &lua.globals().raw_get("table")?, &budget)?)?;
        host.raw_set("scan", strings::scan(&lua, &budget)?)?;
        host.raw_set("units", units(&lua)?)?;
        host.raw_set("print", print(&lua, rule)?)?;
        host.raw_set("check_limit", check_limit(&lua, &budget)?)?;
        // `require` loads into the environment that only exists after the prelude.
        let modules = lua.create_table()?;
        host.raw_set("require", require(&lua, libraries, &modules)?)?;
        let env: Table = lua.load(include_str!("prelude.lua")).set_name("=prelude").call(host)?;
        modules.raw_set(ENV_KEY, env.clone())?;

        let every = HOOK_EVERY.min(limits.instructions).max(1);
        let b = Rc::clone(&budget);
        let triggers = HookTriggers::new().every_nth_instruction(u32::try_from(every).unwrap_or(u32::MAX));
        lua.set_hook(triggers, move |lua, _| {
            let within = b.check_cpu().and_then(|()| b.charge(every));
            if within.is_err() {
                b.stopped_at(|| (0..MAX_LEVELS).find_map(|level| lua.inspect_stack(level, place).flatten()));
            }
            within.map(|()| VmState::Continue)
        })?;
        lua.set_memory_limit(budget.max_memory())?;
        let tidy = Cell::new(lua.used_memory());
        Ok(Sandbox { lua, budget, env, tidy })
    }

    /// Ends an evaluation. What a rule has made of ten thousand sites is megabytes, and would stay until the next one. To be
    /// called while the rule's time runs: finalizers count as its own work, and one that fails has failed for itself.
    pub(super) fn tidy(&self) {
        if self.lua.used_memory() > self.tidy.get() + MAX_UNTIDY {
            let _ = self.lua.gc_collect();
            self.tidy.set(self.lua.used_memory());
        }
    }

    /// Compiles and runs a chunk as text; `name` is what errors call it.
    pub(super) fn run(&self, name: &str, text: &str) -> mlua::Result<Value> {
        self.budget.start_snapshot();
        self.budget.start_call();
        load(&self.lua, &self.env, name, text)
    }

    /// The limit behind an error, if one is: the budget's own, or Lua's report that memory is out.
    pub(super) fn stopped(&self, error: &mlua::Error) -> Option<Stopped> {
        let memory = error.chain().any(|e| matches!(e.downcast_ref(), Some(mlua::Error::MemoryError(_))));
        if memory {
            self.budget.exceed_memory();
        }
        self.budget.exceeded().map(|limit| Stopped { limit, place: self.budget.place() })
    }
}

/// Chunk and line of a stack level, unless it is host code or the prelude.
fn place(level: &mlua::debug::Debug<'_>) -> Option<(String, u32)> {
    let chunk = level.source().short_src?.into_owned();
    let line = level.current_line().and_then(|n| u32::try_from(n).ok())?;
    chunk.ends_with(".lua").then_some((chunk, line))
}

/// Where `require` keeps the environment among the modules; no module name has a space.
const ENV_KEY: &str = "the environment";

fn load(lua: &Lua, env: &Table, name: &str, text: &str) -> mlua::Result<Value> {
    lua.load(text).set_name(format!("@{name}")).set_mode(ChunkMode::Text).set_environment(env.clone()).eval()
}

/// `require "lib.NAME"` or `require "NAME"`: a shared module, loaded once per state.
fn require(lua: &Lua, libraries: &Libraries, modules: &Table) -> mlua::Result<Function> {
    let libraries = Rc::clone(libraries);
    let modules = modules.clone();
    lua.create_function(move |lua, name: String| {
        let name = name.strip_prefix("lib.").unwrap_or(&name);
        let Some(text) = libraries.get(name) else {
            let known: Vec<_> = libraries.keys().map(String::as_str).collect();
            let known = if known.is_empty() { "there are none".to_owned() } else { known.join(", ") };
            return Err(mlua::Error::runtime(format!("no shared module 'lib.{name}' (known: {known})")));
        };
        match modules.raw_get::<Value>(name)? {
            Value::Nil => {}
            Value::Boolean(_) => {
                return Err(mlua::Error::runtime(format!("shared module 'lib.{name}' requires itself")));
            }
            module => return Ok(module),
        }
        modules.raw_set(name, true)?;
        let env: Table = modules.raw_get(ENV_KEY)?;
        let module = load(lua, &env, &format!("lib/{name}.lua"), text);
        modules.raw_set(name, Value::Nil)?;
        let module = module?;
        if !module.is_table() {
            let got = module.type_name();
            return Err(mlua::Error::runtime(format!("shared module 'lib.{name}' must return a table, not {got}")));
        }
        modules.raw_set(name, module.clone())?;
        Ok(module)
    })
}

/// `print` for rules: one debug line in the log.
fn print(lua: &Lua, rule: &str) -> mlua::Result<Function> {
    let rule = rule.to_owned();
    let to_string: Function = lua.globals().raw_get("tostring")?;
    lua.create_function(move |_, values: Variadic<Value>| {
        let mut line = String::new();
        for (i, value) in values.iter().enumerate() {
            if i > 0 {
                line.push('\t');
            }
            line.push_str(&to_string.call::<LuaString>(value)?.to_string_lossy());
            if line.len() > MAX_PRINT {
                line.truncate(cut(&line, MAX_PRINT).len());
                line.push_str("...");
                break;
            }
        }
        tracing::debug!(rule = %rule, "{}", line.escape_debug());
        Ok(())
    })
}

/// Called by `pcall` with every error it caught: raises limits again.
fn check_limit(lua: &Lua, budget: &Rc<Budget>) -> mlua::Result<Function> {
    let b = Rc::clone(budget);
    lua.create_function(move |_, error: Value| {
        let memory = match &error {
            Value::String(text) => text.as_bytes().as_ref() == b"not enough memory",
            Value::Error(e) => e.chain().any(|e| matches!(e.downcast_ref(), Some(mlua::Error::MemoryError(_)))),
            _ => false,
        };
        if memory {
            return Err(b.exceed_memory());
        }
        match b.exceeded() {
            Some(limit) => Err(mlua::Error::external(limit)),
            None => Ok(()),
        }
    })
}

/// The start of a text, at most `max` bytes, without splitting a character.
pub(super) fn cut(text: &str, max: usize) -> &str {
    let end = (0..=max.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
    &text[..end]
}
