use std::collections::BTreeSet;

use super::*;

const EXAMPLE: &str = include_str!("../../../config.example.toml");

fn parse(text: &str) -> Result<Config> {
    Config::resolve(Some((Path::new("m.toml"), text)), &[])
}

fn set(arguments: &[&str]) -> Result<Config> {
    let sets: Vec<String> = arguments.iter().map(|s| (*s).to_owned()).collect();
    Config::load(None, &sets)
}

fn message(result: Result<Config>) -> String {
    result.expect_err("the settings are wrong").to_string()
}

/// The example documents the defaults: if the two part, people configure what they do not mean.
#[test]
fn the_example_is_exactly_the_defaults_and_the_demo() {
    let target = TargetSpec { name: Some("memleak-demo".to_owned()), ..TargetSpec::default() };
    assert_eq!(parse(EXAMPLE).unwrap(), Config { targets: vec![target], ..Config::default() });
}

/// A key that the example does not show might as well not exist.
#[test]
fn the_example_shows_every_key() {
    let mut reader = read::Reader::default();
    decode::decode(&mut reader, tree::Entries::new());
    // Headers and keys, also those that are commented out, but not the sentences.
    let mut shown = BTreeSet::new();
    let mut section = String::new();
    for line in EXAMPLE.lines() {
        let line = line.strip_prefix("# ").unwrap_or(line);
        if let Some(header) = line.strip_prefix('[') {
            section = header.trim_start_matches('[').trim_end_matches(']').to_owned();
            shown.insert(section.clone());
        } else if let Some((key, _)) = line.split_once(" = ").filter(|(key, _)| !key.contains(' ')) {
            shown.insert(if section.is_empty() { key.to_owned() } else { format!("{section}.{key}") });
        }
    }
    let named_by_user = ["plugins.mmap", "plugins.mmap.enabled", "rules.growth"];
    let named_by_user = named_by_user.into_iter().chain(["rules.growth.enabled", "rules.growth.min_bytes"]);
    let expected: BTreeSet<String> = reader.known.iter().cloned().chain(named_by_user.map(str::to_owned)).collect();
    assert_eq!(shown, expected);
}

/// What is commented out in the example must work for those who remove the `# `.
#[test]
fn what_the_example_comments_out_is_valid() {
    let uncomment = |line: &str| {
        let candidate = line.strip_prefix("# ").unwrap_or(line);
        let is_setting =
            candidate.starts_with('[') || candidate.split_once(" = ").is_some_and(|(k, _)| !k.contains(' '));
        // A command excludes the conditions beside it.
        let keep = is_setting && !candidate.starts_with("command");
        if keep { format!("{candidate}\n") } else { "\n".to_owned() }
    };
    let config = parse(&EXAMPLE.lines().map(uncomment).collect::<String>()).unwrap();
    assert_eq!(config.targets[0].pid, [1234, 5678]);
    assert_eq!(config.targets[0].cgroup.as_deref(), Some("system.slice/nginx.service"));
    assert!(config.plugins.enabled["mmap"]);
    assert_eq!(config.rules.params["growth"]["min_bytes"].as_str(), Some("1MiB"));
    let command = parse("[[target]]\ncommand = [\"./server\", \"--port\", \"8080\"]").unwrap();
    assert_eq!(command.targets[0].command, ["./server", "--port", "8080"]);
}

