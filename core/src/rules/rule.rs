//! One compiled rule: a sandbox with the table that the rule file returned.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;

use mlua::{Function, IntoLuaMulti, Table, Value};

use super::api::{self, SiteRef, SnapshotRef, Symbolize};
use super::error::RuleError;
use super::needs::Needs;
use super::params::{self, ParamInfo, hint};
use super::sandbox::{Libraries, Limits, Sandbox};
use super::source::{LuaFile, Origin};
use super::view::Context;
use crate::finding::Severity;
use crate::snapshot::Site;

/// Failed calls after which a rule is not called again in the same snapshot.
const MAX_FAILURES: u64 = 100;
/// Longest reason that a rule may give, in bytes.
const MAX_REASON: usize = 1_000;
/// Most findings of one `evaluate_snapshot`.
const MAX_FINDINGS: usize = 100_000;
/// Longest name of a rule, in bytes.
const MAX_NAME: usize = 64;
/// Keys that a rule file may return.
const KEYS: [&str; 9] = [
    "name",
    "description",
    "params",
    "needs",
    "evaluate",
    "evaluate_snapshot",
    "evaluate_exit",
    "suppress",
    "examples",
];
/// Keys of a finding.
const RESULT_KEYS: [&str; 5] = ["severity", "confidence", "reason", "site", "scan"];

/// What is known of a rule without running it.
#[derive(Clone, Debug, PartialEq)]
pub struct RuleInfo {
    /// Name, as in `[rules.NAME]` and in findings.
    pub name: Arc<str>,
    /// One sentence saying what it finds.
    pub description: String,
    /// Its parameters, sorted by name.
    pub params: Vec<ParamInfo>,
    /// Where its text comes from.
    pub origin: Origin,
    /// False when `[rules.NAME] enabled = false`.
    pub enabled: bool,
}

/// A finding before it knows its site's identity: what a rule returned.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Draft {
    pub(super) severity: Severity,
    pub(super) confidence: f64,
    pub(super) reason: String,
}

/// What a rule returned for one site: a finding, the request to scan the process's memory, or both.
#[derive(Clone, Debug, PartialEq)]
struct Answer {
    finding: Option<Draft>,
    scan: bool,
}

/// Everything that a rule said in one snapshot; sites go by their place.
#[derive(Debug, Default)]
pub(super) struct Said {
    pub(super) findings: Vec<(u32, Draft)>,
    /// Sites whose process the rule wants scanned.
    pub(super) scans: Vec<u32>,
    pub(super) error: Option<RuleError>,
}

impl Said {
    fn add(&mut self, place: u32, answer: Answer) {
        self.findings.extend(answer.finding.map(|draft| (place, draft)));
        if answer.scan {
            self.scans.push(place);
        }
    }
}

/// The settings that apply to all rules.
#[derive(Clone)]
pub(super) struct Setup {
    pub(super) limits: Limits,
    pub(super) libraries: Libraries,
    pub(super) params: Rc<BTreeMap<String, toml::Table>>,
}

/// When a rule is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moment {
    /// At a snapshot: `evaluate` and `evaluate_snapshot`.
    Snapshot,
    /// At the end of processes: `evaluate_exit`.
    Exit,
}

/// A function of a rule, with the line where it starts.
struct Entry {
    function: Function,
    line: Option<u32>,
}

/// A rule that is ready to run.
pub(super) struct Rule {
    pub(super) info: Arc<RuleInfo>,
    pub(super) file: LuaFile,
    sandbox: Sandbox,
    params: Table,
    /// What a site must have for `evaluate` to be called.
    needs: Needs,
    evaluate: Option<Entry>,
    evaluate_snapshot: Option<Entry>,
    evaluate_exit: Option<Entry>,
    suppress: Option<Entry>,
    /// The table of examples, for `memleak rules test`.
    pub(super) examples: Option<Table>,
}

/// Callback that symbolizes a site.
pub(super) type Symbolizer<'a> = &'a mut dyn FnMut(&Arc<Site>);

