//! Keeps the recording of a run going: what the engine knows goes in, and a disk that is full ends nothing.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::Result;
use crate::alert::{Alert, AlertEvent, AlertManager};
use crate::collector::{Collector, Notice};
use crate::config::Config;
use crate::live;
use crate::output::report::RunInfo;
use crate::recording::{Event, EventKind, Host, Limits, Settings, Step, Writer};
use crate::rules::Evaluation;
use crate::snapshot::Snapshot;

/// Time per snapshot for naming call stacks that nobody has asked for yet, ...
const NAMING_PER_SNAPSHOT: Duration = Duration::from_millis(2);
/// ... and at the end of the run, when it is now or never.
const NAMING_AT_END: Duration = Duration::from_secs(10);

pub(super) struct Recorder {
    writer: Writer,
    /// Snapshots in a row that could not be stored, ...
    missing: u64,
    /// ... and why, as it was told.
    told: String,
}

impl Recorder {
    /// Makes the file, when the settings name one.
    pub(super) fn start(config: &Config, run: &RunInfo) -> Result<Option<Recorder>> {
        let Some(path) = &config.recording.path else { return Ok(None) };
        let limits = Limits { max_size: config.recording.max_size.0, ..Limits::default() };
        let settings = Settings::of(config).to_text();
        Ok(Some(Recorder {
            writer: Writer::create(path, limits, &Host::this(), run, &settings)?,
            missing: 0,
            told: String::new(),
        }))
    }

    /// Stores a snapshot with everything that was said of it; returns what people should be told.
    pub(super) fn push(
        &mut self,
        snapshot: &Snapshot,
        evaluation: &Evaluation,
        (alerts, events): (&AlertManager, &[AlertEvent]),
        run: &RunInfo,
        collector: &mut Collector,
    ) -> Option<String> {
        for error in &evaluation.errors {
            self.event(EventKind::Rule, snapshot.time_s, None, error.to_string());
        }
        self.name(snapshot, collector, NAMING_PER_SNAPSHOT);
        let changed: Vec<&Alert> = events.iter().map(|e| &e.alert).collect();
        let step = Step {
            snapshot,
            findings: &evaluation.findings,
            active: &alerts.active(),
            changed: &changed,
            run: Some(run),
        };
        match self.writer.push(&step, &mut |site| collector.take_locations(site.key)) {
            Ok(()) if self.missing > 0 => {
                let missing = std::mem::take(&mut self.missing);
                self.told.clear();
                Some(format!("recording goes on; {missing} snapshots are missing in it"))
            }
            Ok(()) => None,
            Err(e) => {
                let why = format!("{e:#}");
                if why != self.told {
                    tracing::error!("recording pauses, everything else goes on: {why}");
                    self.told = why;
                }
                self.missing += 1;
                None
            }
        }
    }

    /// Names some of the sites that have none in the file yet, the largest first.
    fn name(&self, snapshot: &Snapshot, collector: &mut Collector, time: Duration) {
        let until = Instant::now() + time;
        for sample in snapshot.sites.iter().filter(|s| self.writer.lacks_name(&s.site)) {
            if Instant::now() >= until {
                break;
            }
            collector.symbolize(&sample.site);
        }
    }

    /// Keeps what happened to a process.
    pub(super) fn note(&mut self, notice: &Notice, time_s: f64) {
        let (kind, instance) = match notice {
            Notice::Watching(process, _) | Notice::Limited { process, .. } => {
                (EventKind::Attach, Some(process.instance))
            }
            Notice::Ended(process) => (EventKind::End, Some(process.instance)),
            Notice::Mode { process, .. } | Notice::Sampled { process, .. } | Notice::Stopped { process, .. } => {
                (EventKind::Mode, Some(process.instance))
            }
            Notice::Scanning { process, .. } | Notice::Scanned { process, .. } | Notice::NotScanned { process, .. } => {
                (EventKind::Scan, Some(process.instance))
            }
            Notice::Failed { .. } => (EventKind::Failed, None),
        };
        self.event(kind, time_s, instance, live::notice_line(notice));
    }

    pub(super) fn event(&mut self, kind: EventKind, time_s: f64, instance: Option<u32>, text: String) {
        let wall_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        self.writer.event(Event { time_s, wall_s, kind, instance, text });
    }

    /// The end of the run: names what has none, and closes the file.
    pub(super) fn finish(
        mut self,
        last: Option<&Snapshot>,
        alerts: &AlertManager,
        run: &RunInfo,
        collector: &mut Collector,
    ) {
        let named = last.map_or(Ok(()), |snapshot| {
            self.name(snapshot, collector, NAMING_AT_END);
            self.writer.name(snapshot.sites.iter().map(|s| &s.site))
        });
        let finished = self.writer.finish(Some(run), &alerts.active());
        if let Err(e) = named.and(finished) {
            tracing::error!("the recording is not complete: {e:#}");
        }
    }
}