/// Every key must reach its own field; two swapped ones would pass a test of the defaults.
#[test]
fn every_key_reaches_its_field() {
    let config = parse(
        r#"
        interval = "2s"
        duration = "30s"
        [[target]]
        pid = 7
        [[target]]
        name = "a*"
        exe = "/b/*"
        cgroup = "/sys/fs/cgroup/c/d/"
        container = "3f4a"
        unit = "nginx"
        budget = "2.5%"
        latency = "sensitive"
        [[target]]
        command = "x 'y z'"
        budget = "off"
        [collector]
        backend = "perf"
        max_outstanding = 11
        max_sites = 12
        max_threads = 13
        max_frames = 14
        min_size = 15
        sample_bytes = "16KiB"
        placement = "entry"
        stacks = "frame-pointers"
        python_frames = false
        unwind_cache = "u"
        budget = "6%"
        budget_floor = "7 %"
        total_budget = "8.5%"
        max_window = "90ms"
        max_window_hits = 9000
        max_slowdown = "40%"
        [history]
        samples = 116
        points = 1017
        [plugins]
        dir = "p"
        glibc.enabled = false
        [rules]
        dir = "r"
        suppressions_file = "s"
        max_instructions = 1018
        max_memory = "1MiB"
        growth = { enabled = false, list = ["a", "b"], share = 0.5 }
        [alerts]
        file = "f"
        stdout = true
        hold = "19s"
        cooldown = "20s"
        min_severity = "info"
        [alerts.webhook]
        url = "https://example.org/hook"
        timeout = "21s"
        attempts = 22
        queue = 23
        template = "t"
        [report]
        path = "o"
        every = "24s"
        max_sites = 25
        title = "i"
        [recording]
        path = "q"
        max_size = "27MiB"
        [templates]
        dir = "d"
        [live]
        sites = 26
        [reachability]
        automatic = false
        every = "27s"
        core_share = "28%"
        max_bandwidth = "37MiB/s"
        max_blocks = 3800
        max_memory = "29MiB"
        stop = "brief"
        max_stop = "33ms"
        at_exit = false
        scans = 30
        min_lost = 31
        min_fraction = "32%"
        [kernel]
        enabled = true
        backend = "kprobe"
        sample_bytes = "8KiB"
        budget = "off"
        max_outstanding = 33
        max_sites = 34
        min_size = "35B"
        caches = ["kmalloc-*"]
        modules = "leak*"
        gfp = ["__GFP_ZERO"]
        pids = [36]
        cgroup = "/g/"
        movable_pages = true
        "#,
    )
    .unwrap();
    let secs = Duration::from_secs;
    let growth = toml::toml! { enabled = false list = ["a", "b"] share = 0.5 };
    let text = |s: &str| Some(s.to_owned());
    let expected = Config {
        kernel: KernelSettings {
            enabled: true,
            backend: KernelBackend::Kprobe,
            sample_bytes: Bytes(8 << 10),
            budget: None,
            max_outstanding: 33,
            max_sites: 34,
            min_size: Bytes(35),
            caches: vec!["kmalloc-*".to_owned()],
            modules: vec!["leak*".to_owned()],
            gfp: vec!["__GFP_ZERO".to_owned()],
            pids: vec![36],
            cgroup: text("g"),
            movable_pages: true,
        },
        interval: secs(2),
        duration: Some(secs(30)),
        targets: vec![
            TargetSpec { pid: vec![7], ..TargetSpec::default() },
            TargetSpec {
                name: text("a*"),
                exe: text("/b/*"),
                cgroup: text("c/d"),
                container: text("3f4a"),
                unit: text("nginx"),
                budget: Some(Budget::Share(0.025)),
                latency: Latency::Sensitive,
                ..TargetSpec::default()
            },
            TargetSpec {
                command: vec!["x".to_owned(), "y z".to_owned()],
                budget: Some(Budget::Off),
                ..TargetSpec::default()
            },
        ],
        collector: CollectorSettings {
            backend: Backend::Perf,
            max_outstanding: 11,
            max_sites: 12,
            max_threads: 13,
            max_frames: 14,
            min_size: Bytes(15),
            sample_bytes: Bytes(16 << 10),
            placement: Placement::Entry,
            stacks: Stacks::FramePointers,
            python_frames: false,
            unwind_cache: UnwindCache::Folder("u".into()),
            budget: BudgetSettings {
                share: Some(0.06),
                floor: 0.07,
                total: 0.085,
                max_window: Duration::from_millis(90),
                max_window_hits: 9000,
                max_slowdown: 0.4,
                latency: Latency::Normal,
            },
        },
        history: crate::history::Bounds { samples: 116, points: 1017 },
        plugins: PluginSettings { dir: Some("p".into()), enabled: BTreeMap::from([("glibc".to_owned(), false)]) },
        rules: RuleSettings {
            dir: Some("r".into()),
            suppressions_file: Some("s".into()),
            max_instructions: 1018,
            max_memory: Bytes(1 << 20),
            params: BTreeMap::from([("growth".to_owned(), growth)]),
        },
        alerts: AlertSettings {
            file: Some("f".into()),
            stdout: true,
            hold: secs(19),
            cooldown: secs(20),
            min_severity: Severity::Info,
            webhook: Some(WebhookSettings {
                url: "https://example.org/hook".to_owned(),
                timeout: secs(21),
                attempts: 22,
                queue: 23,
                template: text("t"),
            }),
        },
        report: ReportSettings { path: Some("o".into()), every: Some(secs(24)), max_sites: 25, title: text("i") },
        recording: RecordingSettings { path: Some("q".into()), max_size: Bytes(27 << 20) },
        templates_dir: Some("d".into()),
        live: LiveSettings { sites: 26 },
        reachability: ReachabilitySettings {
            automatic: false,
            every: secs(27),
            core_share: 0.28,
            max_bandwidth: f64::from(37 << 20),
            max_blocks: 3800,
            max_memory: Bytes(29 << 20),
            stop: true,
            max_stop: Duration::from_millis(33),
            at_exit: false,
            limits: crate::reachability::Limits { scans: 30, most_scans: 30, min_lost: 31, min_fraction: 0.32 },
        },
    };
    assert_eq!(config, expected);
}

