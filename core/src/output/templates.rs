//! The template environment: what is embedded in the binary, and what a user's folder puts in its place.
//!
//! A template's name decides how values are escaped in it: `*.html.tera` escapes HTML, `*.json.tera` escapes for the
//! inside of a JSON string, everything else is plain text, in which control characters are written out. A user's
//! file of the same name wins over the embedded one. Style sheets and scripts (`*.css`, `*.js`) are looked up the
//! same way and put into a page with `{{ asset(name="report.css") }}`, so that a page needs no other file.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use tera::{Context, Tera, Value};

use super::filters;
use super::text::visible;
use crate::error::{Error, ErrorKind, Result};

/// Templates in the binary, by name.
const EMBEDDED: [(&str, &str); 9] = [
    ("alert.txt.tera", include_str!("../../../templates/alert.txt.tera")),
    ("alert.webhook.json.tera", include_str!("../../../templates/alert.webhook.json.tera")),
    ("diff.html.tera", include_str!("../../../templates/diff.html.tera")),
    ("diff.txt.tera", include_str!("../../../templates/diff.txt.tera")),
    ("report.html.tera", include_str!("../../../templates/report.html.tera")),
    ("report.txt.tera", include_str!("../../../templates/report.txt.tera")),
    ("_collector.html.tera", include_str!("../../../templates/_collector.html.tera")),
    ("_guide.html.tera", include_str!("../../../templates/_guide.html.tera")),
    ("_sites.txt.tera", include_str!("../../../templates/_sites.txt.tera")),
];

/// Style sheets and scripts in the binary, by name.
const EMBEDDED_ASSETS: [(&str, &str); 8] = [
    ("report.css", include_str!("../../../templates/report.css")),
    ("report_data.js", include_str!("../../../templates/report_data.js")),
    ("report_charts.js", include_str!("../../../templates/report_charts.js")),
    ("report_detail.js", include_str!("../../../templates/report_detail.js")),
    ("report_flame.js", include_str!("../../../templates/report_flame.js")),
    ("report.js", include_str!("../../../templates/report.js")),
    ("uPlot.min.css", include_str!("../../../templates/vendor/uplot/uPlot.min.css")),
    ("uPlot.iife.min.js", include_str!("../../../templates/vendor/uplot/uPlot.iife.min.js")),
];

/// How values are escaped in a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Escape {
    Html,
    Json,
    Text,
}

impl Escape {
    fn of(name: &str) -> Escape {
        match name.strip_suffix(".tera").unwrap_or(name) {
            n if n.ends_with(".html") || n.ends_with(".htm") => Escape::Html,
            n if n.ends_with(".json") => Escape::Json,
            _ => Escape::Text,
        }
    }

    fn function(self) -> fn(&str) -> String {
        match self {
            Escape::Html => |s| tera::escape_html(&visible(s)),
            Escape::Json => escape_json,
            Escape::Text => |s| visible(s).into_owned(),
        }
    }
}

/// The inside of a JSON string.
fn escape_json(text: &str) -> String {
    let quoted = Value::String(text.to_owned()).to_string();
    quoted[1..quoted.len() - 1].to_owned()
}

/// All templates, ready to render. Immutable and cheap to share.
#[derive(Debug)]
pub struct Templates {
    /// The same templates once per way of escaping: tera has one escape function per environment.
    html: Tera,
    json: Tera,
    text: Tera,
    /// Where a user's template was read from, by name; for messages.
    files: BTreeMap<String, PathBuf>,
}

impl Templates {
    /// The embedded templates, and those of `dir` in their place.
    ///
    /// # Errors
    /// The folder cannot be read, or a template in it is broken; with several broken ones, the first (see
    /// [`Templates::check`]).
    pub fn new(dir: Option<&Path>) -> Result<Templates> {
        let (templates, problems) = Templates::load(dir);
        match problems.into_iter().next() {
            Some(problem) => Err(problem),
            None => Ok(templates),
        }
    }

