//! What a site must have for a rule to look at it: `needs` of a rule file.
//!
//! A call of Lua costs as much as looking at a hundred sites here, and most sites of a process have nothing that any rule
//! asks for. So rules say beforehand what they need, and are called for the rest only.

use mlua::{Table, Value};

use super::params::{ParamInfo, ParamValue, hint};
use super::view::{Glance, survival};
use crate::history::SiteHistory;

/// Keys of `needs`.
const KEYS: [&str; 9] = ["outstanding", "rise", "time", "snapshots", "generations", "age", "scan", "kernel", "windows"];

/// The least that a rule needs of a site; the default needs nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Needs {
    outstanding: u64,
    rise: u64,
    time_s: f64,
    snapshots: usize,
    generations: u64,
    age_s: f64,
    scan: bool,
    kernel: Option<bool>,
    windows: Option<bool>,
}

impl Needs {
    /// What a rule file says; `params` are the parameters with their values.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn from_lua(value: &Value, params: &[ParamInfo]) -> Result<Needs, String> {
        let table = match value {
            Value::Nil => return Ok(Needs::default()),
            Value::Table(table) => table,
            other => return Err(format!("needs must be a table, not a {}", other.type_name())),
        };
        for pair in table.pairs::<Value, Value>() {
            let key = pair.map_err(|e| e.to_string())?.0.to_string().unwrap_or_default();
            if !KEYS.contains(&key.as_str()) {
                return Err(format!("needs has an unknown key '{key}'; {}", hint(&key, KEYS)));
            }
        }
        let needs = Needs {
            outstanding: bytes(table, "outstanding", params)?,
            rise: bytes(table, "rise", params)?,
            time_s: seconds(table, "time", params)?,
            snapshots: count(table, "snapshots", params)? as usize,
            generations: count(table, "generations", params)?,
            age_s: seconds(table, "age", params)?,
            scan: flag(table, "scan")?.unwrap_or(false),
            kernel: flag(table, "kernel")?,
            windows: flag(table, "windows")?,
        };
        if needs.age_s > 0.0 && needs.generations == 0 {
            return Err("needs.age says how old generations must be, and needs.generations how many: the second is \
                        missing"
                .to_owned());
        }
        Ok(needs)
    }

    /// Whether a site has it all. Something outstanding is always needed: most sites of a busy process hold nothing.
    pub(super) fn met<'h>(&self, site: &Glance, history: impl FnOnce() -> Option<&'h SiteHistory>, now_s: f64) -> bool {
        let at_a_glance = site.has_blocks
            && site.outstanding_bytes >= self.outstanding
            && site.rise >= self.rise
            && (site.scanned || !self.scan)
            && self.kernel.is_none_or(|wanted| wanted == site.kernel)
            && self.windows.is_none_or(|wanted| wanted == site.windows);
        at_a_glance && history().is_some_and(|h| self.met_by(h, now_s))
    }

    fn met_by(&self, history: &SiteHistory, now_s: f64) -> bool {
        let samples = history.series.samples();
        let lasted_s = match samples {
            [first, .., last] => last.time_s - first.time_s,
            _ => 0.0,
        };
        if samples.len() < self.snapshots || lasted_s < self.time_s {
            return false;
        }
        let generations = || survival(history, now_s, self.age_s, f64::INFINITY);
        self.generations == 0 || {
            let old = generations();
            old.cohorts >= self.generations && old.cohorts_with_survivors == old.cohorts
        }
    }
}

/// The value of the parameter that `needs.KEY` names, or the number there.
fn value(table: &Table, key: &str, params: &[ParamInfo]) -> Result<Option<ParamValue>, String> {
    match table.raw_get::<Value>(key).map_err(|e| e.to_string())? {
        Value::Nil => Ok(None),
        Value::Integer(n) => Ok(Some(ParamValue::Number(n as f64))),
        Value::Number(n) => Ok(Some(ParamValue::Number(n))),
        Value::String(name) => {
            let name = name.to_string_lossy();
            let found = params.iter().find(|p| p.name == name).map(|p| p.value.clone());
            found.map(Some).ok_or_else(|| {
                let names = params.iter().map(|p| p.name.as_str());
                format!("needs.{key} names no parameter: '{name}'; {}", hint(&name, names))
            })
        }
        other => Err(format!("needs.{key} must be a number or the name of a parameter, not a {}", other.type_name())),
    }
}

fn bytes(table: &Table, key: &str, params: &[ParamInfo]) -> Result<u64, String> {
    match value(table, key, params)? {
        None => Ok(0),
        Some(ParamValue::Bytes(n)) => Ok(n),
        // A cast saturates.
        Some(ParamValue::Number(n)) if n >= 0.0 => Ok(n as u64),
        Some(_) => Err(format!("needs.{key} must be a size")),
    }
}

fn seconds(table: &Table, key: &str, params: &[ParamInfo]) -> Result<f64, String> {
    match value(table, key, params)? {
        None => Ok(0.0),
        Some(ParamValue::Seconds(s)) => Ok(s),
        Some(ParamValue::Number(s)) if s.is_finite() => Ok(s),
        Some(_) => Err(format!("needs.{key} must be a duration")),
    }
}

fn count(table: &Table, key: &str, params: &[ParamInfo]) -> Result<u64, String> {
    match value(table, key, params)? {
        None => Ok(0),
        // 2.5 snapshots are not reached by 2.
        Some(ParamValue::Number(n)) if n.is_finite() => Ok(n.ceil() as u64),
        Some(_) => Err(format!("needs.{key} must be a number")),
    }
}

fn flag(table: &Table, key: &str) -> Result<Option<bool>, String> {
    match table.raw_get::<Value>(key).map_err(|e| e.to_string())? {
        Value::Nil => Ok(None),
        Value::Boolean(wanted) => Ok(Some(wanted)),
        other => Err(format!("needs.{key} must be true or false, not a {}", other.type_name())),
    }
}