/// A typing error must be found at its place, with the key that was meant.
#[test]
fn unknown_keys_name_their_place_and_the_nearest_key() {
    let cases = [
        ("intervall = \"1s\"", "m.toml:1:1: unknown key `intervall`; did you mean `interval`?"),
        (
            "[alerts]\nhold = \"1s\"\n  coldown = \"1s\"",
            "m.toml:3:3: unknown key `alerts.coldown`; did you mean `alerts.cooldown`?",
        ),
        ("[alert]\nhold = \"1s\"", "m.toml:1:2: unknown key `alert`; did you mean `alerts`?"),
        ("[collector]\nframes = 3", "m.toml:2:1: unknown key `collector.frames`; did you mean `collector.max_frames`?"),
        ("[report]\ncooldown = \"1s\"", "m.toml:2:1: unknown key `report.cooldown`; did you mean `alerts.cooldown`?"),
        ("[[target]]\nnane = \"x\"", "m.toml:2:1: unknown key `target.nane`; did you mean `target.name`?"),
        (
            "[plugins.glibc]\nenable = true",
            "m.toml:2:1: unknown key `plugins.glibc.enable`; did you mean `plugins.glibc.enabled`?",
        ),
        (
            "[rules]\nmax_memry = \"1MiB\"",
            "m.toml:2:1: unknown key `rules.max_memry`; did you mean `rules.max_memory`?",
        ),
        ("zzzzzz = 1", "m.toml:1:1: unknown key `zzzzzz`"),
    ];
    for (text, expected) in cases {
        let found = message(parse(text));
        assert_eq!(found.lines().next(), Some(expected), "{text}");
    }
}

