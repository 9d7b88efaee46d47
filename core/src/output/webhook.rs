//! Delivery of alerts to a webhook, on a thread of its own.
//!
//! [`Webhook::send`] puts a line into a bounded queue and returns; the thread POSTs one line after the other and tries
//! again where that may help. Nothing that the other side does, or fails to do, can hold up the collector. The
//! address may hold a secret, so messages name its host only.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ureq::http::Uri;

use super::alerts::{AlertLine, json_line};
use crate::config::WebhookSettings;
use crate::error::{Error, ErrorKind, Result};

/// Makes the body of a request from an alert line: a template.
pub type Render = Box<dyn Fn(&AlertLine) -> Result<String> + Send>;

/// What became of the alerts so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WebhookStats {
    /// Answered with 2xx.
    pub delivered: u64,
    /// Given up: a final answer, all attempts used, a body that could not be rendered, or no time left at the end.
    pub failed: u64,
    /// Dropped from the queue, which was full.
    pub dropped: u64,
    /// Attempts beyond the first ones.
    pub retries: u64,
    /// Queued, or being delivered.
    pub waiting: usize,
    /// Why the newest attempt that failed did; `None` when none has.
    pub last_error: Option<String>,
}

impl fmt::Display for WebhookStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let WebhookStats { delivered, failed, dropped, .. } = self;
        write!(f, "{delivered} alerts delivered, {failed} failed, {dropped} dropped")?;
        match &self.last_error {
            Some(e) => write!(f, " (last error: {e})"),
            None => Ok(()),
        }
    }
}

/// Pauses between attempts.
#[derive(Clone, Copy, Debug)]
struct Pace {
    /// Before the second attempt; doubles from there.
    first: Duration,
    /// No pause grows beyond this.
    most: Duration,
    /// Most that a `Retry-After` is followed.
    most_asked: Duration,
}

const PACE: Pace =
    Pace { first: Duration::from_millis(500), most: Duration::from_secs(30), most_asked: Duration::from_secs(60) };

impl Pace {
    /// The pause after `failures` failed attempts, 1 or more: half of it fixed, half by `chance` (0 to 1), so that many
    /// senders do not come back in step.
    fn pause(&self, failures: u32, asked: Option<Duration>, chance: f64) -> Duration {
        let doubled = self.first.saturating_mul(1 << failures.saturating_sub(1).min(20)).min(self.most);
        doubled.mul_f64(0.5 + chance / 2.0).max(asked.unwrap_or_default().min(self.most_asked))
    }
}

