//! Where a run's words go: standard output, the file of alerts, the webhook.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use memleak_probes::Prices;

use super::Output;
use crate::alert::{AlertEvent, AlertManager};
use crate::collector::{Collector, Notice};
use crate::config::Config;
use crate::history::History;
use crate::live::{self, View};
use crate::output::alerts::{AlertFile, AlertLine, group, json_line, write_lines};
use crate::output::snapshots::SnapshotLine;
use crate::output::templates::Templates;
use crate::output::webhook::{Render, Webhook};
use crate::selfstats::own_cost;
use crate::snapshot::{Site, Snapshot};
use crate::{Error, Result};

/// How long the end of a run waits for the webhook.
const WEBHOOK_FLUSH: Duration = Duration::from_secs(5);
/// Symbolizing more sites than this is shown as progress on a terminal.
const PROGRESS_FROM: usize = 200;
/// Lines about processes and rules that the live page keeps in view.
const RECENT: usize = 4;

pub(super) struct Sinks {
    output: Output,
    terminal: bool,
    sites: usize,
    duration: Option<Duration>,
    alerts_on_stdout: bool,
    file: Option<AlertFile>,
    webhook: Option<Webhook>,
    templates: Arc<Templates>,
    recent: Vec<String>,
    /// Known once the collector has started.
    pub(super) prices: Option<Prices>,
}

impl Sinks {
    pub(super) fn new(config: &Config, output: Output, templates: &Arc<Templates>) -> Result<Sinks> {
        let webhook = match &config.alerts.webhook {
            None => None,
            Some(settings) => Some(Webhook::start(settings, renderer(settings.template.as_deref(), config)?)?),
        };
        Ok(Sinks {
            output,
            terminal: io::stdout().is_terminal(),
            sites: if config.live.sites == 0 { usize::MAX } else { config.live.sites },
            duration: config.duration,
            alerts_on_stdout: config.alerts.stdout,
            file: config.alerts.file.as_ref().map(AlertFile::new),
            webhook,
            templates: Arc::clone(templates),
            recent: Vec::new(),
            prices: None,
        })
    }

    /// How many of a snapshot's sites, largest first, may be shown, so need names.
    pub(super) fn sites_shown(&self) -> usize {
        match self.output {
            Output { json: true, .. } => self.sites,
            _ if self.has_page() => self.sites.saturating_mul(live::LOOKED_AT),
            _ => 0,
        }
    }

    /// True when a page is redrawn in place.
    fn has_page(&self) -> bool {
        self.terminal && !self.output.quiet && !self.output.json
    }

    /// Tells everybody about an interval.
    pub(super) fn tell(
        &mut self,
        snapshot: &Snapshot,
        history: &History,
        alerts: &AlertManager,
        events: &[AlertEvent],
    ) -> Result<()> {
        let lines: Vec<AlertLine> = events.iter().map(AlertLine::from).collect();
        let json: Vec<String> = lines.iter().map(json_line).collect::<Result<_>>()?;
        if let Some(file) = &mut self.file
            && let Some(notice) = file.write(&json)
        {
            tracing::error!("{notice}");
        }
        if let Some(webhook) = &self.webhook {
            lines.iter().for_each(|line| webhook.send(line.clone()));
        }
        let mut out = io::stdout().lock();
        if self.output.json {
            let line = json_line(&SnapshotLine::new(snapshot, history, self.sites, own_cost(), self.prices))?;
            write_lines(&mut out, &[line])?;
            return write_lines(&mut out, &json);
        }
        if self.alerts_on_stdout {
            write_lines(&mut out, &json)?;
        }
        if self.output.quiet {
            return Ok(());
        }
        let active = alerts.active();
        let view =
            View { snapshot, history, alerts: &active, sites: self.sites, duration: self.duration, own: own_cost() };
        let text = if self.has_page() {
            self.page(&view)
        } else {
            let mut text = format!("{}\n", view.summary());
            for group in group(&lines) {
                let alert = self.templates.render("alert.txt.tera", &group).unwrap_or_else(|e| {
                    tracing::error!("{e:#}");
                    events.iter().map(|e| format!("{}\n", live::event_line(e))).collect()
                });
                text.push_str(&alert);
            }
            text
        };
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(failed)
    }

