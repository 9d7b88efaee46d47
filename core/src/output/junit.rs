//! The report of a run as JUnit XML, which every CI system shows: one test case per finding.
//!
//! A finding that fails the run is a failure, any other one passes with its text as output, a suppressed one is
//! skipped. One more case stands for the run itself, so that a clean run is a suite with a passed test.

use std::fmt::Write as _;

use crate::output::text::visible;
use crate::run::{Leak, RunReport};
use crate::units::format_bytes;

/// The whole document.
pub fn render(report: &RunReport) -> String {
    let failures = report.findings.iter().filter(|l| l.fails).count();
    let tests = report.findings.len() + report.suppressed.len() + 1;
    let mut out = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let counts = format!(
        "tests=\"{tests}\" failures=\"{failures}\" errors=\"0\" skipped=\"{}\" time=\"{:.3}\"",
        report.suppressed.len(),
        report.duration_s
    );
    // Writing to a string cannot fail.
    let _ = write!(
        out,
        "<testsuites name=\"memleak\" {counts}>\n<testsuite name=\"memleak run\" {counts}>\n<properties>\n\
         <property name=\"command\" value=\"{}\"/>\n<property name=\"command_end\" value=\"{}\"/>\n\
         <property name=\"memleak_version\" value=\"{}\"/>\n</properties>\n",
        escape(&report.command.join(" ")),
        escape(&report.command_end.describe()),
        report.version
    );
    let mut run = format!("the command {}\n", report.command_end.describe());
    report.notes.iter().for_each(|note| run.push_str(&format!("{note}\n")));
    let _ = writeln!(
        out,
        "<testcase classname=\"memleak\" name=\"run\" time=\"{:.3}\"><system-out>{}</system-out></testcase>",
        report.duration_s,
        escape_lines(&run)
    );
    for leak in &report.findings {
        let name = escape(&format!("{} [{}]", leak.place, leak.id));
        let _ = write!(out, "<testcase classname=\"memleak.{}\" name=\"{name}\" time=\"0\"", escape(&leak.rule));
        if let Some((file, line)) = leak.location() {
            let _ = write!(out, " file=\"{}\" line=\"{line}\"", escape(file));
        }
        out.push('>');
        let (summary, body) = (escape(&summary(leak)), escape_lines(&body(leak)));
        let _ = match leak.fails {
            true => write!(out, "<failure message=\"{summary}\" type=\"{}\">{body}</failure>", escape(&leak.rule)),
            false => write!(out, "<system-out>{body}</system-out>"),
        };
        out.push_str("</testcase>\n");
    }
    for s in &report.suppressed {
        let name = escape(&format!("{} [{} in {}]", s.place, s.id, s.pid));
        let _ = writeln!(
            out,
            "<testcase classname=\"memleak.{}\" name=\"{name}\" time=\"0\"><skipped message=\"{}\"/></testcase>",
            escape(&s.rule),
            escape(&format!("suppressed by {}", s.by))
        );
    }
    out.push_str("</testsuite>\n</testsuites>\n");
    out
}

fn summary(leak: &Leak) -> String {
    format!("{} in {} blocks at {}", format_bytes(leak.bytes), leak.blocks, leak.place)
}

fn body(leak: &Leak) -> String {
    let mut text = format!("{} {}: {}\n", leak.severity.as_str(), leak.rule, leak.reason);
    for (n, frame) in leak.frames.iter().enumerate() {
        let _ = write!(text, "#{n} {}", crate::live::frame_name(frame));
        if let (Some(file), Some(line)) = (&frame.file, frame.line) {
            let _ = write!(text, " {file}:{line}");
        }
        text.push('\n');
    }
    text
}

/// One line of text for an attribute or an element: what XML forbids is written out by [`visible`] first.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in visible(text).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            // The last two characters of the basic plane are not allowed in XML 1.0 in any form.
            '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// Several lines.
fn escape_lines(text: &str) -> String {
    text.lines().map(|line| format!("{}\n", escape(line))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A function's name must not end an attribute, open an element, or hold what no XML parser reads.
    #[test]
    fn hostile_names_stay_text() {
        let name = "a\"b<c>&\u{1b}[2J\u{0}\u{ffff}]]>\n";
        assert_eq!(escape(name), "a&quot;b&lt;c&gt;&amp;\\x1b[2J\\x00\u{fffd}]]&gt;\\n");
    }
}