/// State shared with the thread.
#[derive(Debug, Default)]
struct State {
    queue: VecDeque<AlertLine>,
    stats: WebhookStats,
    busy: bool,
    /// Set at the end of the run: when to give up.
    deadline: Option<Instant>,
    ended: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    /// A panic elsewhere leaves counters and a queue, which are valid at any time.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `end`, or until the end of the run when that comes first.
    fn wait_until(&self, end: Instant) {
        let mut state = self.lock();
        loop {
            let end = state.deadline.map_or(end, |deadline| end.min(deadline));
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A webhook in service. Dropping it ends the thread without waiting for what is queued; see [`Webhook::finish`].
#[derive(Debug)]
pub struct Webhook {
    shared: Arc<Shared>,
    capacity: usize,
    host: String,
}

impl Webhook {
    /// Starts the thread. `render` makes the body; `None` sends the line as JSON.
    ///
    /// # Errors
    /// The address is not valid, or the thread cannot be started.
    pub fn start(settings: &WebhookSettings, render: Option<Render>) -> Result<Webhook> {
        Webhook::start_with(settings, render, PACE)
    }

    fn start_with(settings: &WebhookSettings, render: Option<Render>, pace: Pace) -> Result<Webhook> {
        let uri: Uri = settings
            .url
            .parse()
            .map_err(|e| Error::with_source(ErrorKind::Config, "failed to read the address alerts.webhook.url", e))?;
        let Some(host) = uri.authority().map(|a| a.host().to_owned()) else {
            return Err(Error::config("the address alerts.webhook.url has no host"));
        };
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            // A POST that is redirected loses its body or reaches somebody who was not named.
            .max_redirects(0)
            .max_redirects_will_error(false)
            // The environment is not read.
            .proxy(None)
            .user_agent(concat!("memleak/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        let shared = Arc::new(Shared::default());
        let sender = Sender {
            shared: shared.clone(),
            agent,
            uri,
            host: host.clone(),
            content_type: content_type(settings.template.as_deref()),
            render,
            timeout: settings.timeout,
            attempts: settings.attempts.max(1),
            pace,
        };
        std::thread::Builder::new()
            .name("webhook".to_owned())
            .spawn(move || sender.run())
            .map_err(|e| Error::io("failed to start the thread of the webhook", e))?;
        Ok(Webhook { shared, capacity: settings.queue.max(1), host })
    }

    /// Queues a line and returns at once. When the queue is full, its oldest line is dropped and counted.
    pub fn send(&self, line: AlertLine) {
        let mut state = self.shared.lock();
        if state.queue.len() >= self.capacity {
            state.queue.pop_front();
            state.stats.dropped += 1;
            if state.stats.dropped == 1 {
                tracing::warn!(host = %self.host, "the webhook's queue is full: the oldest alerts are dropped");
            }
        }
        state.queue.push_back(line);
        self.shared.changed.notify_all();
    }

    /// What became of the alerts so far.
    pub fn stats(&self) -> WebhookStats {
        let state = self.shared.lock();
        WebhookStats { waiting: state.queue.len() + usize::from(state.busy), ..state.stats.clone() }
    }

    /// Delivers what is queued, for at most `limit`; what is left then counts as failed.
    pub fn finish(self, limit: Duration) -> WebhookStats {
        let deadline = Instant::now() + limit;
        {
            let mut state = self.shared.lock();
            state.deadline = Some(deadline);
            self.shared.changed.notify_all();
            // A request that is under way ends by its own timeout: it is waited for only until the deadline.
            while !state.ended {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        let mut stats = self.stats();
        stats.failed += std::mem::take(&mut stats.waiting) as u64;
        stats
    }
}

impl Drop for Webhook {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.deadline.get_or_insert_with(Instant::now);
        self.shared.changed.notify_all();
    }
}

/// How an attempt failed.
struct Failure {
    text: String,
    /// Whether another attempt may help.
    retry: bool,
    /// What `Retry-After` asks for.
    asked: Option<Duration>,
}

/// The thread's side.
struct Sender {
    shared: Arc<Shared>,
    agent: ureq::Agent,
    uri: Uri,
    host: String,
    content_type: &'static str,
    render: Option<Render>,
    timeout: Duration,
    attempts: u32,
    pace: Pace,
}

impl Sender {
    fn run(self) {
        while let Some(line) = self.next() {
            let delivered = self.deliver(&line);
            let mut state = self.shared.lock();
            state.busy = false;
            match delivered {
                Ok(()) => state.stats.delivered += 1,
                Err(text) => {
                    tracing::warn!(host = %self.host, alert = %line.id, "failed to deliver an alert: {text}");
                    state.stats.failed += 1;
                }
            }
            self.shared.changed.notify_all();
        }
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
    }

    /// The next line; `None` when the run is over and either nothing is left or no time.
    fn next(&self) -> Option<AlertLine> {
        let mut state = self.shared.lock();
        loop {
            if state.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return None;
            }
            if let Some(line) = state.queue.pop_front() {
                state.busy = true;
                return Some(line);
            }
            if state.deadline.is_some() {
                return None;
            }
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Delivers one line with as many attempts as it takes and are allowed.
    fn deliver(&self, line: &AlertLine) -> Result<(), String> {
        let body = match &self.render {
            Some(render) => render(line),
            None => json_line(line),
        };
        let body = body.map_err(|e| self.note(format!("{e:#}")))?;
        for attempt in 1..=self.attempts {
            let Err(failure) = self.post(&body) else { return Ok(()) };
            let text = self.note(failure.text);
            if !failure.retry || attempt == self.attempts {
                return Err(format!("{text} (attempt {attempt})"));
            }
            let pause = self.pace.pause(attempt, failure.asked, fastrand::f64());
            tracing::debug!(host = %self.host, attempt, ?pause, "failed to deliver an alert, will try again: {text}");
            self.shared.wait_until(Instant::now() + pause);
            let mut state = self.shared.lock();
            if state.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(format!("{text} (attempt {attempt}, no time left)"));
            }
            state.stats.retries += 1;
        }
        Err("no attempt was made".to_owned())
    }

    /// Remembers why an attempt failed.
    fn note(&self, text: String) -> String {
        self.shared.lock().stats.last_error = Some(text.clone());
        text
    }

    fn post(&self, body: &str) -> Result<(), Failure> {
        let left = self.shared.lock().deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        // A timeout of zero would be none at all.
        let timeout = left.map_or(self.timeout, |left| left.min(self.timeout)).max(Duration::from_millis(1));
        let request = self.agent.post(self.uri.clone()).config().timeout_global(Some(timeout)).build();
        let answer = request.header("Content-Type", self.content_type).send(body);
        match answer {
            Ok(answer) if answer.status().is_success() => Ok(()),
            Ok(answer) => {
                let status = answer.status();
                let asked = answer.headers().get("retry-after").and_then(|v| v.to_str().ok()?.trim().parse().ok());
                Err(Failure {
                    text: format!("{} answered {status}", self.host),
                    retry: status.is_server_error() || matches!(status.as_u16(), 408 | 425 | 429),
                    asked: asked.map(Duration::from_secs),
                })
            }
            // Names, networks and servers come back; what else there is would fail in the same way again, at the
            // cost of a few attempts.
            Err(e) => Err(Failure { text: format!("failed to reach {}: {e}", self.host), retry: true, asked: None }),
        }
    }
}

/// Type of the body, by the name of its template.
fn content_type(template: Option<&str>) -> &'static str {
    let name = template.map_or(".json", |t| t.strip_suffix(".tera").unwrap_or(t));
    match name.rsplit('.').next() {
        Some("json") => "application/json",
        Some("html" | "htm") => "text/html; charset=utf-8",
        _ => "text/plain; charset=utf-8",
    }
}

#[cfg(test)]
mod tests;
