//! What processes and frames are called in other tools' formats: text that neither breaks the format nor steers whoever
//! reads it.

use std::borrow::Cow;

use crate::output::text::{clip, visible};
use crate::snapshot::{Process, Site};
use crate::symbolize::Frame;

/// Most characters of a name: generated C++ names reach hundreds of kilobytes.
const MAX_NAME: usize = 600;

/// Text with nothing unseen in it, of bounded length.
pub(crate) fn shown(text: &str) -> String {
    clip(&visible(text), MAX_NAME).into_owned()
}

/// A process: `shop (4711)`; without a name or pid only what is known.
pub(crate) fn process(p: &Process) -> String {
    match (p.comm.as_str(), p.pid) {
        ("", pid) => format!("({pid})"),
        (comm, 0) => shown(comm),
        (comm, pid) => format!("{} ({pid})", shown(comm)),
    }
}

/// A frame: its function, else module and offset, else the address.
pub(crate) fn frame(f: &Frame) -> String {
    match (&f.function, &f.module) {
        (Some(function), _) => shown(function),
        (None, Some(module)) => format!("{}+{:#x}", shown(file_name(module)), f.offset),
        (None, None) => format!("{:#x}", f.offset),
    }
}

/// The last part of a path.
pub(crate) fn file_name(path: &str) -> &str {
    path.rsplit('/').next().filter(|n| !n.is_empty()).unwrap_or(path)
}

/// The frames of a site, innermost first; addresses where nothing has been symbolized.
pub(crate) fn frames(site: &Site) -> Cow<'_, [Frame]> {
    match site.frames() {
        [] => {
            let bare = |a: &u64| Frame { address: *a, offset: *a, ..Frame::default() };
            Cow::Owned(site.addresses.iter().map(bare).collect())
        }
        frames => Cow::Borrowed(frames),
    }
}
