use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use clap::CommandFactory;

use super::*;
use crate::ErrorKind;
use crate::config::{Config, TargetSpec};
use crate::error::{Error, Result};

const FILE: &str = "\
    interval = \"7s\"\n[[target]]\nname = \"from-file\"\n[report]\npath = \"file.html\"\n[rules]\ndir = \"file-rules\"\n";

/// Resolves a command line; `m.toml` is [`FILE`].
fn resolve(line: &str) -> Result<Invocation> {
    let words = shlex::split(line).expect("the test quotes well");
    let cli = Cli::try_parse_from(words).map_err(|e| Error::config(e.to_string()))?;
    cli.resolve_with(|path| {
        assert_eq!(path, Path::new("m.toml"));
        Ok(FILE.to_owned())
    })
}

fn config(line: &str) -> Config {
    resolve(line).unwrap_or_else(|e| panic!("{line}: {e}")).config
}

fn message(line: &str) -> String {
    resolve(line).expect_err(line).to_string()
}

fn spec(change: impl FnOnce(&mut TargetSpec)) -> TargetSpec {
    let mut spec = TargetSpec::default();
    change(&mut spec);
    spec
}

/// The definitions of flags must not contradict each other; clap checks that only when asked.
#[test]
fn the_definitions_are_consistent() {
    Cli::command().debug_assert();
}

/// Every flag that sets a key must reach that key and no other.
#[test]
fn each_flag_reaches_its_setting() {
    let base = config("memleak -p 1");
    let changed = |flag: &str| config(&format!("memleak -p 1 {flag}"));
    let expect = |flag: &str, change: &dyn Fn(&mut Config)| {
        let mut expected = base.clone();
        change(&mut expected);
        assert_ne!(expected, base, "{flag}");
        assert_eq!(changed(flag), expected, "{flag}");
    };
    expect("--interval 250ms", &|c| c.interval = Duration::from_millis(250));
    expect("--duration 1m30s", &|c| c.duration = Some(Duration::from_secs(90)));
    expect("--report r.html", &|c| c.report.path = Some("r.html".into()));
    expect("--report ''", &|c| c.report.path = None);
    expect("--alerts a.ndjson", &|c| c.alerts.file = Some("a.ndjson".into()));
    expect("--rules r", &|c| c.rules.dir = Some("r".into()));
    expect("--plugins p", &|c| c.plugins.dir = Some("p".into()));
    expect("--templates t", &|c| c.templates_dir = Some("t".into()));
    expect("--set live.sites=3", &|c| c.live.sites = 3);
    expect("--set alerts.hold=9s --set live.sites=3", &|c| {
        c.alerts.hold = Duration::from_secs(9);
        c.live.sites = 3;
    });
}

/// Flags beat `--set`, which beats the file, wherever they stand on the line.
#[test]
fn flags_override_set_and_set_overrides_the_file() {
    assert_eq!(config("memleak --config m.toml").interval, Duration::from_secs(7));
    assert_eq!(config("memleak --config m.toml --set interval=8s").interval, Duration::from_secs(8));
    assert_eq!(config("memleak --interval 9s --config m.toml --set interval=8s").interval, Duration::from_secs(9));
    let c = config("memleak --config m.toml --report flag.html --rules ''");
    assert_eq!(c.report.path, Some("flag.html".into()));
    assert_eq!(c.rules.dir, None);
}

