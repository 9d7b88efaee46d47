//! From what was typed to what is to be done, with the settings it runs under.

use std::path::{Path, PathBuf};

use clap_complete::Shell;

use super::{
    Cli, KernelArgs, LaunchArgs, NO_TARGET, PartArgs, ReplayArgs, RulesCommand, RulesTask, RunArgs, SettingsArgs,
    Subcommands, TargetArgs, WatchArgs,
};
use crate::config::{self, Config, Override, TargetSpec};
use crate::error::{Error, Result};
use crate::recording::Filter;
use crate::{diff, export, import, plugin, recorded, run};

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Watch the targets of the settings; there is at least one.
    Run {
        /// No live view.
        quiet: bool,
        /// Snapshots and alerts as JSON lines on standard output.
        json: bool,
    },
    /// Run the command of the settings' one target to its end.
    Launch(Box<run::Options>),
    /// Do something about rules.
    Rules(RulesTask),
    /// Check the settings, which have been read already, and what they name.
    Check,
    /// Say what kernel and targets allow.
    Doctor {
        /// Processes to look at; may be empty.
        pids: Vec<u32>,
    },
    /// Print every event of the processes in the settings' targets.
    Trace {
        /// As JSON lines.
        json: bool,
    },
    /// Watch and scan the processes in the settings' targets.
    Scan {
        /// As JSON lines.
        json: bool,
    },
    /// Put names into a report.
    Symbolize {
        /// The report.
        report: PathBuf,
        /// Folders with debug files; at least one.
        debug_dirs: Vec<PathBuf>,
        /// Where the result is written.
        out: PathBuf,
    },
    /// Make a recording of a log.
    Import(import::Args),
    /// Write a snapshot of a recording in another format.
    Export(export::Args),
    /// Compare two snapshots.
    Diff(diff::Args),
    /// Write the report of a recording.
    Report {
        /// The recording.
        recording: PathBuf,
        /// Where the page is written.
        output: PathBuf,
        /// What part of it.
        filter: Filter,
        /// What overrides the settings of the run.
        overrides: Vec<Override>,
    },
    /// Run rules over a recording.
    Replay(Box<recorded::Options>),
    /// Print a completion script.
    Completions(Shell),
    /// Print the manual page of memleak, or of one of its subcommands.
    Man(Option<String>),
}

/// A command with the settings it runs under.
#[derive(Clone, Debug, PartialEq)]
pub struct Invocation {
    /// What is to be done.
    pub command: Command,
    /// Checked settings.
    pub config: Config,
    /// How often `-v` was given.
    pub verbosity: u8,
}

impl Cli {
    /// Reads the file that was named, if any, and resolves everything.
    ///
    /// # Errors
    /// The file cannot be read, a setting is wrong, or there is nothing to watch.
    pub fn resolve(self) -> Result<Invocation> {
        self.resolve_with(config::read_file)
    }

