//! The string and table functions of rules: Lua's own, with every loop that runs outside the interpreter charged to
//! the budget.

use std::rc::Rc;

use mlua::{FromLua, Function, Integer, IntoLua, Lua, LuaString, MultiValue, Table, Value};

use super::budget::Budget;
use super::pattern::{Capture, Failure, Matcher};

/// Bytes that a host function copies for the price of one instruction.
const BYTES_PER_STEP: usize = 64;

/// Characters that make a text a pattern.
const SPECIALS: &[u8] = b"^$*+?.([%-";

/// Functions of `string` that are Lua's own: linear in their result, which the memory limit bounds.
const KEPT_STRING: [&str; 8] = ["byte", "char", "format", "len", "lower", "reverse", "sub", "upper"];

/// Builds the `string` library out of Lua's own (`original`).
pub(super) fn string_library(lua: &Lua, original: &Table, budget: &Rc<Budget>) -> mlua::Result<Table> {
    let library = lua.create_table()?;
    for name in KEPT_STRING {
        library.raw_set(name, original.raw_get::<Function>(name)?)?;
    }
    let b = Rc::clone(budget);
    let find = move |lua: &Lua, (s, p, init, plain): (LuaString, LuaString, Option<Integer>, Option<bool>)| {
        let (s, p) = (s.as_bytes(), p.as_bytes());
        let Some(init) = start_index(init, s.len()) else { return Ok(MultiValue::from_iter([Value::Nil])) };
        // As in Lua, a pattern without special characters is plain text: "a)" is found, not malformed.
        if plain.unwrap_or(false) || !p.iter().any(|c| SPECIALS.contains(c)) {
            // The search itself is linear in practice; the worst case is the product of both lengths.
            b.charge(((s.len() - init) / BYTES_PER_STEP) as u64 * (p.len() as u64 / 8 + 1))?;
            return Ok(match find_plain(&s[init..], &p) {
                Some(at) => positions(init + at, init + at + p.len()),
                None => MultiValue::from_iter([Value::Nil]),
            });
        }
        let mut matcher = Matcher::new(&s, &p, || b.charge(1));
        let Some((start, end)) = matcher.find(init, true)? else { return Ok(MultiValue::from_iter([Value::Nil])) };
        let mut results = positions(start, end);
        for &capture in matcher.captures()? {
            results.push_back(capture_value(lua, &s, capture)?);
        }
        Ok(results)
    };
    library.raw_set("find", lua.create_function(find)?)?;

    let b = Rc::clone(budget);
    let match_ = move |lua: &Lua, (s, p, init): (LuaString, LuaString, Option<Integer>)| {
        let (s, p) = (s.as_bytes(), p.as_bytes());
        let none = || Ok(MultiValue::from_iter([Value::Nil]));
        let Some(init) = start_index(init, s.len()) else { return none() };
        let mut matcher = Matcher::new(&s, &p, || b.charge(1));
        match matcher.find(init, true)? {
            Some((start, end)) => whole_or_captures(lua, &s, matcher.captures()?, start, end),
            None => none(),
        }
    };
    library.raw_set("match", lua.create_function(match_)?)?;

    let b = Rc::clone(budget);
    let gsub = move |lua: &Lua, args: (LuaString, LuaString, Value, Option<Integer>)| gsub(lua, &b, args);
    library.raw_set("gsub", lua.create_function(gsub)?)?;

    let b = Rc::clone(budget);
    let rep_original: Function = original.raw_get("rep")?;
    let rep = move |lua: &Lua, (s, n, sep): (LuaString, Integer, Option<LuaString>)| {
        let unit = s.as_bytes().len() + sep.as_ref().map_or(0, |s| s.as_bytes().len());
        // Lua's own loop runs n times even when there is nothing to copy.
        if n <= 0 || unit == 0 {
            return lua.create_string("");
        }
        let bytes = (unit as u64).saturating_mul(n.unsigned_abs());
        b.charge(bytes / BYTES_PER_STEP as u64 + n.unsigned_abs() / 8)?;
        rep_original.call((s, n, sep))
    };
    library.raw_set("rep", lua.create_function(rep)?)?;
    Ok(library)
}

