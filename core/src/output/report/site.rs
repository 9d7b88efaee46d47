//! Allocation sites and their frames as a report shows them, and what to call them.

use serde::Serialize;

use super::trend;
use crate::finding::Severity;
use crate::history::{Sample, SiteHistory};
use crate::output::reach::ReachView;
use crate::output::text::clip;
use crate::snapshot::{Cohort, LIFETIME_CLASSES, SiteKey, StandardErrors, Totals};
use crate::symbolize::Frame;

/// Most characters of a name or path: generated C++ names reach hundreds of kilobytes.
const MAX_NAME: usize = 600;

/// One allocation site.
#[derive(Debug, Serialize)]
pub(super) struct SiteView {
    #[serde(skip)]
    pub(super) key: SiteKey,
    /// Place in the ranking, starting at 1.
    pub(super) rank: usize,
    /// Stable id, 16 hexadecimal digits; the same in processes with the same executable.
    pub(super) id: String,
    pub(super) instance: u32,
    pub(super) pid: u32,
    pub(super) comm: String,
    pub(super) probe_set: String,
    pub(super) function: String,
    pub(super) severity: Option<Severity>,
    pub(super) rules: Vec<String>,
    pub(super) outstanding_bytes: u64,
    pub(super) outstanding_count: u64,
    #[serde(flatten)]
    pub(super) totals: Totals,
    pub(super) growth_bytes_per_s: f64,
    pub(super) growing_since_s: Option<f64>,
    growing_for_s: Option<f64>,
    pub(super) oldest_age_s: f64,
    pub(super) last_allocation_s: f64,
    pub(super) ended_s: Option<f64>,
    pub(super) heading: Heading,
    pub(super) truncated: Option<String>,
    pub(super) frames: Vec<FrameView>,
    #[serde(skip)]
    pub(super) cohorts: Vec<Cohort>,
    #[serde(flatten)]
    pub(super) stderr: StandardErrors,
    /// What scans of the process's memory say; `None` before there was one.
    pub(super) reachability: Option<ReachView>,
    #[serde(skip)]
    pub(super) lifetimes: [u64; LIFETIME_CLASSES],
    #[serde(skip)]
    pub(super) series: Vec<Sample>,
}

/// What a site is called in a list.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Heading {
    /// Place of the frame in `frames`, counted from 0; `None` without frames.
    pub(super) frame: Option<usize>,
    /// Function, or module and offset, or address.
    pub(super) name: String,
    /// Source file and line, else the file name of the module; empty when neither is known.
    pub(super) place: String,
}

/// One frame of a call stack.
#[derive(Clone, Debug, Serialize)]
pub(super) struct FrameView {
    pub(super) function: Option<String>,
    pub(super) module: Option<String>,
    /// Hexadecimal with `0x`: addresses do not fit into JavaScript's numbers.
    pub(super) offset: String,
    pub(super) file: Option<String>,
    pub(super) line: Option<u32>,
    pub(super) inlined: bool,
    pub(super) reason: Option<String>,
    /// What to call it: function, else module and offset, else address.
    pub(super) name: String,
    /// Where it is: source file and line, else the file name of the module; empty when neither is known.
    pub(super) place: String,
    /// For the page, so that it can be symbolized later.
    #[serde(skip)]
    pub(super) build_id: Option<String>,
    #[serde(skip)]
    pub(super) file_address: Option<u64>,
}

impl SiteView {
    pub(super) fn new(
        rank: usize,
        h: &SiteHistory,
        growth_bytes_per_s: f64,
        severity: Option<Severity>,
        rules: Vec<String>,
        now_s: f64,
    ) -> Self {
        let site = h.site();
        let mut frames: Vec<FrameView> = site.frames().iter().map(FrameView::new).collect();
        if frames.is_empty() {
            frames = site.addresses.iter().map(|a| FrameView::unsymbolized(*a)).collect();
        }
        // A site of a process that has ended is as old as it was then.
        let until_s = h.ended_s.unwrap_or(now_s);
        let growing_since_s = trend::growing_since_s(h.series.samples());
        SiteView {
            rank,
            key: site.key,
            id: format!("{:016x}", site.id),
            instance: site.process.instance,
            pid: site.process.pid,
            comm: name(&site.process.comm),
            probe_set: name(&site.probe_set),
            function: name(&site.function),
            severity,
            rules,
            outstanding_bytes: h.latest.totals.outstanding_bytes(),
            outstanding_count: h.latest.totals.outstanding_count(),
            totals: h.latest.totals,
            growth_bytes_per_s,
            growing_since_s,
            growing_for_s: growing_since_s.map(|s| until_s - s),
            oldest_age_s: h.oldest_age_s(until_s),
            last_allocation_s: h.latest.last_allocation_s,
            ended_s: h.ended_s,
            heading: Heading::new(site.frames(), &frames, &site.function),
            truncated: site.truncated.as_deref().map(name),
            frames,
            cohorts: h.latest.cohorts.clone(),
            stderr: h.latest.stderr,
            reachability: h.latest.reachability.as_deref().map(ReachView::from),
            lifetimes: h.latest.lifetimes,
            series: h.series.samples().to_vec(),
        }
    }
}