    /// As [`Cli::resolve`], with a function that reads the file: pure if that is.
    ///
    /// # Errors
    /// As [`Cli::resolve`].
    pub fn resolve_with(self, read_file: impl FnOnce(&Path) -> Result<String>) -> Result<Invocation> {
        match self.command {
            None => self.run.resolve(read_file),
            Some(Subcommands::Check { file, settings }) => settings.resolve(Command::Check, file, &[], read_file),
            Some(Subcommands::Doctor { pid, config, settings }) => {
                settings.resolve(Command::Doctor { pids: pid }, config.file, &[], read_file)
            }
            Some(Subcommands::Kernel { kernel, watch }) => {
                let json = watch.json;
                let mut resolved = watch.resolve(kernel.backend.clone(), read_file)?;
                if kernel.trace {
                    resolved.command = Command::Trace { json };
                }
                kernel.apply(&mut resolved.config)?;
                Ok(resolved)
            }
            Some(Subcommands::Run(arguments)) => arguments.resolve(read_file),
            Some(Subcommands::Trace { pid, json, duration, config, settings }) => {
                let duration = duration.map(|d| Override::flag("--duration", "duration", d));
                let mut resolved =
                    settings.resolve(Command::Trace { json }, config.file, duration.as_slice(), read_file)?;
                resolved.config.targets = vec![TargetSpec { pid, ..TargetSpec::default() }];
                Ok(resolved)
            }
            Some(Subcommands::Scan { pid, json, duration, stop, config, settings }) => {
                let duration = duration.map(|d| Override::flag("--duration", "duration", d));
                let stop = stop.then(|| Override::flag("--stop", "reachability.stop", "brief".to_owned()));
                let flags: Vec<Override> = duration.into_iter().chain(stop).collect();
                let mut resolved = settings.resolve(Command::Scan { json }, config.file, &flags, read_file)?;
                resolved.config.targets = vec![TargetSpec { pid, ..TargetSpec::default() }];
                Ok(resolved)
            }
            Some(Subcommands::Symbolize { report, debug_dir, out }) => {
                let out = out.unwrap_or_else(|| report.clone());
                let usual = debug_dir.is_empty().then(|| PathBuf::from("/usr/lib/debug"));
                let debug_dirs = debug_dir.into_iter().chain(usual).collect();
                Ok(plain(Command::Symbolize { report, debug_dirs, out }))
            }
            Some(Subcommands::Import(args)) => Ok(plain(Command::Import(args))),
            Some(Subcommands::Export(args)) => Ok(plain(Command::Export(args))),
            Some(Subcommands::Diff(args)) => Ok(plain(Command::Diff(args))),
            Some(Subcommands::Rules { command }) => match command {
                RulesCommand::List { json, config, settings } => {
                    settings.resolve(Command::Rules(RulesTask::List { json }), config.file, &[], read_file)
                }
                RulesCommand::Test { what, config, settings } => {
                    settings.resolve(Command::Rules(RulesTask::Test(what)), config.file, &[], read_file)
                }
                RulesCommand::New { name, dir } => Ok(plain(Command::Rules(RulesTask::New { name, dir }))),
            },
            Some(Subcommands::Report { recording, output, part, settings }) => {
                let overrides = settings.sets.clone();
                let command = Command::Report { recording, output, filter: part.filter(), overrides };
                settings.resolve(command, None, &[], read_file)
            }
            Some(Subcommands::Replay(arguments)) => arguments.resolve(read_file),
            Some(Subcommands::Completions { shell }) => Ok(plain(Command::Completions(shell))),
            Some(Subcommands::Man { subcommand }) => Ok(plain(Command::Man(subcommand))),
        }
    }
}

/// A command that needs no settings.
fn plain(command: Command) -> Invocation {
    Invocation { command, config: Config::default(), verbosity: 0 }
}

impl RunArgs {
    fn resolve(self, read_file: impl FnOnce(&Path) -> Result<String>) -> Result<Invocation> {
        let mut resolved = self.watch.resolve(None, read_file)?;
        let config = &mut resolved.config;
        let targets = self.targets.into_specs();
        if !targets.is_empty() {
            config.targets = targets;
        }
        if config.targets.is_empty() && !config.kernel.enabled {
            return Err(Error::config(NO_TARGET));
        }
        Ok(resolved)
    }
}

impl WatchArgs {
    /// Settings of a run, without its targets. `backend` is how the kernel is attached to.
    fn resolve(self, backend: Option<String>, read_file: impl FnOnce(&Path) -> Result<String>) -> Result<Invocation> {
        let flags: Vec<Override> = [
            ("--interval", "interval", self.interval),
            ("--duration", "duration", self.duration),
            ("--backend", "kernel.backend", backend),
        ]
        .into_iter()
        .filter_map(|(name, key, value)| Some(Override::flag(name, key, value?)))
        .collect();
        let command = Command::Run { quiet: self.quiet, json: self.json };
        let mut resolved = self.settings.resolve(command, self.config.file, &flags, read_file)?;
        let config = &mut resolved.config;
        // Paths need no check and may be other than UTF-8: they do not go through the text of an override.
        override_path(&mut config.report.path, self.report);
        override_path(&mut config.alerts.file, self.alerts);
        override_path(&mut config.recording.path, self.record);
        Ok(resolved)
    }
}

impl SettingsArgs {
    fn resolve(
        self,
        command: Command,
        file: Option<PathBuf>,
        flags: &[Override],
        read_file: impl FnOnce(&Path) -> Result<String>,
    ) -> Result<Invocation> {
        let text = file.as_deref().map(read_file).transpose()?;
        let overrides = [&self.sets, flags].concat();
        let mut config = Config::resolve(file.as_deref().zip(text.as_deref()), &overrides)?;
        override_path(&mut config.rules.dir, self.rules);
        override_path(&mut config.rules.suppressions_file, self.suppressions);
        override_path(&mut config.plugins.dir, self.plugins);
        override_path(&mut config.templates_dir, self.templates);
        Ok(Invocation { command, config, verbosity: self.verbose })
    }
}