    /// Everything that is wrong with the templates of `dir`; empty when nothing is. Templates of the report and
    /// of alerts are also rendered once with a small sample, which finds unknown fields and filters.
    pub fn check(dir: Option<&Path>) -> Vec<Error> {
        let (templates, mut problems) = Templates::load(dir);
        if problems.is_empty() {
            problems.extend(super::report::check_templates(&templates));
            problems.extend(super::alerts::check_templates(&templates));
        }
        problems
    }

    /// Loads as much as can be loaded.
    fn load(dir: Option<&Path>) -> (Templates, Vec<Error>) {
        let mut problems = Vec::new();
        let mut sources: BTreeMap<String, Cow<'static, str>> =
            EMBEDDED.iter().map(|(name, text)| ((*name).to_owned(), Cow::Borrowed(*text))).collect();
        let mut assets: HashMap<String, Cow<'static, str>> =
            EMBEDDED_ASSETS.iter().map(|(name, text)| ((*name).to_owned(), Cow::Borrowed(*text))).collect();
        let mut files = BTreeMap::new();
        if let Some(dir) = dir {
            for file in read_folder(dir) {
                match file.and_then(read_file) {
                    Ok((name, path, text)) if name.ends_with(".tera") => {
                        sources.insert(name.clone(), Cow::Owned(text));
                        files.insert(name, path);
                    }
                    Ok((name, path, text)) => match asset_problem(&text) {
                        None => drop(assets.insert(name, Cow::Owned(text))),
                        Some(why) => problems.push(Error::new(ErrorKind::Template, format!("{}: {why}", shown(&path)))),
                    },
                    Err(e) => problems.push(e),
                }
            }
        }
        let mut base = Tera::default();
        filters::register(&mut base);
        base.register_function("asset", Asset(Arc::new(assets)));
        problems.extend(add(&mut base, &sources, &files));
        let environment = |escape: Escape| {
            let mut tera = base.clone();
            // Every name ends with the empty suffix: escape in all of them.
            tera.autoescape_on(vec![""]);
            tera.set_escape_fn(escape.function());
            tera
        };
        let mut json = environment(Escape::Json);
        // Output of tera's own filter is complete JSON; escaped once more it would be wrong.
        json.register_filter("json_encode", filters::Json);
        let templates = Templates { html: environment(Escape::Html), json, text: environment(Escape::Text), files };
        (templates, problems)
    }

    /// True when there is a template of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.text.get_template(name).is_ok()
    }

    /// Renders the template `name` (a file name, such as `report.txt.tera`) with the fields of `context`.
    ///
    /// # Errors
    /// No such template, a context that is no object, or an error in the template; the message names the template.
    pub fn render(&self, name: &str, context: &impl Serialize) -> Result<String> {
        self.render_for(name, "", context)
    }

    /// As [`Templates::render`]; an error also names the subject that was to be rendered, such as `alert 9f02…`.
    pub fn render_for(&self, name: &str, subject: &str, context: &impl Serialize) -> Result<String> {
        let fail = |cause: String| {
            let of = if subject.is_empty() { String::new() } else { format!(" for {}", visible(subject)) };
            Error::with_source(ErrorKind::Template, format!("failed to render {}{of}", self.origin(name)), cause)
        };
        if !self.contains(name) {
            let mut known: Vec<&str> = self.text.get_template_names().filter(|n| !n.starts_with('_')).collect();
            known.sort_unstable();
            return Err(fail(format!("no such template; there are {}", known.join(", "))));
        }
        let context = Context::from_serialize(context).map_err(|e| fail(chain(&e)))?;
        let tera = match Escape::of(name) {
            Escape::Html => &self.html,
            Escape::Json => &self.json,
            Escape::Text => &self.text,
        };
        tera.render(name, &context).map_err(|e| fail(chain(&e)))
    }

    /// Where a template comes from, for messages.
    fn origin(&self, name: &str) -> String {
        match self.files.get(name) {
            Some(path) => format!("template {}", shown(path)),
            None => format!("template {}", visible(name)),
        }
    }
}