impl Rule {
    /// Compiles a rule file in a fresh state.
    ///
    /// # Errors
    /// Everything that is wrong with it: the file itself, or each bad parameter of the settings.
    pub(super) fn compile(file: &LuaFile, setup: &Setup) -> Result<Rule, Vec<crate::Error>> {
        let stem = file.name.trim_end_matches(".lua");
        let fail = |error: RuleError| vec![crate::Error::from(error)];
        let (sandbox, table) = Rule::load(stem, file, setup).map_err(fail)?;
        let (info, errors) = Rule::describe(stem, file, setup, &table).map_err(fail)?;
        if !errors.is_empty() {
            return Err(errors.into_iter().map(crate::Error::config).collect());
        }
        let broken = |why: String| fail(RuleError::new(&info.name, file, None, why));
        let entry = |key: &str| match table.raw_get::<Value>(key) {
            Ok(Value::Nil) => Ok(None),
            Ok(Value::Function(function)) => {
                let line = function.info().line_defined.and_then(|n| u32::try_from(n).ok());
                Ok(Some(Entry { function, line }))
            }
            Ok(other) => Err(broken(format!("{key} must be a function, not a {}", other.type_name()))),
            Err(error) => Err(broken(error.to_string())),
        };
        let (evaluate, evaluate_snapshot) = (entry("evaluate")?, entry("evaluate_snapshot")?);
        let (evaluate_exit, suppress) = (entry("evaluate_exit")?, entry("suppress")?);
        if [&evaluate, &evaluate_snapshot, &evaluate_exit, &suppress].iter().all(|e| e.is_none()) {
            let none = "the table has none of evaluate, evaluate_snapshot, evaluate_exit and suppress";
            return Err(broken(none.to_owned()));
        }
        let examples = match table.raw_get::<Value>("examples") {
            Ok(Value::Nil) => None,
            Ok(Value::Table(examples)) => Some(examples),
            _ => return Err(broken("examples must be a list of tables".to_owned())),
        };
        let needs = table.raw_get::<Value>("needs").map_err(|e| e.to_string());
        let needs = needs.and_then(|needs| Needs::from_lua(&needs, &info.params)).map_err(&broken)?;
        let params = params::to_lua(&sandbox.lua, &info.params).map_err(|e| broken(e.to_string()))?;
        Ok(Rule {
            info: Arc::new(info),
            file: file.clone(),
            sandbox,
            params,
            needs,
            evaluate,
            evaluate_snapshot,
            evaluate_exit,
            suppress,
            examples,
        })
    }

    /// Runs the file: the state and the table that it returns.
    fn load(stem: &str, file: &LuaFile, setup: &Setup) -> Result<(Sandbox, Table), RuleError> {
        let sandbox = Sandbox::new(stem, setup.limits, &setup.libraries, api::units_table)
            .map_err(|e| RuleError::from_lua(stem, file, None, &e, None))?;
        match sandbox.run(&file.name, &file.text) {
            Ok(Value::Table(table)) => Ok((sandbox, table)),
            Ok(other) => {
                let message = format!("a rule file must return a table, not {}", other.type_name());
                Err(RuleError::new(stem, file, None, message))
            }
            Err(error) => {
                let stopped = sandbox.stopped(&error);
                Err(RuleError::from_lua(stem, file, None, &error, stopped))
            }
        }
    }