/// Which processes are watched is the most consequential thing that flags say.
#[test]
fn each_target_flag_becomes_its_target() {
    let cases = [
        ("-p 1", spec(|t| t.pid = vec![1])),
        ("-p 1,2 --pid 3", spec(|t| t.pid = vec![1, 2, 3])),
        ("--name 'a*'", spec(|t| t.name = Some("a*".to_owned()))),
        ("--exe '/b/*'", spec(|t| t.exe = Some("/b/*".to_owned()))),
        ("--cgroup /sys/fs/cgroup/c/", spec(|t| t.cgroup = Some("c".to_owned()))),
        ("--container 3f4a", spec(|t| t.container = Some("3f4a".to_owned()))),
        ("--unit nginx", spec(|t| t.unit = Some("nginx".to_owned()))),
        ("-c \"x 'y z' -p\"", spec(|t| t.command = vec!["x".to_owned(), "y z".to_owned(), "-p".to_owned()])),
        ("-- x 'y z' --json", spec(|t| t.command = vec!["x".to_owned(), "y z".to_owned(), "--json".to_owned()])),
        (
            "--name a --exe b",
            spec(|t| {
                t.name = Some("a".to_owned());
                t.exe = Some("b".to_owned());
            }),
        ),
    ];
    for (flags, expected) in cases {
        let expected = [expected];
        assert_eq!(config(&format!("memleak {flags}")).targets, expected, "{flags}");
        assert_eq!(config(&format!("memleak --config m.toml {flags}")).targets, expected, "{flags} replaces");
    }
    let several = config("memleak -p 1 --name a -- x").targets;
    assert_eq!(
        several,
        [
            spec(|t| t.pid = vec![1]),
            spec(|t| t.name = Some("a".to_owned())),
            spec(|t| t.command = vec!["x".to_owned()])
        ]
    );
    assert_eq!(config("memleak --config m.toml").targets, [spec(|t| t.name = Some("from-file".to_owned()))]);
}

/// Flags of the run itself.
#[test]
fn each_run_flag_reaches_the_command() {
    let run = |flags: &str| {
        let i = resolve(&format!("memleak -p 1 {flags}")).unwrap();
        (i.command, i.verbosity)
    };
    assert_eq!(run(""), (Command::Run { quiet: false, json: false }, 0));
    assert_eq!(run("--quiet"), (Command::Run { quiet: true, json: false }, 0));
    assert_eq!(run("-q --json"), (Command::Run { quiet: true, json: true }, 0));
    assert_eq!(run("-vv"), (Command::Run { quiet: false, json: false }, 2));
}

/// Each subcommand, with each of its own flags.
#[test]
fn each_subcommand_resolves() {
    let command = |line: &str| resolve(line).unwrap_or_else(|e| panic!("{line}: {e}")).command;
    assert_eq!(command("memleak check"), Command::Check);
    assert_eq!(command("memleak check m.toml -v"), Command::Check);
    assert_eq!(config("memleak check m.toml --set live.sites=3 --rules r").rules.dir, Some("r".into()));
    assert_eq!(config("memleak check m.toml").interval, Duration::from_secs(7));
    assert_eq!(command("memleak doctor"), Command::Doctor { pids: vec![] });
    assert_eq!(command("memleak doctor -p 1,2"), Command::Doctor { pids: vec![1, 2] });
    assert_eq!(config("memleak doctor --config m.toml").interval, Duration::from_secs(7));
    assert_eq!(config("memleak trace -p 1 --config m.toml").rules.dir, Some("file-rules".into()));
    assert_eq!(command("memleak trace -p 1"), Command::Trace { json: false });
    assert_eq!(command("memleak trace -p 1 --json"), Command::Trace { json: true });
    let trace = config("memleak trace -p 1 -p 2 --duration 5s --plugins p --set collector.backend=perf");
    assert_eq!(trace.targets, [spec(|t| t.pid = vec![1, 2])]);
    assert_eq!(trace.duration, Some(Duration::from_secs(5)));
    assert_eq!(trace.plugins.dir, Some("p".into()));
    assert_eq!(trace.collector.backend, config::Backend::Perf);
    assert_eq!(command("memleak scan -p 1 --json"), Command::Scan { json: true });
    let scan = config("memleak scan -p 1,2 --duration 5s --stop --set reachability.max_stop=20ms");
    assert_eq!(scan.targets, [spec(|t| t.pid = vec![1, 2])]);
    assert_eq!(scan.duration, Some(Duration::from_secs(5)));
    assert_eq!((scan.reachability.stop, scan.reachability.max_stop), (true, Duration::from_millis(20)));
    assert_eq!(command("memleak completions zsh"), Command::Completions(Shell::Zsh));
    assert_eq!(command("memleak man"), Command::Man(None));
    assert_eq!(command("memleak man trace"), Command::Man(Some("trace".to_owned())));
}

