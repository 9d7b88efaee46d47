//! What a run has found: the model behind every format.
//!
//! Sites of several processes that are the same code are one [`Leak`]: forked workers and repeated commands would
//! otherwise repeat every finding. Names are as the processes gave them: hostile text, made fit to be shown by formats.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;

use serde::Serialize;

use super::{ExitCode, FailOn, Options};
use crate::collector::End;
use crate::finding::{Finding, Severity};
use crate::live;
use crate::rules::{RuleError, SuppressionUse};
use crate::snapshot::{Losses, Mode, ProcessSample, Site, SiteSample, Totals};
use crate::symbolize::Frame;

/// Most process ids that are listed with one finding.
const MAX_PIDS: usize = 20;

/// How the command ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CommandEnd {
    /// It was still running when the report was made.
    #[default]
    Running,
    /// With this exit code.
    Exited(i32),
    /// By this signal.
    Killed(i32),
    /// Nobody can tell.
    Unknown,
}

impl CommandEnd {
    pub(super) fn of(end: Option<Option<ExitStatus>>) -> CommandEnd {
        match end {
            None => CommandEnd::Running,
            Some(None) => CommandEnd::Unknown,
            Some(Some(status)) => match (status.code(), status.signal()) {
                (Some(code), _) => CommandEnd::Exited(code),
                (None, Some(signal)) => CommandEnd::Killed(signal),
                (None, None) => CommandEnd::Unknown,
            },
        }
    }

    /// The command's exit code as a shell would have it; 0 when it has none.
    pub fn code(self) -> u8 {
        match self {
            CommandEnd::Exited(code) => code.to_le_bytes()[0],
            CommandEnd::Killed(signal) => 128_u8.saturating_add(signal.to_le_bytes()[0]),
            CommandEnd::Running | CommandEnd::Unknown => 0,
        }
    }

    /// In words, after "the command".
    pub fn describe(self) -> String {
        match self {
            CommandEnd::Running => "was still running".to_owned(),
            CommandEnd::Exited(code) => format!("exited with {code}"),
            CommandEnd::Killed(signal) => format!("was killed by signal {signal}"),
            CommandEnd::Unknown => "ended, nobody can tell how".to_owned(),
        }
    }
}

/// A finding about one piece of code, over all processes of the run.
#[derive(Clone, Debug, Serialize)]
pub struct Leak {
    /// The finding's id: the same in the next run of the same code.
    pub id: String,
    /// Name of the rule.
    pub rule: String,
    /// How bad it is.
    pub severity: Severity,
    /// How sure the rule is, 0 to 1.
    pub confidence: f64,
    /// One sentence, about the process where most was outstanding.
    pub reason: String,
    /// It makes the run fail.
    pub fails: bool,
    /// Bytes outstanding, over all processes.
    pub bytes: u64,
    /// Blocks outstanding, over all processes.
    pub blocks: u64,
    /// Every call was traced; else bytes and blocks are estimates.
    pub exact: bool,
    /// Number of processes.
    pub processes: u64,
    /// The first of their process ids.
    pub pids: Vec<u32>,
    /// Short name of the first process.
    pub comm: String,
    /// Path of its executable.
    pub exe: String,
    /// The probe set.
    pub probe_set: String,
    /// The allocator function.
    pub function: String,
    /// The call stack, innermost first.
    pub frames: Vec<Frame>,
    /// Why it ends early.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub truncated: Option<String>,
    #[serde(skip)]
    most_bytes: u64,
    /// Where it is, in a few words.
    #[serde(skip)]
    pub place: String,
}

impl Leak {
    /// The innermost frame with file and line, else nothing.
    pub fn location(&self) -> Option<(&str, u32)> {
        self.frames.iter().find_map(|f| Some((f.file.as_deref()?, f.line?)))
    }
}

/// A finding that was silenced.
#[derive(Clone, Debug, Serialize)]
pub struct Suppressed {
    /// The finding's id.
    pub id: String,
    /// Name of the rule.
    pub rule: String,
    /// Bytes outstanding.
    pub bytes: u64,
    /// Blocks outstanding.
    pub blocks: u64,
    /// Process id.
    pub pid: u32,
    /// By what.
    pub by: String,
    /// Where it is, in a few words.
    pub place: String,
    /// The call stack, innermost first.
    #[serde(skip)]
    pub frames: Vec<Frame>,
}

