//! Detection rules: Lua files that look at allocation sites and return findings.
//!
//! The [`RuleEngine`] loads them (embedded ones and those of a folder), runs them over the newest snapshot, keeps a
//! failing one from disturbing the others, and replaces them while running when their files change. It refuses to
//! touch anything but the history: rules see numbers and names, never files, clocks or the network. The engine calls
//! [`RuleEngine::evaluate`] once per snapshot and [`RuleEngine::poll`] in between.
//!
//! What rule authors need to know is in `rules/README.md`.

mod api;
mod budget;
mod error;
mod examples;
pub mod kit;
mod needs;
mod params;
mod pattern;
mod reload;
mod rule;
mod sandbox;
mod simulate;
mod source;
mod strings;
mod suppressions;
mod view;

use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

pub use error::RuleError;
pub use examples::ExampleResult;
pub use params::{ParamInfo, ParamValue};
pub use reload::{ReloadEvent, ReloadOutcome};
pub use rule::RuleInfo;
pub use source::Origin;
pub use suppressions::{CodePattern, SuppressionUse};
pub use view::Ending;

use crate::config::RuleSettings;
use crate::finding::Finding;
use crate::history::History;
use crate::snapshot::{ProcessSample, Site, Totals};
use crate::{Error, Result};
use params::hint;
use reload::Watcher;
use rule::{Draft, Moment, Rule, Setup};
use sandbox::Limits;
use source::Sources;
use suppressions::Suppressions;
use view::Context;

/// Least that losses leave of a finding's confidence.
const MIN_LOSS_FACTOR: f64 = 0.5;
/// How much faster than the share of lost events confidence falls: 1 % lost costs 5 %.
const LOSS_WEIGHT: f64 = 5.0;

/// What the rules say about one snapshot.
#[derive(Clone, Debug, Default)]
pub struct Evaluation {
    /// Findings by rule (in the order of their files), largest site first.
    pub findings: Vec<Finding>,
    /// Findings that a rule has suppressed, with the reason.
    pub suppressed: Vec<(Finding, String)>,
    /// Sites of processes whose memory a rule wants scanned (`scan = true`).
    pub scans: Vec<Arc<Site>>,
    /// Rules that failed, at most one entry per rule and function kind.
    pub errors: Vec<RuleError>,
}

/// Loads and runs the rules. Not `Send`: it stays on the thread that made it.
pub struct RuleEngine {
    setup: Setup,
    context: Rc<Context>,
    /// By file name.
    rules: BTreeMap<String, Rule>,
    sources: Sources,
    watcher: Option<Watcher>,
    suppressions: Option<Suppressions>,
}

impl RuleEngine {
    /// Loads the embedded rules and those of `settings.dir`, and starts watching the folder.
    ///
    /// # Errors
    /// The folder cannot be read, a rule is broken (with file and line), or `[rules.NAME]` names a rule or parameter
    /// that does not exist; the first one, see [`RuleEngine::check`] for all.
    pub fn new(settings: &RuleSettings) -> Result<RuleEngine> {
        let files = settings.dir.as_deref().map(source::read_dir).transpose()?;
        let sources = Sources::merge(settings.dir.as_deref().zip(files.as_ref()));
        let (setup, rules, errors) = build(settings, &sources);
        if let Some(first) = errors.into_iter().next() {
            return Err(first);
        }
        let suppressions = settings.suppressions_file.as_deref().map(Suppressions::load).transpose()?;
        let watcher = settings.dir.as_ref().zip(files).map(|(dir, files)| Watcher::start(dir.clone(), files));
        Ok(RuleEngine { setup, context: Rc::default(), rules, sources, watcher, suppressions })
    }

    /// Everything that is wrong with the rules and their settings; empty when [`RuleEngine::new`] would succeed.
    pub fn check(settings: &RuleSettings) -> Vec<Error> {
        let files = match settings.dir.as_deref().map(source::read_dir).transpose() {
            Ok(files) => files,
            Err(error) => return vec![error],
        };
        let mut errors = build(settings, &Sources::merge(settings.dir.as_deref().zip(files.as_ref()))).2;
        errors.extend(settings.suppressions_file.as_deref().and_then(|path| Suppressions::load(path).err()));
        errors
    }