    /// Checks name, description, keys and parameters; the second part is what is wrong in the settings.
    fn describe(
        stem: &str,
        file: &LuaFile,
        setup: &Setup,
        table: &Table,
    ) -> Result<(RuleInfo, Vec<String>), RuleError> {
        let broken = |why: String| RuleError::new(stem, file, None, why);
        for pair in table.pairs::<Value, Value>() {
            let key = pair.map_err(|e| broken(e.to_string()))?.0;
            let key = key.to_string().unwrap_or_default();
            if !KEYS.contains(&key.as_str()) {
                return Err(broken(format!("the table has an unknown key '{key}'; {}", hint(&key, KEYS))));
            }
        }
        let text = |key: &str| match table.raw_get::<Value>(key) {
            Ok(Value::String(text)) if !text.as_bytes().is_empty() => Ok(text.to_string_lossy()),
            _ => Err(broken(format!("the table needs {key}, a text"))),
        };
        let name = text("name")?;
        let plain = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'-');
        if !plain || name.len() > MAX_NAME {
            return Err(broken(format!(
                "the name {name:?} must be at most {MAX_NAME} lower-case letters, digits, '_' and '-'"
            )));
        }
        let description = text("description")?;
        let mut params = match table.raw_get::<Value>("params") {
            Ok(Value::Nil) => Vec::new(),
            Ok(Value::Table(table)) => params::defaults(&table).map_err(broken)?,
            _ => return Err(broken("params must be a table of names and defaults".to_owned())),
        };
        let (enabled, errors) = match setup.params.get(&name) {
            Some(table) => params::apply(&name, &mut params, table),
            None => (true, Vec::new()),
        };
        let origin = file.origin.clone();
        Ok((RuleInfo { name: Arc::from(name), description, params, origin, enabled }, errors))
    }

    /// Whether it judges findings of other rules.
    pub(super) fn suppresses(&self) -> bool {
        self.suppress.is_some()
    }

    /// Runs `evaluate` for every site with what the rule needs, and `evaluate_snapshot`, over the current view; or at the
    /// end of processes `evaluate_exit` for every site with something outstanding.
    ///
    /// `symbolize` is called when the rule asks for frames; `None` leaves frames as they are. The findings name
    /// sites by their place. A failed call costs that site's finding alone; a limit or too many failures
    /// end the rule's turn in this snapshot.
    pub(super) fn evaluate(&self, context: &Rc<Context>, moment: Moment, symbolize: Option<Symbolizer<'_>>) -> Said {
        let mut said = Said::default();
        let everything = Needs::default();
        let (each_site, needs, whole) = match moment {
            Moment::Snapshot => (&self.evaluate, &self.needs, &self.evaluate_snapshot),
            Moment::Exit => (&self.evaluate_exit, &everything, &None),
        };
        let sites = match each_site {
            Some(_) => context.with(context.epoch(), |view| view.sites_with(needs)).unwrap_or_default(),
            None => Vec::new(),
        };
        if sites.is_empty() && whole.is_none() {
            return said;
        }
        let mut run = Run { rule: self, context, error: None, over: false };
        let outcome = self.scoped(context, symbolize, || {
            if let Some(entry) = each_site {
                run.sites(entry, &sites, &mut said);
            }
            if let (Some(entry), false) = (whole, run.over) {
                run.snapshot(entry, &mut said);
            }
            self.sandbox.tidy();
        });
        if let Err(error) = outcome {
            run.fail(None, None, &error);
        }
        said.error = run.error;
        said
    }

    /// Asks whether the finding of each site is to be suppressed: place of the site and why, for those that are.
    pub(super) fn suppress(
        &self,
        context: &Rc<Context>,
        symbolize: Option<Symbolizer<'_>>,
        sites: &[u32],
    ) -> (Vec<(u32, String)>, Option<RuleError>) {
        let mut suppressed = Vec::new();
        let Some(entry) = &self.suppress else { return (suppressed, None) };
        let mut run = Run { rule: self, context, error: None, over: false };
        let outcome = self.scoped(context, symbolize, || {
            for &place in sites {
                if run.over {
                    break;
                }
                match run.call(entry, SiteRef::new(context, place)).map(|value| self.verdict(&value)) {
                    Ok(Ok(None)) => {}
                    Ok(Ok(Some(why))) => suppressed.push((place, why)),
                    Ok(Err(why)) => run.fail_with(Some(place), entry.line, why),
                    Err(error) => run.fail(Some(place), entry.line, &error),
                }
            }
        });
        if let Err(error) = outcome {
            run.fail(None, None, &error);
        }
        (suppressed, run.error)
    }

    /// What `suppress` returned.
    fn verdict(&self, value: &Value) -> Result<Option<String>, String> {
        match value {
            Value::Nil | Value::Boolean(false) => Ok(None),
            Value::Boolean(true) => Ok(Some(format!("suppressed by rule {}", self.info.name))),
            Value::String(_) => reason(value).map(Some),
            other => Err(format!("suppress must return nil, a boolean or a reason, not a {}", other.type_name())),
        }
    }

    /// Runs `work` with the symbolizer in reach of the state, and turns a panic below Lua into an error.
    fn scoped(
        &self,
        context: &Rc<Context>,
        symbolize: Option<Symbolizer<'_>>,
        work: impl FnOnce(),
    ) -> mlua::Result<()> {
        let lua = &self.sandbox.lua;
        self.sandbox.budget.start_snapshot();
        let guarded = || {
            lua.scope(|scope| {
                if let Some(symbolize) = symbolize {
                    let function = scope.create_function_mut(|_, place: u32| {
                        if let Some(site) = context.site(place) {
                            self.sandbox.budget.exempt(|| symbolize(&site));
                        }
                        Ok(())
                    })?;
                    lua.set_app_data(Symbolize(function));
                }
                work();
                lua.remove_app_data::<Symbolize>();
                Ok(())
            })
        };
        match catch_unwind(AssertUnwindSafe(guarded)) {
            Ok(result) => result,
            Err(_) => Err(mlua::Error::runtime("the Lua runtime failed; the rule starts afresh at the next snapshot")),
        }
    }
}

