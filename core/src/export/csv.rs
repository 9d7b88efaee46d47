//! One row per allocation site (RFC 4180), for spreadsheets.
//!
//! Text is always quoted, and text that a spreadsheet would take for a formula gets a `'` in front: names come from the
//! traced system.

use std::fmt::Write as _;

use super::names;
use crate::snapshot::Snapshot;

const HEADER: &str = "site,pid,comm,exe,probe_set,function,outstanding_bytes,outstanding_count,allocated_bytes,\
                      allocated_count,freed_bytes,freed_count,last_allocation_s,truncated,stack\r\n";

pub(super) fn encode(snapshot: &Snapshot) -> Vec<u8> {
    let mut out = String::from(HEADER);
    for s in &snapshot.sites {
        let (site, t) = (&s.site, &s.totals);
        let stack: Vec<String> = names::frames(site).iter().map(names::frame).collect();
        // Writing to a string cannot fail.
        let _ = write!(
            out,
            "{:016x},{},{},{},{},{},{},{},{},{},{},{},{:.3},{},{}\r\n",
            site.id,
            site.process.pid,
            cell(&names::shown(&site.process.comm)),
            cell(&names::shown(&site.process.exe)),
            cell(&names::shown(&site.probe_set)),
            cell(&names::shown(&site.function)),
            t.outstanding_bytes(),
            t.outstanding_count(),
            t.allocated_bytes,
            t.allocated_count,
            t.freed_bytes,
            t.freed_count,
            s.last_allocation_s,
            cell(&names::shown(site.truncated.as_deref().unwrap_or_default())),
            cell(&stack.join(" < ")),
        );
    }
    out.into_bytes()
}

/// A cell with text that has no control characters left.
fn cell(text: &str) -> String {
    let formula = text.starts_with(['=', '+', '-', '@', '|', '%']);
    format!("\"{}{}\"", if formula { "'" } else { "" }, text.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::sample;

    /// A name must neither end its cell nor become a formula.
    #[test]
    fn hostile_names_stay_text_in_their_cell() {
        let text = String::from_utf8(encode(&sample::typical())).expect("text");
        let rows: Vec<&str> = text.split_terminator("\r\n").collect();
        assert_eq!(rows.len(), 4);
        assert_eq!(rows[0].split(',').count(), 15);
        assert_eq!(
            rows[1],
            "0000000000000001,4711,\"shop\",\"/opt/shop\",\"glibc\",\"malloc\",1000,100,1300,130,300,30,1.500,\"\",\
             \"inner < outer < main\""
        );
        assert!(rows[2].ends_with(r#","'=cmd|'/c'!A1;""</script>\n\u{202e},x 7 < shop+0x77 < main""#), "{}", rows[2]);
        assert!(!text.replace("\r\n", "").contains(|c: char| c.is_control()));
    }
}
