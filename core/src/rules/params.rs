//! Parameters of a rule: defaults from the rule file, overrides from `[rules.NAME]` of the settings.
//!
//! The default decides the kind: a number, a flag, a quantity with a unit in quotes, or a list of texts. Lua gets
//! plain numbers in base units: bytes, bytes per second, seconds.

use std::fmt;

use mlua::{Integer, Lua, Table, Value};

use crate::config::nearest;
use crate::units::{self, Bytes};

/// Key of `[rules.NAME]` that is not a parameter.
pub(super) const ENABLED: &str = "enabled";

/// A parameter's value and with it its kind.
#[derive(Clone, Debug, PartialEq)]
pub enum ParamValue {
    /// A number without a unit.
    Number(f64),
    /// On or off.
    Flag(bool),
    /// A size in bytes.
    Bytes(u64),
    /// A rate in bytes per second.
    Rate(f64),
    /// A duration in seconds.
    Seconds(f64),
    /// A list of texts.
    Texts(Vec<String>),
}

impl ParamValue {
    /// What a value of this kind looks like, for messages.
    pub fn expected(&self) -> &'static str {
        match self {
            ParamValue::Number(_) => "a number",
            ParamValue::Flag(_) => "true or false",
            ParamValue::Bytes(_) => "a size such as \"256KiB\"",
            ParamValue::Rate(_) => "a rate such as \"1KiB/min\"",
            ParamValue::Seconds(_) => "a duration such as \"30s\"",
            ParamValue::Texts(_) => "a list of texts such as [\"a\", \"b\"]",
        }
    }

    /// A quantity in quotes: the unit decides which.
    fn from_text(text: &str) -> Result<ParamValue, String> {
        if text.contains('/') {
            return units::parse_rate(text).map(ParamValue::Rate);
        }
        if let Ok(duration) = units::parse_duration(text) {
            // "0" is a duration too, but then nobody knows of what.
            if text.trim() != "0" {
                return Ok(ParamValue::Seconds(duration.as_secs_f64()));
            }
        }
        match Bytes::parse(text) {
            Ok(Bytes(n)) if text.ends_with(|c: char| c.is_alphabetic()) => Ok(ParamValue::Bytes(n)),
            Ok(_) => Err(format!("{text:?} has no unit: write a number without quotes, or for example \"{text}KiB\"")),
            Err(_) => Err(format!("{text:?} is not a size (\"256KiB\"), rate (\"1KiB/min\") or duration (\"30s\")")),
        }
    }

    /// A default as the rule file gives it.
    fn from_lua(value: &Value) -> Result<ParamValue, String> {
        match value {
            Value::Integer(n) => Ok(ParamValue::Number(*n as f64)),
            Value::Number(n) if n.is_finite() => Ok(ParamValue::Number(*n)),
            Value::Boolean(b) => Ok(ParamValue::Flag(*b)),
            Value::String(text) => ParamValue::from_text(&text.to_string_lossy()),
            Value::Table(list) => {
                let values = list.sequence_values::<Value>();
                let texts: Vec<_> = values.filter_map(|v| Some(v.ok()?.as_string()?.to_string_lossy())).collect();
                if list.pairs::<Value, Value>().count() != texts.len() {
                    return Err("a list must hold texts only".to_owned());
                }
                Ok(ParamValue::Texts(texts))
            }
            other => Err(format!("a {} cannot be a parameter", other.type_name())),
        }
    }

    /// An override of a parameter of this kind; `None` when the value is of another kind.
    fn override_with(&self, value: &toml::Value) -> Result<ParamValue, Option<String>> {
        match (self, value) {
            (ParamValue::Number(_), toml::Value::Integer(n)) => Ok(ParamValue::Number(*n as f64)),
            (ParamValue::Number(_), toml::Value::Float(n)) if n.is_finite() => Ok(ParamValue::Number(*n)),
            (ParamValue::Flag(_), toml::Value::Boolean(b)) => Ok(ParamValue::Flag(*b)),
            (ParamValue::Bytes(_), toml::Value::String(text)) => {
                Bytes::parse(text).map(|b| ParamValue::Bytes(b.0)).map_err(Some)
            }
            // A bare number of bytes is as plain as it gets; for times and rates it would be a guess.
            (ParamValue::Bytes(_), toml::Value::Integer(n)) => {
                u64::try_from(*n).map(ParamValue::Bytes).map_err(|_| Some("a size cannot be negative".to_owned()))
            }
            (ParamValue::Rate(_), toml::Value::String(text)) => {
                units::parse_rate(text).map(ParamValue::Rate).map_err(Some)
            }
            (ParamValue::Seconds(_), toml::Value::String(text)) => {
                units::parse_duration(text).map(|d| ParamValue::Seconds(d.as_secs_f64())).map_err(Some)
            }
            (ParamValue::Texts(_), toml::Value::Array(list)) => {
                let texts: Option<Vec<_>> = list.iter().map(|v| v.as_str().map(str::to_owned)).collect();
                texts.map(ParamValue::Texts).ok_or(None)
            }
            _ => Err(None),
        }
    }

    fn to_lua(&self, lua: &Lua) -> mlua::Result<Value> {
        Ok(match self {
            ParamValue::Flag(b) => Value::Boolean(*b),
            ParamValue::Texts(texts) => Value::Table(lua.create_sequence_from(texts.iter().map(String::as_str))?),
            ParamValue::Bytes(n) => Value::Integer(Integer::try_from(*n).unwrap_or(Integer::MAX)),
            // Whole numbers stay integers, so that "%d" takes them and 12 does not print as 12.0.
            ParamValue::Number(n) | ParamValue::Rate(n) | ParamValue::Seconds(n) => {
                if n.fract() == 0.0 && n.abs() < 1e15 { Value::Integer(*n as Integer) } else { Value::Number(*n) }
            }
        })
    }
}

