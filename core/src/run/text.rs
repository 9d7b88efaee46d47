//! The report of a run for people: findings with their stacks, then what was left out and why.

use std::fmt::Write as _;

use super::report::{Leak, RunReport};
use crate::live;
use crate::output::text::{clip, visible};
use crate::units::{format_bytes, format_duration_s};

/// Longest command line that is shown, in characters.
const MAX_COMMAND: usize = 200;
/// Most frames of a finding.
const MAX_FRAMES: usize = 30;
/// Most places that exit handlers have freed, and most silenced findings, that are listed.
const MAX_LISTED: usize = 10;

/// The whole report.
pub(super) fn render(report: &RunReport) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write(&mut out, report);
    out
}

fn write(out: &mut String, report: &RunReport) -> std::fmt::Result {
    let command = report.command.join(" ");
    writeln!(out, "memleak run: {}", clip(&visible(&command), MAX_COMMAND))?;
    let (all, exact) = (report.processes.len(), report.processes.iter().filter(|p| p.exact).count());
    let how = if exact == all { "every call was traced".to_owned() } else { format!("{exact} of them exactly") };
    writeln!(
        out,
        "the command {} after {}; {} followed, {how}",
        report.command_end.describe(),
        format_duration_s(report.duration_s),
        counted(all as u64, "process", "processes")
    )?;
    for leak in &report.findings {
        finding(out, leak)?;
    }
    writeln!(out)?;
    let running: Vec<_> = report.processes.iter().filter(|p| p.end == "running").collect();
    if let Some(first) = running.first() {
        writeln!(
            out,
            "still running: {}, such as {} {} (--wait waits longer); what they hold may yet be freed",
            counted(running.len() as u64, "process", "processes"),
            first.pid,
            visible(&first.comm)
        )?;
    }
    let freed = report.freed.iter().fold((0, 0), |(b, n), f| (b + f.bytes, n + f.blocks));
    if freed.1 > 0 {
        writeln!(out, "freed by exit handlers, so no leak: {} in {} blocks", format_bytes(freed.0), freed.1)?;
        for site in report.freed.iter().take(MAX_LISTED) {
            writeln!(out, "  {} in {} blocks at {}", format_bytes(site.bytes), site.blocks, site.place)?;
        }
    }
    if !report.suppressed.is_empty() {
        writeln!(out, "suppressed: {}", counted(report.suppressed.len() as u64, "finding", "findings"))?;
        for s in report.suppressed.iter().take(MAX_LISTED) {
            writeln!(out, "  {} in {} blocks at {}: {}", format_bytes(s.bytes), s.blocks, s.place, visible(&s.by))?;
        }
    }
    if let Some(file) = &report.suppressions {
        let name = file.file.display().to_string();
        for line in &file.lines {
            let place = format!("{}:{}: {}", visible(&name), line.line, visible(&line.text));
            match line.findings {
                0 => writeln!(out, "suppression never used: {place}")?,
                n => writeln!(out, "suppression used {n} times ({}): {place}", format_bytes(line.bytes))?,
            }
        }
    }
    if report.losses.total() > 0 {
        let lost = report.losses.entries().into_iter().filter(|(_, n)| *n > 0);
        let lost: Vec<String> = lost.map(|(name, n)| format!("{name} {n}")).collect();
        writeln!(out, "lost, so numbers may be too low: {}", lost.join(", "))?;
    }
    for note in &report.notes {
        writeln!(out, "note: {}", visible(note))?;
    }
    let failing = report.findings.iter().filter(|l| l.fails).count() as u64;
    let others = report.findings.len() as u64 - failing;
    let fail_on = report.fail_on.join(", ");
    writeln!(out, "{} ({fail_on}), {others} more", counted(failing, "finding fails the run", "findings fail the run"))
}

fn finding(out: &mut String, leak: &Leak) -> std::fmt::Result {
    let about = if leak.exact { "" } else { "about " };
    let processes = match leak.processes {
        1 => format!("{} {}", leak.pids.first().copied().unwrap_or(0), visible(&leak.comm)),
        n => format!("{n} processes {}", visible(&leak.comm)),
    };
    writeln!(
        out,
        "\n{} {}: {about}{} in {} at {} [{processes}]",
        leak.severity.as_str().to_uppercase(),
        visible(&leak.rule),
        format_bytes(leak.bytes),
        counted(leak.blocks, "block", "blocks"),
        leak.place
    )?;
    writeln!(out, "  {}", visible(&leak.reason))?;
    for (n, frame) in leak.frames.iter().take(MAX_FRAMES).enumerate() {
        write!(out, "    #{n} {}", live::frame_name(frame))?;
        match (&frame.file, frame.line, &frame.module) {
            (Some(file), Some(line), _) => writeln!(out, " {}:{line}", visible(file))?,
            (_, _, Some(module)) if frame.function.is_some() => writeln!(out, " ({})", visible(module))?,
            _ => writeln!(out)?,
        }
    }
    if leak.frames.len() > MAX_FRAMES {
        writeln!(out, "    ... {} more frames", leak.frames.len() - MAX_FRAMES)?;
    }
    if let Some(why) = &leak.truncated {
        writeln!(out, "    the stack ends here: {why}")?;
    }
    Ok(())
}

fn counted(n: u64, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}
