//! Tests of differences: how sites are matched, what counts as a change, what fails.

use std::sync::Arc;

use super::*;
use crate::export::sample::{HOSTILE, frame, process, site, snapshot};
use crate::snapshot::Process;

const LIMITS: Limits = Limits { min_bytes: 100, min_share: 0.1 };
const ALL: [FailOn; 2] = [FailOn::New, FailOn::Grown];

fn compared(before: Vec<SiteSample>, after: Vec<SiteSample>) -> Difference {
    Difference::new(["a", "b"], &snapshot(before), &snapshot(after), LIMITS, &ALL)
}

/// Name, change, how it was matched, and the difference in bytes.
fn listed(d: &Difference) -> Vec<(&str, Change, &str, i64)> {
    d.sites.iter().map(|s| (&*s.name, s.change, s.matched, s.difference_bytes)).collect()
}

/// Each kind of change once, below the limits nothing, what grows first.
#[test]
fn every_change_is_told_apart() {
    let p = process();
    let make = |id, name: &str, bytes| site(&p, id, vec![frame(name, id)], bytes, 0);
    let before = vec![
        make(1, "grower", 1_000),
        make(2, "shrinker", 1_000),
        make(3, "leaver", 500),
        make(4, "steady", 1_000),
        make(5, "small_part", 10_000),
        make(6, "freed", 0),
    ];
    let after = vec![
        make(1, "grower", 1_200),
        make(2, "shrinker", 700),
        make(4, "steady", 1_099),
        make(5, "small_part", 10_999),
        make(6, "freed", 0),
        make(7, "newcomer", 100),
        make(8, "tiny", 99),
    ];
    let d = compared(before, after);
    assert_eq!(
        listed(&d),
        [
            ("grower", Change::Grew, "id", 200),
            ("newcomer", Change::New, "nothing", 100),
            ("leaver", Change::Gone, "nothing", -500),
            ("shrinker", Change::Shrank, "id", -300),
        ]
    );
    assert_eq!(d.counts(), Counts { new: 1, grew: 1, shrank: 1, gone: 1, unchanged: 3 });
    assert!(d.has_failed());
    assert_eq!(d.verdict, "1 new site and 1 grown site, by 100B and 10 % or more.");
}

/// In another build every offset and id is another one; the names must bring the sites together, all of a name at once.
#[test]
fn another_build_is_matched_by_names() {
    let p = process();
    let stack = |offset: u64| vec![frame("take", 0x100 + offset), frame("main", 0x900 + offset)];
    let before = vec![site(&p, 1, stack(0), 1_000, 0), site(&p, 2, stack(8), 500, 0)];
    let after = vec![site(&p, 11, stack(64), 1_900, 0)];
    let d = compared(before, after);
    assert_eq!(listed(&d), [("take", Change::Grew, "names", 400)]);
    assert_eq!((d.sites[0].ids_before.len(), d.sites[0].ids_after.len()), (2, 1));
    // The same id is the same site, whatever else has that name.
    let before = vec![site(&p, 1, stack(0), 1_000, 0), site(&p, 2, stack(8), 500, 0)];
    let d = compared(before, vec![site(&p, 1, stack(0), 1_000, 0), site(&p, 3, stack(64), 900, 0)]);
    assert_eq!(listed(&d), [("take", Change::Grew, "names", 400)]);
    assert_eq!(d.counts().unchanged, 1);
}

/// Stacks without names must not all be taken for one, nor programs of different names.
#[test]
fn nameless_stacks_and_other_programs_are_not_matched() {
    let p = process();
    let nameless = |id| site(&p, id, vec![Frame { function: None, ..frame("", id) }], 1_000, 0);
    let d = compared(vec![nameless(1)], vec![nameless(2)]);
    assert_eq!(d.counts(), Counts { new: 1, gone: 1, ..Counts::default() });
    let other = Arc::new(Process { comm: "other".to_owned(), ..Process::clone(&p) });
    let make = |p: &Arc<Process>, id| site(p, id, vec![frame("take", 1)], 1_000, 0);
    let d = compared(vec![make(&p, 1)], vec![make(&other, 2)]);
    assert_eq!(d.counts(), Counts { new: 1, gone: 1, ..Counts::default() });
}

/// Eight workers with one site are one site with the sum.
#[test]
fn processes_with_one_identity_are_added_up() {
    let p = process();
    let worker = |instance| Arc::new(Process { instance, ..Process::clone(&p) });
    let make = |instance, bytes| site(&worker(instance), 1, vec![frame("take", 1)], bytes, 0);
    let d = compared(vec![make(1, 100), make(2, 100)], vec![make(3, 200), make(4, 300), make(5, 100)]);
    assert_eq!(listed(&d), [("take", Change::Grew, "id", 400)]);
    assert_eq!((d.sites[0].before_bytes, d.sites[0].after_bytes), (200, 600));
}

/// Only what was asked for fails.
#[test]
fn it_fails_on_what_was_asked_for() {
    let p = process();
    let make = |id, name: &str, bytes| site(&p, id, vec![frame(name, id)], bytes, 0);
    let (a, grown) = (snapshot(vec![make(1, "f", 1_000)]), snapshot(vec![make(1, "f", 2_000)]));
    let new = snapshot(vec![make(1, "f", 1_000), make(2, "g", 2_000)]);
    for (after, on, expected) in [
        (&grown, vec![FailOn::New], false),
        (&grown, vec![FailOn::Grown], true),
        (&new, vec![FailOn::New], true),
        (&new, vec![FailOn::Grown], false),
        (&new, vec![FailOn::None], false),
        (&a, ALL.to_vec(), false),
    ] {
        let d = Difference::new(["a", "b"], &a, after, LIMITS, &on);
        assert_eq!(d.has_failed(), expected, "{on:?}: {}", d.verdict);
    }
}

/// Names come from the traced system: neither the page nor the terminal may obey them.
#[test]
fn hostile_names_stay_text() {
    let p = process();
    let d = compared(Vec::new(), vec![site(&p, 1, vec![frame(HOSTILE, 1)], 1_000, 0)]);
    let templates = Templates::new(None).expect("templates");
    let text = d.text(&templates).expect("text");
    assert!(text.contains(r#"=cmd|'/c'!A1;"</script>\n\u{202e},x 7"#), "{text}");
    assert!(text.lines().all(|l| l.chars().count() <= 110 && !l.contains(char::is_control)), "{text}");
    let page = d.html(&templates).expect("page");
    assert!(!page.contains("</script>") && page.contains("&lt;&#x2F;script&gt;"), "{page}");
}

/// Runs of different length or with estimates are compared with a warning.
#[test]
fn what_is_hard_to_compare_is_said() {
    let (a, mut b) = (snapshot(Vec::new()), snapshot(Vec::new()));
    assert!(Difference::new(["a", "b"], &a, &b, LIMITS, &ALL).notes.is_empty());
    b.time_s = 600.0;
    assert!(
        Difference::new(["a", "a"], &a, &b, LIMITS, &ALL).notes.is_empty(),
        "two times of one run differ on purpose"
    );
    let d = Difference::new(["a", "b"], &a, &b, LIMITS, &ALL);
    assert!(d.notes[0].contains("1m") && d.notes[0].contains("10m"), "{:?}", d.notes);
}