impl TargetArgs {
    /// Process ids, the globs together, and the command are a target each.
    fn into_specs(self) -> Vec<TargetSpec> {
        let command = self.command.map_or(self.trailing, |c| c.0);
        let conditions = TargetSpec {
            name: self.name,
            exe: self.exe,
            cgroup: self.cgroup,
            container: self.container,
            unit: self.unit,
            ..TargetSpec::default()
        };
        let pids = TargetSpec { pid: self.pid, ..TargetSpec::default() };
        let launched = TargetSpec { command, ..TargetSpec::default() };
        let mut specs = vec![pids, conditions, launched];
        specs.retain(|spec| *spec != TargetSpec::default());
        specs
    }
}

/// A flag with a path wins; an empty one switches the setting off, as in the file.
fn override_path(setting: &mut Option<PathBuf>, flag: Option<PathBuf>) {
    if let Some(path) = flag {
        *setting = (!path.as_os_str().is_empty()).then_some(path);
    }
}

impl KernelArgs {
    /// Lays the flags over the settings.
    fn apply(self, config: &mut Config) -> Result<()> {
        config.targets.clear();
        let k = &mut config.kernel;
        k.enabled = true;
        for (setting, flags) in [(&mut k.caches, self.cache), (&mut k.modules, self.module), (&mut k.gfp, self.gfp)] {
            if !flags.is_empty() {
                *setting = flags;
            }
        }
        let most = memleak_probes::kernel::MAX_KERNEL_PIDS;
        if self.pid.len() > most {
            return Err(Error::config(format!("--pid: {} processes are too many: at most {most}", self.pid.len())));
        }
        if !self.pid.is_empty() {
            k.pids = self.pid;
        }
        k.cgroup = self.cgroup.or(k.cgroup.take());
        if !self.probe_set.is_empty() {
            let sets: Vec<String> = plugin::load(&config.plugins)?
                .into_iter()
                .filter(|p| p.kernel.is_some())
                .map(|p| p.spec.name)
                .collect();
            if let Some(unknown) = self.probe_set.iter().find(|name| !sets.contains(name)) {
                let message =
                    format!("--probe-set {unknown}: no such probe set of the kernel; there are {}", sets.join(", "));
                return Err(Error::config(message));
            }
            for name in sets {
                let on = self.probe_set.contains(&name);
                config.plugins.enabled.insert(name, on);
            }
        }
        Ok(())
    }
}

impl LaunchArgs {
    fn resolve(self, read_file: impl FnOnce(&Path) -> Result<String>) -> Result<Invocation> {
        let options = run::Options {
            fail_on: self.fail_on,
            format: self.format,
            out: self.output,
            wait: self.wait,
            only: self.only,
            exit_code: self.exit_code,
            quiet: self.quiet,
        };
        let mut settings = self.settings;
        // Exact unless somebody says otherwise; --set still wins.
        settings.sets.insert(0, Override::flag("memleak run", "collector.budget", "off".to_owned()));
        let flags: Vec<Override> =
            [("--budget", "collector.budget", self.budget), ("--duration", "duration", self.duration)]
                .into_iter()
                .filter_map(|(name, key, value)| Some(Override::flag(name, key, value?)))
                .collect();
        let mut resolved = settings.resolve(Command::Launch(Box::new(options)), self.config.file, &flags, read_file)?;
        resolved.config.targets = vec![TargetSpec { command: self.command, ..TargetSpec::default() }];
        Ok(resolved)
    }
}

impl ReplayArgs {
    fn resolve(self, read_file: impl FnOnce(&Path) -> Result<String>) -> Result<Invocation> {
        let mut options = Box::new(recorded::Options {
            recording: self.recording,
            json: self.json,
            overrides: self.settings.sets.clone(),
            compare: self.compare,
            compare_overrides: self.compare_set,
            labels: self.labels,
            ..recorded::Options::default()
        });
        // Only what was typed counts: everything else is the recording's.
        let typed = self.settings.resolve(Command::Check, None, &[], read_file)?;
        options.rules = typed.config.rules.dir.clone();
        options.suppressions = typed.config.rules.suppressions_file.clone();
        Ok(Invocation { command: Command::Replay(options), ..typed })
    }
}

impl PartArgs {
    fn filter(self) -> Filter {
        Filter { since_s: self.since, until_s: self.until, pids: self.pid, probe_sets: self.probe_set }
    }
}