/// Wrong values must name place, key, what is wrong and what would be right.
#[test]
fn wrong_values_name_their_place_and_what_would_be_right() {
    let cases = [
        ("interval = \"10\"", "m.toml:1:12: `interval`: \"10\" has no unit; write for example \"10s\" or \"10ms\""),
        ("interval = 10", "m.toml:1:12: `interval`: \"10\" has no unit"),
        ("interval = \"1x\"", "m.toml:1:12: `interval`: unknown unit \"x\""),
        ("interval = \"1ms\"", "m.toml:1:12: `interval`: 1ms is out of range: it must be from 10ms to 1d"),
        ("interval = true", "m.toml:1:12: `interval`: must be a duration such as \"30s\", not a boolean"),
        ("collector = 1", "m.toml:1:13: `collector` must be a table, not an integer"),
        (
            "[collector]\nmax_frames = 128",
            "m.toml:2:14: `collector.max_frames`: 128 is out of range: it must be from 1 to 127",
        ),
        ("[collector]\nmax_sites = -1", "m.toml:2:13: `collector.max_sites`: -1 is out of range"),
        (
            "[collector]\nmax_sites = \"many\"",
            "m.toml:2:13: `collector.max_sites`: must be an integer, not the string \"many\"",
        ),
        (
            "[collector]\nsample_bytes = \"63B\"",
            "m.toml:2:16: `collector.sample_bytes`: 63B is out of range: it must be 0B, which records everything, or from 64B to 64MiB",
        ),
        ("[collector]\nsample_bytes = \"1GiB\"", "m.toml:2:16: `collector.sample_bytes`: 1GiB is out of range"),
        ("[collector]\nsample_bytes = -1", "m.toml:2:16: `collector.sample_bytes`: -1 is no size: it is negative"),
        ("[collector]\nmin_size = \"1XB\"", "m.toml:2:12: `collector.min_size`: unknown unit \"XB\""),
        (
            "[collector]\nbackend = \"sesion\"",
            "m.toml:2:11: `collector.backend`: \"sesion\" is none of auto, session, multi, perf, perf-plain; did you mean \"session\"?",
        ),
        (
            "[collector]\nstacks = \"dwarf\"",
            "m.toml:2:10: `collector.stacks`: \"dwarf\" is none of auto, frame-pointers",
        ),
        ("[collector]\nunwind_cache = \"\"", "m.toml:2:16: `collector.unwind_cache`: \"\" is no folder: give one"),
        (
            "[alerts]\nmin_severity = \"fatal\"",
            "m.toml:2:16: `alerts.min_severity`: \"fatal\" is none of info, warning, critical",
        ),
        ("[alerts.webhook]\nurl = \"ftp://x\"", "m.toml:2:7: `alerts.webhook.url`: \"ftp://x\" is no web address"),
        (
            "[alerts.webhook]\nurl = \"http:///x\"",
            "m.toml:2:7: `alerts.webhook.url`: \"http:///x\" is not a valid web address",
        ),
        (
            "[plugins.glibc]\nenabled = \"no\"",
            "m.toml:2:11: `plugins.glibc.enabled`: must be true or false, not the string \"no\"",
        ),
        ("[rules.growth]\nenabled = 1", "m.toml:2:11: `rules.growth.enabled`: must be true or false, not an integer"),
        ("[[target]]\nname = \"a[\"", "m.toml:2:8: `target.name`: \"a[\" is not a valid glob"),
        ("[[target]]\npid = 0", "m.toml:2:7: `target.pid`: 0 is no process id"),
        (
            "[[target]]\npid = [1, \"x\"]",
            "m.toml:2:7: `target.pid`: must be a process id or a list of them, not the string \"x\"",
        ),
        ("[[target]]\ncgroup = \"/\"", "m.toml:2:10: `target.cgroup`: \"/\" is the root of all cgroups"),
        ("[[target]]\ncgroup = \"a/../b\"", "m.toml:2:10: `target.cgroup`: \"a/../b\" is not a plain path"),
        ("[[target]]\ncontainer = \"3f\"", "m.toml:2:13: `target.container`: \"3f\" is too short"),
        ("[[target]]\nunit = \"a[\"", "m.toml:2:8: `target.unit`: \"a[\" is not a valid glob"),
        ("[[target]]\ncommand = \"a 'b\"", "m.toml:2:11: `target.command`: a quote in \"a 'b\" is not closed"),
        ("[[target]]", "m.toml:1:1: a target needs at least one of pid, name, exe, cgroup, container, unit or command"),
        ("[[target]]\npid = 1\ncommand = \"x\"", "m.toml:1:1: a target with a command takes no other condition"),
        ("[target]\npid = 1", "m.toml:1:1: `target`: must be a list of tables: [[target]] with two brackets"),
        ("target = [1]", "m.toml:1:11: `target` must be a list of tables, not of numbers"),
        ("x = 99999999999999999999", "m.toml:1:5: the number 99999999999999999999 is too large"),
    ];
    for (text, expected) in cases {
        let found = message(parse(text));
        assert!(found.lines().any(|line| line.starts_with(expected)), "{text}\n{found}");
    }
}

/// Fixing a file one error per attempt is tedious: all of them are named, in the order of the file.
#[test]
fn all_problems_are_reported_at_once_in_order() {
    let text = "interval = \"1\"\nwhat = 1\n[alerts]\nhold = 5\n[[target]]\nname = \"[\"\n";
    let found = message(parse(text));
    let places: Vec<&str> = found.lines().filter_map(|l| l.split(": ").next()).collect();
    assert_eq!(places, ["m.toml:1:12", "m.toml:2:1", "m.toml:4:8", "m.toml:6:8"]);
}