/// One rule's turn in one snapshot.
struct Run<'a> {
    rule: &'a Rule,
    context: &'a Rc<Context>,
    error: Option<RuleError>,
    /// No further calls in this snapshot.
    over: bool,
}

impl Run<'_> {
    fn call(&self, entry: &Entry, argument: impl mlua::IntoLua) -> mlua::Result<Value> {
        self.rule.sandbox.budget.start_call();
        let args = (argument, &self.rule.params).into_lua_multi(&self.rule.sandbox.lua)?;
        entry.function.call(args)
    }

    fn sites(&mut self, entry: &Entry, places: &[u32], said: &mut Said) {
        for &place in places {
            if self.over {
                return;
            }
            match self.call(entry, SiteRef::new(self.context, place)).map(answer) {
                Ok(Ok(None)) => {}
                Ok(Ok(Some(answer))) => said.add(place, answer),
                Ok(Err(why)) => self.fail_with(Some(place), entry.line, why),
                Err(error) => self.fail(Some(place), entry.line, &error),
            }
        }
    }

    fn snapshot(&mut self, entry: &Entry, said: &mut Said) {
        match self.call(entry, SnapshotRef::new(self.context)) {
            Err(error) => self.fail(None, entry.line, &error),
            Ok(Value::Nil | Value::Boolean(false)) => {}
            Ok(Value::Table(list)) => {
                for (i, item) in list.sequence_values::<Value>().enumerate() {
                    if self.over || i >= MAX_FINDINGS {
                        return;
                    }
                    match item.map_err(|e| e.to_string()).and_then(sited_answer) {
                        Ok((place, answer)) => said.add(place, answer),
                        Err(why) => self.fail_with(None, entry.line, format!("finding {}: {why}", i + 1)),
                    }
                }
            }
            Ok(other) => {
                let why = format!("evaluate_snapshot must return nil or a list of findings, not {}", other.type_name());
                self.fail_with(None, entry.line, why);
            }
        }
    }

    fn fail_with(&mut self, site: Option<u32>, line: Option<u32>, why: String) {
        self.note(site, |rule| RuleError::new(&rule.info.name, &rule.file, line, why));
    }

    fn fail(&mut self, site: Option<u32>, line: Option<u32>, error: &mlua::Error) {
        let stopped = self.rule.sandbox.stopped(error);
        self.over |= stopped.is_some();
        self.note(site, |rule| RuleError::from_lua(&rule.info.name, &rule.file, line, error, stopped));
    }

    /// Keeps the first error and counts the others.
    fn note(&mut self, site: Option<u32>, error: impl FnOnce(&Rule) -> RuleError) {
        if let Some(first) = &mut self.error {
            first.failures += 1;
            self.over |= first.failures >= MAX_FAILURES;
            return;
        }
        let site = site.and_then(|place| self.context.site(place));
        self.error = Some(RuleError { site, ..error(self.rule) });
    }
}