    /// The page for the terminal, from its top left corner.
    fn page(&self, view: &View<'_>) -> String {
        let (columns, lines) =
            terminal_size::terminal_size().map_or((100, 40), |(w, h)| (usize::from(w.0), usize::from(h.0)));
        let mut page = view.page(columns, lines.saturating_sub(self.recent.len() + 1));
        for line in &self.recent {
            page.push_str(&crate::output::text::clip(line, columns));
            page.push('\n');
        }
        // Home, each line cleared to its end, and the rest of the screen.
        format!("\x1b[H{}\x1b[J", page.replace('\n', "\x1b[K\n"))
    }

    /// Something about a process.
    pub(super) fn notice(&mut self, notice: &Notice) {
        match notice {
            Notice::Failed { .. } => tracing::warn!("{}", live::notice_line(notice)),
            _ => self.say(&live::notice_line(notice)),
        }
    }

    /// A line about the run itself: on standard error, or within the page.
    pub(super) fn say(&mut self, line: &str) {
        if self.output.quiet {
            return;
        }
        if self.has_page() {
            self.recent.push(line.to_owned());
            let excess = self.recent.len().saturating_sub(RECENT);
            self.recent.drain(..excess);
        } else {
            // Nothing is lost for those who read it when nobody does.
            let _ = writeln!(io::stderr(), "{line}");
        }
    }

    /// Names all these sites, with a progress bar where that takes long and somebody watches.
    pub(super) fn symbolize_all(&self, collector: &mut Collector, sites: &[Arc<Site>]) {
        let watched = sites.len() >= PROGRESS_FROM && io::stderr().is_terminal() && !self.output.quiet;
        let bar = if watched { ProgressBar::new(sites.len() as u64) } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("naming call stacks {wide_bar} {pos}/{len}") {
            bar.set_style(style);
        }
        for site in sites {
            collector.symbolize(site);
            bar.inc(1);
        }
        bar.finish_and_clear();
    }

    /// The end of the run.
    pub(super) fn finish(&mut self, text: Result<String>) -> Result<()> {
        if let Some(file) = &mut self.file {
            // What waits gets a last chance.
            let _ = file.write(&[]);
            let unwritten = file.waiting() as u64 + file.lost();
            if unwritten > 0 {
                tracing::error!("{unwritten} alert lines could not be written to {}", file.path().display());
            }
        }
        if let Some(webhook) = self.webhook.take() {
            let stats = webhook.finish(WEBHOOK_FLUSH);
            if stats.failed + stats.dropped > 0 {
                tracing::error!("webhook: {stats}");
            }
        }
        if self.output.quiet || self.output.json {
            return Ok(());
        }
        let mut out = io::stdout().lock();
        let clear = if self.has_page() { "\x1b[H\x1b[J" } else { "\n" };
        out.write_all(format!("{clear}{}", text?).as_bytes()).and_then(|()| out.flush()).map_err(failed)
    }
}

fn failed(e: io::Error) -> Error {
    Error::io("failed to write to standard output", e)
}

/// Renders webhook bodies by the named template, on the webhook's own thread.
fn renderer(template: Option<&str>, config: &Config) -> Result<Option<Render>> {
    let Some(name) = template.map(str::to_owned) else { return Ok(None) };
    let templates = Templates::new(config.templates_dir.as_deref())?;
    if !templates.contains(&name) {
        return Err(Error::config(format!("alerts.webhook.template: there is no template {name:?}")));
    }
    Ok(Some(Box::new(move |line: &AlertLine| templates.render_for(&name, &format!("alert {}", line.id), line))))
}
