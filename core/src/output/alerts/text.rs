//! Alerts as text for people: what the rules say of one site goes together, and templates make the words.

use serde::Serialize;

use super::{AlertLine, FrameLine, ProcessLine, SiteLine};
use crate::alert::Status;
use crate::error::{Error, ErrorKind, Result};
use crate::finding::Severity;
use crate::labels::Labels;
use crate::output::reach;
use crate::output::templates::Templates;
use crate::snapshot::{Losses, Mode};

/// Template of a message about one site.
const TEXT: &str = "alert.txt.tera";
/// Template of the body of a webhook that comes with memleak.
const WEBHOOK: &str = "alert.webhook.json.tera";

/// What several rules say of one site at one time: the context of `alert.txt.tera`.
#[derive(Clone, Debug, Serialize)]
pub struct AlertGroup {
    /// Whether these alerts stand.
    pub status: Status,
    /// The highest severity of them.
    pub severity: Severity,
    /// The process and the site, and what holds for all of them, from the first line.
    pub process: ProcessLine,
    /// Number of processes with the finding.
    pub processes: usize,
    /// The allocation site.
    pub site: SiteLine,
    /// How the figures were obtained.
    pub mode: Mode,
    /// Number of events lost in the process, of all kinds.
    pub lost: u64,
    /// The lines, in the order given.
    pub alerts: Vec<AlertLine>,
}

/// Groups lines by site and status, in order of first appearance: one message per site for people.
pub fn group(lines: &[AlertLine]) -> Vec<AlertGroup> {
    let mut groups: Vec<AlertGroup> = Vec::new();
    for line in lines {
        match groups.iter_mut().find(|g| g.site.id == line.site.id && g.status == line.status) {
            Some(group) => {
                group.severity = group.severity.max(line.severity);
                group.alerts.push(line.clone());
            }
            None => groups.push(AlertGroup {
                status: line.status,
                severity: line.severity,
                process: line.process.clone(),
                processes: line.processes,
                site: line.site.clone(),
                mode: line.mode,
                lost: line.losses.total(),
                alerts: vec![line.clone()],
            }),
        }
    }
    groups
}

/// Messages about all lines, one per site and status, rendered by `alert.txt.tera`. Empty without lines.
///
/// # Errors
/// The template fails.
pub fn text(templates: &Templates, lines: &[AlertLine]) -> Result<String> {
    let subject = |g: &AlertGroup| format!("alerts at site {}", g.site.id);
    group(lines).iter().map(|g| templates.render_for(TEXT, &subject(g), g)).collect()
}

/// Renders a template of a webhook from a sample.
///
/// # Errors
/// There is no such template, it fails, or it is named `*.json.tera` and makes no JSON.
pub fn check_template(templates: &Templates, name: &str) -> Result<()> {
    let body = templates.render_for(name, "a sample alert", &sample())?;
    let json = name.strip_suffix(".tera").unwrap_or(name).ends_with(".json");
    match serde_json::from_str::<serde::de::IgnoredAny>(&body) {
        Err(e) if json => {
            let message = format!("template {name} makes no valid JSON from a sample alert");
            Err(Error::with_source(ErrorKind::Template, message, e))
        }
        _ => Ok(()),
    }
}

/// What is wrong with the templates of alerts that come with memleak or replace those.
pub(crate) fn check_templates(templates: &Templates) -> Vec<Error> {
    [text(templates, &[sample()]).map(drop), check_template(templates, WEBHOOK)]
        .into_iter()
        .filter_map(Result::err)
        .collect()
}