/// Parses every template; what fails to parse is left out and returned as a problem.
fn add(
    tera: &mut Tera,
    sources: &BTreeMap<String, Cow<'static, str>>,
    files: &BTreeMap<String, PathBuf>,
) -> Vec<Error> {
    let mut problems = Vec::new();
    let mut good = Vec::new();
    for (name, text) in sources {
        // Alone first: tera reports only the first problem of a set, and we want them all.
        match (tera::Template::new(name, None, text), joined_line(text)) {
            (Ok(_), None) => good.push((name.as_str(), text.as_ref())),
            (Ok(_), Some(line)) => {
                let file = shown_file(name, files.get(name));
                let why = "values joined with ~ are not escaped; join them in {% set %} and print the result";
                problems.push(Error::new(ErrorKind::Template, format!("{file}:{line}: {why}")));
            }
            (Err(e), _) => problems.push(parse_error(name, files.get(name), &e)),
        }
    }
    // What is left to go wrong together: a parent or a macro file that is missing.
    if let Err(e) = tera.add_raw_templates(good) {
        problems.push(Error::with_source(ErrorKind::Template, "failed to connect the templates", chain(&e)));
    }
    problems
}

/// A parse error as `FILE:LINE:COLUMN: cause`, the form that editors jump to.
fn parse_error(name: &str, file: Option<&PathBuf>, error: &tera::Error) -> Error {
    let text = chain(error);
    let place = text.split_once("--> ").and_then(|(_, rest)| rest.split_whitespace().next()).unwrap_or("1:1");
    let cause = text.rsplit_once("= ").map_or(text.as_str(), |(_, cause)| cause).trim();
    Error::new(ErrorKind::Template, format!("{}:{place}: {cause}", shown_file(name, file)))
}

/// The file of a template, or that it is an embedded one.
fn shown_file(name: &str, file: Option<&PathBuf>) -> String {
    file.map_or_else(|| format!("embedded template {name}"), |p| shown(p))
}

/// The first line that prints values joined with `~`: the template engine escapes variables and what filters return,
/// but not these, so that they would let hostile names through.
fn joined_line(text: &str) -> Option<usize> {
    let mut rest = text;
    let mut line = 1;
    while let Some(start) = rest.find("{{") {
        line += rest[..start].matches('\n').count();
        rest = &rest[start..];
        let mut quote = None;
        let end = rest.char_indices().find_map(|(i, c)| {
            match (quote, c) {
                (None, '"' | '\'' | '`') => quote = Some(c),
                (Some(q), _) if q == c => quote = None,
                (None, '~') => return Some((i, true)),
                (None, '}') if rest[i..].starts_with("}}") => return Some((i, false)),
                _ => {}
            }
            None
        });
        match end {
            Some((i, true)) => return Some(line + rest[..i].matches('\n').count()),
            Some((i, false)) => {
                line += rest[..i].matches('\n').count();
                rest = &rest[i..];
            }
            None => return None,
        }
    }
    None
}

/// The files of a folder that are templates, style sheets or scripts, by name. Hidden files are left out: editors
/// keep their backups there.
fn read_folder(dir: &Path) -> Vec<Result<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) => return vec![Err(Error::io(format!("failed to read the template folder {}", shown(dir)), e))],
    };
    let wanted = |path: &PathBuf| {
        let name = path.file_name().map(|n| n.to_string_lossy()).unwrap_or_default();
        !name.starts_with('.') && [".tera", ".css", ".js"].iter().any(|s| name.ends_with(s)) && !path.is_dir()
    };
    let mut paths = Vec::new();
    let mut problems = Vec::new();
    for entry in entries {
        match entry {
            Ok(entry) if wanted(&entry.path()) => paths.push(entry.path()),
            Ok(_) => {}
            Err(e) => {
                problems.push(Err(Error::io(format!("failed to read the template folder {}", shown(dir)), e)));
            }
        }
    }
    paths.sort();
    problems.extend(paths.into_iter().map(Ok));
    problems
}

/// Name, path and text of a file.
fn read_file(path: PathBuf) -> Result<(String, PathBuf, String)> {
    let fail = |e| Error::io(format!("failed to read the template {}", shown(&path)), e);
    let text = std::fs::read_to_string(&path).map_err(fail)?;
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    Ok((name, path, text))
}