/// The step function below `string.gmatch`: from position `pos` (1-based) the end of the next match (1-based, so where
/// to go on) and what to return for it; nothing when there is no further match. An empty match at `pos` does not
/// count unless `first`: it touches the match before it.
pub(super) fn scan(lua: &Lua, budget: &Rc<Budget>) -> mlua::Result<Function> {
    let b = Rc::clone(budget);
    lua.create_function(move |lua, (s, p, pos, first): (LuaString, LuaString, Integer, bool)| {
        let (s, p) = (s.as_bytes(), p.as_bytes());
        let mut matcher = Matcher::new(&s, &p, || b.charge(1));
        let from = usize::try_from(pos - 1).unwrap_or(0);
        for start in from..=s.len() {
            let Some(end) = matcher.at(start, 0)? else { continue };
            if end == from && !first {
                continue;
            }
            let mut results = whole_or_captures(lua, &s, matcher.captures()?, start, end)?;
            results.push_front(Value::Integer(end as Integer + 1));
            return Ok(results);
        }
        Ok(MultiValue::new())
    })
}

fn gsub(
    lua: &Lua,
    budget: &Budget,
    (s, p, replacement, limit): (LuaString, LuaString, Value, Option<Integer>),
) -> mlua::Result<(LuaString, Integer)> {
    if !matches!(
        replacement,
        Value::String(_) | Value::Integer(_) | Value::Number(_) | Value::Table(_) | Value::Function(_)
    ) {
        let got = replacement.type_name();
        return Err(mlua::Error::runtime(format!(
            "bad argument #3 to 'gsub' (string/function/table expected, got {got})"
        )));
    }
    let template = match &replacement {
        Value::Table(_) | Value::Function(_) => None,
        other => lua.coerce_string(other.clone())?,
    };
    let (s, p) = (s.as_bytes(), p.as_bytes());
    let anchored = p.first() == Some(&b'^');
    let from = usize::from(anchored);
    let mut matcher = Matcher::new(&s, &p, || budget.charge(1));
    let mut out = Vec::new();
    let (mut at, mut last_end, mut count) = (0, None, 0);
    while limit.is_none_or(|most| count < most) {
        match matcher.at(at, from)?.filter(|&end| last_end != Some(end)) {
            Some(end) => {
                count += 1;
                let captures = matcher.captures()?;
                let before = out.len();
                match &template {
                    Some(text) => expand(&text.as_bytes(), &s, captures, (at, end), &mut out)?,
                    None => {
                        let first = captures.first().copied().unwrap_or(Capture::Text(at, end));
                        let value: Value = match &replacement {
                            Value::Table(t) => t.get(capture_value(lua, &s, first)?)?,
                            Value::Function(f) => f.call(whole_or_captures(lua, &s, captures, at, end)?)?,
                            _ => Value::Nil,
                        };
                        push_replacement(lua, value, &s[at..end], &mut out)?;
                    }
                }
                grow(lua, budget, out.len() - before, out.len())?;
                at = end;
                last_end = Some(end);
            }
            None if at < s.len() => {
                out.push(s[at]);
                at += 1;
            }
            None => break,
        }
        if anchored {
            break;
        }
    }
    out.extend_from_slice(s.get(at..).unwrap_or_default());
    Ok((lua.create_string(&out)?, count))
}

/// Charges for `added` bytes and stops a result that would not fit the state's memory anyway: it is built outside.
fn grow(lua: &Lua, budget: &Budget, added: usize, total: usize) -> mlua::Result<()> {
    budget.charge((added / BYTES_PER_STEP) as u64)?;
    if total + lua.used_memory() > budget.max_memory() { Err(budget.exceed_memory()) } else { Ok(()) }
}