/// Wrong input must be named together with its flag.
#[test]
fn wrong_flags_are_named() {
    let cases = [
        ("memleak", "no target: say what to watch"),
        ("memleak --interval 1s", "memleak -p 1234"),
        ("memleak -p 0", "invalid value '0' for '--pid <PID>'"),
        ("memleak -p x", "invalid value 'x' for '--pid <PID>'"),
        ("memleak -p 1 --interval 10", "--interval: `interval`: \"10\" has no unit"),
        ("memleak -p 1 --duration 1x", "--duration: `duration`: unknown unit \"x\""),
        ("memleak --name 'a['", "\"a[\" is not a valid glob"),
        ("memleak --cgroup ../x", "\"../x\" is not a plain path"),
        ("memleak --name ''", "it is empty"),
        ("memleak -c \"a 'b\"", "is not closed"),
        ("memleak -c ''", "the command is empty"),
        ("memleak -c a -- b", "cannot be used with"),
        ("memleak -p 1 --set x", "is not of the form key.path=value"),
        ("memleak -p 1 --set hold=1s", "--set hold: unknown key `hold`; did you mean `alerts.hold`?"),
        ("memleak -p 1 doctor", "unexpected argument 'doctor'"),
        ("memleak trace", "--pid <PID>"),
        ("memleak --inteval 1s", "--interval"),
        ("memleak chekc", "unexpected argument 'chekc'"),
    ];
    for (line, part) in cases {
        let found = message(line);
        assert!(found.contains(part), "{line}: {found}");
    }
}

/// The long help is the manual: every flag must be explained, and the exit codes named.
#[test]
fn every_flag_has_help() {
    let mut root = Cli::command();
    root.build();
    let all = std::iter::once(&root).chain(root.get_subcommands());
    for command in all {
        assert!(command.get_about().is_some(), "{}", command.get_name());
        for arg in command.get_arguments() {
            assert!(arg.get_help().is_some(), "{} {}", command.get_name(), arg.get_id());
        }
    }
    assert!(root.render_long_help().to_string().contains(EXIT_CODES));
}

/// Packagers build these two; both must mention what they are for.
#[test]
fn completions_and_manual_pages_are_written() {
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        let mut out = Vec::new();
        write_completions(shell, &mut out).unwrap();
        assert!(String::from_utf8(out).unwrap().contains("cgroup"), "{shell}");
    }
    let page = |subcommand: Option<&str>| {
        let mut out = Vec::new();
        write_man(subcommand, &mut out).map(|()| String::from_utf8(out).unwrap())
    };
    assert!(page(None).unwrap().contains("Exit codes"));
    assert!(page(Some("trace")).unwrap().contains("lifetime"));
    assert!(page(Some("trase")).unwrap_err().to_string().contains("did you mean \"trace\"?"));
}

/// `memleak man | head` must end in peace, but a full disk must not.
#[test]
fn a_closed_pipe_is_success_and_a_full_disk_is_not() {
    struct Fails(io::ErrorKind);
    impl Write for Fails {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    assert!(write_man(None, &mut Fails(io::ErrorKind::BrokenPipe)).is_ok());
    let full = write_completions(Shell::Bash, &mut Fails(io::ErrorKind::StorageFull)).unwrap_err();
    assert_eq!(full.kind(), ErrorKind::Io);
    assert!(!is_closed_pipe(&full));
    assert!(is_closed_pipe(&Error::io("failed to write a line", io::ErrorKind::BrokenPipe.into())));
}

/// People copy the examples of docs/ci.md: each must be a command line that is understood.
#[test]
fn the_examples_for_ci_are_understood() {
    let text = include_str!("../../../docs/ci.md").replace("\\\n", " ");
    let lines: Vec<&str> = text.lines().filter_map(|l| l.find("memleak run ").map(|at| &l[at..])).collect();
    let lines: Vec<&&str> = lines.iter().filter(|l| l.contains(" -- ")).collect();
    assert_eq!(lines.len(), 3, "{lines:?}");
    for line in lines {
        let resolved = resolve(line).unwrap_or_else(|e| panic!("{line}: {e}"));
        assert!(matches!(resolved.command, Command::Launch(_)), "{line}");
        assert_eq!(resolved.config.targets[0].command, ["./my-tests"], "{line}");
        // Exact unless somebody says otherwise.
        assert_eq!(resolved.config.collector.budget.share, None, "{line}");
    }
    assert_eq!(config("memleak run --budget 5% -- x").collector.budget.share, Some(0.05));
}
