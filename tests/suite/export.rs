//! Recordings in the formats of other tools, read by those tools where they are installed.

use std::path::Path;
use std::process::Command;

use memleak_tests::{Feature, needs, output_within};
use serde_json::Value;

use crate::import::{Folder, fixture};

fn recorded() -> Folder {
    let folder = Folder::new();
    folder.import(&fixture("libbpf-user.txt"), "a.memleak", &["--date", "2026-03-02", "--top", "10"]);
    folder
}

// pprof itself must open the profile and come to the same sums, by function, by label and in every unit.
#[test]
fn go_tool_pprof_reads_the_profile() {
    needs!(Feature::Command("go"));
    let folder = recorded();
    folder.succeed(&["export", "a.memleak", "-f", "pprof", "-o", "a.pb.gz"]);
    let pprof = |args: &[&str]| {
        let mut command = Command::new("go");
        // Nothing may be looked for on the network, and nothing written outside of the folder.
        command.current_dir(folder.path(".")).args(["tool", "pprof", "-symbolize=none"]).args(args).arg("a.pb.gz");
        command.env("HOME", folder.path(".")).env("GOFLAGS", "-mod=mod").env("GOPROXY", "off");
        let (code, stdout, stderr) = output_within(&mut command);
        assert_eq!(code, Some(0), "{stderr}");
        stdout
    };
    let top = pprof(&["-top", "-unit=B"]);
    let row = |text: &str, name: &str| -> Vec<String> {
        let line = text.lines().find(|l| l.ends_with(name)).unwrap_or_else(|| panic!("no {name} in\n{text}"));
        line.split_whitespace().map(str::to_owned).collect()
    };
    assert!(top.contains("File: order-service") && top.contains("Type: inuse_space"), "{top}");
    assert_eq!(row(&top, " order_new")[..2], ["63104B", "76.43%"]);
    assert_eq!(row(&top, " main")[3], "82560B");
    let blocks = pprof(&["-top", "-sample_index=inuse_objects"]);
    assert_eq!(row(&blocks, " order_new")[0], "493");
    let allocated = pprof(&["-top", "-unit=B", "-sample_index=alloc_space"]);
    // 3,456 at first, then 5,760, and less from then on: what it rises by adds up.
    let book_add: u64 = row(&allocated, " book_add")[0].trim_end_matches('B').parse().expect("bytes");
    assert_eq!(book_add, 5_760, "{allocated}");
    let tags = pprof(&["-tags", "-unit=B"]);
    for tag in ["comm: ", "order-service", "probe_set: ", "bcc", "pid: ", "16851", "site: "] {
        assert!(tags.contains(tag), "{tag} is missing in\n{tags}");
    }
    let raw = pprof(&["-raw"]);
    assert!(raw.contains("/usr/local/bin/order-service") && raw.contains("[FN][FL][LN][IN]"), "{raw}");
}

/// What is wrong with a value by a JSON schema, as much of the language as the fixture uses.
fn violation(root: &Value, schema: &Value, value: &Value, at: &str) -> Option<String> {
    if let Some(reference) = schema["$ref"].as_str() {
        let schema = root.pointer(reference.strip_prefix('#').expect("local")).expect("definition");
        return violation(root, schema, value, at);
    }
    if let Some(kind) = schema["type"].as_str() {
        let fits = match kind {
            "object" => value.is_object(),
            "array" => value.is_array(),
            "string" => value.is_string(),
            "number" => value.is_number(),
            other => panic!("type {other}"),
        };
        if !fits {
            return Some(format!("{at} is no {kind}"));
        }
    }
    let wrong = |allowed: bool| (!allowed).then(|| format!("{at} may not be {value}"));
    let constant = schema.get("const").and_then(|c| wrong(c == value));
    let listed = schema["enum"].as_array().and_then(|all| wrong(all.contains(value)));
    let any = schema["anyOf"].as_array().and_then(|all| {
        let problems: Vec<String> = all.iter().map_while(|s| violation(root, s, value, at)).collect();
        (problems.len() == all.len()).then(|| problems.join(", "))
    });
    let missing = schema["required"].as_array().and_then(|names| {
        let name = names.iter().find(|n| value.get(n.as_str().expect("name")).is_none())?;
        Some(format!("{at} has no {name}"))
    });
    let field = schema["properties"].as_object().and_then(|fields| {
        fields.iter().find_map(|(name, s)| violation(root, s, value.get(name)?, &format!("{at}.{name}")))
    });
    let items = schema.get("items").and_then(|s| {
        let elements = value.as_array()?.iter().enumerate();
        elements.into_iter().find_map(|(i, v)| violation(root, s, v, &format!("{at}[{i}]")))
    });
    constant.or(listed).or(any).or(missing).or(field).or(items)
}

