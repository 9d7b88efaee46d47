//! Rules that change while running.
//!
//! A thread watches the folder and reads it when it has been quiet for a moment, so that a file that is written in
//! pieces or replaced by renaming is seen once and whole. What it reads is compared with what it read before: only
//! contents count, not which events an editor, a configuration manager or a network file system makes of a change.
//! The reading is done there because a folder may hang; compiling is done by [`RuleEngine::poll`].

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};

use super::error::RuleError;
use super::rule::{Moment, Rule};
use super::source::{self, DirFiles, LuaFile, Origin, Sources};
use super::view::View;
use super::{RuleEngine, duplicate};
use crate::history::History;

/// How long the folder must be quiet before it is read.
const QUIET: Duration = Duration::from_millis(150);
/// Longest wait for quiet: something may write into the folder all the time.
const MAX_WAIT: Duration = Duration::from_secs(1);
/// How often the folder is read without being told: events get lost, and some file systems have none.
const RESCAN: Duration = Duration::from_secs(5);

/// A rule file that changed, and what came of it.
#[derive(Clone, Debug)]
pub struct ReloadEvent {
    /// The file, or the folder when that cannot be read.
    pub file: PathBuf,
    /// Name of the rule; `None` when the file never got as far as to have one.
    pub rule: Option<Arc<str>>,
    /// What came of it.
    pub outcome: ReloadOutcome,
}

/// What came of a change.
#[derive(Clone, Debug)]
pub enum ReloadOutcome {
    /// A new rule runs.
    Added,
    /// The new version runs.
    Changed,
    /// The file is gone and so is the rule; a built-in rule that it had replaced runs again.
    Removed,
    /// The new version is broken, in the words given; what ran before goes on.
    Failed(String),
}

/// What the thread has read.
pub(super) enum Scan {
    /// All files of the folder.
    Files(DirFiles),
    /// The folder cannot be read: why.
    Unreadable(String),
}

enum Signal {
    Touched,
    Stop,
}

/// The watching thread, from this side.
pub(super) struct Watcher {
    dir: PathBuf,
    scans: Receiver<Scan>,
    signals: Sender<Signal>,
}

impl Watcher {
    /// Starts watching; `known` is what was read already.
    pub(super) fn start(dir: PathBuf, known: DirFiles) -> Watcher {
        let (signals, received) = mpsc::channel();
        let (sender, scans) = mpsc::channel();
        let events = signals.clone();
        let thread_dir = dir.clone();
        let spawned = std::thread::Builder::new().name("rule-watcher".into()).spawn(move || {
            let watcher = watch(&thread_dir, events);
            if let Err(error) = &watcher {
                tracing::warn!(dir = %thread_dir.display(), %error, "cannot watch the rules folder; reading it every 5 s");
            }
            follow(&thread_dir, known, &received, &sender);
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "cannot start the thread that watches the rules folder; changes need a restart");
        }
        Watcher { dir, scans, signals }
    }

    /// The newest reading since the last call, if there is one.
    pub(super) fn newest(&self) -> Option<Scan> {
        self.scans.try_iter().last()
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // The thread is not joined: it may be stuck in a file system. If it is gone already, so be it.
        let _ = self.signals.send(Signal::Stop);
    }
}

/// Signals every event below the folder.
fn watch(dir: &Path, signals: Sender<Signal>) -> notify::Result<RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Our own reading must not wake us; errors (a queue that overflowed) may hide a change.
        if !event.is_ok_and(|e| e.kind.is_access()) {
            let _ = signals.send(Signal::Touched);
        }
    })?;
    watcher.watch(dir, RecursiveMode::Recursive)?;
    Ok(watcher)
}