impl Suppressed {
    pub(super) fn new(finding: &Finding, totals: Totals, by: String) -> Suppressed {
        Suppressed {
            id: finding.id.clone(),
            rule: finding.rule.to_string(),
            bytes: totals.outstanding_bytes(),
            blocks: totals.outstanding_count(),
            pid: finding.site.process.pid,
            by,
            place: live::stack_head(&finding.site),
            frames: finding.site.frames().to_vec(),
        }
    }
}

/// What exit handlers have freed at one site of one process: no leak.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FreedSite {
    /// Where it is, in a few words.
    pub place: String,
    /// Bytes.
    pub bytes: u64,
    /// Blocks.
    pub blocks: u64,
}

/// A process of the run; they are listed as they ended, those of one interval in the order of their starts.
#[derive(Clone, Debug, Serialize)]
pub struct ProcessEnd {
    /// Process id.
    pub pid: u32,
    /// Short name.
    pub comm: String,
    /// Path of the executable.
    pub exe: String,
    /// `exited`, `killed`, `exec` (it runs another program), `running` or `unknown`.
    pub end: &'static str,
    /// Exit code of one that has exited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Signal of one that was killed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// Rules were asked about what it left.
    pub judged: bool,
    /// Bytes outstanding at its end.
    pub bytes: u64,
    /// Blocks outstanding at its end.
    pub blocks: u64,
    /// Bytes that its exit handlers have freed.
    pub freed_by_handlers_bytes: u64,
    /// Blocks that its exit handlers have freed.
    pub freed_by_handlers_blocks: u64,
    /// Every call was traced.
    pub exact: bool,
    /// Traced calls.
    pub hits: u64,
}

impl ProcessEnd {
    pub(super) fn new(
        sample: &ProcessSample,
        how: End,
        sites: &[&SiteSample],
        freed: &[FreedSite],
        judged: bool,
    ) -> ProcessEnd {
        let (end, exit_code, signal) = match how {
            End::Exited(code) => ("exited", Some(code), None),
            End::Killed(signal) => ("killed", None, Some(signal)),
            End::Exec => ("exec", None, None),
            End::Unknown => ("unknown", None, None),
        };
        let mut totals = Totals::default();
        sites.iter().for_each(|s| totals.add(&s.totals));
        ProcessEnd {
            pid: sample.process.pid,
            comm: sample.process.comm.clone(),
            exe: sample.process.exe.clone(),
            end,
            exit_code,
            signal,
            judged,
            bytes: totals.outstanding_bytes(),
            blocks: totals.outstanding_count(),
            freed_by_handlers_bytes: freed.iter().map(|f| f.bytes).sum(),
            freed_by_handlers_blocks: freed.iter().map(|f| f.blocks).sum(),
            exact: sample.mode == Mode::Exact,
            hits: sample.hits,
        }
    }

    /// One that outlives the run.
    pub(super) fn running(sample: &ProcessSample, sites: &[&SiteSample], judged: bool) -> ProcessEnd {
        ProcessEnd { end: "running", ..ProcessEnd::new(sample, End::Unknown, sites, &[], judged) }
    }
}

/// Everything that a run has found.
#[derive(Clone, Debug, Serialize)]
pub struct RunReport {
    /// `run`.
    pub r#type: &'static str,
    /// Version of memleak.
    pub version: &'static str,
    /// The command with its arguments.
    pub command: Vec<String>,
    /// How it ended.
    pub command_end: CommandEnd,
    /// How long the run took, seconds.
    pub duration_s: f64,
    /// What makes the run fail.
    pub fail_on: Vec<String>,
    /// Something did.
    pub failed: bool,
    /// Findings, worst first, then largest.
    pub findings: Vec<Leak>,
    /// Findings that were silenced.
    pub suppressed: Vec<Suppressed>,
    /// The file of suppressions and what its lines have done; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suppressions: Option<SuppressionFile>,
    /// What exit handlers have freed, by place, largest first.
    pub freed: Vec<FreedSite>,
    /// Every process that was followed.
    pub processes: Vec<ProcessEnd>,
    /// What was lost.
    pub losses: Losses,
    /// What the reader has to know beside that.
    pub notes: Vec<String>,
    /// Descriptions of the rules by name.
    #[serde(skip)]
    pub rules: BTreeMap<String, String>,
}