/// As people read it: sizes, rates and durations with their units.
impl fmt::Display for ParamValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ParamValue::Number(n) => write!(f, "{n}"),
            ParamValue::Flag(b) => write!(f, "{b}"),
            ParamValue::Bytes(n) => write!(f, "{}", Bytes(*n)),
            ParamValue::Rate(n) => f.write_str(&units::format_rate(*n)),
            ParamValue::Seconds(s) => f.write_str(&units::format_duration_s(*s)),
            ParamValue::Texts(texts) => write!(f, "{texts:?}"),
        }
    }
}

/// One parameter of a rule.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamInfo {
    /// Name, as in `[rules.NAME]` and in `p.` of the rule.
    pub name: String,
    /// What the rule file says.
    pub default: ParamValue,
    /// What holds: the override, else the default.
    pub value: ParamValue,
}

/// Reads the `params` table of a rule file, sorted by name.
pub(super) fn defaults(table: &Table) -> Result<Vec<ParamInfo>, String> {
    let mut params = Vec::new();
    for pair in table.pairs::<Value, Value>() {
        let (key, value) = pair.map_err(|e| e.to_string())?;
        let Value::String(key) = key else {
            return Err("params must be a table of names and defaults".to_owned());
        };
        let name = key.to_string_lossy();
        if name == ENABLED {
            return Err(format!("params.{ENABLED} is reserved for switching the rule on and off"));
        }
        let default = ParamValue::from_lua(&value).map_err(|why| format!("params.{name}: {why}"))?;
        params.push(ParamInfo { name, value: default.clone(), default });
    }
    params.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(params)
}

/// Applies `[rules.NAME]`: whether the rule is on, and a sentence per key that is wrong.
pub(super) fn apply(rule: &str, params: &mut [ParamInfo], table: &toml::Table) -> (bool, Vec<String>) {
    let mut enabled = true;
    let mut errors = Vec::new();
    for (key, value) in table {
        if key == ENABLED {
            match value.as_bool() {
                Some(on) => enabled = on,
                None => errors.push(format!("rules.{rule}.{ENABLED} = {value}: expected true or false")),
            }
            continue;
        }
        let Some(param) = params.iter_mut().find(|p| p.name == *key) else {
            let names = params.iter().map(|p| p.name.as_str()).chain([ENABLED]);
            let near = nearest(key, names.clone()).and_then(|near| params.iter().find(|p| p.name == near));
            let expected = near.map_or(String::new(), |p| format!(" It is {}.", p.default.expected()));
            errors.push(format!("rules.{rule}.{key}: the rule has no such parameter; {}{expected}", hint(key, names)));
            continue;
        };
        match param.default.override_with(value) {
            Ok(value) => param.value = value,
            Err(why) => {
                let why = why.map_or(String::new(), |why| format!(": {why}"));
                let (expected, default) = (param.default.expected(), &param.default);
                errors.push(format!("rules.{rule}.{key} = {value}: expected {expected} (default {default}){why}"));
            }
        }
    }
    (enabled, errors)
}

