//! The settings that a recording keeps, so that rules run on it as they ran live.

use std::path::Path;

use crate::Result;
use crate::config::{Config, Override};
use crate::units::format_duration;

/// Settings of rules, alerts, history and report.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings(toml::Table);

impl Settings {
    /// What a recording keeps of a run's settings.
    pub fn of(config: &Config) -> Settings {
        let integer = |n: u64| toml::Value::Integer(n.cast_signed());
        let text = |s: String| toml::Value::String(s);
        let table = |entries: Vec<(&str, toml::Value)>| {
            toml::Value::Table(entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
        };
        let mut rules: toml::Table =
            config.rules.params.iter().map(|(name, params)| (name.clone(), params.clone().into())).collect();
        rules.insert("max_instructions".into(), integer(config.rules.max_instructions));
        rules.insert("max_memory".into(), text(format!("{}B", config.rules.max_memory.0)));
        let alerts = table(vec![
            ("hold", text(format_duration(config.alerts.hold))),
            ("cooldown", text(format_duration(config.alerts.cooldown))),
            ("min_severity", text(config.alerts.min_severity.as_str().to_owned())),
        ]);
        let history = table(vec![
            ("samples", integer(config.history.samples as u64)),
            ("points", integer(config.history.points as u64)),
        ]);
        let report = table(vec![("max_sites", integer(config.report.max_sites as u64))]);
        let sections = [("rules", rules.into()), ("alerts", alerts), ("history", history), ("report", report)];
        Settings(sections.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
    }

    /// As text of a file of settings.
    pub fn to_text(&self) -> String {
        self.0.to_string()
    }
}

/// The settings of a recording with others laid over them.
///
/// # Errors
/// One of them is wrong.
pub fn recorded(settings: &str, shown: &str, overrides: &[Override]) -> Result<Config> {
    let name = format!("settings in {shown}");
    Config::resolve(Some((Path::new(&name), settings)), overrides)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A replay under other settings than the run's would find something else.
    #[test]
    fn settings_come_back() {
        let text = "[rules]\nmax_memory = \"64MiB\"\n[rules.growth]\nenabled = false\nmin_bytes = \"3MiB\"\n\
                    [alerts]\nhold = \"1m30s\"\nmin_severity = \"info\"\n[history]\nsamples = 77\n\
                    [report]\nmax_sites = 5";
        let config = Config::resolve(Some((Path::new("x"), text)), &[]).expect("settings");
        let back = recorded(&Settings::of(&config).to_text(), "x", &[]).expect("settings");
        assert_eq!((&back.rules, &back.history), (&config.rules, &config.history));
        assert_eq!((back.alerts.hold, back.alerts.min_severity), (Duration::from_secs(90), config.alerts.min_severity));
        assert_eq!(back.report.max_sites, 5);
        let back = recorded(&Settings::of(&Config::default()).to_text(), "x", &[]).expect("settings");
        assert_eq!(back.alerts.hold, Config::default().alerts.hold);
    }
}