/// Why a style sheet or script cannot be put into a page.
fn asset_problem(text: &str) -> Option<&'static str> {
    let lower = text.to_ascii_lowercase();
    ["</script", "</style", "<!--"].iter().any(|end| lower.contains(end)).then_some(
        "holds `</script`, `</style` or `<!--`, which would end the element it is put into; write `<\\/script`",
    )
}

/// The template function `asset(name="…")`.
#[derive(Clone)]
struct Asset(Arc<HashMap<String, Cow<'static, str>>>);

impl tera::Function for Asset {
    fn call(&self, args: &HashMap<String, Value>) -> tera::Result<Value> {
        let name = args.get("name").and_then(Value::as_str);
        let name = name.ok_or_else(|| tera::Error::msg("function `asset` needs name=\"FILE\""))?;
        match self.0.get(name) {
            Some(text) => Ok(Value::String(text.to_string())),
            None => Err(tera::Error::msg(format!("there is no style sheet or script {name:?}"))),
        }
    }

    /// Assets come from the binary or the user's own folder, never from a target.
    fn is_safe(&self) -> bool {
        true
    }
}

/// An error and its causes on one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(e) = source {
        // Writing to a string cannot fail.
        let _ = write!(text, ": {e}");
        source = e.source();
    }
    text
}