/// The parameters as rules see them.
pub(super) fn to_lua(lua: &Lua, params: &[ParamInfo]) -> mlua::Result<Table> {
    let table = lua.create_table()?;
    for param in params {
        table.raw_set(param.name.as_str(), param.value.to_lua(lua)?)?;
    }
    Ok(table)
}

/// What to say after an unknown name: the one that was probably meant, else all that there are.
pub(super) fn hint<'a>(word: &str, known: impl IntoIterator<Item = &'a str> + Clone) -> String {
    match nearest(word, known.clone()) {
        Some(name) => format!("did you mean {name}?"),
        None => format!("known: {}", known.into_iter().collect::<Vec<_>>().join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<ParamInfo>, String> {
        let lua = Lua::new();
        defaults(&lua.load(text).eval().expect("test table"))
    }

    /// Units decide the kind and turn into base units.
    #[test]
    fn defaults_become_base_units() {
        let params = read(r#"{ b = "256KiB", r = "1KiB/min", d = "1m30s", n = 6, f = true, l = {"x", "y"} }"#);
        let values: Vec<_> = params.expect("params").into_iter().map(|p| p.value).collect();
        let expected = [
            ParamValue::Bytes(262_144),
            ParamValue::Seconds(90.0),
            ParamValue::Flag(true),
            ParamValue::Texts(vec!["x".into(), "y".into()]),
            ParamValue::Number(6.0),
            ParamValue::Rate(1024.0 / 60.0),
        ];
        assert_eq!(values, expected);
    }

    /// What is no quantity is refused with the name of the parameter.
    #[test]
    fn nonsense_defaults_are_refused() {
        for bad in [r#"{ x = "soon" }"#, r#"{ x = "5" }"#, "{ x = {1} }", "{ x = {a = 'b'} }", "{ x = 0/0 }"] {
            let error = read(bad).expect_err(bad);
            assert!(error.contains("params.x"), "{bad}: {error}");
        }
        assert!(read("{ 'x' }").is_err());
        assert!(read("{ enabled = true }").is_err());
    }

    /// An override keeps the kind of its default.
    #[test]
    fn overrides_are_taken_in_the_kind_of_the_default() {
        let mut params =
            read(r#"{ size = "1KiB", age = "1s", rate = "1B/s", n = 1, on = true, l = {} }"#).expect("params");
        let table: toml::Table = toml::from_str(
            "enabled = false\nsize = \"2MiB\"\nage = \"2m\"\nrate = \"60B/min\"\nn = 0.5\non = false\nl = [\"a\"]",
        )
        .expect("toml");
        let (enabled, errors) = apply("r", &mut params, &table);
        assert_eq!((enabled, errors), (false, vec![]));
        let values: Vec<_> = params.iter().map(|p| p.value.to_string()).collect();
        assert_eq!(values, ["2m", "[\"a\"]", "0.5", "false", "3.5 KiB/h", "2MiB"]);
    }

    /// A wrong key or kind names rule, key, nearest key and unit.
    #[test]
    fn wrong_overrides_name_rule_key_and_unit() {
        let mut params = read(r#"{ min_bytes = "1KiB", min_age = "1s" }"#).expect("params");
        let cases = [
            ("min_byte = \"1MiB\"", ["rules.growth.min_byte", "did you mean min_bytes", "a size such as"]),
            ("min_bytes = \"1s\"", ["rules.growth.min_bytes", "expected a size such as \"256KiB\"", "default 1KiB"]),
            ("min_bytes = -1", ["rules.growth.min_bytes", "-1", "negative"]),
            ("min_age = 5", ["rules.growth.min_age", "expected a duration such as", "default 1s"]),
            ("enabled = 1", ["rules.growth.enabled", "true or false", "1"]),
        ];
        for (text, parts) in cases {
            let (_, errors) = apply("growth", &mut params, &toml::from_str(text).expect("toml"));
            assert_eq!(errors.len(), 1, "{text}");
            for part in parts {
                assert!(errors[0].contains(part), "{text}: {} lacks {part}", errors[0]);
            }
        }
    }
}