impl Heading {
    fn new(frames: &[Frame], views: &[FrameView], function: &str) -> Self {
        let frame = heading(frames).or(if views.is_empty() { None } else { Some(0) });
        match frame.and_then(|i| views.get(i)) {
            Some(view) => Heading { frame, name: view.name.clone(), place: view.place.clone() },
            None => {
                Heading { frame: None, name: format!("unknown caller of {}", name(function)), place: String::new() }
            }
        }
    }
}

impl FrameView {
    fn new(frame: &Frame) -> Self {
        let module = frame.module.as_deref().map(name);
        let offset = format!("{:#x}", frame.offset);
        let shown = match (&frame.function, &module) {
            (Some(function), _) => name(function),
            (None, Some(module)) => format!("{}+{offset}", file_name(module)),
            (None, None) => offset.clone(),
        };
        let file = frame.file.as_deref().map(name);
        let place = match (&file, frame.line, &module) {
            (Some(file), Some(line), _) => format!("{file}:{line}"),
            (Some(file), None, _) => file.clone(),
            (None, _, Some(module)) if frame.function.is_some() => file_name(module).to_owned(),
            _ => String::new(),
        };
        FrameView {
            function: frame.function.as_deref().map(name),
            module,
            offset,
            file,
            line: frame.line,
            inlined: frame.inlined,
            reason: frame.reason.as_deref().map(name),
            name: shown,
            place,
            build_id: frame.build_id.as_deref().map(name),
            file_address: frame.file_address,
        }
    }

    fn unsymbolized(address: u64) -> Self {
        FrameView::new(&Frame {
            address,
            offset: address,
            reason: Some("not symbolized".to_owned()),
            ..Frame::default()
        })
    }
}

/// The frame by which people know a site: the first, seen from the allocator, that belongs neither to the C library
/// nor to the machinery of a language, and is no wrapper such as `xmalloc`; else the first with a name. `None` when no frame has a name.
pub fn heading(frames: &[Frame]) -> Option<usize> {
    const MODULES: [&str; 8] =
        ["libc.so", "libc-", "libstdc++", "libc++", "libgcc_s", "ld-linux", "ld-musl", "libm.so"];
    const FUNCTIONS: [&str; 10] = [
        "operator new",
        "std::",
        "__gnu_cxx::",
        "alloc::",
        "<alloc::",
        "core::",
        "<core::",
        "<std::",
        "__rust_",
        "__rdl_",
    ];
    let named = |f: &&Frame| f.function.is_some();
    // Programs wrap the allocator: zmalloc, xcalloc, g_strdup, my_malloc_checked.
    let wrapper = |name: &str| {
        name.contains("malloc")
            || ["calloc", "realloc", "memdup", "strdup", "strndup"].iter().any(|e| name.ends_with(e))
    };
    // What the interpreter of Python does is named by the Python function that it does it for.
    let is_python =
        |f: &Frame| f.inlined && f.file.as_deref().is_some_and(|f| f.ends_with(".py") || f.starts_with('<'));
    let interpreter =
        |f: &Frame, module: &str| (module.starts_with("python3") || module.starts_with("libpython3")) && !is_python(f);
    let machinery = |f: &Frame| {
        let module = f.module.as_deref().map_or("", file_name);
        let function = f.function.as_deref().unwrap_or_default();
        MODULES.iter().any(|m| module.starts_with(m))
            || interpreter(f, module)
            || FUNCTIONS.iter().any(|p| function.starts_with(p))
            || wrapper(function)
    };
    (frames.iter().position(|f| named(&f) && !machinery(f))).or_else(|| frames.iter().position(|f| named(&f)))
}

/// The part of a path after the last slash.
fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// A name of bounded length.
pub(super) fn name(text: &str) -> String {
    clip(text, MAX_NAME).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(function: Option<&str>, module: &str) -> Frame {
        Frame { function: function.map(str::to_owned), module: Some(module.to_owned()), ..Frame::default() }
    }

    /// A list in which every site is called `operator new` helps nobody: the heading is the first frame of the
    /// program itself.
    #[test]
    fn the_heading_skips_the_allocation_machinery() {
        let frames = [
            frame(Some("operator new(unsigned long)"), "/usr/lib/libstdc++.so.6.0.30"),
            frame(Some("std::vector<int>::push_back(int const&)"), "/opt/server"),
            frame(Some("Session::open()"), "/opt/server"),
            frame(Some("main"), "/opt/server"),
        ];
        assert_eq!(heading(&frames), Some(2));
        assert_eq!(heading(&[frame(None, "/opt/server"), frame(Some("__strdup"), "/usr/lib/libc.so.6")]), Some(1));
        assert_eq!(heading(&[frame(Some("zmalloc"), "/opt/server"), frame(Some("dictAdd"), "/opt/server")]), Some(1));
        assert_eq!(heading(&[frame(None, "/opt/server")]), None);
    }
}
