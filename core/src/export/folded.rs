//! Folded stacks: one line per call stack, outermost first, frames joined by `;`, then a space and the outstanding bytes.
//!
//! What flame graph tools read. A frame must not hold `;`, and the number at the end of the line must be the only one:
//! `;` becomes `:`, and a space before a number that ends a name becomes `_`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::names;
use crate::snapshot::Snapshot;

pub(super) fn encode(snapshot: &Snapshot) -> Vec<u8> {
    // Sites that differ only in offsets have the same line.
    let mut lines: BTreeMap<String, u64> = BTreeMap::new();
    for s in snapshot.sites.iter().filter(|s| s.totals.outstanding_bytes() > 0) {
        let frames = names::frames(&s.site);
        let mut parts = vec![part(&names::process(&s.site.process))];
        parts.extend(frames.iter().rev().map(|f| part(&names::frame(f))));
        let bytes = lines.entry(parts.join(";")).or_default();
        *bytes = bytes.saturating_add(s.totals.outstanding_bytes());
    }
    let mut out = String::new();
    for (stack, bytes) in lines {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{stack} {bytes}");
    }
    out.into_bytes()
}

fn part(name: &str) -> String {
    let name = name.replace(';', ":");
    match name.rsplit_once(' ') {
        Some((start, end)) if end.starts_with(|c: char| c.is_ascii_digit()) => format!("{start}_{end}"),
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::sample;

    /// Readers split at `;` and take the last word for the number.
    #[test]
    fn a_line_has_its_frames_and_one_number() {
        let mut snapshot = sample::typical();
        // The same call at another offset.
        let process = sample::process();
        snapshot.sites.push(sample::site(&process, 4, vec![sample::frame("main", 0x6010)], 40, 0));
        snapshot.sites.push(sample::site(&process, 5, vec![sample::frame("main", 0x6020)], 60, 0));
        snapshot.sites.push(sample::site(&process, 6, vec![sample::frame("freed", 0x6030)], 60, 60));
        let text = String::from_utf8(encode(&snapshot)).expect("text");
        assert_eq!(
            text,
            "shop (4711) 10\n\
             shop (4711);main 100\n\
             shop (4711);main;outer;inner 1000\n\
             shop (4711);main;shop+0x77;=cmd|'/c'!A1:\"</script>\\n\\u{202e},x_7 70\n"
        );
    }
}