/// A line in which every field has a value, with characters that a template must not let through.
fn sample() -> AlertLine {
    let frame = FrameLine {
        function: Some("operator\"<<\"\n".to_owned()),
        module: Some("/opt/sample".to_owned()),
        offset: 31,
        file: Some("sample.cc".to_owned()),
        line: Some(58),
        inlined: true,
        reason: None,
        address: "0x55d0c2a014ff".to_owned(),
        build_id: Some("8c1f0d6e".to_owned()),
        file_address: Some("0x14ff".to_owned()),
    };
    let unknown =
        FrameLine { function: None, file: None, line: None, reason: Some("no symbols".to_owned()), ..frame.clone() };
    let nowhere = FrameLine { module: None, build_id: None, ..unknown.clone() };
    AlertLine {
        r#type: "alert",
        id: "5f0a3c9d1be27846".to_owned(),
        time: "2025-03-01T12:30:05.250Z".to_owned(),
        status: Status::Firing,
        since: "2025-03-01T12:30:02.250Z".to_owned(),
        rule: "growth".to_owned(),
        severity: Severity::Critical,
        confidence: 0.97,
        reason: "grew in all 12 snapshots, 24.0 KiB/s".to_owned(),
        mode: Mode::Estimated,
        processes: 2,
        process: ProcessLine {
            pid: 4711,
            comm: "sample \"\\".to_owned(),
            exe: "/opt/sample".to_owned(),
            labels: Labels::default(),
            ended: true,
        },
        site: SiteLine {
            id: "9e1c7702ab54d3f0".to_owned(),
            probe_set: "glibc".to_owned(),
            function: "malloc".to_owned(),
            outstanding_bytes: 294_912,
            outstanding_count: 1_152,
            growth_bytes_per_s: 24_576.0,
            oldest_age_s: 12.0,
            frames: vec![frame, unknown, nowhere],
            truncated: Some("a page that is not present".to_owned()),
            reachability: Some((&reach::sample()).into()),
        },
        losses: Losses { implicit_frees: 3, ..Losses::default() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_template(name: &str, text: &str) -> Templates {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(name), text).unwrap();
        Templates::new(Some(dir.path())).unwrap()
    }

    /// Three rules at one site are one message; another site or status is another.
    #[test]
    fn the_rules_of_a_site_are_one_group() {
        let line = |rule: &str, severity, id: &str, status| {
            let mut line = AlertLine { rule: rule.to_owned(), severity, status, ..sample() };
            line.site.id = id.to_owned();
            line
        };
        let groups = group(&[
            line("growth", Severity::Warning, "a", Status::Firing),
            line("age", Severity::Warning, "b", Status::Firing),
            line("survival", Severity::Critical, "a", Status::Firing),
            line("imbalance", Severity::Warning, "a", Status::Resolved),
        ]);
        let rules: Vec<Vec<&str>> = groups.iter().map(|g| g.alerts.iter().map(|a| a.rule.as_str()).collect()).collect();
        assert_eq!(rules, [vec!["growth", "survival"], vec!["age"], vec!["imbalance"]]);
        assert_eq!((groups[0].severity, groups[0].lost), (Severity::Critical, 3));
    }

    /// The whole message, word by word: it is what people see first.
    #[test]
    fn the_text_says_what_where_and_how_much() {
        let other = AlertLine { rule: "survival".to_owned(), reason: "few blocks die".to_owned(), ..sample() };
        let expected = "\
FIRING critical: sample \"\\ (4711), ended and 1 more, malloc of glibc
  288.0 KiB in 1,152 blocks outstanding (estimated), growing 24.0 KiB/s, oldest 12s
  growth (97 %): grew in all 12 snapshots, 24.0 KiB/s
  survival (97 %): few blocks die
  still reachable: 5 of 100 judged blocks are lost (5 %, 95 % interval 2 to 11 %), 2 of them only with other lost blocks, 1 referenced in unusual ways, or perhaps freed unseen; 3 scans
  held by: global sessions+0x10 (server) > Session::\"open\"() x3
    operator\"<<\"\\n  sample.cc:58  (inlined)
    /opt/sample+0x1f  (inlined)
    0x55d0c2a014ff  (inlined)
    the stack ends early: a page that is not present
  3 events were lost: the figures are not exact
";
        assert_eq!(text(&Templates::new(None).unwrap(), &[sample(), other]).unwrap(), expected);
        assert_eq!(text(&Templates::new(None).unwrap(), &[]).unwrap(), "");
    }

    /// The body for chat services must be JSON whatever the names are.
    #[test]
    fn the_webhook_template_makes_json_from_hostile_names() {
        let body = Templates::new(None).unwrap().render(WEBHOOK, &sample()).unwrap();
        let value: serde_json::Value = serde_json::from_str(&body).unwrap();
        let expected = "\
FIRING critical: grew in all 12 snapshots, 24.0 KiB/s (growth)
sample \"\\ (4711): 288.0 KiB in 1,152 blocks outstanding, growing 24.0 KiB/s
still reachable: 5 of 100 judged blocks are lost (5 %, 95 % interval 2 to 11 %), 2 of them only with other lost blocks, 1 referenced in unusual ways, or perhaps freed unseen; 3 scans
held by: global sessions+0x10 (server) > Session::\"open\"() x3
- operator\"<<\"\n sample.cc:58
- /opt/sample+0x1f
- 0x55d0c2a014ff";
        assert_eq!(value, serde_json::json!({ "text": expected }));
    }

    /// A broken template must be found by `check`, not by the first alert at night.
    #[test]
    fn broken_templates_are_found_before_they_are_needed() {
        assert_eq!(check_templates(&Templates::new(None).unwrap()).len(), 0);
        let no_field = with_template(TEXT, "{{ sites.id }}");
        assert!(format!("{:#}", check_templates(&no_field)[0]).contains(TEXT));
        let no_json = with_template("chat.json.tera", "{\"text\": \"{{ reason }}\"");
        let error = check_template(&no_json, "chat.json.tera").unwrap_err();
        assert!(format!("{error:#}").contains("chat.json.tera makes no valid JSON"), "{error:#}");
        let missing = check_template(&Templates::new(None).unwrap(), "chat.json.tera").unwrap_err();
        assert!(format!("{missing:#}").contains("no such template"), "{missing:#}");
        let no_claim = with_template("chat.txt.tera", "{{ reason }}");
        assert!(check_template(&no_claim, "chat.txt.tera").is_ok());
    }
}