/// Broken syntax is reported alone, at its place: complaints about half-read keys would mislead.
#[test]
fn broken_syntax_names_its_place() {
    let found = message(parse("[alerts]\nhold = \"5s\nunknown = 1\n"));
    assert!(found.starts_with("m.toml:2:"), "{found}");
    assert!(!found.contains("unknown key"), "{found}");
    let duplicate = message(parse("interval = \"1s\"\ninterval = \"2s\"\n"));
    assert!(duplicate.starts_with("m.toml:2:1: duplicate key"), "{duplicate}");
}

/// Columns count characters, as editors do, not bytes; a byte order mark is no character.
#[test]
fn columns_count_characters() {
    let found = message(parse("\u{feff}report = { title = \"äöü\", pth = \"x\" }"));
    assert!(found.starts_with("m.toml:1:27: unknown key `report.pth`; did you mean `report.path`?"), "{found}");
}

/// `--set` must reach whatever the file can say: every type, named tables, and targets.
#[test]
fn set_overrides_anything() {
    let file = "interval = \"5s\"\n[rules.growth]\nmin_bytes = \"2MiB\"\nkeep = 1\n";
    let over = |text: &str| Override::parse_set(text).unwrap();
    let overrides = [
        over("interval=250ms"),
        over("duration = 1m30s"),
        over("collector.max_sites=77"),
        over("alerts.stdout=true"),
        over("alerts.file="),
        over("report.title=2025"),
        over("rules.growth.min_bytes=1MiB"),
        over("rules.\"my.rule\".list=[\"a\"]"),
        over("target=[{pid=[1,2]}, {name=\"x*\"}]"),
        over("live.sites=1"),
        over("live.sites=0"),
    ];
    let config = Config::resolve(Some((Path::new("m.toml"), file)), &overrides).unwrap();
    assert_eq!(config.interval, Duration::from_millis(250));
    assert_eq!(config.duration, Some(Duration::from_secs(90)));
    assert_eq!(config.collector.max_sites, 77);
    assert!(config.alerts.stdout);
    assert_eq!(config.alerts.file, None);
    assert_eq!(config.report.title.as_deref(), Some("2025"));
    assert_eq!(config.rules.params["growth"], toml::toml! { min_bytes = "1MiB" keep = 1 });
    assert_eq!(config.rules.params["my.rule"], toml::toml! { list = ["a"] });
    assert_eq!(config.targets[0].pid, [1, 2]);
    assert_eq!(config.targets[1].name.as_deref(), Some("x*"));
    assert_eq!(config.live.sites, 0, "the last one wins");
}

/// An override must be as easy to correct as a line of the file.
#[test]
fn wrong_overrides_name_the_flag() {
    let cases = [
        ("intervall=1s", "--set intervall: unknown key `intervall`; did you mean `interval`?"),
        ("interval=2", "--set interval: `interval`: \"2\" has no unit"),
        ("interval.x=2s", "--set interval.x: `interval`: must be a duration such as \"30s\", not a table"),
        ("collector=5", "--set collector: `collector` must be a table, not an integer"),
        ("a..b=1", "--set a..b: \"a..b\" is not a key path"),
        ("x", "--set \"x\" is not of the form key.path=value"),
        ("=1", "--set \"=1\" is not of the form key.path=value"),
    ];
    for (argument, expected) in cases {
        let found = message(set(&[argument]));
        assert!(found.starts_with(expected), "{argument}: {found}");
    }
    let over = [Override::parse_set("interval.x=2s").unwrap()];
    let found = Config::resolve(Some((Path::new("m.toml"), "interval = \"1s\"")), &over).unwrap_err().to_string();
    assert_eq!(found, "--set interval.x: `interval` is a string and has no keys below it");
}