    /// The rules that are loaded, those switched off included, in the order of their files.
    pub fn rules(&self) -> impl Iterator<Item = &RuleInfo> {
        self.rules.values().map(|r| r.info.as_ref())
    }

    /// Runs all rules over the newest snapshot of the history.
    ///
    /// `symbolize` fills the frames of a site; it is called for sites whose frames a rule asks for and that nobody has
    /// symbolized before. Only sites of processes that still run are looked at.
    ///
    /// A finding's confidence is what the rule says, lowered by what was lost in the site's process: with `l` lost
    /// events of `h` traced calls it is multiplied by `1 - 5 l / (h + l)`, though never by less than 0.5.
    pub fn evaluate(&mut self, history: &History, symbolize: &mut dyn FnMut(&Arc<Site>)) -> Evaluation {
        self.judge(&Rc::clone(&self.context), Moment::Snapshot, history, symbolize)
    }

    /// Runs the rules for ends of processes (`evaluate_exit`) over processes that have come to the same `ending`: the
    /// history holds their last snapshot as if they still ran. Otherwise like [`RuleEngine::evaluate`].
    pub fn evaluate_exit(
        &mut self,
        ended: &History,
        ending: Ending,
        symbolize: &mut dyn FnMut(&Arc<Site>),
    ) -> Evaluation {
        // A context of its own: the other one goes on with the processes that run.
        self.judge(&Rc::new(Context::of_ending(ending)), Moment::Exit, ended, symbolize)
    }

    fn judge(
        &mut self,
        context: &Rc<Context>,
        moment: Moment,
        history: &History,
        symbolize: &mut dyn FnMut(&Arc<Site>),
    ) -> Evaluation {
        let _entered = context.enter(history);
        let mut evaluation = Evaluation::default();
        let mut found: Vec<(u32, Arc<str>, Draft)> = Vec::new();
        let mut exhausted = Vec::new();
        for (file, rule) in self.rules.iter().filter(|(_, r)| r.info.enabled) {
            let said = rule.evaluate(context, moment, Some(&mut *symbolize));
            found.extend(said.findings.into_iter().map(|(site, draft)| (site, Arc::clone(&rule.info.name), draft)));
            let asked = said.scans.into_iter().filter_map(|site| context.site(site));
            evaluation.scans.extend(asked);
            if let Some(error) = said.error {
                evaluation.errors.push(error);
                exhausted.push(file.clone());
            }
        }
        let mut reasons = BTreeMap::new();
        if !found.is_empty() {
            for (file, rule) in self.rules.iter().filter(|(_, r)| r.info.enabled && r.suppresses()) {
                let mut sites: Vec<u32> =
                    found.iter().map(|f| f.0).filter(|site| !reasons.contains_key(site)).collect();
                sites.sort_unstable();
                sites.dedup();
                let (suppressed, error) = rule.suppress(context, Some(&mut *symbolize), &sites);
                reasons.extend(suppressed);
                if let Some(error) = error {
                    evaluation.errors.push(error);
                    exhausted.push(file.clone());
                }
            }
        }
        for (place, rule, draft) in found {
            // Of blocks that may have been freed unseen nothing can be said.
            if context.is_unverifiable(place) {
                continue;
            }
            let Some((finding, totals)) = finding(context, place, rule, draft) else { continue };
            let mut why = reasons.get(&place).cloned();
            if let (None, Some(suppressions)) = (&why, &mut self.suppressions) {
                symbolize(&finding.site);
                why = suppressions.silence(&finding, totals.outstanding_bytes(), totals.outstanding_count());
            }
            match why {
                Some(why) => evaluation.suppressed.push((finding, why)),
                None => evaluation.findings.push(finding),
            }
        }
        for file in exhausted {
            self.renew(&file);
        }
        evaluation
    }

    /// The file of suppressions and what each of its lines has silenced so far; `None` without one.
    pub fn suppressions(&self) -> Option<(&Path, Vec<SuppressionUse>)> {
        self.suppressions.as_ref().map(|s| (s.path(), s.uses()))
    }