/// What a replacement table or function gave: nil and false keep the match.
fn push_replacement(lua: &Lua, value: Value, matched: &[u8], out: &mut Vec<u8>) -> mlua::Result<()> {
    match value {
        Value::Nil | Value::Boolean(false) => out.extend_from_slice(matched),
        Value::String(_) | Value::Integer(_) | Value::Number(_) => {
            out.extend_from_slice(&LuaString::from_lua(value, lua)?.as_bytes());
        }
        other => {
            return Err(mlua::Error::runtime(format!("invalid replacement value (a {})", other.type_name())));
        }
    }
    Ok(())
}

/// Expands `%0` to `%9` and `%%` of a replacement string.
fn expand(
    template: &[u8],
    subject: &[u8],
    captures: &[Capture],
    whole: (usize, usize),
    out: &mut Vec<u8>,
) -> mlua::Result<()> {
    let mut bytes = template.iter();
    while let Some(&byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let capture = match bytes.next() {
            Some(b'%') => {
                out.push(b'%');
                continue;
            }
            Some(b'0') => Some(Capture::Text(whole.0, whole.1)),
            Some(b'1') if captures.is_empty() => Some(Capture::Text(whole.0, whole.1)),
            Some(digit @ b'1'..=b'9') => captures.get(usize::from(digit - b'1')).copied(),
            _ => return Err(mlua::Error::runtime("invalid use of '%' in replacement string")),
        };
        match capture {
            Some(Capture::Text(from, to)) => out.extend_from_slice(&subject[from..to]),
            Some(Capture::Position(at)) => out.extend_from_slice((at + 1).to_string().as_bytes()),
            _ => return Err(mlua::Error::runtime("invalid capture index in replacement string")),
        }
    }
    Ok(())
}

/// All captures, or the whole match when the pattern has none.
fn whole_or_captures(
    lua: &Lua,
    subject: &[u8],
    captures: &[Capture],
    start: usize,
    end: usize,
) -> mlua::Result<MultiValue> {
    if captures.is_empty() {
        return Ok(MultiValue::from_iter([capture_value(lua, subject, Capture::Text(start, end))?]));
    }
    captures.iter().map(|&c| capture_value(lua, subject, c)).collect()
}

fn capture_value(lua: &Lua, subject: &[u8], capture: Capture) -> mlua::Result<Value> {
    match capture {
        Capture::Text(from, to) => lua.create_string(&subject[from..to])?.into_lua(lua),
        Capture::Position(at) => Ok(Value::Integer(at as Integer + 1)),
        Capture::Open(_) => Err(Failure::Malformed("unfinished capture").into()),
    }
}

/// Start and end of a match as Lua counts: from 1, end included.
fn positions(start: usize, end: usize) -> MultiValue {
    MultiValue::from_iter([Value::Integer(start as Integer + 1), Value::Integer(end as Integer)])
}

/// Lua's `init` argument as a zero-based index; `None` when it lies after the end.
fn start_index(init: Option<Integer>, len: usize) -> Option<usize> {
    let index = match init.unwrap_or(1) {
        n if n > 0 => usize::try_from(n - 1).unwrap_or(usize::MAX),
        0 => 0,
        n => len.saturating_sub(usize::try_from(n.unsigned_abs()).unwrap_or(usize::MAX)),
    };
    (index <= len).then_some(index)
}

fn find_plain(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    if needle.is_empty() {
        return Some(0);
    }
    haystack.windows(needle.len()).position(|w| w == needle)
}

/// Builds the `table` library out of Lua's own. Its functions take tables without a metatable only: a `__len` or
/// `__index` could make their C loops run for years.
pub(super) fn table_library(lua: &Lua, original: &Table, budget: &Rc<Budget>) -> mlua::Result<Table> {
    let library = lua.create_table()?;
    library.raw_set("pack", original.raw_get::<Function>("pack")?)?;
    for name in ["concat", "insert", "move", "remove", "sort", "unpack"] {
        let function: Function = original.raw_get(name)?;
        let b = Rc::clone(budget);
        let guarded = move |lua: &Lua, args: MultiValue| {
            let mut longest = 0;
            for table in args.iter().filter_map(Value::as_table) {
                if table.has_metatable() {
                    return Err(mlua::Error::runtime(format!("table.{name} takes tables without a metatable only")));
                }
                longest = longest.max(table.raw_len() as u64);
            }
            b.charge(table_cost(lua, name, &args, longest)?)?;
            function.call::<MultiValue>(args)
        };
        library.raw_set(name, lua.create_function(guarded)?)?;
    }
    Ok(library)
}