/// A file that is missing or no text is named together with the cause.
#[test]
fn an_unreadable_file_is_named() {
    let missing = Config::load(Some(Path::new("/nonexistent/m.toml")), &[]).unwrap_err();
    assert_eq!(missing.kind(), crate::ErrorKind::Io);
    assert!(format!("{missing:#}").contains("/nonexistent/m.toml: No such file"), "{missing:#}");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), b"title = \"\xff\"").unwrap();
    let binary = Config::load(Some(file.path()), &[]).unwrap_err();
    assert!(format!("{binary:#}").contains("UTF-8"), "{binary:#}");
}

/// Suggestions must help: near words only, and the nearest of them.
#[test]
fn nearest_suggests_only_what_is_near() {
    let known = ["growth", "slow_growth", "survival", "mmap"];
    assert_eq!(nearest("grwth", known), Some("growth"));
    assert_eq!(nearest("Growth", known), Some("growth"));
    assert_eq!(nearest("slowgrowth", known), Some("slow_growth"));
    assert_eq!(nearest("map", known), Some("mmap"));
    assert_eq!(nearest("imbalance", known), None);
    assert_eq!(nearest("", known), None);
}

/// A budget that is no budget would either stop all tracing or protect nobody.
#[test]
fn budgets_out_of_range_are_refused() {
    let problem = |toml: &str| Config::resolve(Some((Path::new("c.toml"), toml)), &[]).unwrap_err().to_string();
    for (value, expected) in [
        ("\"0%\"", "more than 0 %"),
        ("\"-3%\"", "more than 0 %"),
        ("\"1000%\"", "at most 100 %"),
        ("\"nan%\"", "out of range"),
        ("\"5\"", "no percentage"),
        ("5", "string"),
    ] {
        for place in ["[collector]\nbudget", "[collector]\nmax_slowdown", "[[target]]\nbudget"] {
            let message = problem(&format!("{place} = {value}"));
            assert!(message.contains("c.toml:2:") && message.contains(expected), "{place} = {value}: {message}");
        }
    }
    for place in ["[collector]\nbudget", "[collector]\nbudget_floor", "[[target]]\npid = 1\nbudget"] {
        let message = problem(&format!("{place} = \"51%\""));
        assert!(message.contains("51 % is above max_slowdown (50 %)"), "{place}: {message}");
    }
    let message = problem("[collector]\nmax_window = \"500ms\"");
    assert!(message.contains("at most 400ms"), "{message}");
    let message = problem("[[target]]\npid = 1\nlatency = \"high\"");
    assert!(message.contains("none of normal, sensitive"), "{message}");
    let message = problem("interval = \"100ms\"\n[collector]\nmax_window = \"150ms\"");
    assert!(message.contains("longer than the interval (100ms)"), "{message}");
    let off = Config::resolve(Some((Path::new("c.toml"), "[collector]\nbudget = \"off\"")), &[]).unwrap();
    assert_eq!(off.collector.budget.share, None);
    // The default follows a short interval by itself.
    let short = Config::resolve(Some((Path::new("c.toml"), "interval = \"100ms\"")), &[]).unwrap();
    assert_eq!(short.collector.budget.max_window, Duration::from_millis(100));
}

/// A target's own budget wins in both directions, and takes nothing from the others.
#[test]
fn a_target_has_a_budget_of_its_own() {
    let text = "[collector]\nbudget = \"6%\"\n[[target]]\npid = 1\nbudget = \"2%\"\nlatency = \"sensitive\"\n\
                [[target]]\npid = 2\nbudget = \"off\"\n[[target]]\npid = 3\n[[target]]\npid = 4\nbudget = \"20%\"\n";
    let config = parse(text).unwrap();
    let base = config.collector.budget;
    let of: Vec<BudgetSettings> = config.targets.iter().map(|t| base.of(t)).collect();
    assert_eq!((of[0].share, of[0].floor), (Some(0.02), 0.02));
    assert_eq!((of[0].max_window, of[0].latency), (Duration::from_millis(50), Latency::Sensitive));
    assert_eq!((of[1].share, of[1].max_window), (None, base.max_window));
    assert_eq!(of[2], base);
    assert_eq!((of[3].share, of[3].floor), (Some(0.2), base.floor));
    let short = BudgetSettings { max_window: Duration::from_millis(20), ..base };
    assert_eq!(short.of(&config.targets[0]).max_window, Duration::from_millis(20), "shorter than the preset");
}