/// A path for messages.
fn shown(path: &Path) -> String {
    visible(&path.to_string_lossy()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A folder with templates of the test fixtures.
    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/templates").join(name)
    }

    /// A folder with one template.
    fn folder(name: &str, text: &[u8]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("folder");
        std::fs::write(dir.path().join(name), text).expect("template");
        dir
    }

    fn messages(problems: &[Error]) -> Vec<String> {
        problems.iter().map(|e| format!("{e:#}")).collect()
    }

    /// What we ship must work as it is.
    #[test]
    fn the_embedded_templates_have_no_problems() {
        assert_eq!(messages(&Templates::check(None)), [""; 0]);
    }

    /// Whether a name can do harm depends on the kind of template, so each kind must escape on its own.
    #[test]
    fn values_are_escaped_by_the_kind_of_template() {
        let hostile = json!({ "v": "<b a='\"'>\n\x1b[2J\u{202e}" });
        for (name, expected) in [
            ("t.html.tera", r"&lt;b a=&#x27;&quot;&#x27;&gt;\n\x1b[2J\u{202e}"),
            ("t.json.tera", r#"<b a='\"'>\n\u001b[2J"#),
            ("t.txt.tera", r#"<b a='"'>\n\x1b[2J\u{202e}"#),
            ("t.tera", r#"<b a='"'>\n\x1b[2J\u{202e}"#),
        ] {
            let dir = folder(name, b"{{ v }}");
            let templates = Templates::new(Some(dir.path())).expect("templates");
            let text = templates.render(name, &hostile).expect("rendered");
            assert!(text.starts_with(expected), "{name}: {text}");
        }
    }

    /// A webhook body must stay JSON whatever the names are, with either JSON filter and with none.
    #[test]
    fn a_json_template_gives_json() {
        let dir = folder("t.json.tera", br#"{"a": "{{ v }}", "b": {{ v | json }}, "c": {{ v | json_encode }}}"#);
        let templates = Templates::new(Some(dir.path())).expect("templates");
        let hostile = "\"}, \\ \n </script>";
        let text = templates.render("t.json.tera", &json!({ "v": hostile })).expect("rendered");
        let value: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(value, json!({ "a": hostile, "b": hostile, "c": hostile }));
    }

    /// A fragment is escaped by the page it is part of, not by its own name.
    #[test]
    fn an_included_fragment_is_escaped_like_its_page() {
        let dir = folder("t.html.tera", b"{% include \"_part.tera\" %}");
        std::fs::write(dir.path().join("_part.tera"), "{{ v }}").expect("fragment");
        let templates = Templates::new(Some(dir.path())).expect("templates");
        assert_eq!(templates.render("t.html.tera", &json!({ "v": "<b>" })).expect("rendered"), "&lt;b&gt;");
    }

    /// A user changes one file and keeps the rest.
    #[test]
    fn a_users_template_wins_and_uses_embedded_fragments() {
        let dir = fixture("override");
        assert_eq!(messages(&Templates::check(Some(&dir))), [""; 0]);
        let templates = Templates::new(Some(&dir)).expect("templates");
        assert!(templates.contains("report.html.tera"));
        let context = json!({ "title": "T", "sites": [], "sites_total": 0 });
        let text = templates.render("report.txt.tera", &context).expect("rendered");
        assert!(text.starts_with("mine: T\nSITES"), "{text}");
    }

    /// Every broken file is named with line and column, not only the first.
    #[test]
    fn all_broken_templates_are_named_with_their_place() {
        let problems = messages(&Templates::check(Some(&fixture("syntax"))));
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].contains("syntax/report.html.tera:3:1: expected "), "{}", problems[0]);
        assert!(problems[1].contains("syntax/report.txt.tera:3:"), "{}", problems[1]);
        let first = Templates::new(Some(&fixture("syntax"))).expect_err("broken");
        assert_eq!(format!("{first:#}"), problems[0]);
    }

    /// Each mistake that only shows when rendering must name the file and what is wrong before a run begins.
    #[test]
    fn check_finds_what_only_rendering_shows() {
        for (name, file, cause) in [
            ("field", "field/report.txt.tera", "`totals.leaked_bytes` not found"),
            ("filter", "filter/report.txt.tera", "Filter 'megabytes' not found"),
            ("parent", "", "company.html.tera"),
            ("asset", "asset/report.js", "`</script`"),
            ("joined", "joined/report.html.tera:2", "are not escaped"),
        ] {
            let problems = messages(&Templates::check(Some(&fixture(name))));
            assert_eq!(problems.len(), 1, "{name}: {problems:?}");
            assert!(problems[0].contains(file) && problems[0].contains(cause), "{name}: {problems:?}");
        }
    }

    /// Joined values are found wherever they are printed, and nothing else is.
    #[test]
    fn joined_values_are_found_by_line() {
        assert_eq!(joined_line("{{ a }}\n{{ b |\n c ~ d }}"), Some(3));
        for fine in ["{% set x = a ~ b %}{{ x }}", "{{ a }} ~ {{ b }}", "{{ \"~\" }}", "~ {{ a", "{{ a | d(v='}}~') }}"]
        {
            assert_eq!(joined_line(fine), None, "{fine}");
        }
    }

    /// A typing error in the folder's name must not silently fall back to the embedded templates.
    #[test]
    fn a_missing_folder_is_an_error_that_names_it() {
        let error = Templates::new(Some(Path::new("/no/such/templates"))).expect_err("missing");
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains("the template folder /no/such/templates"), "{error}");
    }

    /// A file that is no text is named; files that are no templates are none of our business.
    #[test]
    fn unreadable_templates_are_named_and_other_files_ignored() {
        let dir = folder("report.txt.tera", b"\xff\xfe");
        std::fs::write(dir.path().join("notes.md"), b"\xff").expect("file");
        std::fs::write(dir.path().join(".report.txt.tera.swp"), b"\xff").expect("file");
        std::fs::write(dir.path().join(".hidden.tera"), b"{{").expect("file");
        let problems = messages(&Templates::check(Some(dir.path())));
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].contains("report.txt.tera: stream did not contain valid UTF-8"), "{problems:?}");
    }

    /// A failed alert must be found among hundreds: the message names the template and the subject.
    #[test]
    fn a_render_error_names_template_subject_and_cause() {
        let dir = folder("alert.txt.tera", b"{{ reason }} {{ nothing }}");
        let templates = Templates::new(Some(dir.path())).expect("templates");
        let error = templates.render_for("alert.txt.tera", "alert 9f02\n", &json!({ "reason": 1 })).expect_err("field");
        assert_eq!(error.kind(), ErrorKind::Template);
        let message = format!("{error:#}");
        assert!(message.starts_with("failed to render template /"), "{message}");
        assert!(message.contains(r"alert.txt.tera for alert 9f02\n: "), "{message}");
        assert!(message.contains("`nothing` not found"), "{message}");
        let message = format!("{:#}", templates.render("alrt.txt.tera", &json!({})).expect_err("unknown"));
        assert!(message.contains("no such template; there are alert.txt.tera, "), "{message}");
    }
}