/// Reads what `evaluate` returned.
fn answer(value: Value) -> Result<Option<Answer>, String> {
    match value {
        Value::Nil | Value::Boolean(false) => Ok(None),
        Value::Table(table) => answer_of(&table).map(Some),
        other => Err(format!("evaluate must return nil or a table, not {}", other.type_name())),
    }
}

/// Reads one finding of `evaluate_snapshot`: which site and what.
fn sited_answer(value: Value) -> Result<(u32, Answer), String> {
    let Value::Table(table) = value else { return Err(format!("must be a table, not {}", value.type_name())) };
    let site = table.raw_get::<Value>("site").map_err(|e| e.to_string())?;
    let stale = || "its site must be one of snapshot.sites".to_owned();
    let Value::UserData(site) = site else { return Err(stale()) };
    let place = site.borrow::<SiteRef>().ok().and_then(|s| s.place()).ok_or_else(stale)?;
    Ok((place, answer_of(&table)?))
}

/// Reads severity, confidence and reason, and `scan`; nothing else may be in the table, so that typing errors show. With
/// `scan = true` and none of the others it is a request only.
fn answer_of(table: &Table) -> Result<Answer, String> {
    let get = |key: &str| table.raw_get::<Value>(key).map_err(|e| e.to_string());
    let mut keys = 0;
    for pair in table.pairs::<Value, Value>() {
        let key = pair.map_err(|e| e.to_string())?.0.to_string().unwrap_or_default();
        keys += 1;
        if keys > RESULT_KEYS.len() || !RESULT_KEYS.contains(&key.as_str()) {
            let hint = hint(&key, RESULT_KEYS);
            return Err(format!("the finding has an unknown key '{}'; {hint}", super::sandbox::cut(&key, 40)));
        }
    }
    let scan = match get("scan")? {
        Value::Nil => false,
        Value::Boolean(scan) => scan,
        other => return Err(format!("scan must be true or false, not {}", shown(&other))),
    };
    let others = ["severity", "confidence", "reason"];
    if scan && others.iter().all(|key| get(key).is_ok_and(|v| v.is_nil())) {
        return Ok(Answer { finding: None, scan });
    }
    let severity = match get("severity")? {
        Value::String(text) if text == "info" => Severity::Info,
        Value::String(text) if text == "warning" => Severity::Warning,
        Value::String(text) if text == "critical" => Severity::Critical,
        other => return Err(format!("severity must be \"info\", \"warning\" or \"critical\", not {}", shown(&other))),
    };
    let confidence = match get("confidence")? {
        Value::Integer(n) => n as f64,
        Value::Number(n) => n,
        other => return Err(format!("confidence must be a number from 0 to 1, not {}", shown(&other))),
    };
    if !(0.0..=1.0).contains(&confidence) {
        return Err(format!("confidence must be a number from 0 to 1, not {confidence}"));
    }
    let finding = Some(Draft { severity, confidence, reason: reason(&get("reason")?)? });
    Ok(Answer { finding, scan })
}

/// A reason: one sentence, short enough to be read.
fn reason(value: &Value) -> Result<String, String> {
    let Value::String(text) = value else { return Err(format!("reason must be a text, not {}", shown(value))) };
    let length = text.as_bytes().len();
    if length == 0 || length > MAX_REASON {
        return Err(format!("reason must be a text of 1 to {MAX_REASON} bytes, not of {length}"));
    }
    Ok(text.to_string_lossy())
}

/// A value for a message: its text when it is a short one, else its type.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => format!("{:?}", super::sandbox::cut(&text.to_string_lossy(), 40)),
        Value::Integer(_) | Value::Number(_) | Value::Boolean(_) => value.to_string().unwrap_or_default(),
        other => other.type_name().to_owned(),
    }
}