/// Reads the folder after each change and passes on what differs from before.
fn follow(dir: &Path, mut known: DirFiles, signals: &Receiver<Signal>, scans: &Sender<Scan>) {
    let mut unreadable = None;
    loop {
        match signals.recv_timeout(RESCAN) {
            Ok(Signal::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            Ok(Signal::Touched) => {
                if !settle(signals) {
                    return;
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        let scan = match source::read_dir(dir) {
            Ok(files) if files == known && unreadable.is_none() => continue,
            Ok(files) => {
                known.clone_from(&files);
                unreadable = None;
                Scan::Files(files)
            }
            Err(error) => {
                let why = format!("{error:#}");
                if unreadable.as_ref() == Some(&why) {
                    continue;
                }
                unreadable = Some(why.clone());
                Scan::Unreadable(why)
            }
        };
        if scans.send(scan).is_err() {
            return;
        }
    }
}

/// Waits until the folder is quiet; false when it is time to stop.
fn settle(signals: &Receiver<Signal>) -> bool {
    let start = Instant::now();
    while start.elapsed() < MAX_WAIT {
        match signals.recv_timeout(QUIET) {
            Ok(Signal::Touched) => {}
            Ok(Signal::Stop) | Err(RecvTimeoutError::Disconnected) => return false,
            Err(RecvTimeoutError::Timeout) => break,
        }
    }
    true
}

impl RuleEngine {
    /// Brings the rules in line with what was read.
    pub(super) fn apply(&mut self, scan: Scan, history: &History) -> Vec<ReloadEvent> {
        let Some(dir) = self.watcher.as_ref().map(|w| w.dir.clone()) else { return Vec::new() };
        let files = match scan {
            Scan::Unreadable(why) => {
                return vec![ReloadEvent { file: dir, rule: None, outcome: ReloadOutcome::Failed(why) }];
            }
            Scan::Files(files) => files,
        };
        let mut new = Sources::merge(Some((&dir, &files)));
        let old = std::mem::take(&mut self.sources);
        let mut events = Vec::new();
        for (path, why) in new.unreadable.clone() {
            // An unreadable file is no removed file: what it held goes on.
            let name = path.strip_prefix(&dir).unwrap_or(&path).to_string_lossy().into_owned();
            for (new, old) in [(&mut new.rules, &old.rules), (&mut new.libraries, &old.libraries)] {
                if let Some(file) = old.get(&name) {
                    new.insert(name.clone(), file.clone());
                }
            }
            if !old.unreadable.contains(&(path.clone(), why.clone())) {
                let rule = self.rules.get(&name).map(|r| Arc::clone(&r.info.name));
                events.push(ReloadEvent { file: path, rule, outcome: ReloadOutcome::Failed(why) });
            }
        }
        let libraries_changed = new.libraries != old.libraries;
        if libraries_changed {
            self.setup.libraries = Rc::new(new.modules());
        }
        // Removed ones first: their names may come back in another file.
        let removed: Vec<_> = old.rules.values().filter(|f| !new.rules.contains_key(&f.name)).collect();
        for file in removed {
            let rule = self.rules.remove(&file.name).map(|r| Arc::clone(&r.info.name));
            events.push(ReloadEvent { file: path_of(file), rule, outcome: ReloadOutcome::Removed });
        }
        for file in new.rules.values() {
            let before = old.rules.get(&file.name);
            if before == Some(file) && !libraries_changed {
                continue;
            }
            let known = self.rules.get(&file.name).map(|r| Arc::clone(&r.info.name));
            let restored = file.origin == Origin::Embedded && before.is_some_and(|f| f.origin != Origin::Embedded);
            let (rule, outcome) = match self.try_rule(file, history) {
                Ok(rule) => {
                    let name = Arc::clone(&rule.info.name);
                    self.rules.insert(file.name.clone(), rule);
                    let outcome = match (restored, before) {
                        (true, _) => ReloadOutcome::Removed,
                        (false, Some(_)) => ReloadOutcome::Changed,
                        (false, None) => ReloadOutcome::Added,
                    };
                    (Some(name), outcome)
                }
                Err(why) => (known, ReloadOutcome::Failed(why)),
            };
            // A change of a shared module touches built-in rules too; that is worth a line only if it breaks them.
            let quiet = before == Some(file) && matches!(outcome, ReloadOutcome::Changed);
            if !quiet {
                let file = path_of(if restored { before.unwrap_or(file) } else { file });
                events.push(ReloadEvent { file, rule, outcome });
            }
        }
        self.sources = new;
        events
    }

    /// Compiles a rule in a fresh state and runs it over the newest snapshot.
    fn try_rule(&self, file: &LuaFile, history: &History) -> Result<Rule, String> {
        let rule = Rule::compile(file, &self.setup).map_err(|errors| {
            let texts: Vec<_> = errors.iter().map(ToString::to_string).collect();
            texts.join("; ")
        })?;
        if let Some(error) = duplicate(&self.rules, &rule) {
            return Err(crate::Error::from(error).to_string());
        }
        let failed = |error: RuleError| format!("failed to run {error} (tried on the newest snapshot)");
        if !rule.info.enabled {
            return Ok(rule);
        }
        let _entered = self.context.enter(history);
        // Frames are left alone: symbolizing is paid for by findings, not by trials.
        if let Some(error) = rule.evaluate(&self.context, Moment::Snapshot, None).error {
            return Err(failed(error));
        }
        if rule.suppresses() {
            let epoch = self.context.epoch();
            let largest = |view: &View| view.by_size().iter().take(TRIAL_SITES).copied().collect::<Vec<u32>>();
            let sites = self.context.with(epoch, largest).unwrap_or_default();
            if let (_, Some(error)) = rule.suppress(&self.context, None, &sites) {
                return Err(failed(error));
            }
        }
        Ok(rule)
    }
}

/// Sites that a changed suppression is tried on, the largest ones.
const TRIAL_SITES: usize = 100;

fn path_of(file: &LuaFile) -> PathBuf {
    match &file.origin {
        Origin::File(path) => path.clone(),
        Origin::Embedded => PathBuf::from(format!("rules/{}", file.name)),
    }
}
