//! What has changed between two recordings, with the exit code that CI goes by.

use memleak_tests::memleak_command;
use memleak_tests::output_within;
use serde_json::Value;

use crate::import::{Folder, fixture};

/// A log of the python tool with one list of stacks: function, bytes, blocks.
fn log(stacks: &[(&str, u64, u64)]) -> String {
    let mut out = String::from("Attaching to pid 7, Ctrl+C to quit.\n");
    for time in ["10:00:00", "10:01:00"] {
        out += &format!("[{time}] Top 10 stacks with outstanding allocations:\n");
        for (name, bytes, count) in stacks {
            out +=
                &format!("\t{bytes} bytes in {count} allocations from stack\n\t\t{name} [shop]\n\t\tmain+0x9 [shop]\n");
        }
    }
    out
}

fn recorded(folder: &Folder, name: &str, stacks: &[(&str, u64, u64)]) {
    let path = folder.path(&format!("{name}.log"));
    std::fs::write(&path, log(stacks)).expect("log");
    folder.import(&path, name, &[]);
}

fn builds() -> Folder {
    let folder = Folder::new();
    recorded(&folder, "old", &[("take+0x10", 500_000, 500), ("keep+0x20", 300_000, 3), ("drop+0x30", 200_000, 2)]);
    // Another build: other offsets.
    recorded(&folder, "new", &[("take+0x44", 900_000, 900), ("keep+0x55", 300_001, 3), ("fresh+0x66", 100_000, 1)]);
    folder
}

// Across builds offsets move; functions must still be told apart as grown, new and gone, in numbers.
#[test]
fn another_build_is_compared_by_functions() {
    let folder = builds();
    let (code, stdout, stderr) = folder.run(&["diff", "old", "new", "--json"]);
    assert_eq!((code, stderr.as_str()), (Some(1), ""));
    let diff: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!(diff["type"], "diff");
    assert_eq!(diff["counts"], serde_json::json!({ "new": 1, "grew": 1, "shrank": 0, "gone": 1, "unchanged": 1 }));
    let sites: Vec<(&str, &str, i64, &str)> = (diff["sites"].as_array().expect("sites").iter())
        .map(|s| {
            let text = |k: &str| s[k].as_str().expect("text");
            (text("change"), text("name"), s["difference_bytes"].as_i64().expect("number"), text("matched"))
        })
        .collect();
    assert_eq!(
        sites,
        [
            ("grew", "take", 400_000, "names"),
            ("new", "fresh", 100_000, "nothing"),
            ("gone", "drop", -200_000, "nothing"),
        ]
    );
    assert_eq!(
        (&diff["failed"], &diff["verdict"]),
        (&true.into(), &"1 new site and 1 grown site, by 64KiB and 10 % or more.".into())
    );
}

// The exit code is what CI sees: it must follow --fail-on and the limits and nothing else.
#[test]
fn exit_code_follows_what_must_not_change() {
    let folder = builds();
    for (args, expected) in [
        (vec!["old", "new"], 1),
        (vec!["old", "old"], 0),
        (vec!["new", "old"], 1),
        (vec!["old", "new", "--fail-on", "none"], 0),
        (vec!["old", "new", "--min-bytes", "1MiB"], 0),
        (vec!["old", "new", "--fail-on", "new", "--min-bytes", "200kB"], 0),
        (vec!["old", "new", "--fail-on", "grown", "--min-percent", "81"], 0),
        (vec!["old", "new", "--fail-on", "grown", "--min-percent", "79"], 1),
    ] {
        let (code, stdout, stderr) = folder.run(&[&["diff"], args.as_slice()].concat());
        assert_eq!(code, Some(expected), "{args:?}: {stdout}{stderr}");
        assert_eq!(stdout.contains("FAILED"), expected == 1, "{args:?}: {stdout}");
    }
}

// Two times of one run: what grew meanwhile, with the text that a person reads.
#[test]
fn two_times_of_one_recording_are_compared() {
    let folder = Folder::new();
    folder.import(&fixture("libbpf-user.txt"), "a", &["--top", "10"]);
    // Alone it is compared with its own beginning.
    for args in [vec!["a"], vec!["a@start", "a@end"], vec!["a@0", "a@10s"], vec!["a@-10s", "a"]] {
        let args = [&["diff", "--min-bytes", "1KiB"], args.as_slice()].concat();
        let (code, stdout, stderr) = folder.run(&args);
        assert_eq!(code, Some(1), "{stderr}");
        assert!(stdout.contains("0 new, 1 grew, 0 shrank, 1 gone, 1 about the same"), "{stdout}");
        assert!(stdout.contains("10.0 KiB      61.6 KiB      51.6 KiB  order-service, bcc"), "{stdout}");
        assert!(stdout.contains("FAILED: 1 grown site, by 1KiB and 10 % or more."), "{stdout}");
    }
}

// The page goes to people: it must hold what has changed, and keep hostile names text.
#[test]
fn page_holds_the_changes_and_no_markup_from_names() {
    let folder = Folder::new();
    recorded(&folder, "old", &[("keep+0x20", 300_000, 3)]);
    recorded(&folder, "new", &[("keep+0x20", 300_000, 3), ("<script>alert(1)</script>+0x1", 900_000, 9)]);
    let (code, _, stderr) = folder.run(&["diff", "old", "new", "--html", "diff.html"]);
    assert_eq!(code, Some(1), "{stderr}");
    let page = std::fs::read_to_string(folder.path("diff.html")).expect("page");
    assert!(!page.contains("<script") && page.contains("&lt;script&gt;alert(1)"), "{page}");
    assert!(page.contains("878.9 KiB") && page.contains("1 new site, by 64KiB"), "{page}");
    assert!(!page.contains("http://") && !page.contains("https://"), "the page loads nothing");
}

// Each mistake is named with the file or the flag that it is in; nothing is compared then.
#[test]
fn wrong_operands_are_refused() {
    let folder = builds();
    std::fs::write(folder.path("text"), "not a recording").expect("file");
    for (args, why) in [
        (vec!["old", "text"], "text"),
        (vec!["old", "missing"], "missing"),
        (vec!["old@soon", "new"], "wrong time after @"),
        (vec!["old@2020-01-01", "new"], "no snapshot so early"),
        (vec!["old", "new", "--min-percent", "-1"], "0 or more"),
        (vec!["old", "new", "--min-bytes", "lots"], "lots"),
        (vec!["old", "new", "--fail-on", "everything"], "grown"),
        (vec!["old", "new", "--html", "no/such/page.html"], "does not exist"),
    ] {
        let (code, stdout, stderr) =
            output_within(memleak_command().current_dir(folder.path(".")).arg("diff").args(&args));
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{args:?}");
        assert!(stderr.contains(why), "{args:?}: {stderr}");
    }
}
