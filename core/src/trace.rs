//! `memleak trace` and `memleak kernel --trace`: every allocation and free as a line.

use std::collections::HashMap;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use memleak_probes::{Event, EventKind, Tracker};
use serde::Serialize;

use crate::cli::is_closed_pipe;
use crate::collector::{Collector, KernelEvent, Purpose};
use crate::config::Config;
use crate::kernel::Origin;
use crate::live::{frame_name, notice_line};
use crate::output::alerts::json_line;
use crate::output::text::visible;
use crate::snapshot::{Site, SiteKey};
use crate::stop::Stop;
use crate::symbolize::Frame;
use crate::units::format_duration_s;
use crate::{Error, Result};

/// A line of `trace --json`; documented in `docs/json.md`.
#[derive(Serialize)]
struct TraceLine<'a> {
    r#type: &'static str,
    time_s: f64,
    pid: u32,
    tid: u32,
    comm: &'a str,
    address: String,
    size: u64,
    lifetime_ns: Option<u64>,
    probe_set: &'a str,
    function: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<KernelPart<'a>>,
    frames: &'a [Frame],
}

/// What only the kernel's own allocations have.
#[derive(Serialize)]
struct KernelPart<'a> {
    cache: Option<&'a str>,
    object_bytes: u64,
    gfp: &'a str,
    cgroup: u64,
}

/// Prints events until the targets have ended, `config.duration` is over, or `stop` says so.
///
/// # Errors
/// As [`Collector::start`], or standard output cannot be written; a closed pipe is a normal end.
pub fn run(config: &Config, json: bool, stop: &Stop) -> Result<()> {
    let mut collector = Collector::start(config, Purpose::Trace)?;
    collector.require_attached()?;
    let started = Instant::now();
    let mut tracer = Tracer { json, out: BufWriter::new(io::stdout()), sites: HashMap::new(), printed: 0 };
    let result = loop {
        collector.poll(Duration::from_millis(100))?;
        for notice in collector.take_notices() {
            eprintln!("{}", notice_line(&notice));
        }
        if let Err(e) = tracer.drain(&mut collector) {
            break if is_closed_pipe(&e) { Ok(()) } else { Err(e) };
        }
        let over = config.duration.is_some_and(|d| started.elapsed() >= d);
        if over || stop.is_requested() || collector.is_finished() {
            break Ok(());
        }
    };
    let dropped: u64 = collector.snapshot()?.losses().events_dropped;
    let summary = format!("{} events, {dropped} dropped", tracer.printed);
    if dropped > 0 || io::stderr().is_terminal() {
        eprintln!("{summary}");
    }
    result
}

struct Tracer {
    json: bool,
    out: BufWriter<io::Stdout>,
    sites: HashMap<SiteKey, Arc<Site>>,
    printed: u64,
}

impl Tracer {
    /// Prints what has arrived.
    fn drain(&mut self, collector: &mut Collector) -> Result<()> {
        while let Some(event) = collector.tracker().and_then(Tracker::next_event) {
            let key =
                SiteKey { instance: event.site.instance, probe_set: event.site.probe_set, stack: event.site.stack };
            let site = match self.sites.get(&key) {
                Some(site) => Arc::clone(site),
                None => {
                    let site = collector.site(key)?;
                    collector.symbolize(&site);
                    self.sites.insert(key, Arc::clone(&site));
                    site
                }
            };
            let function = match event.kind {
                // Nobody called anything to free it: the site says what allocated it.
                EventKind::ImplicitFree => &site.function,
                EventKind::Alloc | EventKind::Free => collector.tracker().map_or("", |t| t.function_name(event.name)),
            };
            self.print(&event, &site, function, None)?;
        }
        while let Some(KernelEvent { event, site, origin, function }) = collector.next_kernel_event()? {
            self.print(&event, &site, &function, Some(&origin))?;
        }
        self.out.flush().map_err(failed)
    }

    fn print(&mut self, event: &Event, site: &Site, function: &str, origin: Option<&Origin>) -> Result<()> {
        let line =
            if self.json { json_event(event, site, function, origin)? } else { text(event, site, function, origin) };
        self.printed += 1;
        writeln!(self.out, "{line}").map_err(failed)
    }
}

fn failed(cause: io::Error) -> Error {
    Error::io("failed to write to standard output", cause)
}

fn kind(event: &Event) -> &'static str {
    match event.kind {
        EventKind::Alloc => "alloc",
        EventKind::Free => "free",
        EventKind::ImplicitFree => "implicit_free",
    }
}

fn lifetime(event: &Event) -> Option<u64> {
    (event.kind != EventKind::Alloc).then_some(event.lifetime_ns)
}

fn json_event(event: &Event, site: &Site, function: &str, origin: Option<&Origin>) -> Result<String> {
    json_line(&TraceLine {
        r#type: kind(event),
        time_s: event.time_ns as f64 / 1e9,
        pid: event.pid,
        tid: event.tid,
        comm: &event.comm,
        address: format!("0x{:x}", event.address),
        size: event.size,
        lifetime_ns: lifetime(event),
        probe_set: &site.probe_set,
        function,
        kernel: origin.map(|o| KernelPart {
            cache: o.cache.as_deref(),
            object_bytes: o.object_bytes,
            gfp: &o.gfp,
            cgroup: event.cgroup,
        }),
        frames: site.frames(),
    })
}

/// `seconds.micros pid/tid comm kind function address size [lifetime] [cache flags] stack`.
fn text(event: &Event, site: &Site, function: &str, origin: Option<&Origin>) -> String {
    let stack: Vec<String> = site.frames().iter().map(frame_name).collect();
    let lived = lifetime(event).map_or(String::new(), |ns| format!(" lived {}", format_duration_s(ns as f64 / 1e9)));
    let of_kernel = origin.map_or(String::new(), |o| {
        let cache = o.cache.as_deref().map_or(String::new(), |cache| format!(" {}", visible(cache)));
        format!("{cache} {}", visible(&o.gfp))
    });
    format!(
        "{}.{:06} {}/{} {} {} {} 0x{:x} {} B{lived}{of_kernel}  {}",
        event.time_ns / 1_000_000_000,
        event.time_ns % 1_000_000_000 / 1_000,
        event.pid,
        event.tid,
        visible(&event.comm),
        kind(event),
        visible(function),
        event.address,
        event.size,
        stack.join(" < ")
    )
}