/// Upper bound of the steps that a table function takes.
fn table_cost(lua: &Lua, name: &str, args: &MultiValue, len: u64) -> mlua::Result<u64> {
    // As Lua itself reads an index: 2^62 is a float, and "9" a number.
    let integer = |i: usize| match args.get(i) {
        Some(value) => lua.coerce_integer(value.clone()),
        None => Ok(None),
    };
    Ok(match name {
        // At the end they take no loop.
        "insert" if args.len() <= 2 => 1,
        "remove" if args.len() <= 1 => 1,
        "sort" => len.saturating_mul(u64::from(len.max(2).ilog2()) + 1).saturating_mul(2),
        "move" => match (integer(1)?, integer(2)?) {
            (Some(from), Some(to)) if from <= to => to.abs_diff(from).saturating_add(1),
            _ => 1,
        },
        // A range given by hand may be longer than the table; the functions stop at the first nil or at Lua's limits.
        _ => len.max(1),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every case is answered by Lua's own library too: ours must not differ in results or in failing.
    #[test]
    fn string_functions_agree_with_luas_own() {
        let lua = Lua::new();
        let original: Table = lua.globals().get("string").expect("string library");
        let budget = Rc::new(Budget::new(10_000_000, 1 << 30));
        let ours = string_library(&lua, &original, &budget).expect("library");
        let subjects = ["", "hello world", "  key = value  ", "THE (quick) fox", "a.b.c", "f(a(b)c)d", "x\0y", "]-^%"];
        let patterns = [
            "",
            "l+",
            "(%w+)",
            "^%s*(.-)%s*$",
            "%b()",
            "%f[%w]%w+",
            "(.)%1",
            "[^%s]+",
            "[a-f]",
            "[]]",
            "[^]]",
            "[%a-]",
            "()o()",
            ".-",
            "o-",
            "w?o",
            "^h",
            "d$",
            "$",
            "%",
            "[a",
            "(a",
            "a)",
            "%b",
            "%f",
            "%1",
            "[%",
            "x%z",
            "%u%L",
            "^",
            "[-^]",
            "(a*(.)%w(%s*))",
            ".-(%a)",
            "%x*",
            "%p",
            "%c",
            "%g+",
            "\0",
        ];
        let calls: [&str; 8] = [
            "return lib.find(s, p)",
            "return lib.find(s, p, 3)",
            "return lib.find(s, p, -4, true)",
            "return lib.match(s, p)",
            "return lib.match(s, p, 20)",
            "return lib.gsub(s, p, '<%0>')",
            "return lib.gsub(s, p, {hello = 'bye', o = false}, 2)",
            "return lib.gsub(s, p, function(a, b) return b and a end)",
        ];
        let mut compared = 0;
        for call in calls {
            let run: Function = lua.load(format!("return function(lib, s, p) {call} end")).eval().expect("test chunk");
            for s in subjects {
                for p in patterns {
                    let theirs = run.call::<MultiValue>((original.clone(), s, p));
                    let mine = run.call::<MultiValue>((ours.clone(), s, p));
                    match (theirs, mine) {
                        (Ok(a), Ok(b)) => {
                            let equal = a.len() == b.len() && a.iter().zip(b.iter()).all(|(a, b)| a == b);
                            assert!(equal, "{call} with {s:?}, {p:?}: {a:?} and {b:?}");
                        }
                        (Err(_), Err(_)) => {}
                        // Lua's gsub overlooks this mistake when no capture is asked for; ours never does.
                        (Ok(_), Err(e)) if e.to_string().contains("unfinished capture") => {}
                        (a, b) => panic!("{call} with {s:?}, {p:?}: {a:?} and {b:?}"),
                    }
                    compared += 1;
                }
            }
        }
        assert_eq!(compared, calls.len() * subjects.len() * patterns.len());
    }
}
