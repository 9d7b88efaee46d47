//! Checks of what settings name, beyond their own text: what `memleak check` runs, and a run before it attaches.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::config::Config;
use crate::error::{Error, ErrorKind};
use crate::output::alerts::check_template;
use crate::output::templates::Templates;
use crate::plugin;
use crate::rules::RuleEngine;

/// Everything that would keep a run with these settings from working, as far as it can be known without privileges
/// and without running. Empty means that nothing was found.
pub fn check(config: &Config) -> Vec<Error> {
    let mut problems = outputs(config);
    problems.extend(plugin::load(&config.plugins).err());
    problems.extend(RuleEngine::check(&config.rules));
    problems.extend(templates(config));
    problems
}

/// Checks all templates, and the one that the webhook uses.
fn templates(config: &Config) -> Vec<Error> {
    let dir = config.templates_dir.as_deref();
    let problems = Templates::check(dir);
    let name = config.alerts.webhook.as_ref().and_then(|w| w.template.as_deref());
    match (name, problems.is_empty()) {
        (Some(name), true) => {
            let checked = Templates::new(dir).and_then(|templates| check_template(&templates, name));
            checked.err().into_iter().collect()
        }
        _ => problems,
    }
}

/// Checks that report and alerts can be written: their folders exist and take files.
pub fn outputs(config: &Config) -> Vec<Error> {
    let outputs = [
        ("report", config.report.path.as_deref()),
        ("alerts", config.alerts.file.as_deref()),
        ("recording", config.recording.path.as_deref()),
    ];
    outputs.into_iter().filter_map(|(what, path)| output(what, path?).err()).collect()
}

/// That a file can be written, as far as its folder is concerned.
pub(crate) fn output(what: &str, path: &Path) -> Result<(), Error> {
    let object = format!("the {what} {}", path.display());
    if path.is_dir() {
        return Err(Error::config(format!("failed to prepare {object}: it is a folder; name a file in it")));
    }
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let failed = |e| Error::io(format!("failed to prepare {object} in the folder {}", folder.display()), e);
    if !std::fs::metadata(folder).map_err(failed)?.is_dir() {
        let message = format!("failed to prepare {object}: {} is not a folder", folder.display());
        return Err(Error::new(ErrorKind::Io, message));
    }
    writable(folder).map_err(failed)
}

/// Asks the kernel, which knows about read-only file systems and capabilities as well as about modes.
fn writable(folder: &Path) -> std::io::Result<()> {
    let path = CString::new(folder.as_os_str().as_bytes())?;
    // SAFETY: `path` is a string with a terminating NUL that lives until the call returns; the call only reads it.
    let result = unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), libc::W_OK | libc::X_OK, libc::AT_EACCESS) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(report: &Path, alerts: &Path) -> Vec<String> {
        let mut config = Config::default();
        config.report.path = Some(report.to_owned());
        config.alerts.file = Some(alerts.to_owned());
        check(&config).iter().map(|e| format!("{e:#}")).collect()
    }

    /// An hour of collecting must not end with a report that cannot be written.
    #[test]
    fn folders_that_cannot_take_the_output_are_found_before_the_run() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let found = problems(&dir.path().join("missing/r.html"), dir.path());
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("missing: No such file or directory"), "{found:?}");
        assert!(found[1].contains("it is a folder; name a file in it"), "{found:?}");
        let found = problems(&file.join("r.html"), &dir.path().join("new"));
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains("file is not a folder"), "{found:?}");
    }

    /// Everything that the settings name is looked at, not only the first thing that is wrong.
    #[test]
    fn problems_of_every_kind_are_found_together() {
        let dir = tempfile::tempdir().unwrap();
        let missing = |name: &str| Some(dir.path().join(name));
        let mut config = Config::default();
        config.alerts.file = missing("alerts/a");
        config.plugins.dir = missing("plugins");
        config.rules.dir = missing("rules");
        config.templates_dir = missing("templates");
        let found: Vec<String> = check(&config).iter().map(|e| format!("{e:#}")).collect();
        assert_eq!(found.len(), 4, "{found:?}");
        for (message, part) in found.iter().zip(["alerts", "plugins", "rules", "templates"]) {
            assert!(message.contains(&dir.path().join(part).display().to_string()), "{message}");
        }
        let url = "http://localhost/".to_owned();
        let template = Some("nope.json.tera".to_owned());
        let webhook = Some(crate::config::WebhookSettings { url, template, ..Default::default() });
        let config =
            Config { alerts: crate::config::AlertSettings { webhook, ..Default::default() }, ..Config::default() };
        let found = check(&config);
        assert_eq!(found.len(), 1);
        assert!(format!("{:#}", found[0]).contains("nope.json.tera"), "{:#}", found[0]);
    }

    /// Outputs that are switched off need no folder.
    #[test]
    fn outputs_that_are_off_are_not_checked() {
        let mut config = Config::default();
        config.report.path = None;
        config.alerts.file = None;
        assert_eq!(check(&config).len(), 0);
    }
}
