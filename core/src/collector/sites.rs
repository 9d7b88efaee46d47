//! Sites: what is known of a stack when its first allocation has been seen.

use std::sync::Arc;

use memleak_probes::{Stack, StackEnd};

use super::Collector;
use super::cohorts::SiteCohorts;
use crate::Result;
use crate::python::PythonCall;
use crate::snapshot::{FirstThread, Site, SiteKey};
use crate::symbolize::{ModuleName, NormalizedFrame, site_id};
use crate::unwind::Unwinder;

/// A site and what is needed to read its cohorts.
pub(super) struct KnownSite {
    pub(super) site: Arc<Site>,
    /// Its stack reaches the outermost frame.
    pub(super) complete: bool,
    pub(super) cohorts: SiteCohorts,
}

impl Collector {
    /// The site of a key that the kernel side has used.
    ///
    /// # Errors
    /// When the map of stacks cannot be read.
    pub fn site(&mut self, key: SiteKey) -> Result<Arc<Site>> {
        if let Some(known) = self.sites.get(&key) {
            return Ok(Arc::clone(&known.site));
        }
        let (site, end) = self.new_site(key)?;
        if matches!(end, Some(StackEnd::NoTable | StackEnd::Strayed)) {
            // The process may have mapped code that nobody told us of.
            self.unclear.insert(key.instance);
        }
        let complete = end == Some(StackEnd::Complete);
        self.sites.insert(key, KnownSite { site: Arc::clone(&site), complete, cohorts: SiteCohorts::default() });
        Ok(site)
    }

    fn new_site(&mut self, key: SiteKey) -> Result<(Arc<Site>, Option<StackEnd>)> {
        let raw = memleak_probes::SiteKey { instance: key.instance, probe_set: key.probe_set, stack: key.stack };
        let tracker = self.tracker.get()?;
        let stack = tracker.take_stack(raw)?;
        let process = self.watched.get(&key.instance).map(|w| Arc::clone(&w.process)).unwrap_or_default();
        let end = stack.as_ref().map(|stack| stack.end);
        let first_thread = stack.as_ref().map(|s| FirstThread { tid: s.tid, name: s.comm.clone() });
        let probe_set: Arc<str> = self.probe_set_name(key.probe_set).into();
        let addresses = stack.as_ref().map(|stack| stack.addresses.clone()).unwrap_or_default();
        let mut frames = self.symbolizer.normalize(key.instance, &addresses);
        let (truncated, function) = match &stack {
            Some(stack) => {
                let why = self.why_it_ends(stack, key.instance, frames.last());
                (why, tracker.function_name(stack.name).to_owned())
            }
            None => (Some("there was no room for the stack (collector.max_sites)"), String::new()),
        };
        let (calls, cut) = self.python_calls(raw)?;
        let truncated = truncated.or(cut.then_some("of the Python functions only the innermost are known"));
        frames.extend(calls.iter().map(PythonCall::normalized));
        let id = site_id(&process.exe, &probe_set, &function, &frames);
        if let Some(locations) = &mut self.locations {
            let mut places = self.symbolizer.locations(key.instance, &addresses);
            places.extend(calls.iter().map(PythonCall::location));
            locations.insert(key, places);
        }
        if !calls.is_empty() {
            self.symbolizer.set_calls(key, calls);
        }
        let site = Arc::new(Site {
            key,
            id,
            process,
            probe_set,
            function: function.into(),
            addresses,
            truncated: truncated.map(Arc::from),
            first_thread,
            frames: std::sync::OnceLock::new(),
        });
        Ok((site, end))
    }

    /// The Python calls of a new stack, innermost first, and whether there were more; none when the process does not run
    /// Python.
    fn python_calls(&mut self, key: memleak_probes::SiteKey) -> Result<(Vec<PythonCall>, bool)> {
        match self.pythons.get_mut(&key.instance) {
            Some(Ok(python)) => python.calls(self.tracker.get()?, key),
            _ => Ok((Vec::new(), false)),
        }
    }

    /// Why a stack ends early, given where its last address lies; `None` when it does not.
    fn why_it_ends(&self, stack: &Stack, instance: u32, last: Option<&NormalizedFrame>) -> Option<&'static str> {
        const TOO_EARLY: &str = "it was taken before the unwind tables were ready";
        let in_a_file = last.is_some_and(|l| matches!(l.module, ModuleName::BuildId(_) | ModuleName::Path(_)));
        let was_late = |unwinder: &Unwinder| {
            // The call is before the return address.
            let last = stack.addresses.last().map_or(0, |a| a.saturating_sub(1));
            in_a_file && unwinder.was_late(instance, last, self.last_read)
        };
        match stack.end {
            StackEnd::Complete => None,
            StackEnd::Walked => self.unwinder.as_ref().map(|_| TOO_EARLY),
            StackEnd::Strayed if self.unwinder.is_some() => Some(TOO_EARLY),
            StackEnd::Strayed => Some("a caller was built without frame pointers"),
            StackEnd::NoTable if self.unwinder.as_ref().is_some_and(was_late) => Some(TOO_EARLY),
            StackEnd::NoTable => Some("a caller has neither unwind information nor a frame pointer"),
            StackEnd::Cut => Some("the limit of frames was reached (collector.max_frames)"),
            StackEnd::Unreadable => Some("the stack could not be read further"),
            StackEnd::Unsupported => Some("a caller's unwind information needs more than the stack"),
            StackEnd::Lost => Some("a register that a caller's unwind information needs is not known"),
            StackEnd::Trampoline => Some("a return probe of another tracer hides the caller"),
        }
    }
}