/// A file of suppressions and what its lines have done.
#[derive(Clone, Debug, Serialize)]
pub struct SuppressionFile {
    /// Its path.
    pub file: PathBuf,
    /// Its lines, in order.
    pub lines: Vec<SuppressionUse>,
}

impl RunReport {
    pub(super) fn new(command: Vec<String>, options: &Options) -> RunReport {
        RunReport {
            r#type: "run",
            version: env!("CARGO_PKG_VERSION"),
            command,
            command_end: CommandEnd::Running,
            duration_s: 0.0,
            fail_on: options.fail_on.iter().map(ToString::to_string).collect(),
            failed: false,
            findings: Vec::new(),
            suppressed: Vec::new(),
            suppressions: None,
            freed: Vec::new(),
            processes: Vec::new(),
            losses: Losses::default(),
            notes: Vec::new(),
            rules: BTreeMap::new(),
        }
    }

    pub(super) fn note_rule_errors(&mut self, errors: &[RuleError]) {
        for error in errors.iter().map(ToString::to_string) {
            if !self.notes.contains(&error) {
                self.notes.push(error);
            }
        }
    }

    /// Takes a finding in; the same code in another process adds to it.
    pub(super) fn add(&mut self, finding: &Finding, totals: Totals, exact: bool) {
        let (bytes, blocks) = (totals.outstanding_bytes(), totals.outstanding_count());
        let site: &Site = &finding.site;
        let pid = site.process.pid;
        if let Some(leak) = self.findings.iter_mut().find(|l| l.id == finding.id) {
            leak.bytes += bytes;
            leak.blocks += blocks;
            leak.exact &= exact;
            leak.processes += 1;
            if leak.pids.len() < MAX_PIDS {
                leak.pids.push(pid);
            }
            let worse = finding.severity > leak.severity;
            if worse || (finding.severity == leak.severity && bytes > leak.most_bytes) {
                leak.reason.clone_from(&finding.reason);
                (leak.severity, leak.confidence, leak.most_bytes) = (finding.severity, finding.confidence, bytes);
            }
            return;
        }
        self.findings.push(Leak {
            id: finding.id.clone(),
            rule: finding.rule.to_string(),
            severity: finding.severity,
            confidence: finding.confidence,
            reason: finding.reason.clone(),
            fails: false,
            bytes,
            blocks,
            exact,
            processes: 1,
            pids: vec![pid],
            comm: site.process.comm.clone(),
            exe: site.process.exe.clone(),
            probe_set: site.probe_set.to_string(),
            function: site.function.to_string(),
            frames: site.frames().to_vec(),
            truncated: site.truncated.as_deref().map(str::to_owned),
            most_bytes: bytes,
            place: live::stack_head(site),
        });
    }

    /// Decides what fails and puts everything in order.
    pub(super) fn close(
        &mut self,
        fail_on: &[FailOn],
        rules: BTreeMap<String, String>,
        suppressions: Option<(PathBuf, Vec<SuppressionUse>)>,
    ) {
        for leak in &mut self.findings {
            leak.fails = fail_on.iter().any(|f| f.fails(leak.severity, &leak.rule));
        }
        self.failed = self.findings.iter().any(|l| l.fails);
        self.findings.sort_by(|a, b| (b.severity, b.bytes).cmp(&(a.severity, a.bytes)).then_with(|| a.id.cmp(&b.id)));
        let mut freed: BTreeMap<String, (u64, u64)> = BTreeMap::new();
        for site in self.freed.drain(..) {
            let sum = freed.entry(site.place).or_default();
            *sum = (sum.0 + site.bytes, sum.1 + site.blocks);
        }
        self.freed = freed.into_iter().map(|(place, (bytes, blocks))| FreedSite { place, bytes, blocks }).collect();
        self.freed.sort_by_key(|f| std::cmp::Reverse(f.bytes));
        self.suppressions = suppressions.map(|(file, lines)| SuppressionFile { file, lines });
        self.rules = rules;
    }

    /// The exit code of the run.
    pub fn exit_code(&self, whose: ExitCode) -> u8 {
        match (whose, self.command_end.code(), self.failed) {
            (ExitCode::Command, code @ 1.., _) => code,
            (_, _, failed) => u8::from(failed),
        }
    }
}