// The published schema is what speedscope takes; the sums are what the snapshot holds.
#[test]
fn speedscope_file_follows_the_published_schema() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/speedscope/file-format-schema.json");
    let schema: Value = serde_json::from_str(&std::fs::read_to_string(path).expect("schema")).expect("JSON");
    let folder = recorded();
    let (text, _) = folder.succeed(&["export", "a.memleak", "--format", "speedscope"]);
    let mut file: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(violation(&schema, &schema, &file, "file"), None);
    assert_eq!(file["profiles"][0]["endValue"], 63_104 + 19_456);
    assert_eq!(file["profiles"][1]["endValue"], 493 + 64);
    assert_eq!(file["shared"]["frames"][0]["name"], "order-service (16851)");
    // The check must be able to fail.
    file["profiles"][0]["unit"] = "bananas".into();
    let problem = violation(&schema, &schema, &file, "file").expect("a violation");
    assert!(problem.contains("bananas"), "{problem}");
    file["profiles"][0]["unit"] = "bytes".into();
    file["shared"]["frames"][0] = serde_json::json!({ "file": "x" });
    assert!(violation(&schema, &schema, &file, "file").is_some());
}

// Flame graph tools read these lines; each has its caller before its callee and the bytes at its end.
#[test]
fn folded_stacks_have_a_line_per_stack() {
    let folder = recorded();
    let (text, _) = folder.succeed(&["export", "a.memleak", "--format", "folded"]);
    assert_eq!(
        text,
        "order-service (16851);libc.so.6+0x7fd65cc9824a;main;cache_put 19456\n\
         order-service (16851);libc.so.6+0x7fd65cc9824a;main;handle_request;order_new 63104\n"
    );
    let (text, _) = folder.succeed(&["export", "a.memleak", "--format", "folded", "--at", "start"]);
    assert!(text.contains(";main;book_add 3456\n"), "{text}");
}

// A spreadsheet takes the file as it is: a header, a row per site, quoted text.
#[test]
fn csv_has_a_header_and_a_row_per_site() {
    let folder = recorded();
    let (text, _) = folder.succeed(&["export", "a.memleak", "--format", "csv", "--at", "-10s"]);
    let rows: Vec<&str> = text.split_terminator("\r\n").collect();
    assert_eq!(rows.len(), 4, "{text}");
    assert!(rows[0].starts_with("site,pid,comm,exe,probe_set,function,outstanding_bytes,"), "{text}");
    assert!(rows[1].contains(",16851,\"order-service\",") && rows[1].contains(",19456,64,19456,64,0,0,"), "{text}");
    assert!(rows[1].ends_with("\"cache_put < main < libc.so.6+0x7fd65cc9824a\""), "{text}");
}

// Times that make no sense, files that are none, and outputs that cannot be written each name themselves.
#[test]
fn wrong_recordings_times_and_outputs_are_refused() {
    let folder = recorded();
    std::fs::write(folder.path("text"), "not a recording").expect("file");
    std::fs::write(folder.path("empty"), "").expect("file");
    std::fs::write(folder.path("precious"), "precious").expect("file");
    std::os::unix::fs::symlink(folder.path("precious"), folder.path("link")).expect("link");
    std::fs::create_dir(folder.path("folder")).expect("folder");
    for (args, why) in [
        (vec!["text", "-f", "csv"], "not a recording"),
        (vec!["empty", "-f", "csv"], "failed to"),
        (vec!["missing", "-f", "csv"], "missing"),
        (vec!["folder", "-f", "csv"], "folder"),
        (vec!["a.memleak", "-f", "csv", "--at", "2020-01-01"], "no snapshot so early"),
        (vec!["a.memleak", "-f", "csv", "--at", "noon"], "a time is 10m"),
        (vec!["a.memleak", "-f", "xml"], "pprof"),
        (vec!["a.memleak", "-f", "csv", "-o", "folder"], "it is a folder"),
        (vec!["a.memleak", "-f", "csv", "-o", "no/such"], "does not exist"),
        (vec!["a.memleak", "-f", "csv", "-o", "/dev/full"], "not a regular file"),
    ] {
        let (code, stdout, stderr) = folder.run(&[&["export"], args.as_slice()].concat());
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{args:?}");
        assert!(stderr.contains(why), "{args:?}: {stderr}");
    }
    // A link in the way is replaced by the output; what it points to stays.
    folder.succeed(&["export", "a.memleak", "-f", "csv", "-o", "link"]);
    assert_eq!(std::fs::read_to_string(folder.path("precious")).expect("file"), "precious");
    assert!(std::fs::symlink_metadata(folder.path("link")).expect("file").is_file());
}