    /// Gives a rule that failed a fresh state: whatever it had piled up or half changed is gone.
    fn renew(&mut self, file: &str) {
        let Some(rule) = self.rules.get_mut(file) else { return };
        // It compiled before, from the same text; should it not now, the old state goes on.
        if let Ok(fresh) = Rule::compile(&rule.file, &self.setup) {
            *rule = fresh;
        }
    }

    /// Takes changes of rule files in; never blocks. To be called every 100 ms or so.
    ///
    /// A changed file is compiled in a fresh state, tried on the newest snapshot of `history`, and replaces the rule
    /// only if all that succeeds; otherwise the rule that was running goes on and the event says why.
    pub fn poll(&mut self, history: &History) -> Vec<ReloadEvent> {
        let Some(scan) = self.watcher.as_ref().and_then(Watcher::newest) else { return Vec::new() };
        self.apply(scan, history)
    }
}

/// A finding, and the site's totals.
fn finding(context: &Rc<Context>, place: u32, rule: Arc<str>, draft: Draft) -> Option<(Finding, Totals)> {
    let found = context.with(context.epoch(), |view| {
        let site = view.site(place)?;
        let factor = site.process().map(|p| loss_factor(&p.sample));
        Some((Arc::clone(site.site()), factor, site.history.latest.totals))
    });
    let (site, factor, totals) = found.flatten()?;
    let finding = Finding {
        id: finding_id(&rule, site.id),
        rule,
        severity: draft.severity,
        confidence: draft.confidence * factor.unwrap_or(1.0),
        reason: draft.reason,
        site,
    };
    Some((finding, totals))
}

/// Compiles all rules: those that work, and everything that is wrong.
fn build(settings: &RuleSettings, sources: &Sources) -> (Setup, BTreeMap<String, Rule>, Vec<Error>) {
    let setup = Setup {
        limits: Limits { instructions: settings.max_instructions, memory: settings.max_memory.0 },
        libraries: Rc::new(sources.modules()),
        params: Rc::new(settings.params.clone()),
    };
    let mut errors: Vec<Error> = source::unreadable_errors(sources).collect();
    let mut rules: BTreeMap<String, Rule> = BTreeMap::new();
    // Built-in rules first: of two rules with the same name the user's is the one to change.
    let (embedded, files): (Vec<_>, Vec<_>) = sources.rules.iter().partition(|(_, f)| f.origin == Origin::Embedded);
    for (name, file) in embedded.into_iter().chain(files) {
        match Rule::compile(file, &setup) {
            Ok(rule) => {
                let error = duplicate(&rules, &rule);
                match error {
                    Some(error) => errors.push(error.into()),
                    None => drop(rules.insert(name.clone(), rule)),
                }
            }
            Err(broken) => errors.extend(broken),
        }
    }
    // A rule that is broken cannot be told from one that does not exist.
    if errors.is_empty() {
        for name in settings.params.keys() {
            if !rules.values().any(|r| *r.info.name == **name) {
                let hint = hint(name, rules.values().map(|r| r.info.name.as_ref()));
                errors.push(Error::config(format!("rules.{name}: there is no rule {name}; {hint}")));
            }
        }
    }
    (setup, rules, errors)
}

/// The error if another file has a rule of the same name.
fn duplicate(rules: &BTreeMap<String, Rule>, rule: &Rule) -> Option<RuleError> {
    let other = rules.values().find(|r| r.info.name == rule.info.name && r.file.name != rule.file.name)?;
    let why = format!("there is a rule of the same name in {} ({})", other.file.name, other.info.origin);
    Some(RuleError::new(&rule.info.name, &rule.file, None, why))
}

/// What losses leave of the confidence in what is said about a process.
fn loss_factor(process: &ProcessSample) -> f64 {
    let lost = process.losses.total() as f64;
    let share = lost / (lost + process.hits as f64);
    // No calls and no losses make 0/0.
    if share.is_nan() { 1.0 } else { (1.0 - LOSS_WEIGHT * share).max(MIN_LOSS_FACTOR) }
}

/// Id of a finding: 16 hex digits of the 64-bit FNV-1a hash over the rule's name, a zero byte and the site's id
/// (little endian). Part of the alert format: it must never change.
fn finding_id(rule: &str, site: u64) -> String {
    let bytes = rule.bytes().chain([0]).chain(site.to_le_bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests;
